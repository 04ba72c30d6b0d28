"""A77: who holds a copy of the database holds no credential (and K1: none is in tables or logs)."""

from __future__ import annotations

import hashlib

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.accounts.key_ring import KeyRing
from marketplace.accounts.passwords import hash_password
from marketplace.accounts.people import create_key, create_person
from marketplace.accounts.sessions import open_session
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction

SECRET = SecretStr("s" * 32)
PASSWORD = "correct horse battery"


async def test_a_dump_of_the_tables_lets_nobody_in(
    engine: AsyncEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = SystemClock()
    async with transaction(engine) as connection:
        person_id = await create_person(
            connection, email="ada@example.org", password_hash=await hash_password(PASSWORD)
        )
        key = await create_key(connection, SECRET, person_id, "laptop")
        token, _ = await open_session(connection, SECRET, person_id, clock.now())
    ring = KeyRing(engine, SECRET, clock)
    await ring.start()
    assert ring.lookup(key) is not None
    await ring.stop()

    async with engine.connect() as connection:
        dump = ""
        for table in ("people", "wallets", "wallet_challenges", "sessions", "api_keys"):
            rows = await connection.execute(text(f"SELECT row_to_json(t)::text FROM {table} t"))
            dump += "\n".join(rows.scalars())
        digest = await connection.scalar(text("SELECT digest FROM api_keys"))
    assert "ada@example.org" in dump
    said = capfd.readouterr()
    for secret in (key, key[15:], token, token[3:], PASSWORD, SECRET.get_secret_value()):
        assert secret not in dump
        assert secret not in said.out + said.err

    # Not even a guess can be tested without the secret, which is not in the database.
    assert digest != hashlib.sha256(key.encode()).digest()
    thief = KeyRing(engine, SecretStr("t" * 32), clock)
    await thief.refresh()
    assert len(thief) == 1
    assert thief.lookup(key) is None
