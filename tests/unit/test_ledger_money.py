from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from chain.units import Micro
from marketplace.ledger.ids import lowest_at, made_at, uuid7
from marketplace.ledger.money import NANO_MAX, Nano, cost, dollars, from_micro, parse_dollars, split, to_micro


def test_nano_mixes_with_nothing_else():
    for other in (Micro(1), 1, 1.0, True):
        with pytest.raises(TypeError):
            Nano(1) + other
        with pytest.raises(TypeError):
            Nano(1) - other
    with pytest.raises(TypeError):
        assert Nano(1) < Micro(2)
    for wrong in (1.0, True, "1", None):
        with pytest.raises(TypeError):
            Nano(wrong)


def test_nano_stays_within_a_bigint():
    assert (Nano(NANO_MAX) - Nano(NANO_MAX)).n == 0
    for overflow in (
        lambda: Nano(NANO_MAX) + Nano(1),
        lambda: Nano(-NANO_MAX) - Nano(1),
        lambda: from_micro(2**62),
    ):
        with pytest.raises(OverflowError):
            overflow()


def test_small_chats_lose_nothing_to_rounding():
    # $0.02 per million: micro-dollars would round one token (0.02 µ$) to nothing or to fifty times its price
    assert cost(tokens_in=1, tokens_out=1, price_in=20_000_000, price_out=20_000_000) == Nano(40)
    assert cost(tokens_in=0, tokens_out=0, price_in=1, price_out=1) == Nano(0)


@pytest.mark.parametrize(
    "wrong", ["1e400", "NaN", "Infinity", "1.0000000001", "", "a", "1" * 40, "1e30", "1,5"]
)
def test_amounts_that_are_not_whole_nanos_are_refused(wrong):
    with pytest.raises((ValueError, OverflowError)):
        parse_dollars(wrong)


@pytest.mark.parametrize("amount", [-1, -NANO_MAX])
def test_negative_amounts_are_neither_split_nor_sent(amount):
    with pytest.raises(ValueError):
        split(Nano(amount))
    with pytest.raises(ValueError):
        to_micro(Nano(amount))


def test_dollars_prints_what_parse_reads():
    for n in (0, 1, 10, 999_999_999, 12_500_000_000, -1, NANO_MAX):
        assert parse_dollars(dollars(Nano(n))) == Nano(n)


def test_ids_sort_by_time_and_carry_it():
    moment = datetime(2026, 11, 22, 3, 4, 5, 678_000, tzinfo=UTC)
    assert made_at(lowest_at(moment)) == moment
    before = datetime.now(UTC) - timedelta(seconds=1)
    made = [uuid7() for _ in range(100)]
    assert all(lowest_at(before) < identity for identity in made)
    assert len(set(made)) == 100
    assert {(identity.version, identity.variant) for identity in made} == {(7, "specified in RFC 4122")}
