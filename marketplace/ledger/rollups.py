"""Daily sums of usage: by day (UTC), buyer, operator and model.

A background task calls `roll_up` every minute or so.  It adds the batches posted since, lane by lane, each
exactly once; a mark per lane says how far it is.  `usage.daily` reads them, `prove` compares them with the
charges (L5 daily sums …).
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger.ids import lowest_at, made_at

BATCHES_MAX: Final = 1_000
"""Batches of one lane in one call: bounds its time (a second or two) and its locks."""

_LAST_DAY: Final = date(2100, 12, 31)
_FAR: Final = lowest_at(datetime(2101, 1, 1, tzinfo=UTC))
_TURN: Final = text("SELECT pg_advisory_xact_lock(1919905900)")  # "roll"
# Heads by index, lane by lane: never a scan of all batches.
_BEHIND: Final = text(
    """
    SELECT l.lane, coalesce(m.n, 0) AS mark, h.n AS head
    FROM generate_series(0, 63) AS l (lane) LEFT JOIN rollup_marks m ON m.lane = l.lane
    CROSS JOIN LATERAL (SELECT n FROM batches b WHERE b.lane = l.lane ORDER BY n DESC LIMIT 1) AS h
    WHERE h.n > coalesce(m.n, 0)""",
)
_SPAN: Final = text(
    """
    SELECT (array_agg(first_id ORDER BY first_id))[1] AS first, (array_agg(last_id ORDER BY last_id DESC))[1]
           AS last FROM batches WHERE lane = :lane AND n > :mark AND n <= :head""",
)
_ADD: Final = text(
    """
    INSERT INTO usage_daily AS u
        (day, buyer, operator, model, requests, failed, tok_in, tok_out, amount, fee)
    SELECT CAST(:first_day AS DATE) + width_bucket(id, CAST(:bounds AS UUID[])) - 1, buyer,
           coalesce(operator, 0), model, count(*), count(*) FILTER (WHERE status <> 200),
           sum(tok_in), sum(tok_out), sum(amount), sum(fee)
    FROM charges
    WHERE lane = :lane AND batch > :mark AND batch <= :head AND id BETWEEN :first AND :last
    GROUP BY 1, 2, 3, 4
    ON CONFLICT (buyer, day, operator, model) DO UPDATE SET
        requests = u.requests + EXCLUDED.requests, failed = u.failed + EXCLUDED.failed,
        tok_in = u.tok_in + EXCLUDED.tok_in, tok_out = u.tok_out + EXCLUDED.tok_out,
        amount = u.amount + EXCLUDED.amount, fee = u.fee + EXCLUDED.fee""",
)
_MARK: Final = text(
    """
    INSERT INTO rollup_marks (lane, n) VALUES (:lane, :head)
    ON CONFLICT (lane) DO UPDATE SET n = EXCLUDED.n""",
)


async def roll_up(conn: AsyncConnection, *, batches_max: int = BATCHES_MAX) -> int:
    """Add what was posted since; how many batches there were.  Call again while it is not zero."""
    await conn.execute(_TURN)
    done = 0
    for lane in (await conn.execute(_BEHIND)).all():
        head = min(lane.head, lane.mark + batches_max)
        part = {"lane": lane.lane, "mark": lane.mark, "head": head}
        span = (await conn.execute(_SPAN, part)).one()
        first_day, last_day = day_of(span.first), day_of(span.last)
        values = part | {
            "first": span.first,
            "last": span.last,
            "first_day": first_day,
            "bounds": day_bounds(first_day, last_day),
        }
        await conn.execute(_ADD, values)
        await conn.execute(_MARK, {"lane": lane.lane, "head": head})
        done += head - lane.mark
    return done


def day_of(charge_id: UUID) -> date:
    """The UTC day on which a request arrived; an id from beyond 2100 counts as of its last day."""
    if charge_id > _FAR:
        return _LAST_DAY
    return made_at(charge_id).date()


def day_bounds(first: date, last: date) -> list[UUID]:
    """The lowest id of every day from `first` to the day after `last`.

    `width_bucket(id, bounds)` then numbers the days from 1, at a tenth of the price of a date.
    """
    days = (last - first).days + 2
    midnights = (datetime.combine(first + timedelta(days=n), time(), UTC) for n in range(days))
    return [lowest_at(midnight) for midnight in midnights]
