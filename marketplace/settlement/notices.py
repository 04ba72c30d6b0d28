"""What an operator is told without asking: written in the same transaction as what it tells of.

An outbox: whoever delivers (mail, later) reads what waits and marks it.  A notice about a change of address
goes to the contact on record before the change, so a stolen session cannot keep it from its owner (A43).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.platform.ids import uuid7
from marketplace.settlement.tables import settlement_notices


@dataclass(frozen=True, slots=True)
class Notice:
    """One message that waits."""

    id: UUID
    person_id: UUID
    kind: str
    message: str
    at: datetime


async def leave(conn: AsyncConnection, *, person: UUID, kind: str, message: str, now: datetime) -> None:
    """Leave a notice for a person."""
    row = {"id": uuid7(), "person_id": person, "kind": kind, "message": message[:2000], "at": now}
    await conn.execute(insert(settlement_notices).values(**row))


async def waiting(conn: AsyncConnection, limit: int = 100) -> list[Notice]:
    """The oldest notices that nobody has delivered."""
    t = settlement_notices.c
    statement = select(settlement_notices).where(t.delivered_at.is_(None)).order_by(t.at, t.id).limit(limit)
    return [Notice(r.id, r.person_id, r.kind, r.message, r.at) for r in await conn.execute(statement)]


async def delivered(conn: AsyncConnection, notice_id: UUID, *, now: datetime) -> None:
    """Mark one as delivered; twice is harmless."""
    t = settlement_notices.c
    await conn.execute(
        update(settlement_notices).where(t.id == notice_id, t.delivered_at.is_(None)).values(delivered_at=now)
    )
