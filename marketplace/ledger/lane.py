"""A lane: one poster's exclusive hash chain, and the one transaction that extends it by a batch.

Exclusive means an advisory lock held by the lane's own database session.  When that session is lost and
somebody holds the lock again, no transaction of the old session is running any more; so after a lost
commit, the chain tells for certain whether the batch landed.

The transaction: write the rows, lock leases by id, lock balances by account id, consume leases and move
balances (each row once), append to the chain.  A small batch is one call of the database's `post_charges`,
one round trip; a larger one a binary COPY and a call of `extend_lane`.  Both are for the usual case, in which
every lease covers its charges; where one does not, nothing was done, and the batch is posted step by step.
It talks to asyncpg below SQLAlchemy, for COPY.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from marketplace.ledger import templates
from marketplace.ledger.accounts import LOSS, ensure_account, platform_revenue
from marketplace.ledger.charges import (
    COLUMNS,
    COPY_HEADER,
    COPY_TRAILER,
    GENESIS,
    Charge,
    charge_of,
    extend_chain,
    pack,
)
from marketplace.ledger.errors import LaneBroken, LedgerUnavailable
from marketplace.ledger.ids import NewId
from marketplace.ledger.lease_book import Hold
from marketplace.ledger.money import Nano

LANES_MAX: Final = 64
ONE_CALL_ROWS_MAX: Final = 64
"""Up to so many rows travel as arrays in one call; COPY is cheaper a row, and costs four round trips more."""
_UNUSUAL: Final = "TW001"
"""SQLSTATE of a batch that is not the usual case (`ledger_0004`)."""
_LOCK_CLASS: Final = 0x6C616E65
"""First half of the advisory lock's key ("lane"); the second is the lane's number."""

_SESSION: Final = (
    # A server that lost us frees the lane within seconds.
    "SET idle_in_transaction_session_timeout = '10s'",
    "SET tcp_keepalives_idle = 5",
    "SET tcp_keepalives_interval = 2",
    "SET tcp_keepalives_count = 3",
)
_HEAD: Final = "SELECT n, hash FROM batches WHERE lane = $1 ORDER BY n DESC LIMIT 1"
_BATCHES: Final = "SELECT n, hash FROM batches WHERE lane = $1 AND n = ANY($2::bigint[])"
_HOLDER: Final = """
    SELECT pid FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND objsubid = 2
      AND classid = $1::int::oid AND objid = $2::int::oid
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
_POST: Final = f"SELECT post_charges({', '.join(f'${n}' for n in range(1, 28))})"
_EXTEND: Final = f"SELECT extend_lane({', '.join(f'${n}' for n in range(1, 14))})"
_LOCK_LEASES: Final = """
    SELECT id, buyer, amount FROM leases WHERE id = ANY($1::uuid[]) ORDER BY id FOR NO KEY UPDATE"""
_LOCK_BALANCES: Final = """
    SELECT account_id, posted, held, floor FROM balances
    WHERE account_id = ANY($1::bigint[]) ORDER BY account_id FOR NO KEY UPDATE"""
_WRITE: Final = """
    WITH spent AS (
        UPDATE leases l SET amount = l.amount - u.used
        FROM unnest($1::uuid[], $2::bigint[]) AS u (id, used) WHERE l.id = u.id
    ), moved AS (
        UPDATE balances b SET posted = b.posted + u.posted, held = b.held - u.unheld
        FROM unnest($3::bigint[], $4::bigint[], $5::bigint[]) AS u (account, posted, unheld)
        WHERE b.account_id = u.account
    )
    INSERT INTO batches (lane, n, first_id, last_id, rows, sum, prev_hash, hash)
    VALUES ($6, $7, $8, $9, $10, $11, $12, $13)"""
_OWNERS: Final = "SELECT id, owner FROM accounts WHERE id = ANY($1::bigint[])"
_INSERT_TRANSFER: Final = """
    INSERT INTO transfers (id, kind, debit, credit, amount, ref, input_hash)
    VALUES ($1, $2, $3, $4, $5, $6, $7)"""
_STORED: Final = f"SELECT {', '.join(COLUMNS)} FROM charges WHERE id = ANY($1::uuid[])"  # noqa: S608 - constants only


class NeedsLossAccountError(Exception):
    """A floor would break: the transaction must be repeated with the loss account locked too."""


class MissingAccountsError(Exception):
    """Charges name accounts that do not exist."""

    def __init__(self, accounts: frozenset[int]) -> None:
        super().__init__(f"no balance for {sorted(accounts)}")
        self.accounts = accounts


@dataclass(slots=True, eq=False)
class Waiting:
    """A charge accepted for posting, and who waits for it."""

    charge: Charge
    hold: Hold | None
    outcome: asyncio.Future[bool]
    give_up_at: float


@dataclass(frozen=True, slots=True)
class Attempt:
    """A batch about to be committed: enough to recognise it in the chain afterwards."""

    n: int
    previous: bytes
    hash: bytes


@dataclass(frozen=True, slots=True)
class Session:
    """Which database session held which lane."""

    lane: int
    pid: int


@dataclass(slots=True, eq=False)
class Lane:
    """A claimed lane; `n` and `hash` are the head of its chain."""

    number: int
    revenue: int
    loss: int
    n: int
    hash: bytes
    connection: AsyncConnection
    driver: asyncpg.Connection[asyncpg.Record]

    @property
    def session(self) -> Session:
        return Session(self.number, self.driver.get_server_pid())

    async def drop(self) -> None:
        """End the session, and with it the claim."""
        await _discard(self.connection)

    def prepare(self, charges: Sequence[Charge]) -> tuple[Attempt, list[bytes]]:
        rows = [pack(charge, self.number, self.n + 1) for charge in charges]
        return Attempt(self.n + 1, self.hash, extend_chain(self.hash, rows)), rows


async def claim(engine: AsyncEngine, number: int | None, *, after: Session | None, patience_s: float) -> Lane:
    """Claim this lane, or (None) the first free one.

    `after` is the caller's last session: its lane is claimed again, or another if somebody else has taken
    it since; either way, that session's transactions are over when this returns.  Raises
    `LedgerUnavailable` when nothing came free in time.
    """
    connection = await engine.connect()
    try:
        driver = (await connection.get_raw_connection()).driver_connection
        assert isinstance(driver, asyncpg.Connection)
        for setting in _SESSION:
            await driver.execute(setting)
        claimed = await _lock(driver, number, after, patience_s)
        async with connection.begin():
            revenue = await ensure_account(connection, platform_revenue(claimed))
            loss = await ensure_account(connection, LOSS)
        head = await driver.fetchrow(_HEAD, claimed)
    except BaseException:
        await _discard(connection)
        raise
    n, last = (0, GENESIS) if head is None else (head["n"], head["hash"])
    return Lane(claimed, revenue, loss, n, last, connection, driver)


async def _discard(connection: AsyncConnection) -> None:
    """Close for good: back in the pool, the session would keep its locks."""
    try:
        await connection.invalidate()
    finally:
        await connection.close()


async def _lock(
    driver: asyncpg.Connection[asyncpg.Record],
    number: int | None,
    after: Session | None,
    patience_s: float,
) -> int:
    clock = asyncio.get_running_loop().time
    give_up_at = clock() + patience_s
    while True:
        wanted = await _candidates(driver, number, after)
        for lane in wanted:
            if await driver.fetchval("SELECT pg_try_advisory_lock($1, $2)", _LOCK_CLASS, lane):
                return lane
        if clock() >= give_up_at:
            raise LedgerUnavailable("no poster lane came free")
        await asyncio.sleep(0.05)


async def _candidates(
    driver: asyncpg.Connection[asyncpg.Record], number: int | None, after: Session | None
) -> Sequence[int]:
    if after is None:
        return range(LANES_MAX) if number is None else (number,)
    holder = await driver.fetchval(_HOLDER, _LOCK_CLASS, after.lane)
    if holder in {None, after.pid}:
        return (after.lane,)  # free, or still our own old session's: nothing else would prove that it ended
    return range(LANES_MAX)


async def landed(lane: Lane, number: int, attempt: Attempt) -> bool:
    """Whether that batch of lane `number` was committed; its session is over (see `claim`)."""
    found = await lane.driver.fetch(_BATCHES, number, [attempt.n - 1, attempt.n])
    stored = {row["n"]: row["hash"] for row in found} | ({0: GENESIS} if attempt.n == 1 else {})
    if stored.get(attempt.n - 1) != attempt.previous:
        raise LaneBroken(f"lane {number}: batch {attempt.n - 1} is not what batch {attempt.n} was chained to")
    return stored.get(attempt.n) == attempt.hash


@dataclass(slots=True)
class _Moves:
    """What a batch does to each row, before the rows are known."""

    buyers: dict[int, int] = field(default_factory=dict)
    operators: dict[int, int] = field(default_factory=dict)
    leases: dict[UUID, int] = field(default_factory=dict)
    unheld: dict[int, int] = field(default_factory=dict)
    """By buyer, should every lease give what is asked of it."""
    last_charge: dict[int, UUID] = field(default_factory=dict)
    fees: int = 0
    total: int = 0


def _moves(part: Sequence[Waiting]) -> _Moves:
    moves = _Moves()
    buyers, operators, leases = moves.buyers, moves.operators, moves.leases
    for waiting in part:
        charge, hold = waiting.charge, waiting.hold
        amount, fee = charge.amount.n, charge.fee.n
        if not amount or charge.operator is None:
            continue
        buyers[charge.buyer] = buyers.get(charge.buyer, 0) + amount
        operators[charge.operator] = operators.get(charge.operator, 0) + amount - fee
        moves.fees += fee
        moves.total += amount
        moves.last_charge[charge.buyer] = charge.id
        if hold is not None and hold.amount_nano:
            used = min(amount, hold.amount_nano)
            leases[hold.lease_id] = leases.get(hold.lease_id, 0) + used
            moves.unheld[charge.buyer] = moves.unheld.get(charge.buyer, 0) + used
    return moves


async def commit(
    lane: Lane,
    part: Sequence[Waiting],
    attempt: Attempt,
    rows: Sequence[bytes],
    *,
    with_loss: bool,
    new_id: NewId,
    on_sent: Callable[[], None],
) -> None:
    """One transaction: the batch is durable when this returns; on any exception ask the chain's head.

    `on_sent` is called, for a batch that goes by COPY, whenever the database has got work for a while.
    """
    moves = _moves(part)
    try:
        if with_loss:
            await _commit_by_steps(lane, part, attempt, rows, moves, with_loss=True, new_id=new_id)
        elif len(part) <= ONE_CALL_ROWS_MAX:
            await _commit_in_one_call(lane, part, attempt, moves)
        else:
            await _commit_by_copy(lane, part, attempt, rows, moves, on_sent)
    except asyncpg.PostgresError as e:
        if e.sqlstate != _UNUSUAL:
            raise
        await _commit_by_steps(lane, part, attempt, rows, moves, with_loss=False, new_id=new_id)
    lane.n, lane.hash = attempt.n, attempt.hash


def _usual(lane: Lane, moves: _Moves) -> tuple[list[UUID], list[int], list[int], list[int], list[int]]:
    """(lease ids, consumed, account ids, added, released), should every lease cover its charges."""
    added = {account: -amount for account, amount in moves.buyers.items()}
    for account, amount in moves.operators.items():
        added[account] = added.get(account, 0) + amount
    if moves.total:
        added[lane.revenue] = moves.fees
    return (
        list(moves.leases),
        list(moves.leases.values()),
        list(added),
        list(added.values()),
        [moves.unheld.get(account, 0) for account in added],
    )


async def _commit_in_one_call(lane: Lane, part: Sequence[Waiting], attempt: Attempt, moves: _Moves) -> None:
    charges = [waiting.charge for waiting in part]
    await lane.driver.execute(
        _POST,
        [c.id for c in charges],
        [c.buyer for c in charges],
        [c.operator for c in charges],
        [c.amount.n for c in charges],
        [c.fee.n for c in charges],
        [c.node for c in charges],
        [c.model for c in charges],
        [c.key_id for c in charges],
        [c.tok_in for c in charges],
        [c.tok_out for c in charges],
        [c.counted_by for c in charges],
        [c.price_version for c in charges],
        [c.latency_ms for c in charges],
        [c.ttft_ms for c in charges],
        [c.status for c in charges],
        [c.finish for c in charges],
        [c.stream for c in charges],
        lane.number,
        attempt.n,
        moves.total,
        attempt.previous,
        attempt.hash,
        *_usual(lane, moves),
    )


async def _copy(lane: Lane, rows: Sequence[bytes]) -> None:
    # Bytes would be taken for a path, a file be read on another thread.
    source: Any = memoryview(b"".join((COPY_HEADER, *rows, COPY_TRAILER)))  # not among its declared types
    await lane.driver.copy_to_table("charges", source=source, format="binary", columns=COLUMNS)


async def _commit_by_copy(
    lane: Lane,
    part: Sequence[Waiting],
    attempt: Attempt,
    rows: Sequence[bytes],
    moves: _Moves,
    on_sent: Callable[[], None],
) -> None:
    driver = lane.driver
    loop = asyncio.get_running_loop()
    async with driver.transaction():
        loop.call_soon(on_sent)  # runs once the statement has been sent and is waited for
        await _copy(lane, rows)
        loop.call_soon(on_sent)
        await driver.execute(
            _EXTEND,
            lane.number,
            attempt.n,
            part[0].charge.id,
            part[-1].charge.id,
            len(part),
            moves.total,
            attempt.previous,
            attempt.hash,
            *_usual(lane, moves),
        )


async def _commit_by_steps(
    lane: Lane,
    part: Sequence[Waiting],
    attempt: Attempt,
    rows: Sequence[bytes],
    moves: _Moves,
    *,
    with_loss: bool,
    new_id: NewId,
) -> None:
    """The general case: leases that are gone, accounts that are missing, money that is short."""
    driver = lane.driver
    async with driver.transaction():
        await _copy(lane, rows)
        used, unheld = await _lock_leases(driver, moves)
        posted = await _lock_and_move(lane, moves, unheld, with_loss=with_loss, new_id=new_id)
        await driver.execute(
            _WRITE,
            list(used),
            list(used.values()),
            list(posted),
            list(posted.values()),
            [unheld.get(account, 0) for account in posted],
            lane.number,
            attempt.n,
            part[0].charge.id,
            part[-1].charge.id,
            len(part),
            moves.total,
            attempt.previous,
            attempt.hash,
        )


async def _lock_leases(
    driver: asyncpg.Connection[asyncpg.Record], moves: _Moves
) -> tuple[dict[UUID, int], dict[int, int]]:
    """(consumed by lease, consumed by buyer): what is there; a reaped lease gives nothing."""
    used: dict[UUID, int] = {}
    unheld: dict[int, int] = {}
    if not moves.leases:
        return used, unheld
    for row in await driver.fetch(_LOCK_LEASES, list(moves.leases)):
        part = min(row["amount"], moves.leases[row["id"]])
        used[row["id"]] = part
        unheld[row["buyer"]] = unheld.get(row["buyer"], 0) + part
    return used, unheld


async def _lock_and_move(
    lane: Lane, moves: _Moves, unheld: Mapping[int, int], *, with_loss: bool, new_id: NewId
) -> dict[int, int]:
    """Lock every balance the batch moves; give back what is to be added to each one's posted."""
    if not moves.total:
        return {}
    wanted = {*moves.buyers, *moves.operators, lane.revenue, *([lane.loss] if with_loss else [])}
    locked = {row["account_id"]: row for row in await lane.driver.fetch(_LOCK_BALANCES, list(wanted))}
    if len(locked) != len(wanted):
        raise MissingAccountsError(frozenset(wanted - locked.keys()))
    shortfalls: dict[int, int] = {}
    for account, amount in moves.buyers.items():
        row = locked[account]
        before = row["posted"] - row["held"]
        after = before - amount + unheld.get(account, 0)
        lowest = min(0, before)  # what no lease covers may take what is available, and nothing beyond
        if row["floor"] is not None and after < lowest:
            shortfalls[account] = lowest - after
    if shortfalls and not with_loss:
        raise NeedsLossAccountError
    posted = dict.fromkeys(wanted, 0)
    for account, amount in moves.buyers.items():
        posted[account] += shortfalls.get(account, 0) - amount
    for account, amount in moves.operators.items():
        posted[account] += amount
    posted[lane.revenue] += moves.fees
    if shortfalls:
        posted[lane.loss] -= sum(shortfalls.values())
        await _carry(lane, moves, shortfalls, new_id)
    return posted


async def _carry(lane: Lane, moves: _Moves, shortfalls: Mapping[int, int], new_id: NewId) -> None:
    """Put on record what the platform carries for buyers whose lease was gone when the charge came."""
    owners = {row["id"]: row["owner"] for row in await lane.driver.fetch(_OWNERS, list(shortfalls))}
    for account, amount in shortfalls.items():
        ref = str(moves.last_charge[account])
        transfer = templates.uncollectable(person=owners[account], amount=Nano(amount), ref=ref)
        await lane.driver.execute(
            _INSERT_TRANSFER,
            new_id(),
            transfer.kind.value,
            lane.loss,
            account,
            amount,
            ref,
            transfer.input_hash,
        )


async def stored(lane: Lane, ids: Sequence[UUID]) -> dict[UUID, Charge]:
    """Which of these charges are on record already, as they were posted."""
    return {row["id"]: charge_of(row) for row in await lane.driver.fetch(_STORED, list(ids))}
