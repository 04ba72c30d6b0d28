"""Limits of keys and accounts, through the API that sets them and the route that obeys them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_parts import (
    DOLLAR,
    HELLO,
    MODEL,
    PRICE_IN,
    PRICE_OUT,
    RunningGateway,
    running_gateway,
    saying,
)
from letters import prompt_tokens
from sqlalchemy import text

from marketplace.ledger.money import cost
from marketplace.platform.embedded_nats import EmbeddedNats


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


async def _key(gateway: RunningGateway, **limits: Any) -> tuple[str, str]:
    """Make a key with limits; gives its text and its id."""
    made = await gateway.post("/api/keys", {"name": "limited", **limits})
    assert made.status_code == 201, made.text
    assert {name: made.json()[name] for name in limits} == limits
    return made.json()["key"], made.json()["id"]


async def _ask(gateway: RunningGateway, key: str, **fields: Any) -> httpx.Response:
    return await gateway.chat({**HELLO, **fields}, Authorization=f"Bearer {key}")


def _code(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json().get("error", {}).get("code")


async def test_requests_a_minute_of_a_key_and_of_all_of_an_accounts_keys(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["ok"]))
    limited, identity = await _key(gateway, requests_per_minute=2)
    other, _ = await _key(gateway)
    answers = [await _ask(gateway, limited) for _ in range(3)]
    assert [_code(answer)[0] for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["1", "0", "0"]
    assert {answer.headers["x-ratelimit-limit"] for answer in answers} == {"2"}
    assert int(answers[2].headers["retry-after"]) >= 1
    assert (await _ask(gateway, other)).status_code == 200
    async with httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers) as http:
        changed = await http.patch(f"/api/keys/{identity}", json={"requests_per_minute": None})
        assert (changed.status_code, changed.json()["requests_per_minute"]) == (200, None)
        assert (await _ask(gateway, limited)).status_code == 200
        denied = await http.put(f"/api/admin/accounts/{gateway.person}/limits", json={})
        assert denied.status_code == 403
    async with gateway.owner.begin() as connection:
        await connection.execute(text("UPDATE people SET requests_per_minute = 6"))
    await gateway.process.keys.refresh()
    await asyncio.sleep(1.1)  # what was handed out under the older limit has expired
    statuses = [(await _ask(gateway, key)).status_code for key in (limited, other)]
    assert statuses == [200, 429]  # both count for the account


async def test_tokens_a_minute_are_taken_at_their_worst_and_given_back(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["ok"]))
    prompt = prompt_tokens("Hi")
    key, _ = await _key(gateway, tokens_per_minute=prompt + 100)
    assert _code(await _ask(gateway, key, max_tokens=101, min_tokens=101)) == (429, "token_limit_exceeded")
    cut = await _ask(gateway, key, max_tokens=500)
    assert cut.headers["x-tollway-max-tokens"] == "100; wanted=500"
    assert b'"max_tokens":100' in node.requests[-1].body
    # Two tokens were used of a hundred: the rest serves the next, which takes its prompt again.
    again = await _ask(gateway, key, max_tokens=50)
    assert again.status_code == 200, again.text
    refused = await _ask(gateway, key, max_tokens=1000, min_tokens=97)
    assert _code(refused) == (429, "token_limit_exceeded")


async def test_dollars_a_day_are_never_passed_and_cut_the_answer(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["1234567"]))
    prompt = prompt_tokens("Hi")
    day = cost(tokens_in=prompt, tokens_out=7, price_in=PRICE_IN, price_out=PRICE_OUT).n
    key, _ = await _key(gateway, spend_nano_per_day=day)
    first = await _ask(gateway, key, max_tokens=50)
    assert first.headers["x-tollway-max-tokens"] == "7; wanted=50"
    assert first.json()["usage"]["cost_nano"] == day
    assert _code(await _ask(gateway, key, max_tokens=1)) == (402, "spend_limit_reached")
    assert len(node.requests) == 1
    assert (await _ask(gateway, gateway.key)).status_code == 200  # the account's other key is not bound by it


async def test_requests_at_once_models_and_expiry(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["o", "k"], pause_s=0.4))
    key, identity = await _key(gateway, parallel_requests=2, allowed_models=["other"])
    assert _code(await _ask(gateway, key)) == (403, "model_not_allowed")
    async with httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers) as http:
        assert (
            await http.patch(f"/api/keys/{identity}", json={"allowed_models": [MODEL]})
        ).status_code == 200
        answers = await asyncio.gather(*(_ask(gateway, key) for _ in range(4)))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
        assert {_code(answer)[1] for answer in answers} == {None, "too_many_at_once"}
        assert (await _ask(gateway, key)).status_code == 200  # what ended is free again
        soon = (datetime.now(UTC) + timedelta(seconds=0.5)).isoformat()
        assert (await http.patch(f"/api/keys/{identity}", json={"expires_at": soon})).status_code == 200
        await asyncio.sleep(0.6)
        assert _code(await _ask(gateway, key)) == (401, "invalid_api_key")
        own = await http.patch(f"/api/keys/{await _identity(gateway)}", json={"requests_per_minute": None})
        assert own.status_code == 403


async def _identity(gateway: RunningGateway) -> str:
    """The id of the key the tests themselves use."""
    keys = (await gateway.get("/api/keys"))["data"]
    return str(next(key["id"] for key in keys if key["name"] == "test"))


async def test_every_response_tells_where_its_caller_stands(gateway: RunningGateway) -> None:
    """R22: on successes and on errors, on the hot route and behind it."""
    await gateway.add_node(saying(["ok"]))
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        answers = [
            await gateway.chat(HELLO),
            await gateway.chat({**HELLO, "stream": True}),
            await gateway.chat(b"nonsense"),
            await gateway.chat({**HELLO, "model": "none"}),
            await http.post("/v1/chat/completions", json=HELLO),
            await http.post("/v1/chat/completions?key=x", json=HELLO),
            await http.get("/v1/models"),
            await http.get("/v1/models/none"),
            await http.get("/api/keys"),
            await http.get("/api/keys", headers=gateway.headers),
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 400, 404, 401, 400, 200, 404, 401, 200]
    for answer in answers:
        for name in ("limit", "remaining", "reset"):
            assert int(answer.headers[f"x-ratelimit-{name}"]) >= 0, (answer.request.url, answer.headers)
