"""Rate limits: exact sliding windows, bounded memory, headers on every response."""

from __future__ import annotations

from collections import Counter
from uuid import UUID, uuid4

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from marketplace.platform import limits as module
from marketplace.platform.limits import (
    DEFAULT_LIMITS,
    Limit,
    RateLimitMiddleware,
    RateLimits,
    Rule,
    Taken,
    rule_of,
)


class Time:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def test_the_defaults_are_the_required_ones() -> None:
    assert {rule: (limit.requests, limit.window_s) for rule, limit in DEFAULT_LIMITS.items()} == {
        Rule.CHAT: (60, 60),
        Rule.MODELS: (30, 60),
        Rule.KEYS: (20, 60),
        Rule.AUTHENTICATION: (5, 900),
        Rule.UNAUTHENTICATED: (60, 60),
        Rule.OTHER: (300, 60),
    }


def test_a_window_counts_down_refuses_and_frees_one_place_at_a_time() -> None:
    time = Time()
    limits = RateLimits(time, {Rule.CHAT: Limit(2, 60)})
    assert limits.take(Rule.CHAT, "a") == Taken(True, 2, 1, 60)
    time.s = 10.5
    assert limits.take(Rule.CHAT, "a") == Taken(True, 2, 0, 50)
    time.s = 59.9
    assert limits.take(Rule.CHAT, "a") == Taken(False, 2, 0, 1)
    assert limits.take(Rule.CHAT, "b").allowed
    assert limits.take(Rule.MODELS, "a").allowed
    time.s = 60
    assert limits.take(Rule.CHAT, "a") == Taken(True, 2, 0, 11)
    assert not limits.take(Rule.CHAT, "a").allowed


@given(st.lists(st.floats(0, 30), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 20))
def test_no_window_ever_holds_more_than_the_limit(gaps: list[float], requests: int, window_s: int) -> None:
    time = Time()
    limits = RateLimits(time, {Rule.CHAT: Limit(requests, window_s)})
    let_through: list[float] = []
    for gap in gaps:
        time.s += gap
        recent = [at for at in let_through if at > time.s - window_s]
        taken = limits.take(Rule.CHAT, "a")
        assert taken.allowed == (len(recent) < requests)
        assert taken.remaining == max(0, requests - len(recent) - 1)
        if taken.allowed:
            let_through.append(time.s)
        else:
            assert 1 <= taken.reset_s <= window_s


def test_who_waits_the_time_named_is_let_through() -> None:
    time = Time()
    limits = RateLimits(time, {Rule.AUTHENTICATION: Limit(5, 900)})
    for _ in range(5):
        time.s += 1.3
        limits.take(Rule.AUTHENTICATION, "a")
    refused = limits.take(Rule.AUTHENTICATION, "a")
    time.s += refused.reset_s
    assert limits.take(Rule.AUTHENTICATION, "a").allowed


def test_a_person_can_have_limits_of_his_own() -> None:
    person = uuid4()
    overrides = {person: {Rule.CHAT: Limit(1, 60)}}
    limits = RateLimits(Time(), DEFAULT_LIMITS, overrides)
    assert [limits.take(Rule.CHAT, person).allowed for _ in range(2)] == [True, False]
    overrides[person] = {Rule.CHAT: Limit(3, 60)}
    assert [limits.take(Rule.CHAT, person).allowed for _ in range(3)] == [True, True, False]
    assert limits.take(Rule.MODELS, person).limit == 30


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNTERS_MAX", 100)
    limits = RateLimits(Time())
    for n in range(1_000):
        limits.take(Rule.CHAT, n)
    assert limits.counters(Rule.CHAT) == 100
    assert limits.take(Rule.CHAT, 999).remaining == 58  # the newest are kept


@pytest.mark.parametrize("wrong", [(0, 60), (60, 0), (-1, 60)])
def test_a_limit_of_nothing_is_refused(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError):
        Limit(*wrong)


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("/v1/chat/completions", Rule.CHAT),
        ("/v1/models", Rule.MODELS),
        ("/v1/models/a/b", Rule.MODELS),
        ("/v1/modelsx", Rule.CHAT),
        ("/api/keys", Rule.KEYS),
        ("/api/keys/1", Rule.KEYS),
        ("/api/auth/login", Rule.AUTHENTICATION),
        ("/api/auth/register", Rule.AUTHENTICATION),
        ("/api/auth/wallet/verify", Rule.AUTHENTICATION),
        ("/api/auth/wallet/challenge", Rule.OTHER),
        ("/api/usage", Rule.OTHER),
        ("/healthz", None),
        ("/apiary", None),
    ],
)
def test_every_path_has_its_rule(path: str, rule: Rule | None) -> None:
    assert rule_of(path) is rule


ADA = UUID(int=1)


def site(limits: RateLimits) -> ASGIApp:
    async def hello(request: object) -> PlainTextResponse:
        return PlainTextResponse("hello")

    app = Starlette(routes=[Route("/api/hello", hello), Route("/api/keys", hello), Route("/page", hello)])
    return RateLimitMiddleware(app, limits, person_of=lambda token: ADA if token == "ada" else None)


def client(app: ASGIApp, address: str = "192.0.2.1") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(address, 1)), base_url="http://x")


async def test_every_response_says_where_its_caller_stands() -> None:
    async with client(site(RateLimits(Time()))) as web:
        for path, status in (("/api/hello", 200), ("/api/nothing", 404)):
            answer = await web.get(path)
            assert answer.status_code == status
            assert answer.headers["x-ratelimit-limit"] == "300"
            assert answer.headers["x-ratelimit-reset"] == "60"
        assert answer.headers["x-ratelimit-remaining"] == "298"
        assert "x-ratelimit-limit" not in (await web.get("/page")).headers


async def test_over_the_limit_is_a_429_in_openais_shape() -> None:
    async with client(site(RateLimits(Time()))) as web:
        answers = [await web.get("/api/keys", headers={"Authorization": "Bearer ada"}) for _ in range(21)]
    assert Counter(a.status_code for a in answers) == {200: 20, 429: 1}
    last = answers[-1]
    assert last.json()["error"]["code"] == "rate_limit_exceeded"
    assert last.json()["error"]["type"] == "rate_limit_error"
    assert last.headers["retry-after"] == last.headers["x-ratelimit-reset"] == "60"
    assert last.headers["x-ratelimit-remaining"] == "0"


async def test_a_person_is_counted_across_addresses_and_not_with_strangers_beside_him() -> None:
    limits = RateLimits(Time(), {Rule.KEYS: Limit(2, 60)})
    app, ada = site(limits), {"Authorization": "bearer ada"}
    async with client(app, "192.0.2.1") as here, client(app, "192.0.2.2") as there:
        assert (await here.get("/api/keys", headers=ada)).status_code == 200
        assert (await there.get("/api/keys", headers=ada)).status_code == 200
        assert (await here.get("/api/keys", headers=ada)).status_code == 429
        assert (await here.get("/api/keys")).status_code == 200
