"""Who is calling an /api or /v1 route: a person through an API key or a session.

Keys are looked up in memory (`key_ring`), sessions in the database.  A refusal never tells apart a
credential that is unknown, revoked, expired or of a frozen person.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

from fastapi import Request
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.accounts.errors import KeysUnavailable
from marketplace.accounts.key_ring import KeyRing
from marketplace.accounts.people import SESSION_SCOPES
from marketplace.accounts.sessions import find_session
from marketplace.accounts.tokens import KEY_START, has_credential, is_session_token, session_digester
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.platform.http import Identity, Refusal
from marketplace.platform.settings import Settings

REMEMBERED_MAX: Final = 10_000
_SCHEME: Final = "bearer "


def missing() -> Refusal:
    return Refusal(
        401, "missing_credentials", "give an API key or a session token: `Authorization: Bearer sk-tollway-…`"
    )


def invalid_key() -> Refusal:
    return Refusal(401, "invalid_api_key", "this API key does not work: it is mistyped, unknown or revoked")


def invalid_session() -> Refusal:
    return Refusal(401, "invalid_session", "this session has ended; sign in again")


def unavailable() -> Refusal:
    return Refusal(
        503, "credentials_unavailable", "credentials cannot be checked at the moment", retry_after_s=2
    )


def in_query() -> Refusal:
    return Refusal(
        400,
        "credential_in_query",
        "a credential was sent in the address, where logs keep it: revoke it, use the Authorization header",
    )


def bearer(authorization: str | None) -> str:
    """Read the credential out of an Authorization header; Refusal 401 where there is none."""
    if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
        raise missing()
    presented = authorization[len(_SCHEME) :].strip()
    if not presented:
        raise missing()
    return presented


class AccountAuthenticator:
    """`platform.http.Authenticator` over the key ring and the sessions table."""

    def __init__(self, engine: AsyncEngine, settings: Settings, clock: Clock, keys: KeyRing) -> None:
        self._engine = engine
        self._clock = clock
        self.keys = keys
        self._digest = session_digester(settings.secret)
        self._remembered: dict[bytes, UUID] = {}

    async def authenticate(self, request: Request) -> Identity:
        """Give the caller; Refusal 400 for a credential in the address, 401, or 503 without a database."""
        if has_credential(request.url.query):
            raise in_query()
        presented = bearer(request.headers.get("authorization"))
        if presented.startswith(KEY_START) or not is_session_token(presented):
            return await self._by_key(presented)
        return await self._by_session(presented)

    async def _by_key(self, presented: str) -> Identity:
        try:
            found = await self.keys.find(presented)
        except KeysUnavailable as e:
            raise unavailable() from e
        if not self.keys.is_fresh:
            raise unavailable()
        if found is None:
            raise invalid_key()
        return found.identity

    async def _by_session(self, presented: str) -> Identity:
        digest = self.session_digest(presented)
        try:
            async with transaction(self._engine) as connection:
                found = await find_session(connection, digest, self._clock.now())
        except (OSError, SQLAlchemyError) as e:
            raise unavailable() from e
        if found is None or found.is_frozen:
            raise invalid_session()
        self._remember(digest, found.person_id)
        scopes = SESSION_SCOPES | {"admin"} if found.is_admin else SESSION_SCOPES
        return Identity(found.person_id, None, scopes, found.proved_at)

    def session_digest(self, presented: str) -> bytes:
        return self._digest(presented)

    def _remember(self, digest: bytes, person_id: UUID) -> None:
        self._remembered.pop(digest, None)
        self._remembered[digest] = person_id
        if len(self._remembered) > REMEMBERED_MAX:
            del self._remembered[next(iter(self._remembered))]

    def person_of(self, presented: str) -> UUID | None:
        """Tell, without asking the database, whose credential this is, to count requests by person.

        It authenticates nobody: a session that has just ended is still remembered.
        """
        if is_session_token(presented):
            return self._remembered.get(self._digest(presented))
        found = self.keys.lookup(presented)
        return None if found is None else found.person_id
