"""One chain's watcher: what the chain says goes into the book, once, when it is final.

A `tick` is one unit of progress and one transaction:

1. the node's final block is above ours → read that range, book every transfer in it, move the cursor;
2. else the node's head is not our tip → read what is new, show deposits as seen, orphan what a reorg took.

Final blocks are read again at finality even if they were seen before, so that credit never depends on
what was read while it could still change: what is booked equals a fresh index of the final chain.

Nothing is kept that the database does not have: after any failure the watcher reads its cursor again.
A final block that contradicts the cursor halts the chain, in the database, until a person resumes it; so
does a deposit that the ledger refuses to book.
One watcher per chain works (a session lock); others wait as hot standby.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import structlog
from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chain.errors import ChainBroken, ChainError, FinalityViolated, RpcUnavailable
from chain.headers import (
    Extended,
    Fetch,
    FinalRegressed,
    Idle,
    Lagging,
    Reorged,
    finalize,
    follow,
    plan_final,
    plan_head,
)
from chain.ports import BlockFacts, ChainReader, Departure, Header, TransferSeen
from chain.units import Micro
from marketplace.deposits import metrics
from marketplace.deposits.alarms import halt_and_ask, note_changes, require_acknowledged
from marketplace.deposits.booking import (
    Credit,
    Rules,
    book_final,
    book_opening_balance,
    orphan,
    record_foreign,
    record_seen,
)
from marketplace.deposits.cursor import Cursor, create_cursor, load_cursor, save_cursor
from marketplace.deposits.directory import KnownAddresses, look_up
from marketplace.deposits.errors import ChainHalted, DepositFault, Unacknowledged
from marketplace.deposits.tables import chain_cursors
from marketplace.ledger.errors import LedgerRefusal
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction

WATCHER: Final = "watcher"
PROGRESS_EVERY_S: Final = 5.0
STALL_S: Final = 3600.0
"""A node whose final block has not moved for so long: nothing is lent on the chain until it does."""
LOCK_SPACE: Final = 0x746F6C6C  # "toll": first key of the advisory locks, the second is the chain's
_log: Final = structlog.get_logger("marketplace.deposits")


@dataclass(frozen=True, slots=True)
class Pace:
    """How much and how often."""

    blocks_per_tick: int = 500
    """Of one read; both adapters take at least 2,000."""
    poll_s: float = 0.5
    fault_wait_s: float = 1.0
    """After a failed tick; doubled up to `fault_wait_s_max`."""
    fault_wait_s_max: float = 30.0
    standby_poll_s: float = 1.0
    identity_every_s: float = 3600.0


@dataclass(slots=True)
class Watcher:
    """Follows one chain; `start_height` None means: begin above the block that is final at first start."""

    rules: Rules
    reader: ChainReader
    engine: AsyncEngine
    clock: Clock
    start_height: int | None = None
    pace: Pace = field(default_factory=Pace)
    on_credit: Callable[[Credit], None] | None = None
    """Called after the commit; must not raise."""
    _cursor: Cursor | None = None
    _addresses: KnownAddresses = field(init=False)
    _halt_told: bool = False
    _caught_up_from_at: tuple[float, int] | None = None
    """Since when, and from which height, this watcher has been catching up."""
    _progress_told_at: float = 0.0
    _final_moved_at: tuple[int, float] | None = None
    """The highest final block the node has told, and when it first did (monotonic seconds)."""
    _stall_told: bool = False

    def __post_init__(self) -> None:
        self._addresses = KnownAddresses(self.rules.chain, self.rules.escrow)

    async def tick(self) -> bool:
        """Make one unit of progress; False if there was nothing to do (or the chain is halted).

        Raises ChainError or a database error after which calling again is safe.
        """
        try:
            return await self._tick()
        except (FinalityViolated, Unacknowledged, LedgerRefusal) as e:
            # A refusal of the ledger too: it would refuse again, and other chains go on.
            self._cursor = None
            await self._halt(str(e))
            return False
        except ChainHalted:
            self._cursor = None
            return False
        except BaseException:
            self._cursor = None  # the database knows better
            raise

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the chain until `stop`; returns after the unit in progress is committed."""
        while not stop.is_set():
            try:
                async with self.engine.connect() as connection:
                    lock = await connection.execution_options(isolation_level="AUTOCOMMIT")
                    if await self._is_ours(lock):
                        await self._follow(lock, stop)
            except (SQLAlchemyError, OSError):
                self._odd("database")
                _log.warning("watcher lost the database", chain=self.rules.chain.value, exc_info=True)
            await _wait(stop, self.pace.standby_poll_s)

    async def _follow(self, lock: AsyncConnection, stop: asyncio.Event) -> None:
        """Tick while we hold the lock; its connection is asked each time, since the lock dies with it."""
        _log.info("watching", chain=self.rules.chain.value)
        self._cursor = None
        wait_s = self.pace.fault_wait_s
        identity_at = self.clock.monotonic()
        try:
            while not stop.is_set():
                await lock.execute(text("SELECT 1"))
                try:
                    if self.clock.monotonic() >= identity_at:
                        await self.reader.check_identity()
                        identity_at = self.clock.monotonic() + self.pace.identity_every_s
                    is_progress = await self.tick()
                    wait_s = self.pace.fault_wait_s
                except (ChainError, DepositFault) as e:
                    self._odd(type(e).__name__)
                    level = _log.error if isinstance(e, ChainBroken) else _log.warning
                    level("no progress", chain=self.rules.chain.value, reason=str(e), fault=type(e).__name__)
                    identity_at = self.clock.monotonic()  # who answers may have changed
                    await _wait(stop, wait_s)
                    wait_s = min(2 * wait_s, self.pace.fault_wait_s_max)
                    continue
                if not is_progress:
                    await _wait(stop, self.pace.poll_s)
        finally:
            # Not left to the pool: a connection that goes back keeps its session's locks.
            with suppress(SQLAlchemyError, OSError):
                await lock.execute(select(func.pg_advisory_unlock(*self._lock_key())))

    async def _is_ours(self, connection: AsyncConnection) -> bool:
        return bool(await connection.scalar(select(func.pg_try_advisory_lock(*self._lock_key()))))

    def _lock_key(self) -> tuple[int, int]:
        chain = int.from_bytes(self.rules.chain.value.encode()[:3])
        return LOCK_SPACE, chain

    async def _tick(self) -> bool:
        final = await self.reader.final()
        self._watch_finality(final)
        cursor = await self._load()
        if cursor is None:
            await self._start(final)
            return True
        self._tell_halt(cursor)
        if cursor.halt is not None:
            return False
        if await self._move_final(cursor, final):
            return True
        return await self._move_head(cursor)

    def _watch_finality(self, final: Header) -> None:
        """Say once when finality stalls.  Credits wait for it anyway; loans against it stop."""
        now = self.clock.monotonic()
        if self._final_moved_at is None or final.height > self._final_moved_at[0]:
            self._final_moved_at, self._stall_told = (final.height, now), False
        unmoved_s = now - self._final_moved_at[1]
        metrics.FINAL_UNMOVED.labels(self.rules.chain).set(unmoved_s)
        if unmoved_s > STALL_S and not self._stall_told:
            self._stall_told = True
            self._odd("final_stalled")
            _log.error("finality stalls", chain=self.rules.chain.value, height=final.height, for_s=unmoved_s)

    async def _load(self) -> Cursor | None:
        """The cursor, from memory while this watcher is the only writer; halts are read every time."""
        async with transaction(self.engine) as conn:
            await self._addresses.refresh(conn, self.clock.now())
            if self._cursor is None or await _is_stale(conn, self._cursor):
                self._cursor = await load_cursor(conn, self.rules.chain)
        return self._cursor

    async def _move_final(self, cursor: Cursor, final: Header) -> bool:
        chain = self.rules.chain
        metrics.FINAL_LAG.labels(chain).set(max(0, final.height - cursor.window.final.height))
        step = plan_final(cursor.window, final, limit=self.pace.blocks_per_tick)
        match step:
            case Idle():
                return False
            case FinalRegressed(by):
                self._odd("final_regressed")
                _log.warning("the node's final block went back", chain=chain.value, by=by)
                return False
            case Fetch(start, end):
                facts = await self._read_final(start, end, final)
                await self._require_acknowledged(facts, final)
        moved = finalize(cursor.window, [block.header for block in facts])
        if isinstance(moved, Fetch):
            raise RpcUnavailable(f"{chain}: the node left out final blocks from {moved.start}")
        now, transfers, outbound = self.clock.now(), _inbound(facts), _outbound(facts)
        foreign = [found for block in facts for found in block.foreign]
        async with transaction(self.engine) as conn:
            saved = await save_cursor(
                conn, cursor, moved.window, head_height=max(cursor.head_height, final.height), now=now
            )
            # A losing branch may reach above the new final block: nothing later would look at it again.
            await orphan(conn, chain, [header.hash for header in moved.orphaned], now)
            arrived = [*transfers, *(found.transfer for found in foreign)]
            directory = await look_up(conn, chain, self.rules.escrow, arrived)
            credited = await book_final(
                conn,
                self.rules,
                transfers,
                directory,
                through_height=moved.window.final.height,
                now=now,
                outbound=outbound,
            )
            await record_foreign(conn, chain, foreign, directory, now)
            await note_changes(conn, chain, [change for block in facts for change in block.changes], now)
        self._moved(saved)
        self._tell_progress(cursor.window.final.height, final.height)
        self._tell_credits(credited)
        return True

    async def _require_acknowledged(self, facts: Sequence[BlockFacts], final: Header) -> None:
        """Raise Unacknowledged for new code behind USDC (A8) or a new owner of one of our accounts (A26).

        Nothing of the range is booked then: all its deposits are on hold until a person has looked.
        """
        alarms = {
            change.alarm: f"{change.account}: {change.detail}"
            for block in facts
            for change in block.changes
            if change.what == "owner"
        }
        code = await self.reader.token_code(final.height)
        if code:
            alarms[f"token-code:{code}"] = "the code behind USDC has changed"
        if alarms:
            async with transaction(self.engine) as conn:
                await require_acknowledged(conn, self.rules.chain, alarms, self.clock.now())

    async def _read_final(self, start: int, end: int, final: Header) -> list[BlockFacts]:
        """Read a final range that holds at least one block (on Solana a whole range may be skipped)."""
        facts = await self.reader.blocks(start, end, self._addresses)
        while not facts and end < final.height:
            end = min(final.height, end + self.pace.blocks_per_tick)
            facts = await self.reader.blocks(
                max(start, end - self.pace.blocks_per_tick + 1), end, self._addresses
            )
        if not facts:
            raise RpcUnavailable(
                f"{self.rules.chain}: the node's final block {final.height} is not in its range"
            )
        newest = facts[-1].header
        if end == final.height and newest.hash != final.hash:
            raise RpcUnavailable(f"{self.rules.chain}: {final.height} was {final.hash}, then {newest.hash}")
        return facts

    async def _move_head(self, cursor: Cursor) -> bool:
        chain = self.rules.chain
        head = await self.reader.head()
        metrics.HEAD_HEIGHT.labels(chain).set(head.height)
        step: Idle | Lagging | Fetch | Extended | Reorged
        step = plan_head(cursor.window, head, limit=self.pace.blocks_per_tick)
        facts: list[BlockFacts] = []
        while isinstance(step, Fetch):
            facts = await self.reader.blocks(step.start, step.end, self._addresses)
            again = follow(cursor.window, [block.header for block in facts])
            if isinstance(again, Fetch) and again.start >= step.start:
                raise RpcUnavailable(f"{chain}: the node left out blocks from {again.start}")
            step = again
        match step:
            case Lagging(behind):
                self._odd("lagging")
                _log.debug("the node lags", chain=chain.value, behind=behind)
                return False
            case Extended() | Reorged():
                await self._save_seen(cursor, step, facts, head)
                return True
        return False

    async def _save_seen(
        self, cursor: Cursor, step: Extended | Reorged, facts: Sequence[BlockFacts], head: Header
    ) -> None:
        now = self.clock.now()
        added = {header.hash for header in step.added}
        fresh = [block for block in facts if block.header.hash in added]
        transfers = _inbound(fresh)
        async with transaction(self.engine) as conn:
            saved = await save_cursor(conn, cursor, step.window, head_height=head.height, now=now)
            if isinstance(step, Reorged):
                await orphan(conn, self.rules.chain, [header.hash for header in step.orphaned], now)
            directory = await look_up(conn, self.rules.chain, self.rules.escrow, transfers)
            rules = replace(self.rules, early=None) if self._stall_told else self.rules
            await record_seen(conn, rules, transfers, directory, now, outbound=_outbound(fresh))
        self._moved(saved)
        if isinstance(step, Reorged):
            metrics.REORGS.labels(self.rules.chain).inc()
            _log.info(
                "reorg", chain=self.rules.chain.value, blocks=len(step.orphaned), at=step.ancestor.height
            )

    async def _start(self, final: Header) -> None:
        """First start: choose the block to begin above, and book what the escrow holds there."""
        chain = self.rules.chain
        begin = final if self.start_height is None else await self.reader.header_at(self.start_height)
        if begin is None or begin.height > final.height:
            raise RpcUnavailable(f"{chain}: block {self.start_height}, to start from, is not final (yet)")
        opening = await self._opening_balance(begin, is_newest=begin == final)
        async with transaction(self.engine) as conn:
            if await create_cursor(conn, chain, begin, self.clock.now()):
                await book_opening_balance(conn, chain, opening, begin.height, self.clock.now())
        _log.info("first start", chain=chain.value, height=begin.height, opening_micro=opening.n)

    async def _opening_balance(self, begin: Header, *, is_newest: bool) -> Micro:
        """What the escrow held at `begin`: asked for only when that is the newest final block.

        An older start is a start from before the escrow existed (nodes forget old balances).  Solana tells
        the newest balance only: right if nothing came in since.
        """
        escrow = self.rules.escrow
        if not is_newest:
            return Micro(0)
        if self.rules.chain.is_evm:
            return await self.reader.usdc_balance(escrow, height=begin.height)
        amount = await self.reader.usdc_balance(escrow)
        after = await self.reader.final()
        if after.height > begin.height:
            since = await self.reader.blocks(begin.height + 1, after.height, self._addresses)
            if any(transfer.to == escrow for transfer in _inbound(since)):
                raise RpcUnavailable("the escrow was paid during the first start; once more")
        return amount

    async def _halt(self, reason: str) -> None:
        _log.critical("chain halted", chain=self.rules.chain.value, reason=reason)
        async with transaction(self.engine) as conn:
            await halt_and_ask(conn, self.rules.chain, actor=WATCHER, reason=reason, now=self.clock.now())

    def _tell_halt(self, cursor: Cursor) -> None:
        is_halted = cursor.halt is not None
        metrics.HALTED.labels(self.rules.chain).set(int(is_halted))
        if cursor.halt is not None and not self._halt_told:
            _log.error("halted", chain=self.rules.chain.value, reason=cursor.halt.reason, by=cursor.halt.by)
        self._halt_told = is_halted

    def _moved(self, saved: Cursor) -> None:
        self._cursor = saved
        metrics.FINAL_HEIGHT.labels(self.rules.chain).set(saved.window.final.height)

    def _tell_progress(self, before: int, target: int) -> None:
        """While far behind, say now and then how far and how fast."""
        height = self._cursor.window.final.height if self._cursor is not None else before
        now = self.clock.monotonic()
        if target - height <= self.pace.blocks_per_tick:
            self._caught_up_from_at = None
            return
        began, first = self._caught_up_from_at or (now, before)
        self._caught_up_from_at = began, first
        if now - self._progress_told_at >= PROGRESS_EVERY_S and now > began:
            self._progress_told_at = now
            speed = (height - first) / (now - began)
            _log.info(
                "catching up",
                chain=self.rules.chain.value,
                height=height,
                target=target,
                blocks_per_s=round(speed),
                left_s=round((target - height) / speed) if speed else None,
            )

    def _tell_credits(self, credited: Sequence[Credit]) -> None:
        for credit in credited:
            metrics.CREDITED.labels(self.rules.chain).inc(credit.amount.n)
            _log.info(
                "credited",
                chain=self.rules.chain.value,
                key=credit.key,
                person=str(credit.person_id),
                amount_micro=credit.amount.n,
            )
            if self.on_credit is not None:
                self.on_credit(credit)

    def _odd(self, kind: str) -> None:
        metrics.ODDITIES.labels(self.rules.chain, kind).inc()


def _inbound(facts: Sequence[BlockFacts]) -> list[TransferSeen]:
    return [transfer for block in facts for transfer in block.inbound]


def _outbound(facts: Sequence[BlockFacts]) -> list[Departure]:
    return [departure for block in facts for departure in block.outbound]


async def _is_stale(conn: AsyncConnection, cursor: Cursor) -> bool:
    columns = chain_cursors.c
    row = (
        await conn.execute(
            select(columns.version, columns.halted_at).where(columns.chain == cursor.chain.value)
        )
    ).one_or_none()
    return row is None or row.version != cursor.version or (row.halted_at is None) != (cursor.halt is None)


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
