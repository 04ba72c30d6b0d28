"""The gateway on a real socket, with real PostgreSQL and NATS, and a node that answers as told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from gateway_parts import (
    MODEL,
    PRICE_IN,
    PRICE_OUT,
    RunningGateway,
    StubNode,
    prompt_tokens,
    running_gateway,
    saying,
)
from sqlalchemy import text

from marketplace.ledger.money import cost, split
from marketplace.ledger.reconcile import prove
from marketplace.platform.embedded_nats import EmbeddedNats
from node_agent import protocol

DOLLAR = 1_000_000_000
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


async def _usage(gateway: RunningGateway) -> list[dict[str, object]]:
    async with httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers) as http:
        answer = await http.get("/api/usage")
        assert answer.status_code == 200, answer.text
        rows: list[dict[str, object]] = answer.json()["data"]
        return rows


async def _assert_proved(gateway: RunningGateway) -> None:
    async with gateway.owner.connect() as connection:
        failed = [check async for check in prove(connection) if not check.ok]
    assert not failed, failed


async def test_the_official_client_chats_and_is_billed_to_the_token(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["Hello", " there", "!"]))
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=50
        )
        answer = raw.parse()
    assert answer.choices[0].message.content == "Hello there!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens("Hi"), 12)
    expected = cost(tokens_in=prompt_tokens("Hi"), tokens_out=12, price_in=PRICE_IN, price_out=PRICE_OUT)
    assert answer.usage.cost_nano == expected.n  # type: ignore[attr-defined]
    assert raw.headers["x-tollway-cost"] == str(expected)
    assert raw.headers["x-ratelimit-limit"]
    (row,) = await _usage(gateway)
    assert row["cost_nano"] == expected.n
    assert row["operator_nano"] == split(expected)[0].n
    assert row["status"] == 200
    assert row["node"] is not None
    await _assert_proved(gateway)


async def test_a_stream_is_billed_exactly_like_a_whole_answer(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["Hello", " there", "!"], pause_s=0.01))
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == "Hello there!"
    assert len([chunk for chunk in chunks if chunk.choices]) == 3  # each event stays one
    assert chunks[-1].usage is not None
    assert not chunks[-1].choices
    whole = await _chat(gateway, HELLO)
    assert chunks[-1].usage.cost_nano == whole.json()["usage"]["cost_nano"]  # type: ignore[attr-defined]
    assert [row["stream"] for row in await _usage(gateway)] == [False, True]


async def test_the_last_byte_waits_for_the_commit(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["Hello", "!"]))
    async with (
        httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers) as http,
        http.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as answer,
    ):
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                break
            if '"usage"' in line:
                receipt = json.loads(line[6:])["usage"]["receipt_id"]
        async with gateway.owner.connect() as connection:
            found = await connection.scalar(
                text("SELECT count(*) FROM charges WHERE id = :id"), {"id": receipt}
            )
        assert found == 1


async def _chat(gateway: RunningGateway, body: object, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as http:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await http.post(
            "/v1/chat/completions", content=content, headers={**gateway.headers, **headers}
        )


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_value"),
        ({"model": MODEL, "messages": []}, 400, "invalid_value"),
        ({**HELLO, "temperature": 3}, 400, "invalid_value"),
        ({**HELLO, "n": 1000}, 400, "invalid_value"),
        (json.dumps(HELLO).replace("50", "NaN").encode(), 400, "invalid_json"),
        ({**HELLO, "messages": [{"role": "user", "content": 7}]}, 400, "invalid_value"),
        ({**HELLO, "model": "unknown"}, 404, "model_not_found"),
        ({**HELLO, "messages": [{"role": "user", "content": "x" * 5000}]}, 400, "context_length_exceeded"),
        (b" " * (1024 * 1024 + 1), 413, "body_too_large"),
        ({**HELLO, "tools": [json.loads("[" * 100 + "]" * 100)]}, 400, "invalid_value"),
        ({**HELLO, "response_format": {"a": json.loads("[" * 100 + "]" * 100)}}, 400, "too_deep"),
    ],
)
async def test_bad_bodies_are_refused_in_words(
    gateway: RunningGateway, body: object, status: int, code: str
) -> None:
    answer = await _chat(gateway, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_credentials_are_refused_in_words(gateway: RunningGateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        none = await http.post("/v1/chat/completions", json=HELLO)
        wrong = await http.post(
            "/v1/chat/completions", json=HELLO, headers={"Authorization": "Bearer sk-tollway-nonsense"}
        )
        query = await http.post("/v1/chat/completions?api_key=sk-x", json=HELLO, headers=gateway.headers)
    assert (none.status_code, none.json()["error"]["code"]) == (401, "missing_credentials")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (query.status_code, query.json()["error"]["code"]) == (400, "query_refused")


async def test_a_revoked_key_is_refused_within_five_seconds(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["ok"]))
    assert (await _chat(gateway, HELLO)).status_code == 200
    async with gateway.owner.begin() as connection:
        await connection.execute(text("UPDATE api_keys SET revoked_at = now()"))
    async with asyncio.timeout(5):
        while (await _chat(gateway, HELLO)).status_code != 401:
            await asyncio.sleep(0.1)


async def test_no_node_is_503_with_retry_after(gateway: RunningGateway) -> None:
    answer = await _chat(gateway, HELLO)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_node_available")
    assert int(answer.headers["retry-after"]) > 0


async def test_an_empty_balance_is_402_and_has_a_usage_row(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> None:
    async with running_gateway(database_url, nats_server, tmp_path) as gateway:
        await gateway.add_node(saying(["ok"]))
        answer = await _chat(gateway, HELLO)
        assert (answer.status_code, answer.json()["error"]["code"]) == (402, "insufficient_funds")
        assert answer.json()["error"]["type"] == "insufficient_funds"
        (row,) = await _usage(gateway)
        assert (row["status"], row["cost_nano"]) == (402, 0)
        await _assert_proved(gateway)


async def test_max_tokens_is_clamped_to_what_the_balance_affords_and_told(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> None:
    async with running_gateway(database_url, nats_server, tmp_path) as gateway:
        node = await gateway.add_node(saying(["12345"]))
        affordable = prompt_tokens("Hi") * PRICE_IN // 10**6 + 7 * PRICE_OUT // 10**6
        await gateway.fund(affordable)
        answer = await _chat(gateway, HELLO)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-tollway-max-tokens"] == "7; wanted=50"
        assert json.loads(node.requests[0].body)["max_tokens"] == 7


async def test_an_operator_who_overstates_is_billed_on_our_count(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["Hello"], reported=5_000))
    answer = await _chat(gateway, HELLO)
    assert answer.json()["usage"]["completion_tokens"] == 5


async def test_ids_that_do_not_say_the_text_are_not_billed(gateway: RunningGateway) -> None:
    async def answer(node: StubNode, request: protocol.Request, reply: str) -> None:
        await node.send(reply, protocol.Accepted(0))
        choice = protocol.ChoiceDelta(content="Hi", token_ids=list(range(40)), finish_reason="stop")
        await node.send(reply, protocol.Delta(1, [choice], completion_tokens=40))
        await node.send(reply, protocol.End(2, completion_tokens=40))

    await gateway.add_node(answer)
    assert (await _chat(gateway, HELLO)).json()["usage"]["completion_tokens"] == 2


async def test_a_node_that_refuses_is_replaced_before_the_first_byte(gateway: RunningGateway) -> None:
    async def refuse(node: StubNode, request: protocol.Request, reply: str) -> None:
        failed = protocol.Failed(0, protocol.FailureCode.ENGINE_DOWN, "engine is down", is_retriable=True)
        await node.send(reply, failed)

    await gateway.add_node(refuse, price_in=1, price_out=1)
    await gateway.add_node(saying(["fine"]))
    for _ in range(3):
        answer = await _chat(gateway, HELLO)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"] == "fine"


async def test_a_node_that_dies_in_mid_stream_is_paid_for_what_was_delivered(
    gateway: RunningGateway,
) -> None:
    async def die(node: StubNode, request: protocol.Request, reply: str) -> None:
        await node.send(reply, protocol.Accepted(0))
        await node.send(
            reply, protocol.Delta(1, [protocol.ChoiceDelta(content="Hel", token_ids=[39, 68, 75])])
        )
        failed = protocol.Failed(2, protocol.FailureCode.ENGINE_DOWN, "crash", is_retriable=True)
        await node.send(reply, failed)

    await gateway.add_node(die)
    answer = await _chat(gateway, {**HELLO, "stream": True})
    assert answer.status_code == 200
    assert '"node_failed"' in answer.text
    assert "[DONE]" not in answer.text
    (row,) = await _usage(gateway)
    assert (row["status"], row["completion_tokens"]) == (502, 3)
    await _assert_proved(gateway)


async def test_a_buyer_who_leaves_stops_the_node_and_pays_for_what_came(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["a"] * 200, pause_s=0.02))
    body = {**HELLO, "stream": True, "max_tokens": 500}
    async with (
        httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers) as http,
        http.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        async for line in answer.aiter_lines():
            if line:
                break
    async with asyncio.timeout(0.2 + 0.3):  # 0.2 s for us, the rest for the test's own sockets
        while not node.cancelled:
            await asyncio.sleep(0.01)
    async with asyncio.timeout(3):
        while not (rows := await _usage(gateway)):
            await asyncio.sleep(0.02)
    assert rows[0]["status"] == 499
    assert 1 <= int(str(rows[0]["completion_tokens"])) < 200
    await _assert_proved(gateway)


async def test_a_node_cannot_inject_events(gateway: RunningGateway) -> None:
    evil = 'data: [DONE]\n\nevent: x\ndata: {"a":1}\n\n'
    await gateway.add_node(saying([evil, "!"]))
    answer = await _chat(gateway, {**HELLO, "stream": True})
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.count("data: [DONE]") == 1
    assert (
        "".join(json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines[:-1]) == evil + "!"
    )


async def test_the_buyers_headers_and_key_never_reach_the_node(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["ok"]))
    await _chat(gateway, {**HELLO, "user": "ann@example.org"}, **{"X-Secret": "canary-header"})
    body = node.requests[0].body.decode()
    assert gateway.key not in body
    assert "canary-header" not in body
    assert "ann@example.org" not in body
    assert set(json.loads(body)) == {"messages", "max_tokens", "cache_salt"}


async def test_keep_alive_pipelining_and_chunked_bodies(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["ok"]))
    body = json.dumps(HELLO).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n".encode()
    )
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    other = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(whole + chunked + other)
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    await writer.wait_closed()
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.count(b'"chat.completion"') == 2
    assert answer.endswith(b'{"status":"ok"}')


async def test_a_thousand_parallel_requests_never_overdraw(gateway: RunningGateway) -> None:
    """A65: what all of them together cost is far above the balance."""
    await gateway.add_node(saying(["x" * 40]))
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(
        base_url=gateway.url, headers=gateway.headers, limits=limits, timeout=60
    ) as http:
        price = (prompt_tokens("Hi") * PRICE_IN + 40 * PRICE_OUT) // 10**6
        async with gateway.owner.begin() as connection:  # leave enough for about twenty answers
            left = 20 * price
            await connection.execute(text("SELECT 1"))
        await _spend_down(gateway, left)
        answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=HELLO) for _ in range(1000)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) <= {200, 402, 503}
        assert 1 <= statuses.count(200) <= 20 + 1
        balance = (await http.get("/api/balance")).json()
    assert balance["available_nano"] >= 0
    await _assert_proved(gateway)


async def _spend_down(gateway: RunningGateway, left_nano: int) -> None:
    from marketplace.ledger.accounts import PROMO, buyer, read_balance
    from marketplace.ledger.money import Nano
    from marketplace.ledger.posting import post_transfer
    from marketplace.ledger.templates import correction
    from marketplace.platform.database import transaction

    async with transaction(gateway.process.engine) as connection:
        account = buyer(str(gateway.person))
        balance = await read_balance(connection, account)
        assert balance is not None
        amount = Nano(balance.posted.n - left_nano)
        await post_transfer(
            connection, correction(debit=account, credit=PROMO, amount=amount, ref="spend-down", note="test")
        )


async def test_models_and_openapi_tell_the_truth(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["ok"]))
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        listed = (await http.get("/v1/models")).json()
        one = (await http.get(f"/v1/models/{MODEL}")).json()
        missing = await http.get("/v1/models/none")
        described = (await http.get("/openapi.json")).json()
        ready = await http.get("/readyz")
        metrics = (await http.get("/metrics")).text
    assert [model["id"] for model in listed["data"]] == [MODEL]
    assert one["price_out"] == "2.00"
    assert missing.status_code == 404
    assert "/v1/chat/completions" in described["paths"]
    assert described["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert ready.status_code == 200, ready.text
    assert "tollway_requests_total" in metrics
