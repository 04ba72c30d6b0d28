"""Sweep when it pays: gas against what it brings in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chain.units import Micro
from marketplace.deposits.sweeper import (
    GAS_AGAIN,
    GAS_FIRST,
    GAS_PER_SWEEP,
    Due,
    SweepPolicy,
    worth_sweeping,
)

GWEI = 10**9
POLICY = SweepPolicy(cost_bps_max=1_000, ether_micro=5_000_000_000)


def due(usdc: int, *, is_first: bool = True) -> Due:
    return Due(f"{usdc}{is_first}", b"", Micro(usdc * 1_000_000), is_first)


def test_what_gas_costs_is_rounded_up() -> None:
    assert POLICY.cost_micro(54_000, GWEI) == 270_000  # 0.000054 ether
    assert POLICY.cost_micro(1, 1) == 1


def test_cheap_gas_takes_everything_and_dear_gas_waits() -> None:
    small, large = due(6), due(500)
    assert worth_sweeping([large, small], GWEI // 100, POLICY) == [large, small]
    assert worth_sweeping([large, small], 10 * GWEI, POLICY) == [large]
    assert worth_sweeping([large, small], 200 * GWEI, POLICY) == []


def test_an_address_that_was_swept_before_costs_less() -> None:
    again, first = due(20, is_first=False), due(20)
    assert worth_sweeping([due(500), first, again], 10 * GWEI, POLICY) == [due(500), again]


def test_each_may_pay_and_the_transaction_not() -> None:
    """Alone it carries the transaction too."""
    lonely = due(30)
    price = 11 * GWEI
    assert POLICY.pays(lonely.amount, lonely.gas, price)
    assert worth_sweeping([lonely], price, POLICY) == []
    assert worth_sweeping([due(500), lonely], price, POLICY) == [due(500), lonely]


def test_too_little_together_is_left() -> None:
    assert worth_sweeping([due(2), due(2, is_first=False)], 0, POLICY) == []


@given(
    usdc=st.lists(st.tuples(st.integers(1, 10_000), st.booleans()), max_size=20),
    wei=st.integers(0, 500 * GWEI),
)
def test_no_sweep_costs_more_than_its_share(usdc: list[tuple[int, bool]], wei: int) -> None:
    chosen = worth_sweeping([due(n, is_first=is_first) for n, is_first in usdc], wei, POLICY)
    gas = (GAS_PER_SWEEP if chosen else 0) + sum(GAS_FIRST if d.is_first else GAS_AGAIN for d in chosen)
    assert POLICY.cost_micro(gas, wei) * 10 <= sum(d.amount.n for d in chosen)
