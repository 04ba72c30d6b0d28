"""Daily sums of usage by key: by day (UTC), buyer, key and model.

As the ledger's own daily sums (`marketplace.ledger.rollups`), which do not know keys: batches are added lane
by lane, each exactly once, in one transaction with the mark that says how far a lane is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from marketplace.ledger.money import Nano
from marketplace.ledger.rollups import day_bounds, day_of
from marketplace.platform.database import transaction

BATCHES_MAX: Final = 1_000
DAYS_MAX: Final = 10_000
"""Rows of one answer."""

_TURN: Final = text("SELECT pg_advisory_xact_lock(1801808748)")  # "keyl"
_BEHIND: Final = text("""
    SELECT l.lane, coalesce(m.n, 0) AS mark, h.n AS head
    FROM generate_series(0, 63) AS l (lane) LEFT JOIN usage_key_marks m ON m.lane = l.lane
    CROSS JOIN LATERAL (SELECT n FROM batches b WHERE b.lane = l.lane ORDER BY n DESC LIMIT 1) AS h
    WHERE h.n > coalesce(m.n, 0)""")
_SPAN: Final = text("""
    SELECT (array_agg(first_id ORDER BY first_id))[1] AS first, (array_agg(last_id ORDER BY last_id DESC))[1]
           AS last FROM batches WHERE lane = :lane AND n > :mark AND n <= :head""")
_ADD: Final = text("""
    INSERT INTO usage_daily_keys AS u (day, buyer, key_id, model, requests, failed, tok_in, tok_out, amount)
    SELECT CAST(:first_day AS DATE) + width_bucket(id, CAST(:bounds AS UUID[])) - 1, buyer, key_id, model,
           count(*), count(*) FILTER (WHERE status <> 200), sum(tok_in), sum(tok_out), sum(amount)
    FROM charges
    WHERE lane = :lane AND batch > :mark AND batch <= :head AND id BETWEEN :first AND :last
      AND key_id IS NOT NULL
    GROUP BY 1, 2, 3, 4
    ON CONFLICT (buyer, day, key_id, model) DO UPDATE SET
        requests = u.requests + EXCLUDED.requests, failed = u.failed + EXCLUDED.failed,
        tok_in = u.tok_in + EXCLUDED.tok_in, tok_out = u.tok_out + EXCLUDED.tok_out,
        amount = u.amount + EXCLUDED.amount""")
_MARK: Final = text("""
    INSERT INTO usage_key_marks (lane, n) VALUES (:lane, :head)
    ON CONFLICT (lane) DO UPDATE SET n = EXCLUDED.n""")
_DAYS: Final = text("""
    SELECT day, key_id, model, requests, failed, tok_in, tok_out, amount FROM usage_daily_keys
    WHERE buyer = :buyer AND day BETWEEN :first AND :last
    ORDER BY day, key_id, model LIMIT :rows""")


@dataclass(frozen=True, slots=True)
class KeyDay:
    """One UTC day's sums of one key and model."""

    day: date
    key_id: UUID
    model: str
    requests: int
    failed: int
    tok_in: int
    tok_out: int
    amount: Nano


async def roll_up_keys(engine: AsyncEngine) -> int:
    """Add what was posted since; how many batches there were."""
    done = 0
    async with transaction(engine) as connection:
        await connection.execute(_TURN)
        for lane in (await connection.execute(_BEHIND)).all():
            head = min(lane.head, lane.mark + BATCHES_MAX)
            part = {"lane": lane.lane, "mark": lane.mark, "head": head}
            span = (await connection.execute(_SPAN, part)).one()
            first_day, last_day = day_of(span.first), day_of(span.last)
            bounds = day_bounds(first_day, last_day)
            values = {
                **part,
                "first": span.first,
                "last": span.last,
                "first_day": first_day,
                "bounds": bounds,
            }
            await connection.execute(_ADD, values)
            await connection.execute(_MARK, {"lane": lane.lane, "head": head})
            done += head - lane.mark
    return done


async def key_days(connection: AsyncConnection, *, buyer: int, first: date, last: date) -> Sequence[KeyDay]:
    """A buyer's days from `first` to `last`, as of the latest roll-up."""
    values = {"buyer": buyer, "first": first, "last": last, "rows": DAYS_MAX}
    return [
        KeyDay(
            row.day, row.key_id, row.model, row.requests, row.failed,
            int(row.tok_in), int(row.tok_out), Nano(int(row.amount)),
        )
        for row in await connection.execute(_DAYS, values)
    ]  # fmt: skip
