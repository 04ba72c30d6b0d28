"""Month partitions of `charges`, made ahead of time.

A charge whose month has none lands in the default partition, where it is as safe but cannot be detached
by month; a month with rows there can no longer get a partition.  So: once at start, then daily.
"""

from __future__ import annotations

from datetime import date
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

MONTHS_AHEAD: Final = 12


async def ensure_partitions(conn: AsyncConnection, *, months_ahead: int = MONTHS_AHEAD) -> int:
    """Make the partitions missing up to `months_ahead` (0 to 120) months from now; how many there were."""
    created = await conn.scalar(text("SELECT ensure_partitions(:months)"), {"months": months_ahead})
    return int(created)


async def detach_month(conn: AsyncConnection, month: date) -> str:
    """Take the oldest month's charges out of the book; gives back the name of the table they are in now.

    Needs the schema owner.  The month must be over for two months and in the daily sums; its batches stay,
    and so does what it moved (`archived_moves`), so that `prove` still derives every balance.  The table is
    the caller's to dump and drop.
    """
    return str(await conn.scalar(text("SELECT detach_month(CAST(:month AS DATE))"), {"month": month}))
