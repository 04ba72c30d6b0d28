"""Posting transfers: once, in the caller's transaction, within the floors.

The transaction is READ COMMITTED.  Rows are locked in one order everywhere in the ledger: leases by
id, then balances by account id; so no two of its transactions can wait for each other in a circle.
A refusal is raised before anything is written: the caller may go on with its transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from sqlalchemy import bindparam, func, select, text, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger.accounts import (
    CHARGE_REFUNDS,
    Account,
    Balance,
    TransferKind,
    ensure_accounts,
    platform_revenue,
)
from marketplace.ledger.errors import (
    AmountTooLarge,
    InsufficientFunds,
    KeyReused,
    ReversalRefused,
    UnknownAccount,
)
from marketplace.ledger.ids import NewId, uuid7
from marketplace.ledger.money import NANO_MAX, Nano
from marketplace.ledger.tables import charges, transfers
from marketplace.ledger.templates import Transfer

BULK_MAX: Final = 10_000
"""Transfers in one call: bounds the statement, the locks and the time they are held."""


@dataclass(frozen=True, slots=True)
class Posted:
    """What is on record under a business key."""

    id: UUID
    amount: Nano
    input_hash: bytes


async def post_transfer(conn: AsyncConnection, transfer: Transfer, *, new_id: NewId = uuid7) -> bool:
    """Move the money; True if this call did it, False if the same transfer was already on record.

    Raises `KeyReused` for the same (kind, ref) with other inputs, `InsufficientFunds` when a floor
    would be broken, `AmountTooLarge`, `ReversalRefused`.  Never commits.
    """
    return (await post_transfers(conn, [transfer], new_id=new_id))[0]


async def post_transfers(
    conn: AsyncConnection, wanted: Sequence[Transfer], *, new_id: NewId = uuid7
) -> list[bool]:
    """Post all of these, in this order, or none: as `post_transfer` one after the other, at bulk speed.

    At most `BULK_MAX`.  What the first gives, the second may spend.  The same transfer twice in one call
    is posted once.
    """
    if len(wanted) > BULK_MAX:
        raise ValueError(f"at most {BULK_MAX} transfers in one call")
    ids = await ensure_accounts(conn, (name for t in wanted for name in (t.debit, t.credit)))
    book = _Book(await lock_balances(conn, list(ids.values())), ids)
    known = await _on_record(conn, wanted)
    fresh: list[tuple[UUID, Transfer]] = []
    outcomes: list[bool] = []
    for transfer in wanted:
        is_new = not _is_known(transfer, known)
        if is_new:
            if transfer.reverses is not None:
                await _check_reversal(conn, transfer, ids, fresh)
            if transfer.kind in CHARGE_REFUNDS:
                await _check_charge_refund(conn, transfer, ids)
            book.move(transfer)
            identity = new_id()
            fresh.append((identity, transfer))
            known[transfer.kind.value, transfer.ref] = transfer.input_hash
        outcomes.append(is_new)
    if fresh and not await _insert(conn, fresh, ids):
        return [False for _ in wanted]
    await book.write(conn)
    return outcomes


async def find_transfer(conn: AsyncConnection, kind: TransferKind, ref: str) -> Posted | None:
    """What is on record under this business key, if anything."""
    statement = select(transfers.c.id, transfers.c.amount, transfers.c.input_hash).where(
        transfers.c.kind == kind.value,
        transfers.c.ref == ref,
    )
    row = (await conn.execute(statement)).one_or_none()
    return None if row is None else Posted(row.id, Nano(row.amount), row.input_hash)


async def lock_balances(conn: AsyncConnection, ids: Iterable[int]) -> dict[int, Balance]:
    """Lock these balances in account order until the transaction ends, and read them."""
    wanted = sorted(set(ids))
    rows = (await conn.execute(_LOCK, {"ids": wanted})).all()
    if len(rows) != len(wanted):
        raise UnknownAccount(f"no balance for {sorted(set(wanted) - {row.account_id for row in rows})}")
    return {
        row.account_id: Balance(
            row.account_id, Nano(row.posted), Nano(row.held), None if row.floor is None else Nano(row.floor)
        )
        for row in rows
    }


_LOCK: Final = text(
    """
    SELECT account_id, posted, held, floor FROM balances
    WHERE account_id = ANY(CAST(:ids AS BIGINT[])) ORDER BY account_id FOR NO KEY UPDATE""",
)
_MOVE: Final = text(
    """
    UPDATE balances b SET posted = u.posted, floor = u.floor
    FROM unnest(CAST(:ids AS BIGINT[]), CAST(:posted AS BIGINT[]), CAST(:floors AS BIGINT[]))
         AS u (id, posted, floor)
    WHERE b.account_id = u.id""",
)


class _Book:
    """The locked balances, as they will be when the transfers are written."""

    def __init__(self, locked: Mapping[int, Balance], ids: Mapping[Account, int]) -> None:
        self._before = locked
        self._ids = ids
        self._posted = {account: balance.posted.n for account, balance in locked.items()}
        self._floor = {account: balance.floor for account, balance in locked.items()}

    def move(self, transfer: Transfer) -> None:
        debit, credit, amount = self._ids[transfer.debit], self._ids[transfer.credit], transfer.amount.n
        left = self._posted[debit] - self._before[debit].held.n - amount
        floor = self._floor[debit]
        # Spending stops at zero, even where a floor below zero was granted to an overdraft or a dispute.
        if floor is not None and left < 0:
            if not transfer.lifts_floor:
                available = left + amount
                raise InsufficientFunds(
                    f"{transfer.debit} has {Nano(available)} available, "
                    f"{transfer.kind} needs {transfer.amount}",
                    available_nano=available,
                )
            self._floor[debit] = min(floor, Nano(left))
        if abs(self._posted[debit] - amount) > NANO_MAX or abs(self._posted[credit] + amount) > NANO_MAX:
            raise AmountTooLarge(f"{transfer.amount} more does not fit {transfer.debit} or {transfer.credit}")
        self._posted[debit] -= amount
        self._posted[credit] += amount

    async def write(self, conn: AsyncConnection) -> None:
        moved = [
            account
            for account, balance in self._before.items()
            if (balance.posted.n, balance.floor) != (self._posted[account], self._floor[account])
        ]
        if not moved:
            return
        floors = [self._floor[account] for account in moved]
        values = {
            "ids": moved,
            "posted": [self._posted[account] for account in moved],
            "floors": [None if floor is None else floor.n for floor in floors],
        }
        await conn.execute(_MOVE, values)


_Key = tuple[str, str]


async def _on_record(conn: AsyncConnection, wanted: Sequence[Transfer]) -> dict[_Key, bytes]:
    keys = [(t.kind.value, t.ref) for t in wanted]
    statement = select(transfers.c.kind, transfers.c.ref, transfers.c.input_hash).where(
        tuple_(transfers.c.kind, transfers.c.ref).in_(bindparam("keys", expanding=True)),
    )
    found: dict[_Key, bytes] = {}
    for start in range(0, len(keys), 5_000):  # the wire protocol carries 32,767 parameters
        rows = await conn.execute(statement, {"keys": keys[start : start + 5_000]})
        found |= {(row.kind, row.ref): row.input_hash for row in rows}
    return found


def _is_known(transfer: Transfer, known: Mapping[_Key, bytes]) -> bool:
    found = known.get((transfer.kind.value, transfer.ref))
    if found is not None and found != transfer.input_hash:
        raise KeyReused(f"{transfer.kind} {transfer.ref!r} is on record with other inputs")
    return found is not None


async def _check_reversal(
    conn: AsyncConnection,
    transfer: Transfer,
    ids: Mapping[Account, int],
    fresh: Sequence[tuple[UUID, Transfer]],
) -> None:
    # Both balances are locked, and every reversal of one transfer locks the same two: no race on the sum.
    statement = select(transfers).where(transfers.c.id == transfer.reverses)
    original = (await conn.execute(statement)).one_or_none()
    if original is None or original.kind in {TransferKind.REVERSAL, *CHARGE_REFUNDS}:
        raise ReversalRefused(f"{transfer.reverses} is not a transfer that can be reversed")
    if (original.credit, original.debit) != (ids[transfer.debit], ids[transfer.credit]):
        raise ReversalRefused("a reversal runs between the original's own accounts, backwards")
    stored = await conn.scalar(
        select(func.coalesce(func.sum(transfers.c.amount), 0)).where(
            transfers.c.reverses == transfer.reverses
        ),
    )
    undone = int(stored or 0) + sum(t.amount.n for _, t in fresh if t.reverses == transfer.reverses)
    if undone + transfer.amount.n > original.amount:
        raise ReversalRefused(f"{transfer.reverses} moved {original.amount}, {undone} is undone already")


async def _check_charge_refund(conn: AsyncConnection, transfer: Transfer, ids: Mapping[Account, int]) -> None:
    """A share of a stored charge goes back from who had it to who paid it, and no more than he had."""
    try:
        charge_id = UUID(transfer.ref)
    except ValueError as e:
        raise ReversalRefused(f"{transfer.ref!r} is no charge's id") from e
    charge = (await conn.execute(select(charges).where(charges.c.id == charge_id))).one_or_none()
    if charge is None or charge.buyer != ids[transfer.credit]:
        raise ReversalRefused(f"{transfer.ref} is no charge of {transfer.credit}")
    if transfer.kind is TransferKind.CHARGE_REFUND_OPERATOR:
        had = charge.amount - charge.fee if charge.operator == ids[transfer.debit] else 0
    else:
        had = charge.fee if transfer.debit == platform_revenue(charge.lane) else 0
    if transfer.amount.n > had:
        raise ReversalRefused(f"{transfer.debit} had {Nano(had)} of charge {charge_id}")


async def _insert(
    conn: AsyncConnection, fresh: Sequence[tuple[UUID, Transfer]], ids: Mapping[Account, int]
) -> bool:
    """Write the rows; False if one transfer alone was, at this moment, written by somebody else."""
    rows = [
        {
            "id": identity,
            "kind": t.kind.value,
            "debit": ids[t.debit],
            "credit": ids[t.credit],
            "amount": t.amount.n,
            "ref": t.ref,
            "input_hash": t.input_hash,
            "reverses": t.reverses,
            "note": t.note,
            "lifts_floor": t.lifts_floor,
        }
        for identity, t in fresh
    ]
    if len(rows) > 1:  # a key taken at this very moment between other accounts ends the transaction
        await conn.execute(insert(transfers), rows)
        return True
    statement = insert(transfers).values(rows[0]).on_conflict_do_nothing(constraint="one_transfer_per_key")
    if await conn.scalar(statement.returning(transfers.c.id)) is not None:
        return True
    # Same key between other accounts, at the same moment (the same accounts would have queued on the lock).
    transfer = fresh[0][1]
    if not _is_known(transfer, await _on_record(conn, [transfer])):
        raise KeyReused(f"{transfer.kind} {transfer.ref!r} is being posted elsewhere")
    return False
