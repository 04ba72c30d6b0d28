"""The ledger's invariants as SQL, run on one snapshot of the whole book.

    async with engine.connect() as conn:
        async for check in prove(conn):
            ...                     # Check(name, ok, detail)

Names are those of docs/promises.md: L1 to L10, S2, V3, V4.  Nothing is repaired: a failure halts payouts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger.accounts import ASSETS, FLOORED, PERMITTED
from marketplace.ledger.chains import Tell, broken_chains
from marketplace.ledger.money import NANO_PER_MICRO
from marketplace.ledger.overdrafts import PLATFORM_CAP
from marketplace.ledger.rollups import day_bounds
from marketplace.ledger.templates import ON_CHAIN

APPLICATION_ROLE: Final = "tollway_app"
LEASE_OVERDUE_S: Final = 60


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant's verdict; `detail` says what was compared, or what is wrong."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class _NoneSuch:
    """An invariant that holds when a query finds no offender; the query gives (offender, …) rows."""

    name: str
    promise: str
    query: str


_DERIVED: Final = """
    WITH moves AS (
        SELECT debit AS account, -amount AS delta FROM transfers
        UNION ALL SELECT credit, amount FROM transfers
        UNION ALL SELECT buyer, -sum(amount) FROM charges GROUP BY buyer
        UNION ALL SELECT operator, sum(amount - fee) FROM charges WHERE operator IS NOT NULL GROUP BY operator
        UNION ALL SELECT a.id, c.fee FROM (SELECT lane, sum(fee) AS fee FROM charges GROUP BY lane) c
                  JOIN accounts a ON a.kind = 'platform_revenue' AND a.owner = c.lane::text
        UNION ALL SELECT account, delta FROM archived_moves
    ), derived AS (SELECT account, sum(delta) AS posted FROM moves GROUP BY account)
    SELECT coalesce(b.account_id, d.account), b.posted, d.posted
    FROM balances b FULL JOIN derived d ON d.account = b.account_id
    WHERE b.account_id IS NULL OR b.posted <> coalesce(d.posted, 0) LIMIT 5"""

_HELD: Final = """
    WITH parts AS (
        SELECT buyer AS account, amount FROM leases UNION ALL SELECT account, amount FROM holds
    ), derived AS (SELECT account, sum(amount) AS held FROM parts GROUP BY account)
    SELECT b.account_id, b.held, d.held
    FROM balances b LEFT JOIN derived d ON d.account = b.account_id
    WHERE b.held <> coalesce(d.held, 0) LIMIT 5"""

# Below zero by permission only: an overdraft's limit, or a transfer that says it breaks the floor.
_UNPERMITTED: Final = """
    SELECT b.account_id, b.floor, o.limit_nano FROM balances b LEFT JOIN overdrafts o USING (account_id)
    WHERE b.floor < 0 AND b.posted - b.held < -coalesce(o.limit_nano, 0)
      AND NOT EXISTS (SELECT FROM transfers t WHERE t.debit = b.account_id AND t.lifts_floor) LIMIT 5"""

_DAYS: Final = (
    "SELECT least(min(day), current_date) AS first, greatest(max(day), current_date) AS last FROM usage_daily"
)
_MARKS: Final = """
    SELECT coalesce(m.n, 0) FROM generate_series(0, 63) AS l (lane)
    LEFT JOIN rollup_marks m ON m.lane = l.lane ORDER BY l.lane"""

# By day, then by buyer: a pass over the charges each.  By buyer and day, there are about as many groups as
# charges.
_ROLLED_UP: Final = """
    WITH derived AS (
        SELECT {of_charge} AS part, count(*) AS requests, sum(amount) AS amount, sum(fee) AS fee,
               sum(tok_in) AS tok_in, sum(tok_out) AS tok_out
        FROM charges WHERE batch <= (CAST(:marks AS BIGINT[]))[lane + 1] GROUP BY 1
    ), stored AS (
        SELECT {of_day} AS part, sum(requests) AS requests, sum(amount) AS amount, sum(fee) AS fee,
               sum(tok_in) AS tok_in, sum(tok_out) AS tok_out
        FROM usage_daily
        WHERE day >= coalesce((SELECT max(month) + interval '1 month' FROM archived_months), '-infinity')
        GROUP BY 1
    )
    SELECT part FROM derived d FULL JOIN stored s USING (part)
    WHERE (d.requests, d.amount, d.fee, d.tok_in, d.tok_out)
          IS DISTINCT FROM (s.requests, s.amount, s.fee, s.tok_in, s.tok_out) LIMIT 5"""
_BY_DAY: Final = _ROLLED_UP.format(
    of_charge="CAST(:first AS DATE) + width_bucket(id, CAST(:bounds AS UUID[])) - 1", of_day="day"
)
_BY_BUYER: Final = _ROLLED_UP.format(of_charge="buyer", of_day="buyer")

_WRITABLE: Final = f"""
    SELECT c.relname, p.privilege FROM pg_class c,
           (VALUES ('UPDATE'), ('DELETE'), ('TRUNCATE')) AS p (privilege)
    WHERE (c.relname IN ('transfers', 'charges', 'batches')
           OR c.oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'charges'::regclass))
      AND c.relkind IN ('r', 'p')
      AND c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'charges'::regclass)
      AND has_table_privilege('{APPLICATION_ROLE}', c.oid, p.privilege) LIMIT 5"""  # noqa: S608 - constants only

_NONE_SUCH: Final[Sequence[_NoneSuch]] = (
    _NoneSuch(
        "L1 balanced transfers",
        "every transfer moves a positive amount between two accounts",
        "SELECT id FROM transfers WHERE amount <= 0 OR debit = credit LIMIT 5",
    ),
    _NoneSuch(
        "L1 balanced charges",
        "every charge's fee is part of its amount, and somebody earns the rest",
        """SELECT id FROM charges
           WHERE amount < 0 OR fee < 0 OR fee > amount OR (amount > 0 AND operator IS NULL) LIMIT 5""",
    ),
    _NoneSuch(
        "L2 closed",
        "all balances together are zero",
        "SELECT sum(posted) FROM balances HAVING sum(posted) <> 0",
    ),
    _NoneSuch("L3 immutable", "the application may not change or delete what is posted", _WRITABLE),
    _NoneSuch("L5 posted", "every cached balance equals the sum of its transfers and charges", _DERIVED),
    _NoneSuch("L5 held", "every cached held equals its leases and holds", _HELD),
    _NoneSuch(
        "L6 floors",
        "no available amount is below its floor",
        "SELECT account_id FROM balances WHERE posted - held < floor LIMIT 5",
    ),
    _NoneSuch(
        "V4 overdrafts",
        "nobody is below zero but within his overdraft, or by a transfer that says so",
        _UNPERMITTED,
    ),
    _NoneSuch(
        "V4 platform cap",
        f"all overdrafts together are at most {PLATFORM_CAP}",
        f"""SELECT sum(b.held - b.posted) FROM overdrafts o JOIN balances b USING (account_id)
            WHERE o.is_drawn AND b.posted < b.held
              AND NOT EXISTS (SELECT FROM transfers t WHERE t.debit = o.account_id AND t.lifts_floor)
            HAVING sum(b.held - b.posted) > {PLATFORM_CAP.n}""",  # noqa: S608 - constants only
    ),
    _NoneSuch(
        "L7 once",
        "a business key yields one transfer",
        "SELECT kind, ref FROM transfers GROUP BY kind, ref HAVING count(*) > 1 LIMIT 5",
    ),
    _NoneSuch(
        "L9 reversals",
        "no transfer is reversed beyond its amount, no reversal is reversed",
        """SELECT o.id FROM transfers o JOIN transfers r ON r.reverses = o.id
           GROUP BY o.id, o.amount, o.kind, o.debit, o.credit
           HAVING sum(r.amount) > o.amount OR bool_or(r.debit <> o.credit OR r.credit <> o.debit)
               OR o.kind IN ('reversal', 'charge_refund_operator', 'charge_refund_platform') LIMIT 5""",
    ),
    _NoneSuch(
        "L9 refunds",
        "no charge is refunded beyond what each had of it",
        """SELECT t.kind, t.ref FROM transfers t
           JOIN charges c ON c.id = CASE WHEN t.ref ~ '^[0-9a-f-]{36}$' THEN t.ref::uuid END
           WHERE t.kind IN ('charge_refund_operator', 'charge_refund_platform') AND (t.credit <> c.buyer
               OR t.amount > CASE WHEN t.kind = 'charge_refund_platform' THEN c.fee
                                  WHEN t.debit = c.operator THEN c.amount - c.fee ELSE 0 END) LIMIT 5""",
    ),
)


async def prove(
    conn: AsyncConnection, *, beside: AsyncConnection | None = None, tell: Tell | None = None
) -> AsyncIterator[Check]:
    """Run every check on one snapshot; `conn` is fresh (no transaction open) and is left open.

    With a second fresh connection `beside`, the chains are re-hashed there at the same time, on the same
    snapshot.  `tell` hears how far that is.  Holds no row locks.  Reads the charges a few times, each time in
    bulk: a statement may take a minute at 10⁷ of them, so connect without a time limit for statements.
    """
    await conn.execute(_ONE_SNAPSHOT)
    for setting in _BULK:
        await conn.execute(setting)
    chains: AsyncIterator[Check] | _Ahead = prove_chains(conn, tell=tell)
    if beside is not None:
        await beside.execute(_ONE_SNAPSHOT)
        shared = await conn.scalar(text("SELECT pg_export_snapshot()"))
        await beside.execute(text(f"SET TRANSACTION SNAPSHOT '{shared}'"))
        chains = _Ahead(prove_chains(beside, tell=tell))
    try:
        for wanted in _NONE_SUCH:
            yield await _none_such(conn, wanted)
        for check in await _rolled_up(conn):
            yield check
        for prove_it in (_permitted, _whole_micros, _in_flight_stays_owed, _signs, _leases_end):
            yield await prove_it(conn)
        async for check in chains:
            yield check
    finally:
        if isinstance(chains, _Ahead):
            await chains.stop()


_BULK: Final = (
    # Everything is read once from end to end: never row by row through an index, nor sorted on disk.
    text("SET LOCAL enable_indexscan = off"),
    text("SET LOCAL work_mem = '192MB'"),
)
_ONE_SNAPSHOT: Final = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")


class _Ahead:
    """Checks that are made while others are: iterating gives the verdicts."""

    def __init__(self, checks: AsyncIterator[Check]) -> None:
        self._task = asyncio.create_task(self._collect(checks), name="prove-ahead")

    @staticmethod
    async def _collect(checks: AsyncIterator[Check]) -> list[Check]:
        return [check async for check in checks]

    async def __aiter__(self) -> AsyncIterator[Check]:
        for check in await self._task:
            yield check

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def _none_such(conn: AsyncConnection, wanted: _NoneSuch, values: dict[str, Any] | None = None) -> Check:
    found = (await conn.execute(text(wanted.query), values or {})).all()
    if not found:
        return Check(wanted.name, ok=True, detail=wanted.promise)
    shown = "; ".join(", ".join(map(str, row)) for row in found)
    return Check(wanted.name, ok=False, detail=f"not so: {wanted.promise}: {shown}")


async def _permitted(conn: AsyncConnection) -> Check:
    """L8: the kinds that faced each other are in the routing table."""
    flows = text(
        """SELECT DISTINCT t.kind, d.kind, c.kind FROM transfers t
           JOIN accounts d ON d.id = t.debit JOIN accounts c ON c.id = t.credit""",
    )
    allowed = {(kind.value, d.value, c.value) for kind, pairs in PERMITTED.items() for d, c in pairs}
    strange = [tuple(row) for row in await conn.execute(flows) if tuple(row) not in allowed]
    return Check("L8 permitted", not strange, f"flows outside the routing table: {strange or 'none'}")


async def _whole_micros(conn: AsyncConnection) -> Check:
    """L10: BIGINT makes every amount whole; chain-facing ones are whole micros too."""
    query = f"SELECT id FROM transfers WHERE kind = ANY(:kinds) AND amount % {NANO_PER_MICRO} <> 0 LIMIT 5"  # noqa: S608
    wanted = _NoneSuch("L10 integers", "chain-facing amounts are whole micros", query)
    return await _none_such(conn, wanted, {"kinds": [kind.value for kind in ON_CHAIN]})


async def _in_flight_stays_owed(conn: AsyncConnection) -> Check:
    """S2: what we have = what we owe + our own, in flight included."""
    statement = text(
        """SELECT a.kind, sum(b.posted) FROM balances b JOIN accounts a ON a.id = b.account_id
           GROUP BY a.kind""",
    )
    totals = {kind: int(total) for kind, total in await conn.execute(statement)}
    have = -sum(total for kind, total in totals.items() if kind in ASSETS)
    owe = sum(total for kind, total in totals.items() if kind in FLOORED)
    own = sum(total for kind, total in totals.items() if kind not in ASSETS and kind not in FLOORED)
    # Sums over accounts may leave 64 bits: plain ints.
    detail = f"{have:,} nano held = {owe:,} owed + {own:,} platform"
    return Check("S2 in-flight stays owed", have == owe + own, detail)


async def _signs(conn: AsyncConnection) -> Check:
    """S2: nothing we hold is below nothing (assets ≤ 0), nothing we owe either (liabilities ≥ 0)."""
    query = """SELECT a.kind, a.owner, b.posted FROM balances b JOIN accounts a ON a.id = b.account_id
               WHERE (a.kind = ANY(:assets) AND b.posted > 0)
                  OR (a.kind = ANY(:owed) AND b.posted < least(b.floor, 0)) LIMIT 5"""
    wanted = _NoneSuch("S2 signs", "assets are at most zero, liabilities at least their floor", query)
    values = {"assets": [kind.value for kind in ASSETS], "owed": [kind.value for kind in FLOORED]}
    return await _none_such(conn, wanted, values)


async def _leases_end(conn: AsyncConnection) -> Check:
    query = "SELECT id FROM leases WHERE expires < now() - make_interval(secs => :overdue) LIMIT 5"
    wanted = _NoneSuch("V3 leases end", f"no lease outlives its expiry by {LEASE_OVERDUE_S} s", query)
    return await _none_such(conn, wanted, {"overdue": LEASE_OVERDUE_S})


async def _rolled_up(conn: AsyncConnection) -> list[Check]:
    """L5: the daily sums are those of their charges, up to the batches that are in them."""
    days = (await conn.execute(text(_DAYS))).one()
    marks = [int(mark) for mark in await conn.scalars(text(_MARKS))]
    by_day = _NoneSuch("L5 daily sums by day", "each day's sums equal its charges'", _BY_DAY)
    by_buyer = _NoneSuch("L5 daily sums by buyer", "each buyer's sums equal his charges'", _BY_BUYER)
    bounds = {"first": days.first, "bounds": day_bounds(days.first, days.last)}
    return [
        await _none_such(conn, by_day, {"marks": marks} | bounds),
        await _none_such(conn, by_buyer, {"marks": marks}),
    ]


async def prove_chains(conn: AsyncConnection, *, tell: Tell | None = None) -> AsyncIterator[Check]:
    """L4: re-hash every lane from its first batch; also finds charges that belong to no batch."""
    async for verdict in broken_chains(conn, tell=tell):
        yield Check(f"L4 chained lane {verdict.lane}", ok=verdict.trouble is None, detail=verdict.detail)
