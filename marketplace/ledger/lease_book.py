"""Authorising requests in memory, inside leased slices.  No I/O, no waiting: about a microsecond each.

A slice's lease row in the database holds `free + reserved` at every moment at which no charge of it is
being posted: `authorise` moves free → reserved, `settle` (after the charge is durable) moves what was
not spent back.  Amounts here are plain ints of nano-dollars, for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from uuid import UUID

import msgspec

from marketplace.ledger.money import Nano


class HoldState(Enum):
    OPEN = auto()
    POSTING = auto()  # its charge was accepted by the poster: only the poster may end it
    ENDED = auto()


_OPEN, _ENDED = HoldState.OPEN, HoldState.ENDED  # an enum's attribute costs more than the rest of `settle`


@dataclass(slots=True, eq=False)
class Slice:
    """One lease as its process sees it."""

    lease_id: UUID
    buyer: int
    free_nano: int
    reserved_nano: int = 0
    usual_nano: int = 0
    usable_until_ns: int = 0
    used_at_ns: int = 0


class Hold(msgspec.Struct, eq=False, gc=False):
    """The worst-case cost of one request, set aside in a slice.

    One is made for every request: a struct is quicker to make.  It is in no cycle, so the collector skips it.
    """

    slice: Slice
    amount_nano: int
    state: HoldState = HoldState.OPEN

    @property
    def amount(self) -> Nano:
        return Nano(self.amount_nano)

    @property
    def buyer(self) -> int:
        return self.slice.buyer

    @property
    def lease_id(self) -> UUID:
        return self.slice.lease_id


class LeaseBook:
    """The slices of one process, at most one per buyer.

    >>> book = LeaseBook(clock_ns=lambda: 0)
    >>> _ = book.add(UUID(int=1), buyer=7, amount_nano=100, usual_nano=100, usable_until_ns=10)
    >>> hold = book.authorise(7, 60)
    >>> book.authorise(7, 60) is None   # 40 are left
    True
    >>> book.settle(hold, 25); book.free(7)
    75
    """

    def __init__(self, clock_ns: Callable[[], int]) -> None:
        self._clock_ns = clock_ns
        self._slices: dict[int, Slice] = {}

    def authorise(self, buyer: int, amount_nano: int) -> Hold | None:
        """Set `amount_nano` aside, or None if no live slice covers it."""
        part = self._slices.get(buyer)
        if part is None:
            return None
        free_nano = part.free_nano - amount_nano
        now = self._clock_ns()
        if amount_nano < 0 or free_nano < 0 or now >= part.usable_until_ns:
            return None
        part.free_nano = free_nano
        part.reserved_nano += amount_nano
        part.used_at_ns = now
        return Hold(part, amount_nano)

    def settle(self, hold: Hold, cost_nano: int) -> None:
        """The hold's charge is durable: what it did not take of the hold is free again.

        A cost above the hold is not taken from the slice: the poster took the rest from the balance.
        Settling or releasing a hold that has ended is harmless.
        """
        if hold.state is _ENDED:
            return
        hold.state = _ENDED
        part = hold.slice
        held = hold.amount_nano
        part.reserved_nano -= held
        if cost_nano < held:
            part.free_nano += held - cost_nano

    def release(self, hold: Hold) -> None:
        """The request cost nothing.  A hold whose charge was accepted by the poster is left to it."""
        if hold.state is _OPEN:
            self.settle(hold, 0)

    def add(
        self, lease_id: UUID, *, buyer: int, amount_nano: int, usual_nano: int, usable_until_ns: int
    ) -> Slice:
        """Take in a new lease, in place of any the buyer had (whose holds end on their own)."""
        new = Slice(lease_id, buyer, amount_nano, 0, usual_nano, usable_until_ns, self._clock_ns())
        self._slices[buyer] = new
        return new

    def grow(self, part: Slice, *, amount_nano: int, usual_nano: int, usable_until_ns: int) -> None:
        """The database added to this lease and renewed it."""
        part.free_nano += amount_nano
        part.usual_nano = usual_nano
        part.usable_until_ns = max(part.usable_until_ns, usable_until_ns)

    def renewed(self, lease_ids: set[UUID], *, usable_until_ns: int) -> None:
        for part in self._slices.values():
            if part.lease_id in lease_ids:
                part.usable_until_ns = max(part.usable_until_ns, usable_until_ns)

    def drop(self, lease_ids: set[UUID]) -> None:
        """The database no longer has these leases: authorise nothing more from them."""
        for part in [p for p in self._slices.values() if p.lease_id in lease_ids]:
            part.free_nano = 0
            del self._slices[part.buyer]

    def take_out_idle(self, buyer: int, *, unused_since_ns: int) -> Slice | None:
        """Remove and give back a slice with no open hold, none begun since: now the caller's to return."""
        part = self._slices.get(buyer)
        if part is None or part.reserved_nano or part.used_at_ns > unused_since_ns:
            return None
        return self._slices.pop(buyer)

    def take_excess(self, part: Slice) -> int:
        """Remove and give back what is free beyond twice the usual slice."""
        excess = max(0, part.free_nano - 2 * part.usual_nano)
        part.free_nano -= excess
        return excess

    def needs_refill(self, part: Slice) -> bool:
        """Less than half of the usual slice is free."""
        return 2 * part.free_nano < part.usual_nano

    def slice_of(self, buyer: int) -> Slice | None:
        return self._slices.get(buyer)

    def free(self, buyer: int) -> int:
        part = self._slices.get(buyer)
        return 0 if part is None else part.free_nano

    def __iter__(self) -> Iterator[Slice]:
        return iter(list(self._slices.values()))

    def __len__(self) -> int:
        return len(self._slices)
