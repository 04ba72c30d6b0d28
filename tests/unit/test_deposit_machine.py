from __future__ import annotations

import itertools

import pytest

from chain.deposits import Appeared, Confirmed, Deposit, Fact, Known, Reorged, TakenBack, advance
from chain.errors import FinalityViolated
from chain.units import Micro

FIVE = Micro(5_000_000)
HERE, ELSEWHERE = "0xaa", "0xbb"
STATES: list[Known | None] = [None, *(Known(status, HERE, FIVE) for status in Deposit)]
FACTS: list[Fact] = [Appeared(HERE, FIVE), Appeared(ELSEWHERE, FIVE), Confirmed(HERE, FIVE)]
FACTS += [Confirmed(ELSEWHERE, FIVE), Reorged(), TakenBack()]

EXPECTED: dict[tuple[Deposit | None, Fact], Deposit] = {
    (None, Appeared(HERE, FIVE)): Deposit.SEEN,
    (None, Appeared(ELSEWHERE, FIVE)): Deposit.SEEN,
    (None, Confirmed(HERE, FIVE)): Deposit.FINAL,
    (None, Confirmed(ELSEWHERE, FIVE)): Deposit.FINAL,
    (Deposit.SEEN, Appeared(HERE, FIVE)): Deposit.SEEN,
    (Deposit.SEEN, Appeared(ELSEWHERE, FIVE)): Deposit.SEEN,
    (Deposit.SEEN, Confirmed(HERE, FIVE)): Deposit.FINAL,
    (Deposit.SEEN, Confirmed(ELSEWHERE, FIVE)): Deposit.FINAL,
    (Deposit.SEEN, Reorged()): Deposit.ORPHANED,
    (Deposit.ORPHANED, Appeared(HERE, FIVE)): Deposit.SEEN,
    (Deposit.ORPHANED, Appeared(ELSEWHERE, FIVE)): Deposit.SEEN,
    (Deposit.ORPHANED, Confirmed(HERE, FIVE)): Deposit.FINAL,
    (Deposit.ORPHANED, Confirmed(ELSEWHERE, FIVE)): Deposit.FINAL,
    (Deposit.ORPHANED, Reorged()): Deposit.ORPHANED,
    (Deposit.FINAL, Appeared(HERE, FIVE)): Deposit.FINAL,
    (Deposit.FINAL, Confirmed(HERE, FIVE)): Deposit.FINAL,
    (Deposit.SEEN, TakenBack()): Deposit.ORPHANED,
    (Deposit.ORPHANED, TakenBack()): Deposit.ORPHANED,
    (Deposit.FINAL, TakenBack()): Deposit.ORPHANED,
}


@pytest.mark.parametrize(("known", "fact"), list(itertools.product(STATES, FACTS)))
def test_every_state_meets_every_fact(known: Known | None, fact: Fact) -> None:
    expected = EXPECTED.get((known.status if known else None, fact))
    if expected is not None:
        assert advance(known, fact).status is expected
    elif known is None:
        with pytest.raises(ValueError, match="never read"):
            advance(known, fact)
    else:
        assert known.status is Deposit.FINAL
        with pytest.raises(FinalityViolated):
            advance(known, fact)


def test_a_final_amount_cannot_change() -> None:
    with pytest.raises(FinalityViolated):
        advance(Known(Deposit.FINAL, HERE, FIVE), Confirmed(HERE, Micro(6_000_000)))


def test_mined_again_elsewhere_takes_the_new_block() -> None:
    orphaned = advance(Known(Deposit.SEEN, HERE, FIVE), Reorged())
    assert advance(orphaned, Appeared(ELSEWHERE, FIVE)) == Known(Deposit.SEEN, ELSEWHERE, FIVE)
