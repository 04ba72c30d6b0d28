"""QR codes of addresses and payment links, as SVG.  Pure.

A link's code makes a wallet fill in token and network; an address's code is what exchanges scan.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Final

import segno

TEXT_CHARACTERS_MAX: Final = 500
"""A Solana Pay link has about 250."""


@lru_cache(maxsize=1024)
def qr_svg(text: str) -> bytes:
    """Draw `text` as a QR code (error correction M, four modules of quiet zone as ISO 18004 asks).

    About 10 ms of computing, hence the cache.  ValueError if it is too long.
    """
    if not 0 < len(text) <= TEXT_CHARACTERS_MAX:
        raise ValueError(f"a QR code of 1..{TEXT_CHARACTERS_MAX} characters, not {len(text)}")
    drawn = io.BytesIO()
    code = segno.make_qr(text, error="m")
    code.save(drawn, kind="svg", scale=4, border=4, light="#fff", omitsize=False, xmldecl=False)
    return drawn.getvalue()
