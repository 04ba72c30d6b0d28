"""Reading charges: a page at a time by keyset, newest first, and their totals.

A page costs the same at ten million rows as at ten thousand: it walks an index from the last id seen, and
never counts or skips.  It asks for one month, then for the two before it, then four, …, until the page is
full: a statement bounded to a month is planned for that month's partition alone, where a statement over all
of them would be planned for each and would look for a first match in each.

The index is `(buyer, id DESC)` or `(operator, id DESC)`; of a filter, what it has of its own: `(buyer, model,
id DESC)`, `(key_id, id DESC)`, `(node, id DESC)`, and the failures of a buyer or an operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, bindparam, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger.charges import Charge, charge_of
from marketplace.ledger.ids import NewId, lowest_at, made_at, uuid7
from marketplace.ledger.money import Nano
from marketplace.ledger.tables import charges

PAGE_ROWS_MAX: Final = 1_000
FIRST_MONTH: Final = datetime(2026, 1, 1, tzinfo=UTC)
"""Before it there are no partitions by month: all that is older is asked for at once."""
CLOCKS_APART: Final = timedelta(days=1)
"""A charge whose id claims to be from later than this is listed when its time has come."""
_OLDEST: Final = UUID(int=0)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# The best index depends on who asks for what, so each statement is planned for its own values.
PLAN_ANEW: Final = text("SET LOCAL plan_cache_mode = force_custom_plan")


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
    conn: AsyncConnection,
    selection: Selection,
    *,
    limit: int = 100,
    before: UUID | None = None,
    new_id: NewId = uuid7,
) -> Sequence[Charge]:
    """At most `limit` (1 to 1,000) charges older than `before`, newest first.

    The next page's `before` is the last charge's id; a page shorter than `limit` is the last.
    """
    if not 1 <= limit <= PAGE_ROWS_MAX:
        raise ValueError(f"a page has 1 to {PAGE_ROWS_MAX} rows")
    bounds = (before, _bound(selection.until), newest(new_id))
    above = min(bound for bound in bounds if bound is not None)
    conditions = [*_conditions(selection), charges.c.id >= bindparam("low"), charges.c.id < bindparam("high")]
    statement = select(charges).where(*conditions).order_by(charges.c.id.desc()).limit(bindparam("rows"))
    found: list[Charge] = []
    await conn.execute(PLAN_ANEW)
    for low, high in spans(_bound(selection.since) or _OLDEST, above):
        values = {"low": low, "high": high, "rows": limit - len(found)}
        found += [charge_of(row) for row in (await conn.execute(statement, values)).mappings()]
        if len(found) == limit:
            break
    return found


def newest(new_id: NewId = uuid7) -> UUID:
    """Where ids begin that are none of today's: an honest charge's id is below."""
    return lowest_at(made_at(new_id()) + CLOCKS_APART)


def spans(lowest: UUID, high: UUID) -> Iterator[tuple[UUID, UUID]]:
    """[low, high) from `high` down to `lowest`: what there is of one month, then two, four, … of them.

    >>> april = datetime(2026, 4, 9, tzinfo=UTC)
    >>> found = list(spans(_OLDEST, lowest_at(april)))
    >>> [made_at(low).strftime("%Y-%m") for low, _ in found]
    ['2026-04', '2026-02', '2026-01', '1970-01']
    >>> found[0][1] == lowest_at(april), found[1][1] == found[0][0], found[-1][0] == _OLDEST
    (True, True, True)
    >>> list(spans(lowest_at(april), lowest_at(april)))
    []
    """
    months = 1
    while high > lowest:
        low = max(lowest, _months_below(high, months))
        yield low, high
        high, months = low, months * 2


def _months_below(high: UUID, months: int) -> UUID:
    """Where the last of so many months begins that lie (partly) below `high`."""
    last = made_at(UUID(int=high.int - 1))
    number = last.year * 12 + last.month - months
    if last < FIRST_MONTH:
        return _OLDEST
    return lowest_at(max(FIRST_MONTH, datetime(number // 12, number % 12 + 1, 1, tzinfo=UTC)))


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


# Whole days come from the daily sums, with what was posted since they were made; parts of days from the
# charges.  One statement: its three parts see the same moment.
_TOTALS: Final = """
    WITH behind AS (
        SELECT (array_agg(b.first_id ORDER BY b.first_id))[1] AS min_id
        FROM generate_series(0, 63) AS l (lane) LEFT JOIN rollup_marks m ON m.lane = l.lane
        JOIN batches b ON b.lane = l.lane AND b.n > coalesce(m.n, 0)
    ), parts AS (
        SELECT requests, tok_in, tok_out, amount, fee FROM usage_daily
        WHERE {account} = :account AND (model = :model OR CAST(:model AS TEXT) IS NULL)
          AND day >= :first AND day < :last
        UNION ALL
        SELECT 1, tok_in, tok_out, amount, fee FROM charges
        WHERE {account} = :account AND (model = :model OR CAST(:model AS TEXT) IS NULL)
          AND (id >= :since AND id < :first_id OR id >= :last_id AND id < :until)
        UNION ALL
        SELECT 1, c.tok_in, c.tok_out, c.amount, c.fee FROM charges c LEFT JOIN rollup_marks m USING (lane)
        WHERE c.{account} = :account AND (c.model = :model OR CAST(:model AS TEXT) IS NULL)
          AND c.batch > coalesce(m.n, 0) AND c.id >= :first_id AND c.id < :last_id
          AND c.id >= (SELECT min_id FROM behind)
    )
    SELECT coalesce(sum(requests), 0), coalesce(sum(tok_in), 0), coalesce(sum(tok_out), 0),
           coalesce(sum(amount), 0), coalesce(sum(fee), 0) FROM parts"""
_TOTALS_OF: Final = {
    "buyer": text(_TOTALS.format(account="buyer")),
    "operator": text(_TOTALS.format(account="operator")),
}
_LAST_MOMENT: Final = datetime(9999, 12, 31, tzinfo=UTC)


async def totals(conn: AsyncConnection, selection: Selection) -> Totals:
    """Sums over the whole selection, exact to the last commit.

    Whole UTC days cost nothing worth mentioning, unless filtered by key, node or status: then every row is
    read, so bound it with `since` and `until`.
    """
    s = selection
    await conn.execute(PLAN_ANEW)
    if s.key_id is not None or s.node is not None or s.status is not None or s.only_failed:
        return await _totals_of_rows(conn, s)
    since, until = lowest_at(s.since or _EPOCH), lowest_at(s.until or _LAST_MOMENT)
    return await _totals_between(conn, since, until, buyer=s.buyer, operator=s.operator, model=s.model)


async def totals_since(
    conn: AsyncConnection, first: UUID, *, buyer: int | None = None, operator: int | None = None
) -> Totals:
    """Sums over a buyer's or an operator's charges from id `first` on, exact to the last commit."""
    return await _totals_between(conn, first, lowest_at(_LAST_MOMENT), buyer=buyer, operator=operator)


async def _totals_between(
    conn: AsyncConnection,
    since: UUID,
    until: UUID,
    *,
    buyer: int | None,
    operator: int | None,
    model: str | None = None,
) -> Totals:
    first = made_at(UUID(int=since.int - 1)).date() + timedelta(days=1) if since.int else _EPOCH.date()
    last = max(first, made_at(until).date())
    values = {
        "account": operator if buyer is None else buyer,
        "model": model,
        "since": since,
        "until": until,
        "first": first,
        "last": last,
        "first_id": min(until, _midnight(first)),
        "last_id": min(until, _midnight(last)),
    }
    statement = _TOTALS_OF["operator" if buyer is None else "buyer"]
    return _totals((await conn.execute(statement, values)).one())


async def _totals_of_rows(conn: AsyncConnection, selection: Selection) -> Totals:
    c = charges.c
    columns = (func.count(), func.sum(c.tok_in), func.sum(c.tok_out), func.sum(c.amount), func.sum(c.fee))
    conditions = _conditions(selection)
    if selection.since is not None:
        conditions.append(c.id >= lowest_at(selection.since))
    if selection.until is not None:
        conditions.append(c.id < lowest_at(selection.until))
    return _totals((await conn.execute(select(*columns).where(*conditions))).one())


def _totals(row: Sequence[Any]) -> Totals:
    requests, tok_in, tok_out, amount, fee = (int(value or 0) for value in row)
    return Totals(requests, tok_in, tok_out, Nano(amount), Nano(fee))


def _midnight(day: date) -> UUID:
    return lowest_at(datetime.combine(day, time(), UTC))


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
    if s.only_failed or s.status not in {None, 200}:
        conditions.append(c.status != 200)  # the partial indexes' own predicate
    return conditions


def _bound(moment: datetime | None) -> UUID | None:
    return None if moment is None else lowest_at(moment)
