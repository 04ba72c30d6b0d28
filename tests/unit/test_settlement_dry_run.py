"""Who cannot be paid is found, whether the rail names him or not; nobody is blamed for the chain's faults."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chain.ports import PayoutLine
from chain.units import Micro
from marketplace.settlement.dry_run import prepare
from marketplace.settlement.errors import PlanRefused
from marketplace.settlement.simulated_rail import SimulatedRail

LINES = [PayoutLine(f"p{n}", f"w{n}", Micro(1_000_000)) for n in range(12)]


@given(st.sets(st.integers(0, 11), max_size=11), st.booleans())
async def test_offenders_are_split_off_and_the_rest_goes_on(blocked: set[int], names_payees: bool) -> None:
    rail = SimulatedRail(blocked={f"w{n}" for n in blocked}, names_payees=names_payees)
    unsigned, refused = await prepare(rail, LINES)
    assert set(refused) == {f"p{n}" for n in blocked}
    assert unsigned is not None
    assert unsigned.lines == tuple(line for n, line in enumerate(LINES) if n not in blocked)


async def test_when_every_named_payee_is_refused_nothing_is_left_to_sign() -> None:
    rail = SimulatedRail(blocked={line.to for line in LINES})
    unsigned, refused = await prepare(rail, LINES)
    assert unsigned is None
    assert set(refused) == {line.payout_id for line in LINES}


@pytest.mark.parametrize("fault", [{"is_paused": True}, {"escrow_micro": 5_000_000}])
async def test_a_fault_of_the_chain_splits_nobody_off(fault: dict[str, int]) -> None:
    with pytest.raises(PlanRefused) as refused:
        await prepare(SimulatedRail(**fault), LINES)
    assert refused.value.code == "dry_run_failed"
