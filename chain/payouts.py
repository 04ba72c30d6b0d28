"""The life of a settlement batch, as data.

    PLANNED ──Approved──▶ APPROVED ──Signed──▶ SIGNED ──Sent──▶ BROADCAST ──Finalized──▶ FINAL
                                                                          ├─Reverted──▶ FAILED
    (any live state) ──FenceSpent──▶ EXPIRED                              └─FenceSpent▶ EXPIRED

A fact is something that has happened and is on record; `advance` says what the batch is then.  The law
behind the table: money leaves the books only at FINAL, and goes back to its owner only where the signed
bytes can never land any more.  So `Reverted` means *landed without effect and its fence is spent*: a Safe
transaction that reverts leaves the nonce unspent, its signatures are public, and anybody could try it again;
such a batch stays BROADCAST.

Between SIGNED and BROADCAST a process may die right after the send, so every outcome is possible from
SIGNED as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from chain.errors import ChainBroken


class Payout(StrEnum):
    """Where a batch, and each payout in it, stands."""

    PLANNED = "planned"
    """Members, digest and totals are frozen; earnings have moved to payouts in flight."""
    APPROVED = "approved"
    """Threshold approvals over the digest are on record."""
    SIGNED = "signed"
    """Signed bytes and fence are durable; nothing has been sent."""
    BROADCAST = "broadcast"
    """The bytes have been sent, perhaps more than once, perhaps with an unknown result."""
    FINAL = "final"
    FAILED = "failed"
    """Landed without effect; the fence is spent, the money is the operators' again."""
    EXPIRED = "expired"
    """The fence was spent by something else; the money is the operators' again."""


@dataclass(frozen=True, slots=True)
class Approved:
    """The threshold of distinct signers is reached."""


@dataclass(frozen=True, slots=True)
class Signed:
    """Signed bytes and fence are durable."""


@dataclass(frozen=True, slots=True)
class Sent:
    """The bytes were given to a node; whether it took them may be unknown."""


@dataclass(frozen=True, slots=True)
class Finalized:
    """The payload took effect, at finality."""


@dataclass(frozen=True, slots=True)
class Reverted:
    """The transaction landed without effect and its fence is spent, both at finality."""


@dataclass(frozen=True, slots=True)
class FenceSpent:
    """At finality the fence is spent and nothing of this batch landed."""


Fact = Approved | Signed | Sent | Finalized | Reverted | FenceSpent

LIVE: Final = frozenset({Payout.PLANNED, Payout.APPROVED, Payout.SIGNED, Payout.BROADCAST})
"""States in which money is in flight; a chain has at most one live batch, since it has one fence."""
GIVES_BACK: Final = frozenset({Payout.FAILED, Payout.EXPIRED})
"""States whose entry moves the money back to the operators."""

_NEXT: Final[Mapping[tuple[Payout, type[Fact]], Payout]] = MappingProxyType(
    {
        (Payout.PLANNED, Approved): Payout.APPROVED,
        (Payout.PLANNED, FenceSpent): Payout.EXPIRED,
        (Payout.APPROVED, Approved): Payout.APPROVED,  # one more than the threshold
        (Payout.APPROVED, Signed): Payout.SIGNED,
        (Payout.APPROVED, FenceSpent): Payout.EXPIRED,
        (Payout.SIGNED, Signed): Payout.SIGNED,  # another envelope around the same payload
        (Payout.SIGNED, Sent): Payout.BROADCAST,
        (Payout.SIGNED, Finalized): Payout.FINAL,
        (Payout.SIGNED, Reverted): Payout.FAILED,
        (Payout.SIGNED, FenceSpent): Payout.EXPIRED,
        (Payout.BROADCAST, Signed): Payout.BROADCAST,
        (Payout.BROADCAST, Sent): Payout.BROADCAST,  # the same bytes may be sent again
        (Payout.BROADCAST, Finalized): Payout.FINAL,
        (Payout.BROADCAST, Reverted): Payout.FAILED,
        (Payout.BROADCAST, FenceSpent): Payout.EXPIRED,
    }
)


class ImpossibleFact(ChainBroken):
    """A fact that cannot happen to a batch in this state: stop and page."""


def advance(state: Payout, fact: Fact) -> Payout:
    """Give the state after `fact`; ImpossibleFact where the table has no row."""
    after = _NEXT.get((state, type(fact)))
    if after is None:
        raise ImpossibleFact(f"a batch that is {state} cannot see {type(fact).__name__}")
    return after
