"""Prices in, prices out, no digit lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_agent.prices import PriceError, format_price, parse_price
from node_agent.protocol import PRICE_MAX


@pytest.mark.parametrize(
    ("text", "per", "nano"),
    [
        ("0.10", "1m", 100_000_000),
        ("0.0001", "1k", 100_000_000),
        ("$2", "1m", 2_000_000_000),
        ("0", "1k", 0),
        ("0.000000001", "1m", 1),
        ("0.000000001", "1k", 1000),
        ("1e-3", "1m", 1_000_000),
        ("1000000", "1m", PRICE_MAX),
    ],
)
def test_exact(text: str, per: str, nano: int) -> None:
    assert parse_price(text, per) == nano


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "-1",
        "-0.0001",
        "NaN",
        "Infinity",
        "1e400",
        "1000000.01",
        "0.0000000001",
        "1" * 50,
        "0,10",
        "1 2",
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(PriceError):
        parse_price(text)


@given(st.integers(0, PRICE_MAX), st.sampled_from(["1k", "1m"]))
def test_what_is_shown_reads_back(nano: int, per: str) -> None:
    assert parse_price(format_price(nano, per), per) == nano
