"""Reading charges: a page at a time by keyset, newest first, and their totals.

A page costs the same at ten million rows as at ten thousand: it walks `(buyer, id DESC)` or
`(operator, id DESC)` from the last id seen and never counts or skips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Final
from uuid import UUID

from sqlalchemy import ColumnElement, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger.charges import Charge, charge_of
from marketplace.ledger.ids import lowest_at
from marketplace.ledger.money import Nano
from marketplace.ledger.tables import charges

PAGE_ROWS_MAX: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which charges: a buyer's or an operator's (account ids; give one), narrowed by the rest.

    `since` is included, `until` is not; both are aware.  They filter by when the request arrived.
    """

    buyer: int | None = None
    operator: int | None = None
    model: str | None = None
    key_id: UUID | None = None
    node: UUID | None = None
    status: int | None = None
    only_failed: bool = False
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        if (self.buyer is None) == (self.operator is None):
            raise ValueError("select a buyer's charges or an operator's")


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a selection."""

    requests: int
    tok_in: int
    tok_out: int
    amount: Nano
    fee: Nano

    @property
    def earned(self) -> Nano:
        """What the operators got."""
        return self.amount - self.fee


async def page(
    conn: AsyncConnection, selection: Selection, *, limit: int = 100, before: UUID | None = None
) -> Sequence[Charge]:
    """At most `limit` (1 to 1,000) charges older than `before`, newest first.

    The next page's `before` is the last charge's id; a page shorter than `limit` is the last.
    """
    if not 1 <= limit <= PAGE_ROWS_MAX:
        raise ValueError(f"a page has 1 to {PAGE_ROWS_MAX} rows")
    statement = select(charges).where(*_conditions(selection)).order_by(charges.c.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(charges.c.id < before)
    return [charge_of(row) for row in (await conn.execute(statement)).mappings()]


async def find(conn: AsyncConnection, charge_id: UUID) -> Charge | None:
    """One charge by its request's id: how to ask after an `UnknownResult`."""
    statement = select(charges).where(charges.c.id == charge_id)
    row = (await conn.execute(statement)).mappings().one_or_none()
    return None if row is None else charge_of(row)


@dataclass(frozen=True, slots=True)
class Day:
    """One UTC day's sums for one operator and model (operator 0: the request reached none)."""

    day: date
    operator: int
    model: str
    failed: int
    totals: Totals


_DAILY: Final = text(
    """
    SELECT day, operator, model, requests, failed, tok_in, tok_out, amount, fee FROM usage_daily
    WHERE (buyer = :buyer OR CAST(:buyer AS BIGINT) IS NULL)
      AND (operator = :operator OR CAST(:operator AS BIGINT) IS NULL)
      AND day >= :first AND day <= :last ORDER BY day, operator, model""",
)


async def daily(
    conn: AsyncConnection, *, buyer: int | None = None, operator: int | None = None, first: date, last: date
) -> Sequence[Day]:
    """A buyer's or an operator's days from `first` to `last`, as of the latest roll-up."""
    if (buyer is None) == (operator is None):
        raise ValueError("ask for a buyer's days or an operator's")
    values = {"buyer": buyer, "operator": operator, "first": first, "last": last}
    return [
        Day(
            row.day,
            row.operator,
            row.model,
            row.failed,
            Totals(
                row.requests, int(row.tok_in), int(row.tok_out), Nano(int(row.amount)), Nano(int(row.fee))
            ),
        )
        for row in await conn.execute(_DAILY, values)
    ]


async def totals(conn: AsyncConnection, selection: Selection) -> Totals:
    """Sums over the whole selection; bound it with `since` and `until`, since it reads every row."""
    c = charges.c
    columns = (func.count(), func.sum(c.tok_in), func.sum(c.tok_out), func.sum(c.amount), func.sum(c.fee))
    row = (await conn.execute(select(*columns).where(*_conditions(selection)))).one()
    requests, tok_in, tok_out, amount, fee = (int(value or 0) for value in row)
    return Totals(requests, tok_in, tok_out, Nano(amount), Nano(fee))


def _conditions(selection: Selection) -> list[ColumnElement[bool]]:
    c, s = charges.c, selection
    equal = {
        c.buyer: s.buyer,
        c.operator: s.operator,
        c.model: s.model,
        c.key_id: s.key_id,
        c.node: s.node,
        c.status: s.status,
    }
    conditions = [column == value for column, value in equal.items() if value is not None]
    if s.only_failed:
        conditions.append(c.status != 200)  # the partial index's own predicate
    if s.since is not None:
        conditions.append(c.id >= lowest_at(s.since))
    if s.until is not None:
        conditions.append(c.id < lowest_at(s.until))
    return conditions
