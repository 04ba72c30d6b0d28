"""Sessions: a random token, its digest in the database, 24 hours, revocable."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from pydantic import SecretStr
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.accounts.tables import people, sessions
from marketplace.accounts.tokens import make_session_token, session_digester

LIFETIME: Final = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class SessionPerson:
    """Whose session it is."""

    person_id: UUID
    is_admin: bool
    is_frozen: bool


async def open_session(
    connection: AsyncConnection, secret: SecretStr, person_id: UUID, now: datetime
) -> tuple[str, datetime]:
    """Give a new session's token, its only copy, and when it ends; clears the person's ended ones."""
    await connection.execute(
        delete(sessions).where(sessions.c.person_id == person_id, sessions.c.expires_at <= now)
    )
    token, expires_at = make_session_token(), now + LIFETIME
    await connection.execute(
        insert(sessions).values(
            digest=session_digester(secret)(token),
            person_id=person_id,
            created_at=now,
            expires_at=expires_at,
        )
    )
    return token, expires_at


async def find_session(connection: AsyncConnection, digest: bytes, now: datetime) -> SessionPerson | None:
    """Read whose live session this is."""
    query = (
        select(sessions.c.digest, sessions.c.person_id, people.c.is_admin, people.c.frozen_at)
        .join(people, people.c.id == sessions.c.person_id)
        .where(sessions.c.digest == digest, sessions.c.revoked_at.is_(None), sessions.c.expires_at > now)
    )
    row = (await connection.execute(query)).one_or_none()
    if row is None or not hmac.compare_digest(bytes(row.digest), digest):
        return None
    return SessionPerson(row.person_id, row.is_admin, row.frozen_at is not None)


async def close_session(connection: AsyncConnection, digest: bytes, now: datetime) -> None:
    """End a session for good."""
    await connection.execute(
        update(sessions)
        .where(sessions.c.digest == digest, sessions.c.revoked_at.is_(None))
        .values(revoked_at=now)
    )
