"""Exact chain money.

A chain counts USDC in micros (10⁻⁶ USDC).  `Micro` is that count and nothing else: adding it to
the ledger's nano-dollars, or to a bare int, is a `TypeError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Final, Self

MICRO_PER_USDC: Final = 1_000_000
MICRO_MAX: Final = 2**63 - 1
"""What a BIGINT column holds; 9.2 trillion USDC, above any supply."""


@dataclass(frozen=True, slots=True, order=True)
class Micro:
    """A whole, non-negative number of micro-USDC."""

    n: int

    def __post_init__(self) -> None:
        if type(self.n) is not int:
            raise TypeError(f"Micro counts in int, not {type(self.n).__name__}")
        if not 0 <= self.n <= MICRO_MAX:
            raise ValueError(f"{self.n} micro is outside 0..2^63-1")

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
    """Parse a decimal USDC amount such as ``"12.5"``; more than 6 decimals is a ValueError."""
    try:
        scaled = Decimal(text) * MICRO_PER_USDC
    except InvalidOperation as e:
        raise ValueError(f"{text!r} is not a USDC amount") from e
    if not scaled.is_finite() or scaled != scaled.to_integral_value():
        raise ValueError(f"{text!r} is not a whole number of micro-USDC")
    return Micro(int(scaled))
