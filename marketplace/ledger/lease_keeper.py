"""The service that keeps a process's lease book supplied from the database.

    keeper = LeaseKeeper(engine, worker="gateway-…")
    async with keeper:
        hold = await keeper.authorise(buyer, bound, minimum=smallest_useful)
        …
        await poster.post(charge, hold)     # settles the hold
        keeper.release(hold)                # in a `finally`: harmless after the line above

Fast path: memory only.  Slow path, one at a time per buyer: take or extend a lease that covers the
request.  Who asks for a lease while the database grants others is answered together with all who ask
meanwhile, so a thousand buyers who come at once cost a few transactions.  In the background: a slice below
half is refilled, slices in use are renewed every third of their time to live, idle ones and excess are
returned, expired ones of dead processes are reaped.

A commit that was sent and not answered leaves a lease in doubt: the book then counts the lesser of the two
outcomes, until the lease was read again, by the next request that needs it or the next upkeep.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self
from uuid import UUID

import asyncpg
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import leases, overdrafts
from marketplace.ledger.errors import InsufficientFunds, LedgerError, LedgerUnavailable
from marketplace.ledger.ids import NewId, uuid7
from marketplace.ledger.lease_book import Hold, HoldState, LeaseBook, Slice
from marketplace.ledger.leases import LEASE_TTL_MS, REAP_MARGIN_MS, SLICE_MAX, Granted
from marketplace.ledger.money import ZERO, Nano
from marketplace.ledger.overdrafts import Overdraft

_log = logging.getLogger(__name__)

ASKS_MAX: Final = 256
"""Buyers answered in one transaction, which holds the locks of their balances until its commit."""
STOP_BEFORE_EXPIRY_MS: Final = 1_000
"""A slice is not used in its last second: the database's clock may run faster than ours."""
_NO_LEASE: Final = UUID(int=0)
_NS_PER_MS: Final = 1_000_000
# The last: what a statement meets after a dying server's last word; SQLAlchemy passes it on as it is.
_UNREACHABLE: Final = (OSError, SQLAlchemyError, TimeoutError, asyncpg.InternalClientError)


@dataclass(slots=True)
class _Asking:
    """A buyer who waits for a slice of his balance."""

    ask: leases.Ask
    outcome: asyncio.Future[None]


class LeaseKeeper:
    """Authorises requests; owns the process's slices from `start` to `close`."""

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        worker: str,
        new_id: NewId = uuid7,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        ttl_ms: int = LEASE_TTL_MS,
        slice_max: Nano = SLICE_MAX,
        overdraft: Overdraft | None = None,
    ) -> None:
        """`worker` names this process and no other, not even its own predecessor.

        With `overdraft`, a request that the buyer's money does not cover may get its whole hold all the
        same (R12); without, it gets what is left.
        """
        self._engine = engine
        self._worker = worker
        self._new_id = new_id
        self._clock_ns = clock_ns
        self._ttl_ms = ttl_ms
        self._stop_early_ms = min(STOP_BEFORE_EXPIRY_MS, ttl_ms // 5)
        self._slice_max = slice_max
        self._overdraft = overdraft
        self._overdrawn: dict[UUID, Slice] = {}
        self._in_doubt: set[Slice] = set()
        self._returning: set[asyncio.Task[None]] = set()
        self._book = LeaseBook(clock_ns)
        self._locks: dict[int, asyncio.Lock] = {}
        self._refilling: dict[int, asyncio.Task[None]] = {}
        self._asking: list[_Asking] = []
        self._granting: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def book(self) -> LeaseBook:
        """The slices in memory, to look at."""
        return self._book

    async def start(self) -> None:
        self._keeping = asyncio.create_task(self._keep(), name="lease-keeper")

    async def close(self) -> None:
        """Return every slice that has no open hold; the others expire.  End holds first."""
        self._is_closed = True
        tasks = [*self._refilling.values(), *filter(None, (self._keeping, self._granting))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._returning, return_exceptions=True)
        await self._return_idle(unused_since_ns=self._clock_ns())

    async def authorise(self, buyer: int, amount: Nano, *, minimum: Nano | None = None) -> Hold:
        """Set `amount` aside for one request of account `buyer`.

        With `minimum`, a buyer who cannot afford `amount` gets a hold of what is left, at least
        `minimum`: look at `hold.amount`.  With an overdraft he gets all of `amount` for one such request at
        a time, within the terms.  Raises `InsufficientFunds`, `UnknownAccount`, or
        `LedgerUnavailable` when a lease is needed and the database does not answer.
        """
        if amount.n < 0:
            raise ValueError("a hold is never negative")
        if amount.n == 0:  # a free request needs no lease
            return Hold(Slice(_NO_LEASE, buyer, 0), 0)
        hold = self._book.authorise(buyer, amount.n)
        if hold is None:
            least = amount if minimum is None else max(min(minimum, amount), Nano(1))
            try:
                hold = await self._authorise_slowly(buyer, amount, least)
            except _UNREACHABLE as e:
                raise LedgerUnavailable("no lease: the database does not answer") from e
        if self._book.needs_refill(hold.slice):
            self._refill_soon(hold.slice)
        return hold

    def settle(self, hold: Hold, cost: Nano) -> None:
        """End a hold whose charge is durable (the poster calls this)."""
        self._book.settle(hold, cost.n)
        if self._overdrawn:
            self._return_overdraft(hold)

    def release(self, hold: Hold) -> None:
        """End a hold that cost nothing; harmless if its charge was posted or accepted for posting."""
        self._book.release(hold)
        if self._overdrawn:
            self._return_overdraft(hold)

    async def _authorise_slowly(self, buyer: int, amount: Nano, least: Nano) -> Hold:
        async with self._lock(buyer):
            hold = self._book.authorise(buyer, amount.n)  # another request may have fetched enough
            if hold is not None:
                return hold
            if self._overdraft is not None:
                hold = await self._authorise_beyond(buyer, amount, least, self._overdraft)
                if hold is not None:
                    return hold
            try:
                await self._fetch(buyer, amount, least)
            except InsufficientFunds as e:
                # What is free in our own slice counts: it was not enough together with the rest.
                own = self._live_free(buyer)
                raise InsufficientFunds(str(e), available_nano=e.available_nano + own) from e
            hold = self._book.authorise(buyer, min(amount.n, self._book.free(buyer)))
        if hold is None or hold.amount_nano < least.n:
            if hold is not None:
                self._book.release(hold)
            raise LedgerUnavailable("the lease ended before it could be used")
        return hold

    async def _authorise_beyond(self, buyer: int, amount: Nano, least: Nano, terms: Overdraft) -> Hold | None:
        """The whole amount from the balance, else by overdraft; None if neither has more than is left."""
        try:
            await self._fetch(buyer, amount, amount)
        except InsufficientFunds as e:
            left = Nano(max(0, e.available_nano) + self._live_free(buyer))
            if not left.n:  # nothing to begin with: no grant either, and nobody's turn taken
                raise
        else:
            return self._book.authorise(buyer, amount.n)
        part = self._book.slice_of(buyer) or Slice(_NO_LEASE, buyer, 0)
        free, part.free_nano = part.free_nano, 0  # nobody else may use it while it is being returned
        asked_at_ns = self._clock_ns()
        more_than_left = max(least, Nano(left.n + 1))
        try:
            async with self._engine.begin() as conn:
                if free:
                    await overdrafts.take_turn(conn)  # before the lease, as who has none takes it first
                    await leases.shrink(conn, part.lease_id, Nano(free))
                granted = await overdrafts.lend(
                    conn,
                    buyer,
                    self._worker,
                    minimum=min(more_than_left, amount),
                    wanted=amount,
                    terms=terms,
                    ttl_ms=self._ttl_ms,
                    new_id=self._new_id,
                )
                self._in_doubt.add(part)  # until the commit is answered; without answer, what was lent lapses
        except InsufficientFunds:
            return None
        finally:
            self._restore(part, free)
        self._in_doubt.discard(part)
        own = Slice(granted.lease_id, buyer, 0, granted.amount.n, 0, self._usable_until(asked_at_ns))
        self._overdrawn[own.lease_id] = own
        return Hold(own, granted.amount.n)

    def _return_overdraft(self, hold: Hold) -> None:
        """What one overdrawn request left of its lease serves no other: back to the balance."""
        if hold.state is not HoldState.ENDED or self._overdrawn.pop(hold.lease_id, None) is None:
            return
        task = asyncio.get_running_loop().create_task(self._give_back(hold.lease_id), name="overdraft-return")
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)

    async def _give_back(self, lease_id: UUID) -> None:
        with contextlib.suppress(*_UNREACHABLE):  # then it expires and is reaped
            async with self._engine.begin() as conn:
                await leases.give_back(conn, lease_id)

    async def _fetch(self, buyer: int, amount: Nano, least: Nano) -> None:
        """Make the buyer's slice live and at least `least` free, `amount` if there is as much."""
        part = self._book.slice_of(buyer)
        if part is not None and await self._revive(part):
            if part.free_nano < amount.n:
                await self._enlarge(part, amount, least)
            return
        if self._is_closed:
            raise LedgerUnavailable("no lease: this process is stopping")
        asking = _Asking(leases.Ask(buyer, least, amount), asyncio.get_running_loop().create_future())
        self._asking.append(asking)
        if self._granting is None:
            self._granting = asyncio.create_task(self._grant_on(), name="lease-grant")
        await asking.outcome

    async def _grant_on(self) -> None:
        """Answer all who ask, those who come while the database is at work together."""
        try:
            while self._asking:
                turn, later = self._turn()
                self._asking = later
                await self._grant(turn)
        finally:
            self._granting = None
            for asking in self._asking:  # none, unless we are being closed or at fault
                _tell(asking, LedgerUnavailable("no lease: this process grants no more just now"))
            self._asking = []

    def _turn(self) -> tuple[list[_Asking], list[_Asking]]:
        """Who is answered next, a buyer once, and who later."""
        turn: dict[int, _Asking] = {}
        for asking in self._asking:
            if len(turn) < ASKS_MAX:
                turn.setdefault(asking.ask.buyer, asking)
        later = [asking for asking in self._asking if turn.get(asking.ask.buyer) is not asking]
        return list(turn.values()), later

    async def _grant(self, turn: Sequence[_Asking]) -> None:
        asked_at_ns = self._clock_ns()
        try:
            async with self._engine.begin() as conn:
                answers = await leases.lease_all(
                    conn,
                    self._worker,
                    [asking.ask for asking in turn],
                    cap=self._slice_max,
                    ttl_ms=self._ttl_ms,
                    new_id=self._new_id,
                )
        except _UNREACHABLE as e:
            for asking in turn:
                _tell(asking, LedgerUnavailable("no lease: the database does not answer"), because=e)
            return
        except BaseException:
            self._asking = [*turn, *self._asking]  # told where this ends
            raise
        until = self._usable_until(asked_at_ns)
        for asking, answer in zip(turn, answers, strict=True):
            if isinstance(answer, Granted):  # into the book also where nobody waits for it any more
                self._book.add(
                    answer.lease_id,
                    buyer=asking.ask.buyer,
                    amount_nano=answer.amount.n,
                    usual_nano=answer.usual.n,
                    usable_until_ns=until,
                )
            _tell(asking, None if isinstance(answer, Granted) else answer)

    async def _revive(self, part: Slice) -> bool:
        """Make sure that the slice is live and not in doubt; False if its lease was reaped."""
        asked_at_ns = self._clock_ns()
        if asked_at_ns < part.usable_until_ns and part not in self._in_doubt:
            return True
        async with self._engine.begin() as conn:
            alive = await leases.renew(conn, self._worker, {part.lease_id}, ttl_ms=self._ttl_ms)
            if (
                part in self._in_doubt
                and (amount := await leases.read_amount(conn, part.lease_id)) is not None
            ):
                # Only while the lease is locked: no charge takes from it now.  One that was posted and is not
                # settled here is in `reserved` still, so this may be too little by its cost, never too much.
                part.free_nano = max(part.free_nano, amount.n - part.reserved_nano)
                self._in_doubt.discard(part)
        self._book.renewed(alive, usable_until_ns=self._usable_until(asked_at_ns))
        self._book.drop({part.lease_id} - alive)
        return bool(alive)

    def _restore(self, part: Slice, free_nano: int) -> None:
        """What was to leave the lease did not, as no commit was sent.  One in doubt is read: `_revive`."""
        if part not in self._in_doubt:
            part.free_nano += free_nano

    async def _enlarge(self, part: Slice, amount: Nano, least: Nano) -> None:
        missing, asked_at_ns = amount.n - part.free_nano, self._clock_ns()
        try:
            granted = await self._extend(part, Nano(max(1, least.n - part.free_nano)), Nano(missing))
        except InsufficientFunds:
            if part.free_nano < least.n:
                raise
            return
        if granted is None:  # reaped between two statements: the caller's next attempt takes a new lease
            self._book.drop({part.lease_id})
            raise LedgerUnavailable("the lease ended before it could be used")
        self._grow(part, granted, asked_at_ns)

    async def _extend(self, part: Slice, minimum: Nano, wanted: Nano) -> Granted | None:
        async with self._engine.begin() as conn:
            granted = await leases.extend(
                conn,
                part.lease_id,
                part.buyer,
                minimum=minimum,
                wanted=wanted,
                cap=self._slice_max,
                ttl_ms=self._ttl_ms,
            )
            self._in_doubt.add(part)  # until the commit is answered
        self._in_doubt.discard(part)
        return granted

    def _grow(self, part: Slice, granted: Granted, asked_at_ns: int) -> None:
        until = self._usable_until(asked_at_ns)
        self._book.grow(part, amount_nano=granted.amount.n, usual_nano=granted.usual.n, usable_until_ns=until)

    def _usable_until(self, asked_at_ns: int) -> int:
        return asked_at_ns + (self._ttl_ms - self._stop_early_ms) * _NS_PER_MS

    def _live_free(self, buyer: int) -> int:
        part = self._book.slice_of(buyer)
        return 0 if part is None else part.free_nano

    def _lock(self, buyer: int) -> asyncio.Lock:
        return self._locks.setdefault(buyer, asyncio.Lock())

    def _refill_soon(self, part: Slice) -> None:
        if part.buyer not in self._refilling and not self._is_closed:
            task = asyncio.create_task(self._refill(part), name="lease-refill")
            self._refilling[part.buyer] = task
            task.add_done_callback(lambda _: self._refilling.pop(part.buyer, None))

    async def _refill(self, part: Slice) -> None:
        try:
            async with self._lock(part.buyer):
                if self._book.slice_of(part.buyer) is not part or not self._book.needs_refill(part):
                    return
                if part in self._in_doubt and not await self._revive(part):
                    return
                asked_at_ns = self._clock_ns()
                granted = await self._extend(part, Nano(1), ZERO)
                if granted is None:
                    self._book.drop({part.lease_id})
                else:
                    self._grow(part, granted, asked_at_ns)
        except InsufficientFunds:
            part.usual_nano = 0  # nothing left to refill from: the slow path decides from here on
        except _UNREACHABLE:
            _log.warning("a lease could not be refilled", exc_info=True)
            await asyncio.sleep(self._ttl_ms / 10_000)  # holds off the next attempt

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_ms / 3_000)
            try:
                await self.tend()
            except _UNREACHABLE:
                _log.warning("leases could not be renewed; they lapse", exc_info=True)

    async def tend(self) -> None:
        """One round of upkeep: return idle slices and excess, renew the rest, reap what others left."""
        idle_since_ns = self._clock_ns() - self._ttl_ms * _NS_PER_MS
        await self._return_idle(unused_since_ns=idle_since_ns)
        for part in self._book:
            await self._return_excess(part)
        await self._renew_all()
        await self._reap()
        self._forget()

    async def _renew_all(self) -> None:
        asked, asked_at_ns = {part.lease_id for part in self._book} | self._overdrawn.keys(), self._clock_ns()
        if not asked:
            return
        async with self._engine.begin() as conn:
            alive = await leases.renew(conn, self._worker, asked, ttl_ms=self._ttl_ms)
        self._book.renewed(alive, usable_until_ns=self._usable_until(asked_at_ns))
        self._book.drop(asked - alive)
        for lease_id in asked - alive:
            self._overdrawn.pop(lease_id, None)

    async def _reap(self) -> None:
        async with self._engine.begin() as conn:
            await leases.reap(conn, margin_ms=REAP_MARGIN_MS)

    async def _return_idle(self, *, unused_since_ns: int) -> None:
        """Return slices nobody has used since; their buyers' next requests wait for it, which need the money.

        A buyer whose slice is being fetched or refilled is not idle.
        """
        idle: list[UUID] = []
        async with contextlib.AsyncExitStack() as held:
            for part in self._book:
                if self._lock(part.buyer).locked():
                    continue
                if self._book.take_out_idle(part.buyer, unused_since_ns=unused_since_ns) is not None:
                    await held.enter_async_context(self._lock(part.buyer))
                    idle.append(part.lease_id)
            with contextlib.suppress(*_UNREACHABLE):  # then they expire and are reaped
                for start in range(0, len(idle), ASKS_MAX):
                    async with self._engine.begin() as conn:
                        await leases.give_back_all(conn, idle[start : start + ASKS_MAX])

    async def _return_excess(self, part: Slice) -> None:
        async with self._lock(part.buyer):
            if part in self._in_doubt and not await self._revive(part):
                return
            excess = self._book.take_excess(part)
            if not excess:
                return
            try:
                async with self._engine.begin() as conn:
                    await leases.shrink(conn, part.lease_id, Nano(excess))
                    self._in_doubt.add(part)  # until the commit is answered
            finally:
                self._restore(part, excess)
            self._in_doubt.discard(part)

    def _forget(self) -> None:
        self._locks = {
            buyer: lock
            for buyer, lock in self._locks.items()
            if lock.locked() or self._book.slice_of(buyer) is not None
        }
        self._in_doubt.intersection_update(self._book)


def _tell(asking: _Asking, error: LedgerError | None, *, because: BaseException | None = None) -> None:
    """End somebody's waiting, unless he has stopped."""
    if asking.outcome.done():
        return
    if error is None:
        asking.outcome.set_result(None)
    else:
        error.__cause__ = because
        asking.outcome.set_exception(error)
