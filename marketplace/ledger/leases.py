"""Leases: slices of a buyer's balance that one process may spend, as the database keeps them.

Σ leases ≤ balance, so any number of processes can never overspend; a process that dies keeps nothing
but its own slices, until they expire.  Expiry is told by the database's clock alone; a process counts
its time to live on its own monotonic clock from *before* it asked, so it always stops first.
Every function runs in the caller's transaction and never commits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from sqlalchemy import text
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
class Granted:
    """What the database gave: the lease, how much was added to it, and the buyer's usual slice now."""

    lease_id: UUID
    amount: Nano
    usual: Nano


_GRANT: Final = """
    WITH quoted AS (
        SELECT account_id,
               LEAST(posted / 100, CAST(:cap AS BIGINT)) AS usual,
               LEAST(posted - held,
                     GREATEST(CAST(:wanted AS BIGINT), LEAST(posted / 100, CAST(:cap AS BIGINT)))) AS amount
        FROM balances WHERE account_id = :buyer
    ), taken AS (
        UPDATE balances b SET held = b.held + q.amount FROM quoted q
        WHERE b.account_id = q.account_id AND q.amount >= GREATEST(CAST(:minimum AS BIGINT), 1)
        RETURNING q.amount, q.usual
    )"""

# A statement of its own, before: an UPDATE that meets a row changed since its snapshot checks constraints
# against the row as it was, and a deposit at the same moment would look like an overspending.
_LOCK_BALANCE: Final = text("SELECT 1 FROM balances WHERE account_id = :buyer FOR NO KEY UPDATE")

_TAKE: Final = text(
    _GRANT  # noqa: S608 - constants only
    + """
    INSERT INTO leases (id, buyer, worker, amount, expires)
    SELECT :id, :buyer, :worker, amount, now() + CAST(:ttl_ms AS BIGINT) * interval '1 millisecond' FROM taken
    RETURNING amount, (SELECT usual FROM taken)""",
)

_EXTEND: Final = text(
    _GRANT  # noqa: S608 - constants only
    + """
    UPDATE leases l SET amount = l.amount + t.amount,
                        expires = now() + CAST(:ttl_ms AS BIGINT) * interval '1 millisecond'
    FROM taken t WHERE l.id = :id RETURNING t.amount, t.usual""",
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
    """Lease exactly `amount` or raise `InsufficientFunds`; gives back the lease's id."""
    granted = await lease_up_to(
        conn, buyer, worker, minimum=amount, wanted=amount, cap=ZERO, ttl_ms=ttl_ms, new_id=new_id
    )
    return granted.lease_id


async def lease_up_to(
    conn: AsyncConnection,
    buyer: int,
    worker: str,
    *,
    minimum: Nano,
    wanted: Nano,
    cap: Nano = SLICE_MAX,
    ttl_ms: int = LEASE_TTL_MS,
    new_id: NewId = uuid7,
) -> Granted:
    """Lease the larger of `wanted` and the usual slice, or what is left if that is at least `minimum`.

    Raises `InsufficientFunds` (with what is left) or `UnknownAccount`.
    """
    identity = new_id()
    values = _grant_values(buyer, identity, minimum, wanted, cap, ttl_ms) | {"worker": worker}
    await conn.execute(_LOCK_BALANCE, {"buyer": buyer})
    row = (await conn.execute(_TAKE, values)).one_or_none()
    if row is None:
        raise await _refusal(conn, buyer, minimum)
    return Granted(identity, Nano(row.amount), Nano(row.usual))


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
    """Add to a lease and renew it, by the rule of `lease_up_to`; None if the lease was reaped."""
    exists = await conn.execute(
        text("SELECT 1 FROM leases WHERE id = :id FOR NO KEY UPDATE"), {"id": lease_id}
    )
    if exists.one_or_none() is None:
        return None
    values = _grant_values(buyer, lease_id, minimum, wanted, cap, ttl_ms)
    await conn.execute(_LOCK_BALANCE, {"buyer": buyer})
    row = (await conn.execute(_EXTEND, values)).one_or_none()
    if row is None:
        raise await _refusal(conn, buyer, minimum)
    return Granted(lease_id, Nano(row.amount), Nano(row.usual))


async def renew(
    conn: AsyncConnection, worker: str, lease_ids: Collection[UUID], *, ttl_ms: int = LEASE_TTL_MS
) -> set[UUID]:
    """Give these leases a full time to live; those not given back in the set were reaped."""
    values = {"worker": worker, "ids": list(lease_ids), "ttl_ms": ttl_ms}
    return {row.id for row in await conn.execute(_RENEW, values)}


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
    statement = text("DELETE FROM leases WHERE id = :id RETURNING buyer, amount")
    row = (await conn.execute(statement, {"id": lease_id})).one_or_none()
    if row is None:
        return None
    await _unhold(conn, [(row.buyer, row.amount)])
    return Nano(row.amount)


async def reap(conn: AsyncConnection, *, margin_ms: int = REAP_MARGIN_MS) -> int:
    """Release leases that expired at least `margin_ms` ago (at most 1,000); how many there were."""
    rows = (await conn.execute(_EXPIRED, {"margin_ms": margin_ms})).all()
    if not rows:
        return 0
    await conn.execute(
        text("DELETE FROM leases WHERE id = ANY(CAST(:ids AS UUID[]))"), {"ids": [row.id for row in rows]}
    )
    await _unhold(conn, [(row.buyer, row.amount) for row in rows])
    return len(rows)


async def _unhold(conn: AsyncConnection, parts: Sequence[tuple[int, int]]) -> None:
    totals: dict[int, int] = {}
    for account, amount in parts:
        totals[account] = totals.get(account, 0) + amount
    for account in sorted(totals):  # account order: see `posting`
        statement = text("UPDATE balances SET held = held - :amount WHERE account_id = :account")
        await conn.execute(statement, {"account": account, "amount": totals[account]})


def _grant_values(
    buyer: int, identity: UUID, minimum: Nano, wanted: Nano, cap: Nano, ttl_ms: int
) -> dict[str, object]:
    return {
        "buyer": buyer,
        "id": identity,
        "minimum": minimum.n,
        "wanted": wanted.n,
        "cap": cap.n,
        "ttl_ms": ttl_ms,
    }


async def _refusal(conn: AsyncConnection, buyer: int, minimum: Nano) -> InsufficientFunds | UnknownAccount:
    statement = text("SELECT posted - held FROM balances WHERE account_id = :buyer")
    available = await conn.scalar(statement, {"buyer": buyer})
    if available is None:
        return UnknownAccount(f"no balance for account {buyer}")
    return InsufficientFunds(f"{Nano(available)} is left, {minimum} is needed", available_nano=available)
