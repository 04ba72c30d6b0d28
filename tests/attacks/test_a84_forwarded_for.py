"""A84: a client's own X-Forwarded-For buys no more tries; a trusted proxy's word counts."""

from __future__ import annotations

import httpx
import pytest
from starlette.responses import PlainTextResponse

from marketplace.platform.clock import SystemClock
from marketplace.platform.limits import RateLimitMiddleware, RateLimits, client_address

PROXIES = frozenset({"10.0.0.1", "10.0.0.2", "2001:db8::1"})


async def _logins(peer: str, forwarded: list[str], trusted: frozenset[str]) -> list[int]:
    app = RateLimitMiddleware(
        PlainTextResponse("401", 401), RateLimits(SystemClock().monotonic), trusted_proxies=trusted
    )
    transport = httpx.ASGITransport(app, client=(peer, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as web:
        return [
            (await web.post("/api/auth/login", headers={"X-Forwarded-For": each})).status_code
            for each in forwarded
        ]


async def test_a_client_that_names_another_address_each_time_gets_five_tries() -> None:
    invented = [f"198.51.100.{n}" for n in range(8)]
    assert await _logins("203.0.113.5", invented, PROXIES) == [401] * 5 + [429] * 3


async def test_a_client_behind_our_proxy_gets_five_tries_whatever_it_claims() -> None:
    claimed = [f"198.51.100.{n}, 203.0.113.5" for n in range(8)]
    assert await _logins("10.0.0.1", claimed, PROXIES) == [401] * 5 + [429] * 3


async def test_clients_behind_our_proxy_do_not_share_their_tries() -> None:
    clients = [f"203.0.113.{n}" for n in range(8)]
    assert await _logins("10.0.0.1", clients, PROXIES) == [401] * 8


@pytest.mark.parametrize(
    ("peer", "forwarded", "counted"),
    [
        ("203.0.113.5", None, "203.0.113.5"),
        ("203.0.113.5", "10.0.0.1", "203.0.113.5"),
        ("10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.1", "203.0.113.5", "203.0.113.5"),
        ("10.0.0.1", "1.1.1.1,203.0.113.5 , 10.0.0.2", "203.0.113.5"),
        ("10.0.0.1", "10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "203.0.113.5, nonsense", "10.0.0.1"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "1.1.1.1," * 10_000 + "203.0.113.5", "203.0.113.5"),
        ("2001:db8::1", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", None, "2001:db8:1:2::/64"),
        ("::ffff:203.0.113.5", None, "203.0.113.5"),
        ("", None, ""),
    ],
)
def test_who_is_counted(peer: str, forwarded: str | None, counted: str) -> None:
    assert client_address(peer, forwarded, PROXIES) == counted
