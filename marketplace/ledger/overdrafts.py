"""The overdraft: when a buyer's money runs out, his last request may still complete (R12).

A request that the buyer's available amount does not cover gets a lease of its own beyond it, if

1. his available amount, with every other request's hold taken off, is above zero;
2. what it lacks is within his limit, and with all others' overdrafts within the platform's cap.

Such a lease serves this one request and nobody else, and what it did not cost is returned at once.
So available > −(cost of one response), always, however many requests, processes or crashes there are:
a grant starts above zero and takes one request's cost; everything else that moves `available` (a charge
within its hold, a return, a deposit) never lowers it.  Once it is at or below zero nothing is granted.

Available amounts below zero are permitted by `balances.floor`, which a grant lowers to what it needs;
spending otherwise stops at zero.  Grants are rare, and take turns, so that the cap holds exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger.errors import InsufficientFunds
from marketplace.ledger.ids import NewId, uuid7
from marketplace.ledger.leases import LEASE_TTL_MS, Granted
from marketplace.ledger.money import NANO_PER_DOLLAR, ZERO, Nano
from marketplace.ledger.posting import lock_balances

PLATFORM_CAP: Final = Nano(50 * NANO_PER_DOLLAR)
"""Σ of all overdrafts at any moment: docs/promises.md, V4."""
LIMIT: Final = Nano(NANO_PER_DOLLAR)
"""What a buyer without a limit of his own may lack: a long answer of a dear model."""


@dataclass(frozen=True, slots=True)
class Overdraft:
    """The terms: `limit` for buyers without one of their own, `platform_cap` for all together."""

    limit: Nano = LIMIT
    platform_cap: Nano = PLATFORM_CAP


_TURN: Final = text("SELECT pg_advisory_xact_lock(1868984946)")  # "over"
_RECOVERED: Final = text(
    """
    UPDATE overdrafts o SET is_drawn = false FROM balances b
    WHERE o.is_drawn AND b.account_id = o.account_id AND b.posted >= b.held""",
)
_DRAWN: Final = text(
    """
    SELECT coalesce(sum(greatest(b.held - b.posted, 0)), 0)::bigint
    FROM overdrafts o JOIN balances b USING (account_id) WHERE o.is_drawn""",
)
_LIMIT: Final = text(
    """
    INSERT INTO overdrafts AS o (account_id, limit_nano) VALUES (:buyer, :limit)
    ON CONFLICT (account_id) DO UPDATE SET limit_nano = o.limit_nano RETURNING limit_nano""",
)
_LEND: Final = text(
    """
    WITH lent AS (
        UPDATE balances SET held = held + :amount, floor = LEAST(floor, posted - held - :amount)
        WHERE account_id = :buyer RETURNING posted - held AS available
    ), noted AS (
        UPDATE overdrafts SET is_drawn = is_drawn OR (SELECT available < 0 FROM lent)
        WHERE account_id = :buyer
    )
    INSERT INTO leases (id, buyer, worker, amount, expires)
    VALUES (:id, :buyer, :worker, :amount, now() + CAST(:ttl_ms AS BIGINT) * interval '1 millisecond')""",
)


async def take_turn(conn: AsyncConnection) -> None:
    """Wait until nobody else grants, and keep the turn for this transaction; harmless if it has it already.

    Before any row is locked: who waits for a turn with a lease or balance locked and who has the turn and
    waits for that row would wait for each other.
    """
    await conn.execute(_TURN)


async def lend(
    conn: AsyncConnection,
    buyer: int,
    worker: str,
    *,
    minimum: Nano,
    wanted: Nano,
    terms: Overdraft,
    ttl_ms: int = LEASE_TTL_MS,
    new_id: NewId = uuid7,
) -> Granted:
    """Lease `wanted` for one request, or as much as the terms allow if that is at least `minimum`.

    Raises `InsufficientFunds` when the buyer's available amount is not above zero, or the terms are
    exhausted; `UnknownAccount`.  A transaction that has locked rows before has taken its turn before them.
    """
    await take_turn(conn)
    await conn.execute(_RECOVERED)
    drawn = int(await conn.scalar(_DRAWN) or 0)
    available = (await lock_balances(conn, [buyer]))[buyer].available.n
    limit = int(await conn.scalar(_LIMIT, {"buyer": buyer, "limit": terms.limit.n}) or 0)
    room = max(0, min(limit, terms.platform_cap.n - drawn))
    amount = min(wanted.n, available + room)
    if available <= 0 or amount < max(1, minimum.n):
        raise InsufficientFunds(
            f"{Nano(available)} is left, {minimum} is needed, {Nano(room)} may be lent",
            available_nano=available,
        )
    identity = new_id()
    values = {"buyer": buyer, "id": identity, "worker": worker, "amount": amount, "ttl_ms": ttl_ms}
    await conn.execute(_LEND, values)
    return Granted(identity, Nano(amount), ZERO)


async def set_limit(conn: AsyncConnection, buyer: int, limit: Nano) -> None:
    """Give an account its own limit (its tier); zero: no overdraft for this buyer.

    What he owes already stays owed.
    """
    if limit.n < 0:
        raise ValueError("a limit is never negative")
    await take_turn(conn)
    await lock_balances(conn, [buyer])  # UnknownAccount
    statement = text(
        """INSERT INTO overdrafts (account_id, limit_nano) VALUES (:buyer, :limit)
           ON CONFLICT (account_id) DO UPDATE SET limit_nano = EXCLUDED.limit_nano""",
    )
    await conn.execute(statement, {"buyer": buyer, "limit": limit.n})


async def drawn(conn: AsyncConnection) -> Nano:
    """What all buyers together owe by overdraft now, holds included: at most the platform's cap."""
    return Nano(int(await conn.scalar(_DRAWN) or 0))
