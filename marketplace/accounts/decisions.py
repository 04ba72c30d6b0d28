"""What administrators decide about accounts: limits, freezing.

Each decision is a row with its actor, its reason and what was decided, written in the transaction that
carries it out; the application may not change or delete such rows (K4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.accounts import api_keys, people
from marketplace.accounts.tables import account_decisions

REASON_CHARACTERS_MAX: Final = 1_000
LISTED_MAX: Final = 1_000


@dataclass(frozen=True, slots=True)
class Decision:
    """One row of the journal."""

    person_id: UUID
    action: str
    """`limits`, `freeze` or `unfreeze`."""
    actor: UUID
    reason: str
    detail: Mapping[str, Any]
    """The limits as they were set."""
    decided_at: datetime


async def limit(
    connection: AsyncConnection,
    person_id: UUID,
    limits: Mapping[str, object],
    *,
    actor: UUID,
    reason: str,
    now: datetime,
) -> None:
    """Set limits over all of a person's keys together; PersonUnknown."""
    await people.find_person(connection, person_id)
    await api_keys.limit_account(connection, person_id, limits)
    await _note(connection, person_id, "limits", limits, actor, reason, now)


async def set_frozen(
    connection: AsyncConnection, person_id: UUID, *, is_frozen: bool, actor: UUID, reason: str, now: datetime
) -> None:
    """Stop a person's keys (within 5 s) and sessions (at once), or let them work again; PersonUnknown."""
    await people.find_person(connection, person_id)
    await (people.freeze if is_frozen else people.unfreeze)(connection, person_id)
    await _note(connection, person_id, "freeze" if is_frozen else "unfreeze", {}, actor, reason, now)


async def decided(connection: AsyncConnection, person_id: UUID) -> Sequence[Decision]:
    """Give what was decided about an account, newest first, at most LISTED_MAX."""
    t = account_decisions.c
    query = (
        select(t.person_id, t.action, t.actor, t.reason, t.detail, t.decided_at)
        .where(t.person_id == person_id)
        .order_by(t.id.desc())
        .limit(LISTED_MAX)
    )
    return [Decision(**row) for row in (await connection.execute(query)).mappings()]


async def _note(
    connection: AsyncConnection,
    person_id: UUID,
    action: str,
    detail: Mapping[str, object],
    actor: UUID,
    reason: str,
    now: datetime,
) -> None:
    await connection.execute(
        insert(account_decisions).values(
            person_id=person_id, action=action, detail=detail, actor=actor, reason=reason, decided_at=now
        )
    )
