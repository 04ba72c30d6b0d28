"""People: made, found, frozen, given roles.  A person may be buyer and operator at once.

Functions take the caller's connection, inside its transaction; only the edge commits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Final
from uuid import UUID

from pydantic import SecretStr
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.accounts.api_keys import INFERENCE_ONLY, issue_key
from marketplace.accounts.errors import EmailTaken, PersonFrozen, PersonUnknown, WrongCredentials
from marketplace.accounts.passwords import is_right
from marketplace.accounts.tables import people, wallets
from marketplace.platform.ids import uuid7

SESSION_SCOPES: Final = frozenset({"account", "inference"})


@dataclass(frozen=True, slots=True)
class Person:
    """One row of `people`, without the password's hash."""

    id: UUID
    email: str | None
    display_name: str
    is_operator: bool
    is_admin: bool
    created_at: datetime
    frozen_at: datetime | None

    @property
    def scopes(self) -> frozenset[str]:
        """What a session of this person may do."""
        return SESSION_SCOPES | {"admin"} if self.is_admin else SESSION_SCOPES


_COLUMNS: Final = tuple(people.c[field.name] for field in fields(Person))


@dataclass(frozen=True, slots=True)
class Wallet:
    """An address a person has proved to own; canonical spelling (EIP-55, base58)."""

    kind: str
    address: str
    verified_at: datetime


async def create_person(
    connection: AsyncConnection,
    *,
    display_name: str = "",
    email: str | None = None,
    password_hash: str | None = None,
    is_operator: bool = False,
    is_admin: bool = False,
) -> UUID:
    """Make a person and give the id; EmailTaken if somebody signs in with this address already."""
    found = await connection.scalar(
        insert(people)
        .values(
            id=uuid7(),
            email=None if email is None else email.lower(),
            password_hash=password_hash,
            display_name=display_name,
            is_operator=is_operator,
            is_admin=is_admin,
        )
        .on_conflict_do_nothing(index_elements=[people.c.email])
        .returning(people.c.id)
    )
    if found is None:
        raise EmailTaken("an account with this e-mail address exists")
    return UUID(str(found))


async def create_key(
    connection: AsyncConnection,
    secret: SecretStr,
    person_id: UUID,
    name: str,
    scopes: Collection[str] = INFERENCE_ONLY,
) -> str:
    """Make an API key (`secret` is Settings.secret) and give its only copy in plain text."""
    return (await issue_key(connection, secret, person_id, name=name, scopes=scopes)).plaintext


async def find_person(connection: AsyncConnection, person_id: UUID) -> Person:
    """Read one person; PersonUnknown if there is none."""
    query = select(*_COLUMNS).where(people.c.id == person_id)
    row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        raise PersonUnknown(f"there is no person {person_id}")
    return Person(**row)


async def find_by_email(connection: AsyncConnection, email: str) -> tuple[Person | None, str | None]:
    """Read a person and the password's hash; both None where there is none."""
    query = select(*_COLUMNS, people.c.password_hash).where(people.c.email == email.lower())
    row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        return None, None
    return Person(**{c.name: row[c.name] for c in _COLUMNS}), row["password_hash"]


async def find_with_password(
    connection: AsyncConnection, person_id: UUID
) -> tuple[Person | None, str | None]:
    """Read a person by id, and the password's hash (None where he has no password)."""
    query = select(*_COLUMNS, people.c.password_hash).where(people.c.id == person_id)
    row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        return None, None
    return Person(**{c.name: row[c.name] for c in _COLUMNS}), row["password_hash"]


async def prove_password(found: tuple[Person | None, str | None], password: str) -> Person:
    """Sign in what `find_by_email` gave; takes as long whether or not the address is known.

    Needs no connection, and must not hold one: checking a password takes tens of milliseconds.
    """
    person, stored = found
    if not await is_right(stored, password) or person is None:
        raise WrongCredentials("the e-mail address or the password is wrong")
    return require_active(person)


def require_active(person: Person) -> Person:
    """Give the person back, or raise PersonFrozen."""
    if person.frozen_at is not None:
        raise PersonFrozen("this account is frozen; write to support")
    return person


async def wallets_of(connection: AsyncConnection, person_id: UUID) -> list[Wallet]:
    """The wallets that sign this person in, oldest first."""
    query = (
        select(wallets.c.kind, wallets.c.address, wallets.c.verified_at)
        .where(wallets.c.person_id == person_id)
        .order_by(wallets.c.id)
    )
    return [Wallet(**row) for row in (await connection.execute(query)).mappings()]


async def _change(connection: AsyncConnection, person_id: UUID, **values: object) -> None:
    changed = await connection.execute(update(people).where(people.c.id == person_id).values(**values))
    if changed.rowcount != 1:
        raise PersonUnknown(f"there is no person {person_id}")


async def make_operator(connection: AsyncConnection, person_id: UUID) -> None:
    """Let a person run nodes; repeating it changes nothing."""
    await _change(connection, person_id, is_operator=True)


async def make_admin(connection: AsyncConnection, person_id: UUID, *, is_admin: bool = True) -> None:
    """Give or take administration; keys with the scope `admin` follow within 5 s."""
    await _change(connection, person_id, is_admin=is_admin)


async def freeze(connection: AsyncConnection, person_id: UUID) -> None:
    """Stop a person's keys (within 5 s) and sessions (at once)."""
    await _change(connection, person_id, frozen_at=func.coalesce(people.c.frozen_at, func.now()))


async def unfreeze(connection: AsyncConnection, person_id: UUID) -> None:
    """Let a frozen person's keys and sessions work again."""
    await _change(connection, person_id, frozen_at=None)
