"""What a gateway writes beside each charge: hashes for its receipt, drift, and who else saw the prompt.

Rows go in one statement on a session of their own, while the poster commits the charges; where fewer
wait than went the last time, a millisecond is left to the others.  The statement does not wait for the disk
(`synchronous_commit = off`), since the commit of the charges, which the buyer waits for, writes the log up to
there or a fraction of a second more.
A row that cannot be written for `PATIENCE_S` is given up: its receipt then has no hashes, and says so.  One
that the database refuses is given up at once, and alone: what a node said must not hold up others' answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar
from uuid import UUID

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.metering.counting import CountedOn
from marketplace.platform.own_session import FAULTS, OwnSession

_log = logging.getLogger(__name__)

WINDOW_S: Final = 0.001
PATIENCE_S: Final = 5.0
RETRY_S: Final = 0.2
ROWS_MAX: Final = 1_024
QUEUE_MAX: Final = 16_384
REFUSED: Final = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)
"""What the database says of a row that it will never take: SQLSTATE classes 22 and 23."""

_HASHES: Final = """
    INSERT INTO receipts (id, request_sha256, response_sha256, counted_on)
    SELECT * FROM unnest($1::uuid[], $2::bytea[], $3::bytea[], $4::smallint[]) ON CONFLICT DO NOTHING"""
_DRIFTS: Final = """
    INSERT INTO metering_drift (id, node, model, prompt_counted, prompt_reported, completion_counted,
                                completion_reported)
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::integer[], $5::integer[], $6::integer[],
                         $7::integer[]) ON CONFLICT DO NOTHING"""
_ATTEMPTS: Final = """
    INSERT INTO failed_attempts (id, attempt, node, model, reason)
    SELECT * FROM unnest($1::uuid[], $2::smallint[], $3::uuid[], $4::text[], $5::text[])
    ON CONFLICT DO NOTHING"""


@dataclass(frozen=True, slots=True)
class Hashes:
    """What a receipt says beyond the charge."""

    id: UUID
    request_sha256: bytes
    response_sha256: bytes
    counted_on: CountedOn


class Drift(NamedTuple):
    """A node's count and ours too far apart; None where it told none that made sense.

    A row of its table, column by column.
    """

    id: UUID
    node: UUID
    model: str
    prompt_counted: int
    prompt_reported: int | None
    completion_counted: int
    completion_reported: int | None


class Attempt(NamedTuple):
    """A node that was sent a request, and so has seen its prompt, and did not answer it to the end.

    A row of its table, column by column.
    """

    id: UUID
    attempt: int
    """Counted from 1."""
    node: UUID
    model: str
    reason: str


_Row = TypeVar("_Row", Drift, Attempt)


class ReceiptWriter:
    """Accepts rows from `start` to `close`."""

    def __init__(self, engine: AsyncEngine, *, patience_s: float = PATIENCE_S) -> None:
        self._session = OwnSession(engine)
        self._patience_s = patience_s
        self._hashes: deque[tuple[Hashes, asyncio.Future[bool]]] = deque()
        self._drifts: deque[Drift] = deque(maxlen=QUEUE_MAX)
        self._attempts: deque[Attempt] = deque(maxlen=QUEUE_MAX)
        self._last_rows = 0
        self._work = asyncio.Event()
        self._is_closing = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin writing; a database that is away is waited for."""
        self._task = asyncio.create_task(self._run(), name="receipt-writer")

    async def close(self) -> None:
        """Write what waits, as long as the patience lasts."""
        self._is_closing = True
        self._work.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=self._patience_s)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for _, written in self._hashes:
            written.set_result(False)
        self._hashes.clear()
        await self._session.close()

    def note(self, hashes: Hashes) -> asyncio.Future[bool]:
        """Have a row written; the future tells whether it was, and never raises."""
        written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if len(self._hashes) >= QUEUE_MAX or self._is_closing:
            written.set_result(False)
            return written
        self._hashes.append((hashes, written))
        self._work.set()
        return written

    def drifted(self, drift: Drift) -> None:
        """Have a drift written some time soon; of a flood, the newest."""
        self._drifts.append(drift)
        self._work.set()

    def failed(self, attempt: Attempt) -> None:
        """Have a failed attempt written some time soon; of a flood, the newest."""
        self._attempts.append(attempt)
        self._work.set()

    async def _run(self) -> None:
        while True:
            while not (self._hashes or self._drifts or self._attempts):
                if self._is_closing:
                    return
                self._work.clear()
                await self._work.wait()
            if len(self._hashes) < self._last_rows and not self._is_closing:
                await asyncio.sleep(WINDOW_S)
            self._last_rows = len(self._hashes)
            await self._write_hashes()
            await self._write_some(_DRIFTS, self._drifts)
            await self._write_some(_ATTEMPTS, self._attempts)

    async def _write_hashes(self) -> None:
        part = [self._hashes.popleft() for _ in range(min(len(self._hashes), ROWS_MAX))]
        if not part:
            return
        rows = [(row.id, row.request_sha256, row.response_sha256, int(row.counted_on)) for row, _ in part]
        outcomes = [False] * len(part)
        try:
            outcomes = await self._insert(_HASHES, rows)
        finally:
            for (_, written), is_written in zip(part, outcomes, strict=True):
                if not written.done():
                    written.set_result(is_written)

    async def _write_some(self, statement: str, waiting: deque[_Row]) -> None:
        rows = [waiting.popleft() for _ in range(min(len(waiting), ROWS_MAX))]
        if rows:
            await self._insert(statement, rows)

    async def _insert(
        self, statement: str, rows: Sequence[tuple[object, ...]], give_up_at: float | None = None
    ) -> list[bool]:
        """Write rows; tell of each whether it was: not when patience ran out or the database refuses it."""
        loop = asyncio.get_running_loop()
        if give_up_at is None:
            give_up_at = loop.time() + self._patience_s
        columns = [list(column) for column in zip(*rows, strict=True)]
        while True:
            try:
                async with asyncio.timeout_at(give_up_at):
                    await self._session.fetch(statement, *columns)
            except REFUSED as e:
                if len(rows) == 1:
                    _log.warning("a row beside charge %s is refused: %s", rows[0][0], type(e).__name__)
                    return [False]
                half = len(rows) // 2  # the few that are meant are found in a few statements
                return [
                    *await self._insert(statement, rows[:half], give_up_at),
                    *await self._insert(statement, rows[half:], give_up_at),
                ]
            except FAULTS as e:
                if loop.time() + RETRY_S >= give_up_at:
                    _log.warning("%d rows beside charges are given up: %s", len(rows), type(e).__name__)
                    return [False] * len(rows)
                await asyncio.sleep(RETRY_S)
            else:
                return [True] * len(rows)
