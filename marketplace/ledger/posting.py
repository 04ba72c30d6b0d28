"""Posting a transfer: once, in the caller's transaction, within the floors.

The transaction is READ COMMITTED.  Rows are locked in one order everywhere in the ledger: leases by
id, then balances by account id; so no two of its transactions can wait for each other in a circle.
A refusal is raised before anything is written: the caller may go on with its transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger.accounts import Account, Balance, TransferKind, ensure_account
from marketplace.ledger.errors import InsufficientFunds, KeyReused, ReversalRefused, UnknownAccount
from marketplace.ledger.ids import NewId, uuid7
from marketplace.ledger.money import Nano
from marketplace.ledger.tables import balances, transfers
from marketplace.ledger.templates import Transfer


@dataclass(frozen=True, slots=True)
class Posted:
    """What is on record under a business key."""

    id: UUID
    amount: Nano
    input_hash: bytes


async def post_transfer(conn: AsyncConnection, transfer: Transfer, *, new_id: NewId = uuid7) -> bool:
    """Move the money; True if this call did it, False if the same transfer was already on record.

    Raises `KeyReused` for the same (kind, ref) with other inputs, `InsufficientFunds` when a floor
    would be broken, `ReversalRefused`.  Never commits.
    """
    names = sorted((transfer.debit, transfer.credit))  # two creators never wait in a circle
    ids = {name: await ensure_account(conn, name) for name in names}
    locked = await lock_balances(conn, list(ids.values()))
    if await _is_on_record(conn, transfer):
        return False
    if transfer.reverses is not None:
        await _check_reversal(conn, transfer, ids)
    _check_floor(transfer, locked[ids[transfer.debit]])
    if not await _insert(conn, transfer, ids, new_id()):
        return False
    await _apply(conn, {ids[transfer.debit]: -transfer.amount.n, ids[transfer.credit]: transfer.amount.n})
    return True


async def find_transfer(conn: AsyncConnection, kind: TransferKind, ref: str) -> Posted | None:
    """What is on record under this business key, if anything."""
    statement = select(transfers.c.id, transfers.c.amount, transfers.c.input_hash).where(
        transfers.c.kind == kind.value,
        transfers.c.ref == ref,
    )
    row = (await conn.execute(statement)).one_or_none()
    return None if row is None else Posted(row.id, Nano(row.amount), row.input_hash)


async def lock_balances(conn: AsyncConnection, ids: Sequence[int]) -> dict[int, Balance]:
    """Lock these balances in account order until the transaction ends, and read them."""
    statement = (
        select(balances.c.account_id, balances.c.posted, balances.c.held, balances.c.floor)
        .where(balances.c.account_id.in_(ids))
        .order_by(balances.c.account_id)
        .with_for_update(key_share=True)
    )
    rows = (await conn.execute(statement)).all()
    if len(rows) != len(set(ids)):
        raise UnknownAccount(f"no balance for {sorted(set(ids) - {row.account_id for row in rows})}")
    return {
        row.account_id: Balance(
            row.account_id, Nano(row.posted), Nano(row.held), None if row.floor is None else Nano(row.floor)
        )
        for row in rows
    }


async def _is_on_record(conn: AsyncConnection, transfer: Transfer) -> bool:
    found = await find_transfer(conn, transfer.kind, transfer.ref)
    if found is None:
        return False
    if found.input_hash != transfer.input_hash:
        raise KeyReused(f"{transfer.kind} {transfer.ref!r} is on record with other inputs")
    return True


def _check_floor(transfer: Transfer, debited: Balance) -> None:
    # A reversal or correction may find the money spent: that is decided by the caller, not waved through.
    if debited.floor is not None and debited.available < transfer.amount:
        raise InsufficientFunds(
            f"{transfer.debit} has {debited.available} available, {transfer.kind} needs {transfer.amount}",
            available_nano=debited.available.n,
        )


async def _check_reversal(conn: AsyncConnection, transfer: Transfer, ids: Mapping[Account, int]) -> None:
    # Both balances are locked, and every reversal of one transfer locks the same two: no race on the sum.
    statement = select(transfers).where(transfers.c.id == transfer.reverses)
    original = (await conn.execute(statement)).one_or_none()
    if original is None or original.kind == TransferKind.REVERSAL:
        raise ReversalRefused(f"{transfer.reverses} is not a transfer that can be reversed")
    if (original.credit, original.debit) != (ids[transfer.debit], ids[transfer.credit]):
        raise ReversalRefused("a reversal runs between the original's own accounts, backwards")
    undone = await conn.scalar(
        select(func.coalesce(func.sum(transfers.c.amount), 0)).where(
            transfers.c.reverses == transfer.reverses
        ),
    )
    if int(undone or 0) + transfer.amount.n > original.amount:
        raise ReversalRefused(f"{transfer.reverses} moved {original.amount}, {undone} is undone already")


async def _insert(
    conn: AsyncConnection, transfer: Transfer, ids: Mapping[Account, int], identity: UUID
) -> bool:
    statement = insert(transfers).values(
        id=identity,
        kind=transfer.kind.value,
        debit=ids[transfer.debit],
        credit=ids[transfer.credit],
        amount=transfer.amount.n,
        ref=transfer.ref,
        input_hash=transfer.input_hash,
        reverses=transfer.reverses,
        note=transfer.note,
    )
    on_key = statement.on_conflict_do_nothing(constraint="one_transfer_per_key")
    if await conn.scalar(on_key.returning(transfers.c.id)) is not None:
        return True
    # Same key between other accounts, at the same moment (the same accounts would have queued on the lock).
    if not await _is_on_record(conn, transfer):
        raise KeyReused(f"{transfer.kind} {transfer.ref!r} is being posted elsewhere")
    return False


async def _apply(conn: AsyncConnection, deltas: Mapping[int, int]) -> None:
    statement = (
        update(balances)
        .where(balances.c.account_id == bindparam("account"))
        .values(posted=balances.c.posted + bindparam("delta"))
    )
    rows = [{"account": account, "delta": delta} for account, delta in sorted(deltas.items())]
    await conn.execute(statement, rows)
