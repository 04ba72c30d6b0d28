"""Leases: slices of a buyer's balance that one process may spend, as the database keeps them.

Σ leases ≤ balance, so any number of processes can never overspend; a process that dies keeps nothing
but its own slices, until they expire.  Expiry is told by the database's clock alone; a process counts
its time to live on its own monotonic clock from *before* it asked, so it always stops first.
Every function runs in the caller's transaction and never commits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger.errors import InsufficientFunds, UnknownAccount
from marketplace.ledger.ids import NewId, uuid7
from marketplace.ledger.money import NANO_PER_DOLLAR, ZERO, Nano

LEASE_TTL_MS: Final = 10_000
REAP_MARGIN_MS: Final = 5_000
"""A lease is released this long after it expired: a process slow to notice has stopped by then."""
SLICE_MAX: Final = Nano(NANO_PER_DOLLAR)
"""The usual slice is 1 % of the balance, at most this; a dead worker costs its open slices at worst."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What one buyer's lease is to have: the larger of `wanted` and the usual slice, at least `minimum`."""

    buyer: int
    minimum: Nano
    wanted: Nano


@dataclass(frozen=True, slots=True)
class Granted:
    """What the database gave: the lease, how much was added to it, and the buyer's usual slice now."""

    lease_id: UUID
    amount: Nano
    usual: Nano


# One row an ask; every buyer once, or an UPDATE would see only one of his.
_GRANT: Final = """
    WITH asked AS (
        SELECT * FROM unnest(CAST(:ids AS UUID[]), CAST(:buyers AS BIGINT[]),
                             CAST(:minimums AS BIGINT[]), CAST(:wanted AS BIGINT[]))
                 AS a (id, buyer, minimum, wanted)
    ), quoted AS (
        SELECT a.id, a.buyer, a.minimum, b.posted - b.held AS available,
               LEAST(b.posted / 100, CAST(:cap AS BIGINT)) AS usual,
               LEAST(b.posted - b.held,
                     GREATEST(a.wanted, LEAST(b.posted / 100, CAST(:cap AS BIGINT)))) AS amount
        FROM asked a JOIN balances b ON b.account_id = a.buyer
    ), taken AS (
        UPDATE balances b SET held = b.held + q.amount FROM quoted q
        WHERE b.account_id = q.buyer AND q.amount >= GREATEST(q.minimum, 1)
        RETURNING q.id
    ), written AS ("""
_GRANTED: Final = """)
    SELECT q.id, q.available, q.amount, q.usual, t.id IS NOT NULL AS is_taken
    FROM quoted q LEFT JOIN taken t ON t.id = q.id"""
_EXPIRY: Final = "now() + CAST(:ttl_ms AS BIGINT) * interval '1 millisecond'"

# A statement of its own, before: an UPDATE that meets a row changed since its snapshot checks constraints
# against the row as it was, and a deposit at the same moment would look like an overspending.
_LOCK_BALANCES: Final = text(
    """SELECT 1 FROM balances WHERE account_id = ANY(CAST(:accounts AS BIGINT[]))
    ORDER BY account_id FOR NO KEY UPDATE"""
)

_TAKE: Final = text(
    f"""{_GRANT}
        INSERT INTO leases (id, buyer, worker, amount, expires)
        SELECT q.id, q.buyer, :worker, q.amount, {_EXPIRY} FROM quoted q JOIN taken t ON t.id = q.id
    {_GRANTED}"""  # noqa: S608 - constants only
)

_EXTEND: Final = text(
    f"""{_GRANT}
        UPDATE leases l SET amount = l.amount + q.amount, expires = {_EXPIRY}
        FROM quoted q JOIN taken t ON t.id = q.id WHERE l.id = q.id
    {_GRANTED}"""  # noqa: S608 - constants only
)

_LOCK_LEASES: Final = text(
    "SELECT 1 FROM leases WHERE id = ANY(CAST(:ids AS UUID[])) ORDER BY id FOR NO KEY UPDATE"
)
_END: Final = text("DELETE FROM leases WHERE id = ANY(CAST(:ids AS UUID[])) RETURNING id, buyer, amount")
_UNHOLD: Final = text(
    """
    UPDATE balances b SET held = b.held - u.amount
    FROM unnest(CAST(:accounts AS BIGINT[]), CAST(:amounts AS BIGINT[])) AS u (account_id, amount)
    WHERE b.account_id = u.account_id"""
)

_RENEW: Final = text(
    """
    WITH mine AS (
        SELECT id FROM leases WHERE worker = :worker AND id = ANY(CAST(:ids AS UUID[]))
        ORDER BY id FOR NO KEY UPDATE
    )
    UPDATE leases l SET expires = now() + CAST(:ttl_ms AS BIGINT) * interval '1 millisecond'
    FROM mine WHERE l.id = mine.id RETURNING l.id""",
)

_EXPIRED: Final = text(
    """
    SELECT id, buyer, amount FROM leases
    WHERE expires < now() - CAST(:margin_ms AS BIGINT) * interval '1 millisecond'
    ORDER BY id LIMIT 1000 FOR UPDATE SKIP LOCKED""",
)


async def lease(
    conn: AsyncConnection,
    buyer: int,
    worker: str,
    amount: Nano,
    *,
    ttl_ms: int = LEASE_TTL_MS,
    new_id: NewId = uuid7,
) -> UUID:
    """Lease exactly `amount`; gives the lease's id.  Raises `InsufficientFunds` or `UnknownAccount`."""
    ask = Ask(buyer, minimum=amount, wanted=amount)
    (answer,) = await lease_all(conn, worker, [ask], cap=ZERO, ttl_ms=ttl_ms, new_id=new_id)
    if not isinstance(answer, Granted):
        raise answer
    return answer.lease_id


async def lease_all(
    conn: AsyncConnection,
    worker: str,
    asks: Sequence[Ask],
    *,
    cap: Nano = SLICE_MAX,
    ttl_ms: int = LEASE_TTL_MS,
    new_id: NewId = uuid7,
) -> list[Granted | InsufficientFunds | UnknownAccount]:
    """Lease each buyer the larger of `wanted` and the usual slice, or what is left if it reaches `minimum`.

    One round trip, and each his own answer: `InsufficientFunds` says what is left.
    A buyer asks once (else ValueError): the second ask could not see what the first has taken.
    """
    if len({ask.buyer for ask in asks}) < len(asks):
        raise ValueError("a buyer asks twice at once")
    return await _grant(conn, _TAKE, [(new_id(), ask) for ask in asks], cap, ttl_ms, worker=worker)


async def extend(
    conn: AsyncConnection,
    lease_id: UUID,
    buyer: int,
    *,
    minimum: Nano,
    wanted: Nano,
    cap: Nano = SLICE_MAX,
    ttl_ms: int = LEASE_TTL_MS,
) -> Granted | None:
    """Add to a lease and renew it, by the rule of `lease_all`; None if the lease was reaped."""
    exists = await conn.execute(
        text("SELECT 1 FROM leases WHERE id = :id FOR NO KEY UPDATE"), {"id": lease_id}
    )
    if exists.one_or_none() is None:
        return None
    (answer,) = await _grant(conn, _EXTEND, [(lease_id, Ask(buyer, minimum, wanted))], cap, ttl_ms)
    if not isinstance(answer, Granted):
        raise answer
    return answer


async def renew(
    conn: AsyncConnection, worker: str, lease_ids: Collection[UUID], *, ttl_ms: int = LEASE_TTL_MS
) -> set[UUID]:
    """Give these leases a full time to live; those not given back in the set were reaped."""
    values = {"worker": worker, "ids": list(lease_ids), "ttl_ms": ttl_ms}
    return {row.id for row in await conn.execute(_RENEW, values)}


async def read_amount(conn: AsyncConnection, lease_id: UUID) -> Nano | None:
    """What a lease holds, and will until the caller's transaction ends; None if it was reaped.

    Waits for a transaction that has changed it: afterwards it is known which way that one went.
    """
    statement = text("SELECT amount FROM leases WHERE id = :id FOR NO KEY UPDATE")
    amount = await conn.scalar(statement, {"id": lease_id})
    return None if amount is None else Nano(amount)


async def shrink(conn: AsyncConnection, lease_id: UUID, amount: Nano) -> bool:
    """Return part of a lease to the buyer's available balance; False if it was reaped."""
    statement = text("UPDATE leases SET amount = amount - :amount WHERE id = :id RETURNING buyer")
    buyer = await conn.scalar(statement, {"id": lease_id, "amount": amount.n})
    if buyer is None:
        return False
    await _unhold(conn, [(buyer, amount.n)])
    return True


async def give_back(conn: AsyncConnection, lease_id: UUID) -> Nano | None:
    """End a lease and return what is left of it; None if it was reaped (giving back twice is harmless)."""
    return (await give_back_all(conn, [lease_id])).get(lease_id)


async def give_back_all(conn: AsyncConnection, lease_ids: Sequence[UUID]) -> dict[UUID, Nano]:
    """`give_back` for several leases at once: what was left of each; without those that were reaped."""
    values = {"ids": lease_ids}
    await conn.execute(_LOCK_LEASES, values)
    ended = (await conn.execute(_END, values)).all()
    await _unhold(conn, [(row.buyer, row.amount) for row in ended])
    return {row.id: Nano(row.amount) for row in ended}


async def reap(conn: AsyncConnection, *, margin_ms: int = REAP_MARGIN_MS) -> int:
    """Release leases that expired at least `margin_ms` ago (at most 1,000); how many there were."""
    rows = (await conn.execute(_EXPIRED, {"margin_ms": margin_ms})).all()
    if not rows:
        return 0
    await conn.execute(_END, {"ids": [row.id for row in rows]})
    await _unhold(conn, [(row.buyer, row.amount) for row in rows])
    return len(rows)


async def _unhold(conn: AsyncConnection, parts: Sequence[tuple[int, int]]) -> None:
    totals: dict[int, int] = {}
    for account, amount in parts:
        totals[account] = totals.get(account, 0) + amount
    if totals:
        accounts = sorted(totals)
        await conn.execute(_LOCK_BALANCES, {"accounts": accounts})
        await conn.execute(
            _UNHOLD, {"accounts": accounts, "amounts": [totals[account] for account in accounts]}
        )


async def _grant(
    conn: AsyncConnection,
    statement: TextClause,
    asks: Sequence[tuple[UUID, Ask]],
    cap: Nano,
    ttl_ms: int,
    **more: object,
) -> list[Granted | InsufficientFunds | UnknownAccount]:
    buyers = [ask.buyer for _, ask in asks]
    values = {
        "ids": [identity for identity, _ in asks],
        "buyers": buyers,
        "minimums": [ask.minimum.n for _, ask in asks],
        "wanted": [ask.wanted.n for _, ask in asks],
        "cap": cap.n,
        "ttl_ms": ttl_ms,
    }
    await conn.execute(_LOCK_BALANCES, {"accounts": buyers})
    rows = {row.id: row for row in await conn.execute(statement, values | more)}
    return [_answer(rows, identity, ask) for identity, ask in asks]


def _answer(
    rows: Mapping[UUID, Row[Any]], identity: UUID, ask: Ask
) -> Granted | InsufficientFunds | UnknownAccount:
    row = rows.get(identity)
    if row is None:
        return UnknownAccount(f"no balance for account {ask.buyer}")
    if not row.is_taken:
        left = Nano(row.available)
        return InsufficientFunds(f"{left} is left, {ask.minimum} is needed", available_nano=left.n)
    return Granted(identity, Nano(row.amount), Nano(row.usual))
