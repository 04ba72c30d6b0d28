"""A80: how long a refusal takes tells nothing of keys, sessions or e-mail addresses."""

from __future__ import annotations

import hmac
import statistics
import time

import pytest
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.accounts import passwords
from marketplace.accounts.errors import WrongCredentials
from marketplace.accounts.key_ring import KeyRing
from marketplace.accounts.people import create_key, create_person, find_by_email, prove_password
from marketplace.accounts.sessions import find_session, open_session
from marketplace.accounts.tokens import session_digester
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction

SECRET = SecretStr("s" * 32)


async def test_credentials_are_found_by_keyed_digest_and_compared_in_constant_time(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SystemClock()
    async with transaction(engine) as connection:
        person_id = await create_person(connection)
        key = await create_key(connection, SECRET, person_id, "k")
        token, _ = await open_session(connection, SECRET, person_id, clock.now())
    ring = KeyRing(engine, SECRET, clock)
    await ring.refresh()
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def watched(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    assert ring.lookup(key) is not None
    async with transaction(engine) as connection:
        assert await find_session(connection, session_digester(SECRET)(token), clock.now()) is not None
    assert [len(a) for a, _ in compared] == [32, 32]
    assert {token.encode(), key.encode()}.isdisjoint(a for pair in compared for a in pair)


async def test_an_unknown_email_takes_as_long_as_a_wrong_password(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with transaction(engine) as connection:
        await create_person(
            connection,
            email="ada@example.org",
            password_hash=await passwords.hash_password("correct horse battery"),
        )

    async def seconds(email: str) -> float:
        async with transaction(engine) as connection:
            found = await find_by_email(connection, email)
        with pytest.raises(WrongCredentials):
            await prove_password(found, "wrong horse battery")
        return spent.pop()

    spent: list[float] = []
    real = passwords._matches

    def timed(stored: str | None, password: str) -> bool:
        began = time.thread_time()
        try:
            return real(stored, password)
        finally:
            spent.append(time.thread_time() - began)

    monkeypatch.setattr(passwords, "_matches", timed)
    await seconds("ada@example.org")  # the first makes nobody's hash
    known = statistics.median([await seconds("ada@example.org") for _ in range(7)])
    unknown = statistics.median([await seconds("bob@example.org") for _ in range(7)])
    assert known > 0.005
    assert 0.6 < unknown / known < 1.6
