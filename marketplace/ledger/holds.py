"""Holds on record: money set aside until something is decided, such as an operator's pending withdrawal.

(A request's hold lives in memory, inside a lease: see `leases`.)  Both count in `balances.held`.
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import delete, insert, select, update
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
    owner = await conn.scalar(select(holds.c.account).where(holds.c.id == hold_id))
    if owner is None:
        return None
    await lock_balances(conn, [owner])
    amount = await conn.scalar(delete(holds).where(holds.c.id == hold_id).returning(holds.c.amount))
    if amount is None:
        return None
    statement = update(balances).where(balances.c.account_id == owner)
    await conn.execute(statement.values(held=balances.c.held - amount))
    return Nano(amount)
