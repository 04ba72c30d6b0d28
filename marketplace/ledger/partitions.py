"""Month partitions of `charges`, made ahead of time.

A charge whose month has none lands in the default partition, where it is as safe but cannot be detached
by month; a month with rows there can no longer get a partition.  So: once at start, then daily.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

MONTHS_AHEAD: Final = 12


async def ensure_partitions(conn: AsyncConnection, *, months_ahead: int = MONTHS_AHEAD) -> int:
    """Make the partitions missing up to `months_ahead` (0 to 120) months from now; how many there were."""
    created = await conn.scalar(text("SELECT ensure_partitions(:months)"), {"months": months_ahead})
    return int(created)
