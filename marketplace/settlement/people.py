"""Whether a person is in good standing.

Each decision is a row with actor and reason; the newest counts, the older ones are the journal.  Whoever's
account is frozen is in no good standing either, whatever was decided, until it is unfrozen.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import CompoundSelect, DateTime, Select, Uuid, column, insert, select, table, union
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.settlement.errors import NotFound
from marketplace.settlement.tables import standings

REASON_CHARACTERS_MAX: Final = 1000
FROZEN: Final = "this account is frozen"
_PEOPLE: Final = table("people", column("id", Uuid), column("frozen_at", DateTime(timezone=True)))
"""Accounts' table, of which settlement asks only who is frozen."""


async def set_standing(
    conn: AsyncConnection, *, person: UUID, is_good: bool, reason: str, actor: str, now: datetime
) -> None:
    """Record a decision about a person's standing; NotFound if there is no such person."""
    row = insert(standings).values(person_id=person, is_good=is_good, reason=reason, actor=actor, at=now)
    try:
        await conn.execute(row)
    except IntegrityError as e:
        raise NotFound(f"there is no person {person}") from e


async def bad_standings(conn: AsyncConnection, persons: Collection[UUID]) -> dict[UUID, str]:
    """Those of `persons` who are not in good standing, with the reason; without a decision everybody is."""
    newest = (
        select(standings.c.person_id, standings.c.is_good, standings.c.reason)
        .ext(distinct_on(standings.c.person_id))
        .where(standings.c.person_id.in_(persons))
        .order_by(standings.c.person_id, standings.c.id.desc())
    )
    bad = {row.person_id: row.reason for row in await conn.execute(newest) if not row.is_good}
    frozen = await conn.scalars(_frozen().where(_PEOPLE.c.id.in_(persons)))
    return bad | dict.fromkeys(frozen, FROZEN)


def in_bad_standing() -> CompoundSelect[tuple[UUID]]:
    """Whoever is not in good standing, for use inside another statement."""
    newest = (
        select(standings.c.person_id, standings.c.is_good)
        .ext(distinct_on(standings.c.person_id))
        .order_by(standings.c.person_id, standings.c.id.desc())
        .subquery()
    )
    return union(select(newest.c.person_id).where(~newest.c.is_good), _frozen())


def _frozen() -> Select[tuple[UUID]]:
    return select(_PEOPLE.c.id).where(_PEOPLE.c.frozen_at.is_not(None))
