"""Whose money is it?  Pure: what arrived, and what our tables say of the addresses in it.

    a sender on the screening list                  unattributed, until a person decides
    escrow ◀── one of our deposit addresses         a sweep: no new money
    escrow ◀── anybody, with one person's reference a direct deposit (Solana Pay)
    escrow ◀── anybody else                         unattributed
    deposit address in use                          its owner's deposit
    retired or not yet given to anybody             unattributed
    owner's account frozen                          his, but held: a person decides

The sender never decides whose deposit it is, a memo even less.

On Solana one transaction may empty many of our accounts; `part_sweeps` takes it apart by balance
differences before anything is attributed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from chain.ports import Departure, TransferSeen
from chain.units import Micro


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
    """Senders that are our own deposit addresses (EVM; on Solana departures say it)."""
    intents: Mapping[str, UUID]
    """Person by reference."""
    screened: frozenset[str] = frozenset()
    """Senders whose money a person looks at first."""
    frozen: frozenset[UUID] = frozenset()
    """Owners whose accounts are frozen: what is theirs is recorded as theirs and credited to nobody."""


@dataclass(frozen=True, slots=True)
class ToPerson:
    """Money for somebody we know."""

    person_id: UUID
    intent: str | None
    is_direct: bool
    """Straight into the escrow, rather than on a deposit address."""
    is_held: bool = False
    """His account is frozen: nothing is credited or lent until a person decides."""


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
    is_direct = transfer.to == directory.escrow
    if not directory.screened.isdisjoint((transfer.sender, *transfer.also_sent)):
        return Unattributed("screened_sender", is_direct=is_direct)
    if is_direct:
        return _into_escrow(transfer, directory)
    owner = directory.owners.get(transfer.to)
    if owner is None or owner.person_id is None:
        return Unattributed("unassigned_address", is_direct=False)
    if owner.is_retired:
        return Unattributed("retired_address", is_direct=False)
    return ToPerson(owner.person_id, None, is_direct=False, is_held=owner.person_id in directory.frozen)


def _into_escrow(transfer: TransferSeen, directory: Directory) -> Attribution:
    if transfer.sender in directory.our_senders:
        return Swept()
    known = sorted(reference for reference in transfer.references if reference in directory.intents)
    people = {directory.intents[reference] for reference in known}
    if len(people) == 1:
        person = people.pop()
        return ToPerson(person, known[0], is_direct=True, is_held=person in directory.frozen)
    return Unattributed("two_references" if people else "no_reference", is_direct=True)


@dataclass(frozen=True, slots=True)
class Parted:
    """Transfers taken apart from what moved between our own accounts."""

    inbound: list[TransferSeen]
    """New money; an escrow's inbound is lessened by what was swept in the same transaction."""
    swept: list[Departure]
    strayed: list[Departure]
    """Left one of our accounts and did not reach the escrow: somebody used that account's key."""


def part_sweeps(inbound: Sequence[TransferSeen], outbound: Sequence[Departure], escrow: str) -> Parted:
    """Match what left our accounts with what reached the escrow, transaction by transaction, to the micro."""
    leaving: dict[str, list[Departure]] = defaultdict(list)
    for departure in outbound:
        if departure.account != escrow:  # a payout: the settler books it
            leaving[departure.tx].append(departure)
    parted = Parted([], [], [])
    for transfer in inbound:
        if transfer.to != escrow or transfer.tx not in leaving:
            parted.inbound.append(transfer)
            continue
        left = transfer.amount.n
        for departure in leaving.pop(transfer.tx):
            arrived = min(left, departure.amount.n)
            left -= arrived
            _add(parted.swept, departure, arrived)
            _add(parted.strayed, departure, departure.amount.n - arrived)
        if left:
            parted.inbound.append(replace(transfer, amount=Micro(left)))
    parted.strayed.extend(departure for departures in leaving.values() for departure in departures)
    return parted


def _add(to: list[Departure], departure: Departure, amount: int) -> None:
    if amount:
        to.append(replace(departure, amount=Micro(amount)))
