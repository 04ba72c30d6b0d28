"""Whose money is it?  Pure: what arrived, and what our tables say of the addresses in it.

    escrow ◀── one of our deposit addresses         a sweep: no new money
    escrow ◀── anybody, with one person's reference a direct deposit (Solana Pay)
    escrow ◀── anybody else                         unattributed
    deposit address in use                          its owner's deposit
    retired or not yet given to anybody             unattributed

The sender never decides whose deposit it is, a memo even less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from chain.ports import TransferSeen


@dataclass(frozen=True, slots=True)
class Owner:
    """Who has a deposit address; `person_id` None for one that nobody was given yet."""

    person_id: UUID | None
    is_retired: bool


@dataclass(frozen=True, slots=True)
class Directory:
    """What our tables say of the addresses in some transfers."""

    escrow: str
    owners: Mapping[str, Owner]
    """By watched address (EVM address, Solana token account)."""
    our_senders: frozenset[str]
    """Senders that are our own deposit addresses."""
    intents: Mapping[str, UUID]
    """Person by reference."""


@dataclass(frozen=True, slots=True)
class ToPerson:
    """Money for somebody we know."""

    person_id: UUID
    intent: str | None
    is_direct: bool
    """Straight into the escrow, rather than on a deposit address."""


@dataclass(frozen=True, slots=True)
class Swept:
    """Our own money on its way into the escrow."""


@dataclass(frozen=True, slots=True)
class Unattributed:
    """Money for nobody yet; `reason` is a support case's kind."""

    reason: str
    is_direct: bool


Attribution = ToPerson | Swept | Unattributed


def attribute(transfer: TransferSeen, directory: Directory) -> Attribution:
    """Say whose money `transfer` is."""
    if transfer.to == directory.escrow:
        return _into_escrow(transfer, directory)
    owner = directory.owners.get(transfer.to)
    if owner is None or owner.person_id is None:
        return Unattributed("unassigned_address", is_direct=False)
    if owner.is_retired:
        return Unattributed("retired_address", is_direct=False)
    return ToPerson(owner.person_id, None, is_direct=False)


def _into_escrow(transfer: TransferSeen, directory: Directory) -> Attribution:
    if transfer.sender in directory.our_senders:
        return Swept()
    known = sorted(reference for reference in transfer.references if reference in directory.intents)
    people = {directory.intents[reference] for reference in known}
    if len(people) == 1:
        return ToPerson(people.pop(), known[0], is_direct=True)
    return Unattributed("two_references" if people else "no_reference", is_direct=True)
