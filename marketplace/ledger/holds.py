"""Holds on record: money set aside until something is decided, such as an operator's pending withdrawal.

(A request's hold lives in memory, inside a lease: see `leases`.)  Both count in `balances.held`.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger.accounts import Account, ensure_account
from marketplace.ledger.errors import InsufficientFunds
from marketplace.ledger.ids import NewId, uuid7
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import lock_balances
from marketplace.ledger.tables import balances, holds


async def hold(
    conn: AsyncConnection, account: Account, amount: Nano, *, reason: str, new_id: NewId = uuid7
) -> UUID:
    """Set `amount` aside and give back the hold's id; `InsufficientFunds` if it is not available."""
    if amount.n <= 0:
        raise ValueError("a hold is positive")
    identity = await ensure_account(conn, account)
    balance = (await lock_balances(conn, [identity]))[identity]
    if balance.available < amount:
        raise InsufficientFunds(
            f"{account} has {balance.available} available, not {amount}", available_nano=balance.available.n
        )
    new = new_id()
    await conn.execute(insert(holds).values(id=new, account=identity, amount=amount.n, reason=reason))
    statement = update(balances).where(balances.c.account_id == identity)
    await conn.execute(statement.values(held=balances.c.held + amount.n))
    return new


async def release(conn: AsyncConnection, hold_id: UUID) -> Nano | None:
    """End a hold and give back its amount; None if it has ended before (so ending it twice is harmless).

    To spend what was held, release it and post the transfer in the same transaction.
    """
    return (await release_all(conn, [hold_id])).get(hold_id)


async def release_all(conn: AsyncConnection, hold_ids: Sequence[UUID]) -> dict[UUID, Nano]:
    """End these holds and give back the amounts of those that had not ended before."""
    ids = list(set(hold_ids))
    owners = set(await conn.scalars(select(holds.c.account).where(holds.c.id.in_(ids))))
    if not owners:
        return {}
    await lock_balances(conn, owners)
    statement = delete(holds).where(holds.c.id.in_(ids))
    ended = (await conn.execute(statement.returning(holds.c.id, holds.c.account, holds.c.amount))).all()
    totals: dict[int, int] = {}
    for row in ended:
        totals[row.account] = totals.get(row.account, 0) + row.amount
    await conn.execute(_UNHOLD, {"ids": list(totals), "amounts": list(totals.values())})
    return {row.id: Nano(row.amount) for row in ended}


_UNHOLD = text(
    """
    UPDATE balances b SET held = b.held - u.amount
    FROM unnest(CAST(:ids AS BIGINT[]), CAST(:amounts AS BIGINT[])) AS u (id, amount)
    WHERE b.account_id = u.id""",
)
