"""What is billed: min(reported, verified), within the limit, never above the hold."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketplace.ledger.charges import CountedBy
from marketplace.ledger.money import cost
from marketplace.metering import settlement
from marketplace.metering.settlement import affordable_tokens, hold_for, is_drift, settle
from node_agent.protocol import PRICE_MAX

counts = st.integers(0, 2_000_000)
reports = st.none() | st.integers(0, 2**31)
prices = st.integers(0, PRICE_MAX // 1_000)


def test_the_documented_examples() -> None:
    assert doctest.testmod(settlement).failed == 0


@pytest.mark.parametrize(
    ("counted", "reported", "billed", "by"),
    [
        (10, None, 10, CountedBy.GATEWAY),  # the node told nothing
        (10, 10, 10, CountedBy.GATEWAY),
        (10, 5_000, 10, CountedBy.GATEWAY),  # overstated
        (10, 7, 7, CountedBy.NODE),  # understated: his loss
        (10, 0, 0, CountedBy.NODE),
        (60, 60, 50, CountedBy.GATEWAY),  # beyond the limit of 50
        (60, 55, 50, CountedBy.GATEWAY),
    ],
)
def test_the_smaller_count_is_billed(counted: int, reported: int | None, billed: int, by: CountedBy) -> None:
    usage = settle(
        prompt_counted=8, prompt_reported=9, completion_counted=counted, completion_reported=reported,
        completion_limit=50,
    )  # fmt: skip
    assert (usage.tokens_in, usage.tokens_out, usage.counted_by) == (8, billed, by)


def test_nothing_delivered_is_nothing_owed() -> None:
    usage = settle(
        prompt_counted=9_000, prompt_reported=9_000, completion_counted=0, completion_reported=400,
        completion_limit=500,
    )  # fmt: skip
    assert (usage.tokens_in, usage.tokens_out) == (0, 0)
    assert usage.is_drifting


def test_drift_is_told() -> None:
    assert not is_drift(16, 0)
    assert is_drift(17, 0)
    assert is_drift(1_000, 2_000)
    overrun = settle(
        prompt_counted=1, prompt_reported=None, completion_counted=51, completion_reported=None,
        completion_limit=50,
    )  # fmt: skip
    assert overrun.is_drifting


@given(
    prompt=counts, prompt_reported=reports, completion=counts, completion_reported=reports,
    limit=st.integers(1, 1_000_000), choices=st.integers(1, 16), price_in=prices, price_out=prices,
    asked_in=prices, asked_out=prices,
)  # fmt: skip
def test_no_bill_exceeds_its_hold(
    prompt: int, prompt_reported: int | None, completion: int, completion_reported: int | None, limit: int,
    choices: int, price_in: int, price_out: int, asked_in: int, asked_out: int,
) -> None:  # fmt: skip
    """V2: whatever a node says and does, and whichever of the candidates it is."""
    hold = hold_for(
        prompt_tokens=prompt, max_tokens=limit, choices=choices, price_in=max(price_in, asked_in),
        price_out=max(price_out, asked_out),
    )  # fmt: skip
    usage = settle(
        prompt_counted=prompt, prompt_reported=prompt_reported, completion_counted=completion,
        completion_reported=completion_reported, completion_limit=limit * choices,
    )  # fmt: skip
    bill = cost(
        tokens_in=usage.tokens_in, tokens_out=usage.tokens_out, price_in=asked_in, price_out=asked_out
    )
    assert bill.n <= hold.n
    assert usage.tokens_in <= prompt
    assert usage.tokens_out <= min(completion, limit * choices)
    if prompt_reported is not None:
        assert usage.tokens_in <= prompt_reported
    if completion_reported is not None:
        assert usage.tokens_out <= completion_reported


@given(
    available=st.integers(0, 10**15), prompt=counts, choices=st.integers(1, 16), price_in=prices,
    price_out=st.integers(1, PRICE_MAX // 1_000),
)  # fmt: skip
def test_what_is_affordable_is_affordable_and_one_more_is_not(
    available: int, prompt: int, choices: int, price_in: int, price_out: int
) -> None:
    from marketplace.ledger.money import Nano

    tokens = affordable_tokens(
        available=Nano(available), prompt_tokens=prompt, choices=choices, price_in=price_in,
        price_out=price_out,
    )  # fmt: skip

    def bound(tokens: int) -> int:
        return hold_for(
            prompt_tokens=prompt, max_tokens=tokens, choices=choices, price_in=price_in, price_out=price_out
        ).n

    assert tokens == 0 or bound(tokens) <= available
    assert bound(tokens + 1) > available
