"""A79: a key in an address is refused, also beside a good header; a leaked key dies within 5 s."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import quote, quote_plus

import pytest
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request

from marketplace.accounts.api_keys import issue_key, revoke_key
from marketplace.accounts.authenticate import AccountAuthenticator
from marketplace.accounts.key_ring import KeyRing
from marketplace.accounts.people import create_person
from marketplace.accounts.tokens import make_session_token
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import connect, transaction
from marketplace.platform.http import Refusal
from marketplace.platform.settings import Environment, Settings

SECRET = SecretStr("s" * 32)


def asking(query: str, key: str) -> Request:
    headers = [(b"authorization", f"Bearer {key}".encode())]
    return Request(
        {
            "type": "http",
            "method": "GET",
            "path": "/api/usage",
            "query_string": query.encode(),
            "headers": headers,
            "server": ("x", 80),
            "scheme": "http",
        }
    )


async def test_a_credential_in_the_address_is_refused(engine: AsyncEngine) -> None:
    async with transaction(engine) as connection:
        person_id = await create_person(connection)
        key = (await issue_key(connection, SECRET, person_id, name="k", scopes=["account"])).plaintext
    settings = Settings(
        environment=Environment.DEVELOPMENT, secret=SECRET, database_url=SecretStr("postgresql+asyncpg://")
    )
    ring = KeyRing(engine, SECRET, SystemClock())
    await ring.refresh()
    authenticator = AccountAuthenticator(engine, settings, SystemClock(), ring)
    assert (await authenticator.authenticate(asking("key=laptop&limit=1", key))).person_id == person_id
    for query in (
        f"api_key={key}",
        f"q={key}",
        key,
        f"limit=1&x=a{quote(key, safe='')}b",
        "x=" + "".join(f"%{ord(c):02x}" for c in key),
        f"{quote_plus('Access_Token')}=anything",
        f"next={make_session_token()}",
        "a%70i_key=x",
    ):
        with pytest.raises(Refusal) as refused:
            await authenticator.authenticate(asking(query, key))
        assert (refused.value.status, refused.value.code) == (400, "credential_in_query")
        assert key not in refused.value.message


async def test_a_leaked_key_is_refused_within_five_seconds_in_every_process(
    engine: AsyncEngine, database_url: str
) -> None:
    async with transaction(engine) as connection:
        person_id = await create_person(connection)
        leaked = await issue_key(connection, SECRET, person_id, name="k", scopes=["inference"])
    engines = [connect(database_url, pool_size=1) for _ in range(3)]
    gateways = [KeyRing(each, SECRET, SystemClock()) for each in engines]
    for gateway in gateways:
        await gateway.start()
    assert all(gateway.lookup(leaked.plaintext) for gateway in gateways)
    async with transaction(engine) as connection:
        await revoke_key(connection, person_id, leaked.key.id)
    revoked_at = time.monotonic()
    while any(gateway.lookup(leaked.plaintext) for gateway in gateways):
        assert time.monotonic() - revoked_at < 5
        await asyncio.sleep(0.05)
    for gateway, each in zip(gateways, engines, strict=True):
        await gateway.stop()
        await each.dispose()
