"""QR codes hold what they were asked to hold."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
import segno

from marketplace.deposits.qr import TEXT_CHARACTERS_MAX, qr_svg

LINK = "ethereum:0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913@8453/transfer?address=0x" + "Ab" * 20
SVG = "{http://www.w3.org/2000/svg}"


def dark_modules(svg: bytes) -> set[tuple[int, int]]:
    """The (row, column) of every dark module, from the drawing alone; a quiet zone of four is taken off."""
    paths = ET.fromstring(svg).findall(f".//{SVG}path")
    stroked = next(path for path in paths if path.get("stroke"))
    found: set[tuple[int, int]] = set()
    x = y = 0.0
    for step, first, second in re.findall(r"([Mmh])(-?[\d.]+)(?:[ ,]?(-?[\d.]+))?", stroked.get("d", "")):
        if step == "M":
            x, y = float(first), float(second)
        elif step == "m":
            x, y = x + float(first), y + float(second)
        else:
            found |= {(int(y) - 4, int(x) - 4 + i) for i in range(int(first))}
            x += float(first)
    return found


def test_the_drawing_is_the_code_of_the_link() -> None:
    matrix = segno.make_qr(LINK, error="m").matrix
    dark = {(row, column) for row, line in enumerate(matrix) for column, bit in enumerate(line) if bit & 1}
    assert dark_modules(qr_svg(LINK)) == dark
    assert dark_modules(qr_svg(LINK[:-1] + "c")) != dark


def test_a_code_has_a_limit() -> None:
    with pytest.raises(ValueError, match="characters"):
        qr_svg("x" * (TEXT_CHARACTERS_MAX + 1))
    with pytest.raises(ValueError, match="characters"):
        qr_svg("")
