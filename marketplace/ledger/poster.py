"""The poster: writes a process's charges in batches, one transaction each, one at a time.

The next batch leaves when the previous one is durable, so batches grow with the load by themselves: up
to 512 charges.  Where fewer wait than the previous batch had, it waits 2 ms for the others, since many small
commits fight for the disk.  One transaction per charge would queue on the shared revenue row (measured: 16
to 23 times slower).  Where the next batch is at hand already, those of the durable one are told while the
database works on it: else the process and the database would take turns.

Exactly once: the charge's id is its key.  A replay of the same charge is accepted and changes nothing;
the same id with other contents is `KeyReused`.  A batch the database refuses is split until the
refused charge fails alone.  After a lost commit the lane's chain is asked; nothing is repeated blindly.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self
from uuid import UUID

import asyncpg
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import lane as lanes
from marketplace.ledger.charges import Charge, pack
from marketplace.ledger.errors import (
    ChargeRefused,
    KeyReused,
    LedgerBroken,
    LedgerError,
    LedgerUnavailable,
    UnknownAccount,
    UnknownResult,
)
from marketplace.ledger.ids import NewId, uuid7
from marketplace.ledger.lane import (
    Attempt,
    Lane,
    MissingAccountsError,
    NeedsLossAccountError,
    Session,
    Waiting,
)
from marketplace.ledger.lease_book import Hold, HoldState
from marketplace.ledger.money import ZERO, Nano

_log = logging.getLogger(__name__)

BATCH_ROWS_MAX: Final = 512
"""While the database writes so many, the process can prepare as many more."""
WINDOW_S: Final = 0.002
QUEUE_MAX: Final = 16_384
PATIENCE_S: Final = 5.0
_RETRY_S: Final = 0.1
_REFUSED_CLASSES: Final = ("22", "23", "54")
"""SQLSTATE classes that are the row's own fault: bad data, constraint, program limit."""

_FAULTS: Final = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what a statement meets after a dying server's last word
    SQLAlchemyError,
    LedgerUnavailable,
)


class Poster:
    """Accepts charges from `start` to `close`; tells `settle` what each durable one took of its hold."""

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        settle: Callable[[Hold, Nano], None],
        lane: int | None = None,
        new_id: NewId = uuid7,
        patience_s: float = PATIENCE_S,
        queue_max: int = QUEUE_MAX,
    ) -> None:
        """`lane` None takes the first free one; `settle` is `LeaseKeeper.settle`."""
        self._engine = engine
        self._settle = settle
        self._wanted_lane = lane
        self._new_id = new_id
        self._patience_s = patience_s
        self._queue_max = queue_max
        self._queue: deque[Waiting] = deque()
        self._in_flight: Sequence[Waiting] = ()
        self._durable: deque[Waiting] = deque()
        """Posted, and not told yet."""
        self._last_rows = 0
        """Of the previous batch."""
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._lane: Lane | None = None
        self._session: Session | None = None
        self._broken: LedgerError | None = None
        self._is_closing = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Begin posting; a database that is away is waited for."""
        self._tasks = [
            asyncio.create_task(self._run(), name="poster"),
            asyncio.create_task(self._watch(), name="poster-watch"),
        ]

    async def close(self) -> None:
        """Post what waits, as long as the patience lasts; then stop.

        What was never sent fails with `LedgerUnavailable`, what was in flight with `UnknownResult`.
        """
        self._is_closing = True
        self._work.set()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=self._patience_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tell()
        for waiting in self._in_flight:
            _fail(waiting, UnknownResult("closed while the charge was being posted"), keep_hold=True)
        for waiting in self._queue:
            _fail(waiting, LedgerUnavailable("closed before the charge was posted"))
        self._in_flight = ()
        self._queue.clear()
        await self._drop_lane()

    @property
    def waiting(self) -> int:
        """Charges accepted and not yet durable."""
        return len(self._queue) + len(self._in_flight)

    @property
    def is_ready(self) -> bool:
        """A lane is claimed and nothing is broken."""
        return self._lane is not None and self._broken is None

    @property
    def lane(self) -> int | None:
        """The number of the lane last claimed."""
        return None if self._session is None else self._session.lane

    async def post(self, charge: Charge, hold: Hold | None = None) -> bool:
        """Make the charge durable; True if it is new, False if the same charge was on record already.

        Returning settles the hold.  Raises
        `LedgerUnavailable`: not accepted (full queue, or closed); the hold is still yours.
        `UnknownResult`: accepted, and will be posted when the database is back, unless this process ends
        first; the hold is the poster's; post the same charge again to ask.
        `ChargeRefused`, `UnknownAccount`, `KeyReused`: refused for good; the hold is still yours.
        `LedgerBroken`: stop and page.
        Cancelling the call does not take an accepted charge back.
        """
        if hold is not None and (hold.buyer != charge.buyer or hold.state is not HoldState.OPEN):
            raise ValueError("the hold is another buyer's, or has ended")
        if len(self._queue) >= self._queue_max:
            await self._wait_for_room()
        if self._broken is not None:
            raise self._broken
        if self._is_closing:
            raise LedgerUnavailable("the poster is closed")
        if hold is not None:
            hold.state = HoldState.POSTING
        loop = asyncio.get_running_loop()
        waiting = Waiting(charge, hold, loop.create_future(), loop.time() + self._patience_s)
        self._queue.append(waiting)
        self._work.set()
        return await waiting.outcome

    async def _wait_for_room(self) -> None:
        try:
            async with asyncio.timeout(self._patience_s):
                while len(self._queue) >= self._queue_max and not self._is_closing:
                    self._room.clear()
                    await self._room.wait()
        except TimeoutError as e:
            raise LedgerUnavailable(f"{len(self._queue)} charges wait already") from e

    async def _watch(self) -> None:
        """Tell those who waited too long; their charges stay accepted."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(0.25, self._patience_s / 4))
            self._tell()  # should the next batch not even reach the database
            now = loop.time()
            for waiting in (*self._in_flight, *self._queue):
                if waiting.give_up_at <= now:
                    _fail(waiting, UnknownResult("not durable yet"), keep_hold=True)

    async def _run(self) -> None:
        try:
            while await self._has_work():
                self._in_flight = self._take()
                self._last_rows = len(self._in_flight)
                await self._post_all(self._in_flight)
                self._in_flight = ()
                self._room.set()
                if len(self._queue) <= lanes.ONE_CALL_ROWS_MAX:  # the next goes in one call
                    self._tell()
            self._tell()
        except LedgerBroken as e:
            self._break(e)
        except Exception as e:  # a mistake of ours: nobody may wait for ever
            self._break(LedgerBroken(f"the poster stopped: {e!r}"), cause=e)

    def _break(self, error: LedgerBroken, cause: Exception | None = None) -> None:
        _log.critical("the poster is broken and stops", exc_info=cause or error)
        self._broken = error
        self._tell()
        for waiting in (*self._in_flight, *self._queue):
            _fail(waiting, error, keep_hold=True)
        self._in_flight = ()
        self._queue.clear()
        self._room.set()

    async def _has_work(self) -> bool:
        if self._lane is None and not self._is_closing:
            await self._claim()
        while not self._queue:
            if self._is_closing:
                return False
            self._work.clear()
            await self._work.wait()
        if len(self._queue) < self._last_rows and not self._is_closing:
            await asyncio.sleep(WINDOW_S)
        return True

    def _take(self) -> list[Waiting]:
        """The next batch, in id order; a second charge of one id waits for the next batch."""
        batch: dict[UUID, Waiting] = {}
        twice: list[Waiting] = []
        while self._queue and len(batch) < BATCH_ROWS_MAX:
            waiting = self._queue.popleft()
            if batch.setdefault(waiting.charge.id, waiting) is not waiting:
                twice.append(waiting)
        self._queue.extendleft(reversed(twice))
        return sorted(batch.values(), key=lambda waiting: waiting.charge.id.int)

    async def _post_all(self, batch: Sequence[Waiting]) -> None:
        """Return when every charge has its outcome; splits what the database refuses."""
        parts = [batch]
        while parts:
            part = parts.pop()
            if not part:
                continue
            try:
                await self._post_part(part)
            except asyncpg.UniqueViolationError:
                parts.append(await self._without_stored(part))
            except MissingAccountsError as e:
                parts.append(_without_accounts(part, e.accounts))
            except asyncpg.PostgresError as e:
                if len(part) == 1:
                    _refuse(part[0], e)
                else:
                    middle = len(part) // 2
                    parts += [part[middle:], part[:middle]]
            else:
                self._tell()  # those of the batch before, if any are left
                self._durable.extend(part)

    async def _post_part(self, part: Sequence[Waiting]) -> None:
        """Commit these charges, outlasting faults; raises only what is the charges' own fault."""
        with_loss = False
        while True:
            lane = await self._claimed()
            attempt, rows = lane.prepare([waiting.charge for waiting in part])
            try:
                await lanes.commit(
                    lane, part, attempt, rows,
                    with_loss=with_loss, new_id=self._new_id, on_sent=self._tell_half,
                )  # fmt: skip
            except NeedsLossAccountError:
                with_loss = True
            except _FAULTS as e:
                self._tell()
                if _is_charges_fault(e):
                    raise
                _log.warning("a batch met a fault; asking the lane's chain", exc_info=True)
                if await self._landed(attempt, lane.number):
                    return
            else:
                return

    async def _landed(self, attempt: Attempt, number: int) -> bool:
        """Ask for certain: once a lane is claimed again, the old session's transaction is over."""
        await self._drop_lane()
        while True:
            await asyncio.sleep(_RETRY_S)
            lane = await self._claimed()
            try:
                return await lanes.landed(lane, number, attempt)
            except _FAULTS:
                _log.warning("could not ask the lane's chain", exc_info=True)
                await self._drop_lane()

    async def _without_stored(self, part: Sequence[Waiting]) -> list[Waiting]:
        """Answer for the charges that are on record already; give back the others."""
        while True:
            lane = await self._claimed()
            try:
                found = await lanes.stored(lane, [waiting.charge.id for waiting in part])
                break
            except _FAULTS:
                _log.warning("could not ask for stored charges", exc_info=True)
                await self._drop_lane()
                await asyncio.sleep(_RETRY_S)
        rest = []
        for waiting in part:
            known = found.get(waiting.charge.id)
            if known is None:
                rest.append(waiting)
            elif pack(known, 0, 0) == pack(waiting.charge, 0, 0):
                self._succeed(waiting, is_new=False)
            else:
                _fail(waiting, KeyReused(f"charge {waiting.charge.id} is on record with other contents"))
        return rest

    async def _claimed(self) -> Lane:
        while self._lane is None:
            await self._claim()
        return self._lane

    async def _claim(self) -> None:
        try:
            self._lane = await lanes.claim(
                self._engine, self._wanted_lane, after=self._session, patience_s=self._patience_s
            )
            self._session = self._lane.session
        except _FAULTS:
            _log.warning("no poster lane yet", exc_info=True)
            await asyncio.sleep(_RETRY_S)

    async def _drop_lane(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            with contextlib.suppress(*_FAULTS):
                await lane.drop()

    def _tell_half(self) -> None:
        """The database has got its next piece of work: time for some of those whose charges are durable."""
        self._tell(BATCH_ROWS_MAX // 2)

    def _tell(self, most: int = QUEUE_MAX) -> None:
        for _ in range(min(most, len(self._durable))):
            self._succeed(self._durable.popleft(), is_new=True)

    def _succeed(self, waiting: Waiting, *, is_new: bool) -> None:
        if waiting.hold is not None:
            self._settle(waiting.hold, waiting.charge.amount if is_new else ZERO)
        if not waiting.outcome.done():
            waiting.outcome.set_result(is_new)


def _is_charges_fault(error: BaseException) -> bool:
    """The rows are to blame, the transaction was rolled back, and the session lives."""
    if not isinstance(error, asyncpg.PostgresError) or not error.sqlstate:
        return False
    if isinstance(error, asyncpg.UniqueViolationError) and not (error.table_name or "").startswith("charges"):
        return False  # somebody else extended our lane: ask
    return error.sqlstate[:2] in _REFUSED_CLASSES


def _without_accounts(part: Sequence[Waiting], missing: frozenset[int]) -> list[Waiting]:
    rest = []
    for waiting in part:
        named = {waiting.charge.buyer, waiting.charge.operator} & missing
        if waiting.charge.amount.n and named:
            _fail(waiting, UnknownAccount(f"no balance for {sorted(named, key=str)}"))
        else:
            rest.append(waiting)
    if len(rest) == len(part):
        raise LedgerBroken(f"the poster's own accounts are missing: {sorted(missing)}")
    return rest


def _refuse(waiting: Waiting, error: Exception) -> None:
    _log.error("the database refuses charge %s: %s", waiting.charge.id, error)
    refused = ChargeRefused(f"the database refuses charge {waiting.charge.id}: {error}")
    refused.__cause__ = error
    _fail(waiting, refused)


def _fail(waiting: Waiting, error: LedgerError, *, keep_hold: bool = False) -> None:
    """Tell the caller; the hold is its own again unless the poster keeps it."""
    if waiting.hold is not None and not keep_hold:
        waiting.hold.state = HoldState.OPEN
    if not waiting.outcome.done():
        waiting.outcome.set_exception(error)
