"""A78: keys cannot be guessed: 220 bits, refused by checksum before any look-up, 60 tries a minute."""

from __future__ import annotations

from collections import Counter

import httpx
import pytest
from pydantic import SecretStr
from starlette.responses import PlainTextResponse

from marketplace.accounts.errors import KeysUnavailable
from marketplace.accounts.key_ring import KeyRing
from marketplace.accounts.tokens import make_key
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import connect
from marketplace.platform.limits import RateLimitMiddleware, RateLimits

SECRET = SecretStr("s" * 32)


async def test_an_invented_key_costs_no_look_up() -> None:
    nowhere = connect("postgresql+asyncpg://u:p@/none?host=/nonexistent")
    ring = KeyRing(nowhere, SECRET, SystemClock())
    key = make_key()
    invented = key[:-1] + ("a" if key[-1] != "a" else "b")
    assert await ring.find(invented) is None  # the database was not asked: it does not exist
    with pytest.raises(KeysUnavailable):
        await ring.find(key)
    await nowhere.dispose()


async def test_an_address_gets_sixty_tries_a_minute() -> None:
    nowhere = connect("postgresql+asyncpg://u:p@/none?host=/nonexistent")
    ring = KeyRing(nowhere, SECRET, SystemClock())
    app = RateLimitMiddleware(
        PlainTextResponse("401", 401),
        RateLimits(SystemClock().monotonic),
        person_of=lambda presented: None if (found := ring.lookup(presented)) is None else found.person_id,
    )
    transport = httpx.ASGITransport(app, client=("192.0.2.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as web:
        statuses = Counter(
            [
                (await web.get("/api/usage", headers={"Authorization": f"Bearer {make_key()}"})).status_code
                for _ in range(70)
            ]
        )
    await nowhere.dispose()
    assert statuses == {401: 60, 429: 10}
