"""API keys as rows: issued once in plain text, listed by their first characters, revoked for good."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    parallel_requests: int | None = None
    spend_nano_per_day: int | None = None
    allowed_models: list[str] | None = None


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
    limits: Mapping[str, object] | None = None,
) -> IssuedKey:
    """Make a key for a person; at most LIVE_KEYS_MAX live ones, `admin` only for administrators.

    `limits`: any of LIMITS.
    """
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
            **_only_limits(limits or {}),
        )
        .returning(*_COLUMNS)
    )
    return IssuedKey(ApiKey(**made.mappings().one()), plaintext)


LIMITS: Final = frozenset(
    {
        "requests_per_minute", "tokens_per_minute", "parallel_requests", "spend_nano_per_day",
        "allowed_models",
    }
)  # fmt: skip
"""What a key or an account may be limited in; null: no limit of its own."""


def _only_limits(values: Mapping[str, object]) -> dict[str, object]:
    unknown = values.keys() - LIMITS
    if unknown:
        raise ValueError(f"no such limits: {', '.join(sorted(unknown))}")
    return dict(values)


async def change_key(
    connection: AsyncConnection, person_id: UUID, key_id: UUID, values: Mapping[str, object]
) -> ApiKey | None:
    """Change a live key's name, expiry or limits; None if the person has no such live key."""
    changed = {name: values[name] for name in ("name", "expires_at") if name in values}
    changed |= _only_limits({name: value for name, value in values.items() if name not in changed})
    mine = (api_keys.c.id == key_id, api_keys.c.person_id == person_id, api_keys.c.revoked_at.is_(None))
    if changed:
        await connection.execute(update(api_keys).where(*mine).values(changed))
    found = (await connection.execute(select(*_COLUMNS).where(*mine))).mappings().one_or_none()
    return None if found is None else ApiKey(**found)


async def limit_account(connection: AsyncConnection, person_id: UUID, values: Mapping[str, object]) -> None:
    """Set limits over all of a person's keys together; an administrator's `decisions.limit` keeps account."""
    limits = _only_limits(values)
    if limits:
        await connection.execute(update(people).where(people.c.id == person_id).values(limits))


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
