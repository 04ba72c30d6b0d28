"""Exact money.

The ledger counts nano-dollars (10⁻⁹ $).  Prices are nano-dollars per million tokens, so a request
is priced by one multiplication and one division, rounded up, here and nowhere else.  Value leaves
the ledger's precision at two more doors: `split` (who gets what of a cost; the rest is a
subtraction, so nothing is lost) and `to_micro` (what a token can carry; the dust stays).
Every rounding of the ledger is in this module:

========================  ==================================================
`cost`                    up, to one nano-dollar, once per request
`split`                   operator's share down; the platform gets the rest
`to_micro`                down; the dust is given back to the caller
`parse_dollars`           refuses what it would have to round
========================  ==================================================
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Final

import msgspec

NANO_PER_DOLLAR: Final = 1_000_000_000
NANO_PER_MICRO: Final = 1_000
"""1 micro-USDC is booked as 1,000 nano-dollars: 1 USDC is 1 dollar."""
NANO_MAX: Final = 2**63 - 1
"""What a BIGINT column holds: 9.2 billion dollars."""
TOKENS_PER_PRICE: Final = 1_000_000
OPERATOR_PERCENT: Final = 80


class Nano(msgspec.Struct, frozen=True, order=True, gc=False):
    """A whole number of nano-dollars within int64; may be negative.

    >>> Nano(5) + Nano(7) - Nano(2)
    Nano(n=10)
    >>> Nano(5) + 7
    Traceback (most recent call last):
    TypeError: unsupported operand type(s) for +: 'Nano' and 'int'
    """

    n: int

    def __post_init__(self) -> None:
        if type(self.n) is not int:
            raise TypeError(f"Nano counts in int, not {type(self.n).__name__}")
        if not -NANO_MAX <= self.n <= NANO_MAX:
            raise OverflowError(f"{self.n} nano-dollars do not fit 64 bits")

    def __add__(self, other: Nano) -> Nano:
        if type(other) is not Nano:  # Nano + Micro is a TypeError
            return NotImplemented
        return Nano(self.n + other.n)

    def __sub__(self, other: Nano) -> Nano:
        if type(other) is not Nano:
            return NotImplemented
        return Nano(self.n - other.n)

    def __str__(self) -> str:
        return dollars(self)


ZERO: Final = Nano(0)


def cost(*, tokens_in: int, tokens_out: int, price_in: int, price_out: int) -> Nano:
    """Price a request: tokens times nano-dollars per million tokens, rounded up once.

    One token at $0.02 per million costs 20 nano-dollars exactly; 1,000 in at $0.10 and 500 out at
    $0.30 cost $0.00025; a third of a nano-dollar is rounded up to one.

    >>> cost(tokens_in=1, tokens_out=0, price_in=20_000_000, price_out=0)
    Nano(n=20)
    >>> str(cost(tokens_in=1_000, tokens_out=500, price_in=100_000_000, price_out=300_000_000))
    '0.00025'
    >>> cost(tokens_in=1, tokens_out=0, price_in=333_333, price_out=0)
    Nano(n=1)
    """
    if tokens_in < 0 or tokens_out < 0 or price_in < 0 or price_out < 0:
        raise ValueError("tokens and prices are never negative")
    return Nano(-(-(tokens_in * price_in + tokens_out * price_out) // TOKENS_PER_PRICE))


def split(whole: Nano) -> tuple[Nano, Nano]:
    """Give back (operator, platform), which sum to `whole`; operator = floor of 80 %.

    >>> split(Nano(101))
    (Nano(n=80), Nano(n=21))
    """
    if whole.n < 0:
        raise ValueError("a cost is never negative")
    operator = Nano(whole.n * OPERATOR_PERCENT // 100)
    return operator, whole - operator


def from_micro(micro: int) -> Nano:
    """Book micro-USDC as nano-dollars: exact.

    >>> from_micro(12_500_000)
    Nano(n=12500000000)
    """
    return Nano(micro * NANO_PER_MICRO)


def to_micro(amount: Nano) -> tuple[int, Nano]:
    """Give back (whole micro-USDC a token can carry, dust that stays in the ledger).

    >>> to_micro(Nano(1_999))
    (1, Nano(n=999))
    """
    if amount.n < 0:
        raise ValueError("nothing negative leaves for a chain")
    micro, dust = divmod(amount.n, NANO_PER_MICRO)
    return micro, Nano(dust)


def dollars(amount: Nano) -> str:
    """Print exactly, as a decimal string with at least two decimals.

    >>> dollars(Nano(12_500_000_000)), dollars(Nano(-20)), dollars(Nano(0))
    ('12.50', '-0.00000002', '0.00')
    """
    whole, part = divmod(abs(amount.n), NANO_PER_DOLLAR)
    decimals = f"{part:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if amount.n < 0 else ''}{whole}.{decimals}"


def parse_dollars(text: str) -> Nano:
    """Parse a decimal dollar amount; more than nine decimals is a ValueError, never a rounding.

    >>> parse_dollars("0.10")
    Nano(n=100000000)
    >>> parse_dollars("0.0000000001")
    Traceback (most recent call last):
    ValueError: '0.0000000001' is not a whole number of nano-dollars
    """
    if len(text) > 32:  # longer than any int64 amount; also bounds the exponent's cost
        raise ValueError("a dollar amount has at most 32 characters")
    try:
        parsed = Decimal(text)
    except InvalidOperation as e:
        raise ValueError(f"{text!r} is not a dollar amount") from e
    if not parsed.is_finite() or abs(parsed.adjusted()) > 20:
        raise ValueError(f"{text!r} is not a dollar amount")
    scaled = parsed * NANO_PER_DOLLAR
    if scaled != scaled.to_integral_value():
        raise ValueError(f"{text!r} is not a whole number of nano-dollars")
    return Nano(int(scaled))
