"""Every live key in memory, for the hot path.

`lookup` is synchronous, does no I/O and takes a few microseconds.  The ring reads what changed once a
second, so a key revoked (or a person frozen) anywhere is refused here about a second later; when the
database cannot be asked, `is_fresh` turns false 4 s after the last answer, so that no key is accepted
5 s after its revocation (K2): callers then answer 503.

A poll misses nothing: it starts at the oldest transaction the previous poll may not have seen
(`pg_snapshot_xmin`), so a change that committed late is read by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import structlog
from pydantic import SecretStr
from sqlalchemy import TextClause, func, text, update
from sqlalchemy.engine import Row
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.accounts.errors import KeysUnavailable
from marketplace.accounts.tables import api_keys
from marketplace.accounts.tokens import is_key, key_digester
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.platform.http import Identity
from marketplace.platform.limits import NO_ALLOWANCE, Allowance

POLL_S: Final = 1.0
READ_S_MAX: Final = 2.0
FRESH_S: Final = 4.0
"""Below K2's 5 s, which leaves a second for requests already past the look-up."""
MISS_PAUSE_S: Final = 0.2
"""Unknown keys cause at most five reads a second, shared by all who wait."""
LAST_USED_S: Final = 30.0

_log = structlog.get_logger()

_SELECT: Final = """
    SELECT k.id, k.person_id, k.digest, k.scopes, k.expires_at, p.is_admin,
           k.requests_per_minute, k.tokens_per_minute, k.parallel_requests, k.spend_nano_per_day,
           k.allowed_models,
           p.requests_per_minute AS account_requests, p.tokens_per_minute AS account_tokens,
           p.parallel_requests AS account_parallel, p.spend_nano_per_day AS account_spend_nano,
           p.allowed_models AS account_models,
           k.revoked_at IS NULL AND p.frozen_at IS NULL AS is_live
    FROM api_keys k JOIN people p ON p.id = k.person_id"""
_ALL: Final = text(f"{_SELECT} WHERE k.revoked_at IS NULL AND p.frozen_at IS NULL")
_CHANGED: Final = text(
    f"""{_SELECT} WHERE k.changed >= CAST(CAST(:since AS TEXT) AS XID8)
    UNION ALL {_SELECT} WHERE p.changed >= CAST(CAST(:since AS TEXT) AS XID8)"""
)
_HORIZON: Final[TextClause] = text("SELECT CAST(pg_snapshot_xmin(pg_current_snapshot()) AS TEXT)")


@dataclass(frozen=True, slots=True)
class KeyIdentity:
    """Whose key it is and what it may do."""

    key_id: UUID
    person_id: UUID
    scopes: frozenset[str]
    expires_unix_s: float | None = None
    allowance: Allowance = NO_ALLOWANCE
    """Of this key alone."""
    account: Allowance = NO_ALLOWANCE
    """Of all the person's keys together."""

    @property
    def identity(self) -> Identity:
        return Identity(self.person_id, self.key_id, self.scopes)


def _entry(row: Row[Any]) -> tuple[bytes, KeyIdentity]:
    scopes = frozenset(row.scopes) if row.is_admin else frozenset(row.scopes) - {"admin"}
    expires = None if row.expires_at is None else row.expires_at.timestamp()
    allowance = _allowance(
        row.requests_per_minute, row.tokens_per_minute, row.parallel_requests, row.spend_nano_per_day,
        row.allowed_models,
    )  # fmt: skip
    account = _allowance(
        row.account_requests, row.account_tokens, row.account_parallel, row.account_spend_nano,
        row.account_models,
    )  # fmt: skip
    return bytes(row.digest), KeyIdentity(row.id, row.person_id, scopes, expires, allowance, account)


def _allowance(
    requests: int | None,
    tokens: int | None,
    parallel: int | None,
    spend: int | None,
    models: list[str] | None,
) -> Allowance:
    if models is None and requests is tokens is parallel is spend is None:
        return NO_ALLOWANCE  # the hot path knows it by identity
    return Allowance(requests, tokens, parallel, spend, None if models is None else frozenset(models))


class KeyRing:
    """The live keys of every person, by digest."""

    def __init__(self, engine: AsyncEngine, secret: SecretStr, clock: Clock) -> None:
        self._engine = engine
        self._digest = key_digester(secret)
        self._clock = clock
        self._keys: dict[bytes, tuple[bytes, KeyIdentity]] = {}
        self._horizon = 0
        self._as_of = float("-inf")
        self._reading = asyncio.Lock()
        self._used: set[UUID] = set()
        self._used_written = clock.monotonic()
        self._poll: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def is_fresh(self) -> bool:
        """Whether revocations up to 4 s ago are known; if not, answer 503 rather than trust `lookup`."""
        return self._clock.monotonic() - self._as_of <= FRESH_S

    def lookup(self, presented: str) -> KeyIdentity | None:
        """Give the key's identity, or None if it is malformed, unknown, revoked, frozen or expired."""
        if not is_key(presented):
            return None
        digest = self._digest(presented)
        found = self._keys.get(digest)
        if found is None or not hmac.compare_digest(found[0], digest):
            return None
        identity = found[1]
        expires = identity.expires_unix_s
        if expires is not None and expires <= self._clock.now().timestamp():
            return None
        self._used.add(identity.key_id)
        return identity

    async def find(self, presented: str) -> KeyIdentity | None:
        """As `lookup`, but a key this process does not know yet is asked of the database once.

        Raises KeysUnavailable where the database had to be asked and gave no answer.
        """
        asked = self._clock.monotonic()
        found = self.lookup(presented)
        if found is not None or not is_key(presented):
            return found
        await asyncio.sleep(max(0.0, self._as_of + MISS_PAUSE_S - asked))
        await self._read_after(asked)
        return self.lookup(presented)

    async def refresh(self) -> None:
        """Know everything committed before this call; KeysUnavailable if the database gives no answer."""
        await self._read_after(self._clock.monotonic())

    async def start(self) -> None:
        """Read all keys, then keep reading what changes until `stop`."""
        await self.refresh()
        self._poll = asyncio.create_task(self._keep_reading(), name="key ring")

    async def stop(self) -> None:
        if self._poll is not None:
            self._poll.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poll
            self._poll = None
            with contextlib.suppress(KeysUnavailable):
                await self._write_last_used()

    async def _keep_reading(self) -> None:
        was_reading = True
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.refresh()
                if self._clock.monotonic() - self._used_written >= LAST_USED_S:
                    await self._write_last_used()
            except KeysUnavailable as e:
                if was_reading:  # once per outage
                    _log.warning("keys cannot be refreshed", reason=str(e))
                was_reading = False
            else:
                was_reading = True

    async def _read_after(self, asked: float) -> None:
        async with self._reading:
            if self._as_of > asked:  # somebody's read began after we asked
                return
            began = self._clock.monotonic()
            try:
                async with asyncio.timeout(READ_S_MAX):
                    await self._read()
            except Exception as e:  # whatever the driver raises means the same: no answer
                raise KeysUnavailable(f"keys could not be read: {type(e).__name__}") from e
            self._as_of = began

    async def _read(self) -> None:
        async with self._engine.connect() as connection:
            # Asked before the rows, so that it can only be too old, which repeats rows but misses none.
            horizon = int(await connection.scalar(_HORIZON) or 0)
            is_first = not self._horizon or horizon < self._horizon  # backwards: another or a restored book
            if is_first:
                rows = (await connection.execute(_ALL)).all()
            else:
                rows = (await connection.execute(_CHANGED, {"since": str(self._horizon)})).all()
        if is_first:
            self._keys = {}
        for row in rows:
            digest, identity = _entry(row)
            if row.is_live:
                self._keys[digest] = (digest, identity)
            else:
                self._keys.pop(digest, None)
        self._horizon = horizon

    async def _write_last_used(self) -> None:
        used, self._used = self._used, set()
        self._used_written = self._clock.monotonic()
        if not used:
            return
        try:
            async with asyncio.timeout(READ_S_MAX), transaction(self._engine) as connection:
                await connection.execute(
                    update(api_keys).where(api_keys.c.id.in_(used)).values(last_used_at=func.now())
                )
        except Exception as e:
            self._used |= used
            raise KeysUnavailable(f"last use could not be written: {type(e).__name__}") from e
