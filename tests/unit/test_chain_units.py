"""Amounts as text: exact, bounded, plain."""

from __future__ import annotations

import pytest

from chain.units import MICRO_MAX, Micro, parse_usdc


@pytest.mark.parametrize(
    ("text", "micro"),
    [("0", 0), ("12.5", 12_500_000), (".5", 500_000), ("0.000001", 1), ("1.0000000", 1_000_000)],
)
def test_amounts(text: str, micro: int) -> None:
    assert parse_usdc(text) == Micro(micro)


@pytest.mark.parametrize(
    "text",
    [
        "", "-1", "+1", "1e6", "1e999999", "1_000", "NaN", "Infinity", " 1", "1.", "0x1", "٣",
        "0.0000001", "9" * 41, str(MICRO_MAX), "9999999999",
    ],
)  # fmt: skip
def test_what_is_no_amount_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"USDC|outside"):
        parse_usdc(text)
