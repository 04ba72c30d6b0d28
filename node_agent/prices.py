"""Prices, exactly: dollars as the operator writes them, nano-dollars per million tokens inside.

$0.10 per million tokens = 100,000,000. Binary fractions never take part.
"""

import decimal
from decimal import Decimal
from typing import Final, Literal

from node_agent.protocol import PRICE_MAX

NANO_PER_DOLLAR: Final = 10**9
TOKENS_PER_PRICE: Final = 1_000_000
OPERATOR_PERCENT: Final = 80  # R3
Per = Literal["1k", "1m"]
_FACTOR: Final[dict[Per, int]] = {"1k": 1000, "1m": 1}
_CHARS_MAX: Final = 40


class PriceError(ValueError):
    """Not a price; the text says why."""


def parse_price(text: str, per: Per = "1m") -> int:
    """Give back dollars per thousand or million tokens as nano-dollars per million; raises `PriceError`."""
    try:
        dollars = Decimal(text.strip().removeprefix("$")) if len(text) <= _CHARS_MAX else Decimal("NaN")
    except decimal.InvalidOperation as error:
        raise PriceError(f"{text!r} is not a price; write dollars such as 0.10") from error
    if not dollars.is_finite():
        raise PriceError("a price is a plain number of dollars such as 0.10")
    if dollars < 0:
        raise PriceError("a price is not negative")
    if dollars > PRICE_MAX // NANO_PER_DOLLAR:
        raise PriceError(f"${text.strip()} is beyond any price; is it per 1k or per 1m tokens?")
    nano = dollars * _FACTOR[per] * NANO_PER_DOLLAR
    if nano != nano.to_integral_value():
        raise PriceError(
            "a price has at most nine digits after the point per million tokens, six per thousand"
        )
    if nano > PRICE_MAX:
        raise PriceError(f"${text.strip()} per {per} tokens is beyond any price")
    return int(nano)


def format_price(nano_per_million: int, per: Per = "1m") -> str:
    """Give back the price in dollars, without needless zeros but with at least two digits after the point."""
    value = Decimal(nano_per_million) / NANO_PER_DOLLAR / _FACTOR[per]
    whole, _, digits = f"{value:f}".partition(".")
    return f"{whole}.{digits.rstrip('0').ljust(2, '0')}"


def share_nano(price_in: int, price_out: int, *, prompt_tokens: int, completion_tokens: int) -> int:
    """Give the operator's share of a request in nano-dollars: its cost rounded up, 80 % of that rounded down.

    >>> share_nano(100_000_000, 200_000_000, prompt_tokens=3, completion_tokens=5)
    1040
    """
    cost = -(-(prompt_tokens * price_in + completion_tokens * price_out) // TOKENS_PER_PRICE)
    return cost * OPERATOR_PERCENT // 100
