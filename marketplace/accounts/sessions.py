"""Sessions: a random token, its digest in the database, 24 hours, revocable.

A session knows when its person last proved who he is: at sign-in, and again at each step-up (ASVS 7.5.3).
"""

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
    proved_at: datetime


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
            proved_at=now,
        )
    )
    return token, expires_at


async def find_session(connection: AsyncConnection, digest: bytes, now: datetime) -> SessionPerson | None:
    """Read whose live session this is."""
    query = (
        select(
            sessions.c.digest,
            sessions.c.person_id,
            sessions.c.proved_at,
            people.c.is_admin,
            people.c.frozen_at,
        )
        .join(people, people.c.id == sessions.c.person_id)
        .where(sessions.c.digest == digest, sessions.c.revoked_at.is_(None), sessions.c.expires_at > now)
    )
    row = (await connection.execute(query)).one_or_none()
    if row is None or not hmac.compare_digest(bytes(row.digest), digest):
        return None
    return SessionPerson(row.person_id, row.is_admin, row.frozen_at is not None, row.proved_at)


async def step_up(connection: AsyncConnection, digest: bytes, now: datetime) -> None:
    """Note that the session's person has just proved again who he is."""
    await connection.execute(update(sessions).where(sessions.c.digest == digest).values(proved_at=now))


async def close_session(connection: AsyncConnection, digest: bytes, now: datetime) -> None:
    """End a session for good."""
    await connection.execute(
        update(sessions)
        .where(sessions.c.digest == digest, sessions.c.revoked_at.is_(None))
        .values(revoked_at=now)
    )
