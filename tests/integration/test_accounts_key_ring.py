"""The key ring misses no change, however late it was committed, and says when it cannot know."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import UUID

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.accounts import key_ring
from marketplace.accounts.api_keys import issue_key, revoke_key
from marketplace.accounts.errors import KeysUnavailable, PersonFrozen, ScopeNotHeld
from marketplace.accounts.key_ring import KeyRing
from marketplace.accounts.people import create_key, create_person, freeze, unfreeze
from marketplace.accounts.tokens import make_key
from marketplace.platform.database import drop_database, transaction

SECRET = SecretStr("s" * 32)


class SkippingClock:
    def __init__(self) -> None:
        self.ahead_s = 0.0

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.fixture
def clock() -> SkippingClock:
    return SkippingClock()


@pytest.fixture
async def ring(engine: AsyncEngine, clock: SkippingClock) -> KeyRing:
    """Read once; refreshed by hand."""
    ring = KeyRing(engine, SECRET, clock)
    await ring.refresh()
    return ring


@pytest.fixture
async def polling(engine: AsyncEngine, clock: SkippingClock) -> AsyncIterator[KeyRing]:
    ring = KeyRing(engine, SECRET, clock)
    await ring.start()
    yield ring
    await ring.stop()


async def a_person(engine: AsyncEngine) -> UUID:
    async with transaction(engine) as connection:
        return await create_person(connection)


async def a_key(engine: AsyncEngine, person_id: UUID, name: str = "k") -> tuple[UUID, str]:
    async with transaction(engine) as connection:
        issued = await issue_key(connection, SECRET, person_id, name=name, scopes=["inference"])
    return issued.key.id, issued.plaintext


async def test_a_revocation_that_commits_late_is_not_missed(engine: AsyncEngine, ring: KeyRing) -> None:
    person_id = await a_person(engine)
    key_id, key = await a_key(engine, person_id)
    await ring.refresh()
    async with engine.connect() as slow:
        await revoke_key(slow, person_id, key_id)
        _, newer = await a_key(engine, person_id)  # younger, committed first
        await ring.refresh()
        assert ring.lookup(newer) is not None
        assert ring.lookup(key) is not None
        await slow.commit()
    await ring.refresh()
    assert ring.lookup(key) is None


async def test_a_freeze_that_crosses_a_new_key_is_not_missed(engine: AsyncEngine, ring: KeyRing) -> None:
    person_id = await a_person(engine)
    async with engine.connect() as freezing:
        await freezing.execute(text("SELECT pg_current_xact_id()"))  # the older transaction
        _, key = await a_key(engine, person_id)
        await freeze(freezing, person_id)
        await ring.refresh()
        assert ring.lookup(key) is not None
        await freezing.commit()
    await ring.refresh()
    assert ring.lookup(key) is None
    async with transaction(engine) as connection:
        await unfreeze(connection, person_id)
    await ring.refresh()
    assert ring.lookup(key) is not None


async def test_a_poll_reads_only_what_changed(engine: AsyncEngine, ring: KeyRing) -> None:
    person_id = await a_person(engine)
    for n in range(20):
        await a_key(engine, person_id, f"old {n}")
    await ring.refresh()
    await a_key(engine, await a_person(engine), "new")
    async with engine.connect() as connection:
        rows = (await connection.execute(key_ring._CHANGED, {"since": str(ring._horizon)})).all()
    assert len({row.id for row in rows}) == 1
    assert len(ring) == 20


async def test_a_polling_ring_notices_new_and_revoked_keys_by_itself(
    engine: AsyncEngine, polling: KeyRing
) -> None:
    person_id = await a_person(engine)
    key_id, key = await a_key(engine, person_id)
    await asyncio.sleep(key_ring.POLL_S + 0.5)
    found = polling.lookup(key)
    assert found is not None
    assert (found.person_id, found.key_id, found.scopes) == (person_id, key_id, {"inference"})
    async with transaction(engine) as connection:
        await revoke_key(connection, person_id, key_id)
    await asyncio.sleep(key_ring.POLL_S + 0.5)
    assert polling.lookup(key) is None


async def test_find_knows_a_key_made_elsewhere_a_moment_ago(engine: AsyncEngine, ring: KeyRing) -> None:
    _, key = await a_key(engine, await a_person(engine))
    assert ring.lookup(key) is None
    assert await ring.find(key) is not None


async def test_unknown_keys_share_a_few_reads(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    real = ring._read

    async def counted() -> None:
        nonlocal reads
        reads += 1
        await real()

    monkeypatch.setattr(ring, "_read", counted)
    assert await asyncio.gather(*(ring.find(make_key()) for _ in range(500))) == [None] * 500
    assert 1 <= reads <= 3


async def test_a_ring_without_its_database_says_so(
    engine: AsyncEngine, database_url: str, ring: KeyRing, clock: SkippingClock
) -> None:
    _, key = await a_key(engine, await a_person(engine))
    await ring.refresh()
    assert ring.is_fresh
    await drop_database(database_url)
    with pytest.raises(KeysUnavailable):
        await ring.refresh()
    assert ring.is_fresh  # for a moment
    assert ring.lookup(key) is not None
    with pytest.raises(KeysUnavailable):
        await ring.find(make_key())
    clock.ahead_s = key_ring.FRESH_S + 0.1
    assert not ring.is_fresh


async def test_a_ring_over_a_restored_older_book_starts_again(engine: AsyncEngine, ring: KeyRing) -> None:
    _, key = await a_key(engine, await a_person(engine))
    await ring.refresh()
    ring._horizon = 10**15  # as if the book we read before was ahead of this one
    ring._keys = {b"gone": ring._keys.popitem()[1]}
    await ring.refresh()
    assert ring.lookup(key) is not None
    assert len(ring) == 1


async def test_last_use_is_written(engine: AsyncEngine, polling: KeyRing) -> None:
    key_id, key = await a_key(engine, await a_person(engine))
    unused_id, _ = await a_key(engine, await a_person(engine))
    assert await polling.find(key) is not None
    await polling.stop()
    async with engine.connect() as connection:
        rows = await connection.execute(text("SELECT id, last_used_at IS NOT NULL AS used FROM api_keys"))
    assert {row.id: row.used for row in rows} == {key_id: True, unused_id: False}


async def test_a_frozen_person_gets_no_key_and_only_administrators_an_admin_key(engine: AsyncEngine) -> None:
    person_id = await a_person(engine)
    with pytest.raises(ScopeNotHeld):
        async with transaction(engine) as connection:
            await create_key(connection, SECRET, person_id, "up", ["admin"])
    async with transaction(engine) as connection:
        await freeze(connection, person_id)
    with pytest.raises(PersonFrozen):
        async with transaction(engine) as connection:
            await create_key(connection, SECRET, person_id, "k")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE api_keys SET digest = sha256('x')",
        "UPDATE api_keys SET scopes = ARRAY['admin']",
        "UPDATE api_keys SET person_id = gen_random_uuid()",
        "DELETE FROM api_keys",
        "DELETE FROM people",
        "UPDATE wallets SET person_id = gen_random_uuid()",
        "UPDATE sessions SET person_id = gen_random_uuid()",
    ],
)
async def test_the_application_cannot_rewrite_credentials(engine: AsyncEngine, statement: str) -> None:
    with pytest.raises(ProgrammingError, match="permission denied"):
        async with transaction(engine) as connection:
            await connection.execute(text(statement))
