"""An account's statement: every movement of it, newest first, with the balance that it left.

    found = await page(conn, accounts.buyer(person), limit=50)
    older = await page(another, accounts.buyer(person), limit=50, before=found.next_before)

Movements are charges and transfers, in the order of their ids: when the request arrived, when the transfer
was made.  That is not quite the order of their commits, so one in between may lie below what the account
ever showed; but it is exact: each page counts back from the posted balance, in one snapshot, what there is of
newer movements.  Down to the first one, nothing is left over.

Pages go by keyset, month by month (`usage.spans`); what is newer than a page comes from the daily sums, but
for the part of a day.  The platform's revenue has none by lane: the older its page, the longer it takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger import usage
from marketplace.ledger.accounts import Account, Balance, Kind, read_balance
from marketplace.ledger.ids import NewId, lowest_at, made_at, uuid7
from marketplace.ledger.money import Nano

CHARGE: Final = "charge"
_ROUNDS_MAX: Final = 10
"""How often a page is asked for until it is full: bounds the walk over requests that cost nothing."""
_OLDEST: Final = UUID(int=0)
_NEWEST: Final = lowest_at(datetime(9999, 12, 31, tzinfo=UTC))
_ONE_SNAPSHOT: Final = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One movement: a charge (with its request's facts) or a transfer (with its other account)."""

    id: UUID
    kind: str
    """`charge`, or the transfer's kind."""
    amount: Nano
    """What it added; below zero: what it took."""
    balance: Nano
    """What it left."""
    other: Account | None = None
    ref: str | None = None
    note: str | None = None
    model: str | None = None
    tok_in: int | None = None
    tok_out: int | None = None
    status: int | None = None

    @property
    def made_at(self) -> datetime:
        """When the request arrived, or the transfer was made."""
        return made_at(self.id)


@dataclass(frozen=True, slots=True)
class Statement:
    """A page: `lines` newest first, and the balance before the oldest of them (`brought_forward`)."""

    account: Account
    balance: Balance
    lines: Sequence[Line]
    brought_forward: Nano
    next_before: UUID | None
    """Give this as `before` for the next page; None at the end."""


async def page(
    conn: AsyncConnection,
    account: Account,
    *,
    limit: int = 100,
    before: UUID | None = None,
    new_id: NewId = uuid7,
) -> Statement | None:
    """The newest `limit` (1 to 1,000) movements older than `before`; None: nothing was ever booked on it.

    `conn` is fresh (no transaction open) and is left open.  Requests that cost nothing are left out; among
    very many of them a page may be short, even empty, and not be the last.  A statement ends where detached
    months begin: what was moved in them is its last page's `brought_forward`.
    """
    if not 1 <= limit <= usage.PAGE_ROWS_MAX:
        raise ValueError(f"a page has 1 to {usage.PAGE_ROWS_MAX} rows")
    await conn.execute(_ONE_SNAPSHOT)
    await conn.execute(usage.PLAN_ANEW)
    balance = await read_balance(conn, account)
    if balance is None:
        return None
    lowest = await conn.scalar(_DETACHED_BELOW) or _OLDEST
    left, high, newest = balance.posted, _NEWEST, usage.newest(new_id)
    if before is not None:
        high = max(lowest, min(before, _NEWEST))
        left -= await _moved_since(conn, account, balance, high)
    lines: list[Line] = []
    is_last = False
    for _ in range(_ROUNDS_MAX):
        found = await _charges(conn, account, balance, _spans(lowest, high, newest), limit)
        found += await _transfers(conn, balance, lowest, high, limit)
        found = sorted(found, key=lambda move: move["id"].int, reverse=True)[:limit]
        for move in found:
            high = move["id"]
            if move["amount"]:
                amount = Nano(int(move["amount"]))
                lines.append(Line(**{**move, "amount": amount}, balance=left))
                left -= amount
            if len(lines) == limit:
                break
        is_last = len(found) < limit and (not found or high == found[-1]["id"])
        if is_last or len(lines) == limit:
            break
    return Statement(account, balance, lines, left, None if is_last else high)


def _spans(lowest: UUID, high: UUID, newest: UUID) -> Iterator[tuple[UUID, UUID]]:
    """As `usage.spans`, the first with all that claims to be from the future: it moved money too."""
    for low, above in usage.spans(lowest, min(high, newest)):
        yield low, high if above == newest else above


_DETACHED_BELOW: Final = text("SELECT upper_id FROM archived_months ORDER BY month DESC LIMIT 1")
_CHARGES: Final = """
    SELECT id, {amount} AS amount, model, tok_in, tok_out, status FROM charges
    WHERE {account} = :account AND id >= :low AND id < :high ORDER BY id DESC LIMIT :rows"""
_CHARGES_OF: Final = {
    Kind.BUYER: text(_CHARGES.format(account="buyer", amount="-amount")),
    Kind.OPERATOR_EARNINGS: text(_CHARGES.format(account="operator", amount="amount - fee")),
    Kind.PLATFORM_REVENUE: text(_CHARGES.format(account="lane", amount="fee")),
}
_FEES_SINCE: Final = text("SELECT coalesce(sum(fee), 0) FROM charges WHERE lane = :lane AND id >= :first")
# Each side by its own index, from the newest down.
_TRANSFERS: Final = text(
    """
    SELECT m.id, m.kind, m.amount, m.ref, m.note, a.kind AS other_kind, a.owner AS other_owner FROM (
        (SELECT id, kind, -amount AS amount, ref, note, credit AS other FROM transfers
         WHERE debit = :account AND id >= :low AND id < :high ORDER BY id DESC LIMIT :rows)
        UNION ALL
        (SELECT id, kind, amount, ref, note, debit FROM transfers
         WHERE credit = :account AND id >= :low AND id < :high ORDER BY id DESC LIMIT :rows)
    ) AS m JOIN accounts a ON a.id = m.other ORDER BY m.id DESC LIMIT :rows"""
)
_TRANSFERRED_SINCE: Final = text(
    """
    SELECT coalesce((SELECT sum(amount) FROM transfers WHERE credit = :account AND id >= :first), 0)
         - coalesce((SELECT sum(amount) FROM transfers WHERE debit = :account AND id >= :first), 0)"""
)


async def _charges(
    conn: AsyncConnection, account: Account, balance: Balance, spans: Iterator[tuple[UUID, UUID]], limit: int
) -> list[dict[str, Any]]:
    statement = _CHARGES_OF.get(account.kind)
    found: list[dict[str, Any]] = []
    if statement is None:
        return found
    key = int(account.owner) if account.kind is Kind.PLATFORM_REVENUE else balance.account_id
    for low, high in spans:
        values = {"account": key, "low": low, "high": high, "rows": limit - len(found)}
        found += [dict(row, kind=CHARGE) for row in (await conn.execute(statement, values)).mappings()]
        if len(found) == limit:
            break
    return found


async def _transfers(
    conn: AsyncConnection, balance: Balance, low: UUID, high: UUID, limit: int
) -> list[dict[str, Any]]:
    values = {"account": balance.account_id, "low": low, "high": high, "rows": limit}
    found = []
    for row in (await conn.execute(_TRANSFERS, values)).mappings():
        move = dict(row)
        move["other"] = Account(Kind(move.pop("other_kind")), move.pop("other_owner"))
        found.append(move)
    return found


async def _moved_since(conn: AsyncConnection, account: Account, balance: Balance, first: UUID) -> Nano:
    """What the movements from id `first` on added to the account."""
    identity = balance.account_id
    moved = int(await conn.scalar(_TRANSFERRED_SINCE, {"account": identity, "first": first}) or 0)
    match account.kind:
        case Kind.BUYER:
            moved -= (await usage.totals_since(conn, first, buyer=identity)).amount.n
        case Kind.OPERATOR_EARNINGS:
            moved += (await usage.totals_since(conn, first, operator=identity)).earned.n
        case Kind.PLATFORM_REVENUE:
            values = {"lane": int(account.owner), "first": first}
            moved += int(await conn.scalar(_FEES_SINCE, values) or 0)
    return Nano(moved)
