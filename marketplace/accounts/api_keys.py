"""API keys as rows: issued once in plain text, listed by their first characters, revoked for good."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from pydantic import SecretStr
from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.accounts.errors import PersonFrozen, PersonUnknown, ScopeNotHeld, TooManyKeys
from marketplace.accounts.tables import api_keys, people
from marketplace.accounts.tokens import SHOWN, key_digester, make_key
from marketplace.platform.ids import uuid7

SCOPES: Final = frozenset({"inference", "account", "admin"})
INFERENCE_ONLY: Final = frozenset({"inference"})
LIVE_KEYS_MAX: Final = 100
LISTED_MAX: Final = 200


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key as its owner sees it."""

    id: UUID
    name: str
    prefix: str
    """Its first characters, to tell keys apart."""
    scopes: tuple[str, ...]
    created_at: datetime
    last_used_at: datetime | None
    """Written every half minute, so up to that much late."""
    revoked_at: datetime | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A new key and the only copy of its plain text."""

    key: ApiKey
    plaintext: str

    def __repr__(self) -> str:
        return f"IssuedKey({self.key!r})"


_COLUMNS: Final = tuple(c for c in api_keys.c if c.name not in ("digest", "person_id"))


async def issue_key(
    connection: AsyncConnection,
    secret: SecretStr,
    person_id: UUID,
    *,
    name: str,
    scopes: Collection[str],
    expires_at: datetime | None = None,
) -> IssuedKey:
    """Make a key for a person; at most LIVE_KEYS_MAX live ones, `admin` only for administrators."""
    # The lock makes two requests at once count each other's keys.
    query = select(people.c.frozen_at, people.c.is_admin).where(people.c.id == person_id)
    person = (await connection.execute(query.with_for_update(key_share=True))).one_or_none()
    if person is None:
        raise PersonUnknown(f"there is no person {person_id}")
    if person.frozen_at is not None:
        raise PersonFrozen("this account is frozen; write to support")
    if not SCOPES.issuperset(scopes) or ("admin" in scopes and not person.is_admin):
        raise ScopeNotHeld(f"this account cannot give a key the scopes {', '.join(sorted(scopes))}")
    live = select(func.count()).where(
        api_keys.c.person_id == person_id,
        api_keys.c.revoked_at.is_(None),
        or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > func.now()),
    )
    if (await connection.scalar(live) or 0) >= LIVE_KEYS_MAX:
        raise TooManyKeys(f"an account has at most {LIVE_KEYS_MAX} live keys; revoke one first")
    plaintext = make_key()
    made = await connection.execute(
        insert(api_keys)
        .values(
            id=uuid7(),
            person_id=person_id,
            name=name,
            prefix=plaintext[:SHOWN],
            digest=key_digester(secret)(plaintext),
            scopes=sorted(set(scopes)),
            expires_at=expires_at,
        )
        .returning(*_COLUMNS)
    )
    return IssuedKey(ApiKey(**made.mappings().one()), plaintext)


async def list_keys(connection: AsyncConnection, person_id: UUID) -> list[ApiKey]:
    """A person's newest keys, live and revoked."""
    query = (
        select(*_COLUMNS)
        .where(api_keys.c.person_id == person_id)
        .order_by(api_keys.c.revoked_at.isnot(None), api_keys.c.id.desc())
        .limit(LISTED_MAX)
    )
    return [ApiKey(**row) for row in (await connection.execute(query)).mappings()]


async def revoke_key(connection: AsyncConnection, person_id: UUID, key_id: UUID) -> bool:
    """Revoke a person's key for good; False if the person has no such key.  Repeating it changes nothing."""
    mine = (api_keys.c.id == key_id, api_keys.c.person_id == person_id)
    await connection.execute(
        update(api_keys).where(*mine, api_keys.c.revoked_at.is_(None)).values(revoked_at=func.now())
    )
    return await connection.scalar(select(api_keys.c.id).where(*mine)) is not None
