"""The life of one inbound transfer, as data.

    (unknown) ──Appeared──▶ SEEN ──Confirmed──▶ FINAL
                            │  ▲
                    Reorged ▼  │ Appeared (mined again)
                          ORPHANED ──Confirmed──▶ FINAL

Only FINAL may be credited.  FINAL is forever: a reorg of it, or the same transfer in another block, means
that the chain broke its word, and is `FinalityViolated`.  Only a person who accepts the chain's new history
makes it ORPHANED (`TakenBack`).  An unknown transfer may be FINAL at first sight (catching up).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from chain.errors import FinalityViolated
from chain.units import Micro


class Deposit(StrEnum):
    """Where an inbound transfer stands."""

    SEEN = "seen"
    FINAL = "final"
    ORPHANED = "orphaned"


@dataclass(frozen=True, slots=True)
class Appeared:
    """It was read in a block that may still change."""

    block_hash: str
    amount: Micro


@dataclass(frozen=True, slots=True)
class Confirmed:
    """It was read in a final block."""

    block_hash: str
    amount: Micro


@dataclass(frozen=True, slots=True)
class Reorged:
    """Its block left the chain."""


@dataclass(frozen=True, slots=True)
class TakenBack:
    """It is not in the history that a person accepted after its chain broke its word."""


Fact = Appeared | Confirmed | Reorged | TakenBack


@dataclass(frozen=True, slots=True)
class Known:
    """What is on record of a transfer."""

    status: Deposit
    block_hash: str
    amount: Micro


_NEXT: Final[Mapping[tuple[Deposit | None, type[Fact]], Deposit]] = {
    (None, Appeared): Deposit.SEEN,
    (None, Confirmed): Deposit.FINAL,
    (Deposit.SEEN, Appeared): Deposit.SEEN,  # read again, or mined again in another block
    (Deposit.SEEN, Confirmed): Deposit.FINAL,
    (Deposit.SEEN, Reorged): Deposit.ORPHANED,
    (Deposit.ORPHANED, Appeared): Deposit.SEEN,
    (Deposit.ORPHANED, Confirmed): Deposit.FINAL,
    (Deposit.ORPHANED, Reorged): Deposit.ORPHANED,
    (Deposit.FINAL, Appeared): Deposit.FINAL,  # a replay; the same block, or `advance` refuses
    (Deposit.FINAL, Confirmed): Deposit.FINAL,
    (Deposit.SEEN, TakenBack): Deposit.ORPHANED,
    (Deposit.ORPHANED, TakenBack): Deposit.ORPHANED,
    (Deposit.FINAL, TakenBack): Deposit.ORPHANED,
}


def advance(known: Known | None, fact: Fact) -> Known:
    """Give what is on record after `fact`; unchanged if it says nothing new.

    Raises FinalityViolated if `fact` contradicts a final record, ValueError for a reorg of something
    that was never read.
    """
    status = _NEXT.get((known.status if known else None, type(fact)))
    if known is not None and known.status is Deposit.FINAL and not isinstance(fact, TakenBack):
        said = None if isinstance(fact, Reorged) else (fact.block_hash, fact.amount)
        if said != (known.block_hash, known.amount):
            raise FinalityViolated(f"a final transfer of {known.amount} in {known.block_hash}, now {fact}")
    if status is None:
        raise ValueError("a transfer that was never read cannot leave the chain")
    match fact:
        case Appeared() | Confirmed():
            return Known(status, fact.block_hash, fact.amount)
        case Reorged() | TakenBack():
            assert known is not None
            return Known(status, known.block_hash, known.amount)
