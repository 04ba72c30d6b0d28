"""Exact chain money.

A chain counts USDC in micros (10⁻⁶ USDC).  `Micro` is that count and nothing else: adding it to
the ledger's nano-dollars, or to a bare int, is a `TypeError`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

MICRO_PER_USDC: Final = 1_000_000
USDC_DECIMALS: Final = 6
AMOUNT_CHARACTERS_MAX: Final = 40
_AMOUNT: Final = re.compile(r"[0-9]+(\.[0-9]+)?|\.[0-9]+", re.ASCII)
MICRO_MAX: Final = (2**63 - 1) // 1000
"""What a BIGINT column of nano-dollars holds: 9.2 billion USDC, more than we ever hold, limit or move."""


@dataclass(frozen=True, slots=True, order=True)
class Micro:
    """A whole, non-negative number of micro-USDC."""

    n: int

    def __post_init__(self) -> None:
        if type(self.n) is not int:
            raise TypeError(f"Micro counts in int, not {type(self.n).__name__}")
        if not 0 <= self.n <= MICRO_MAX:
            raise ValueError(f"{self.n} micro-USDC is outside 0..{MICRO_MAX}")

    def __add__(self, other: Self) -> Micro:
        if type(other) is not Micro:
            return NotImplemented
        return Micro(self.n + other.n)

    def __sub__(self, other: Self) -> Micro:
        if type(other) is not Micro:
            return NotImplemented
        return Micro(self.n - other.n)

    def __str__(self) -> str:
        whole, part = divmod(self.n, MICRO_PER_USDC)
        return f"{whole}.{part:06d}"


def parse_usdc(text: str) -> Micro:
    """Parse a decimal USDC amount such as ``"12.5"``.

    ValueError for an exponent, a sign, more than 6 decimals, more than AMOUNT_CHARACTERS_MAX or MICRO_MAX.
    """
    if len(text) > AMOUNT_CHARACTERS_MAX or not _AMOUNT.fullmatch(text):
        raise ValueError(f"{text[:AMOUNT_CHARACTERS_MAX]!r} is not a USDC amount")
    whole, _, part = text.partition(".")
    if len(part.rstrip("0")) > USDC_DECIMALS:
        raise ValueError(f"{text!r} is not a whole number of micro-USDC")
    if int(whole or "0") >= MICRO_MAX // MICRO_PER_USDC:
        raise ValueError(f"{text} USDC is too much: less than {MICRO_MAX // MICRO_PER_USDC:,}")
    return Micro(int(whole or "0") * MICRO_PER_USDC + int(part[:USDC_DECIMALS].ljust(USDC_DECIMALS, "0")))
