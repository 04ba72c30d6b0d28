"""Every state against every fact; the table is written a second time here, by hand, as letters."""

from __future__ import annotations

import pytest

from chain.payouts import (
    GIVES_BACK,
    LIVE,
    Approved,
    Fact,
    FenceSpent,
    Finalized,
    ImpossibleFact,
    Payout,
    Reverted,
    Sent,
    Signed,
    advance,
)

FACTS: tuple[Fact, ...] = (Approved(), Signed(), Sent(), Finalized(), Reverted(), FenceSpent())
STATES = {
    "P": Payout.PLANNED,
    "A": Payout.APPROVED,
    "S": Payout.SIGNED,
    "B": Payout.BROADCAST,
    "F": Payout.FINAL,
    "X": Payout.FAILED,
    "E": Payout.EXPIRED,
}
EXPECTED = {  # Approved, Signed, Sent, Finalized, Reverted, FenceSpent; "." = impossible
    "P": "A....E",
    "A": "AS...E",
    "S": ".SBFXE",
    "B": ".BBFXE",
    "F": "......",
    "X": "......",
    "E": "......",
}
MATRIX = [
    (STATES[state], fact, None if after == "." else STATES[after])
    for state, row in EXPECTED.items()
    for fact, after in zip(FACTS, row, strict=True)
]


@pytest.mark.parametrize(("state", "fact", "after"), MATRIX)
def test_matrix(state: Payout, fact: Fact, after: Payout | None) -> None:
    if after is None:
        with pytest.raises(ImpossibleFact):
            advance(state, fact)
    else:
        assert advance(state, fact) is after


def test_the_matrix_is_whole() -> None:
    assert set(STATES.values()) == set(Payout)
    assert len(MATRIX) == len(Payout) * len(FACTS)


def test_every_state_is_live_final_or_gives_back() -> None:
    assert LIVE | GIVES_BACK | {Payout.FINAL} == set(Payout)
    assert not LIVE & GIVES_BACK


def test_nothing_is_sent_before_bytes_are_durable() -> None:
    reachable_by_sending = {
        state for state, fact, after in MATRIX if isinstance(fact, Sent) and after is not None
    }
    assert reachable_by_sending == {Payout.SIGNED, Payout.BROADCAST}
