"""Buyers who want more than they can pay, and what tries to cross from one side of us to the other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import httpx
import pytest
from gateway_parts import (
    DOLLAR,
    HELLO,
    MODEL,
    PRICE_IN,
    PRICE_OUT,
    STREAM,
    RunningGateway,
    StubNode,
    running_gateway,
    said,
    saying,
    sending,
    whole,
)
from letters import prompt_tokens

from marketplace.accounts.people import create_key, create_person
from marketplace.ledger.money import Nano, cost
from marketplace.ledger.posting import post_transfer
from marketplace.ledger.templates import deposit
from marketplace.platform.database import transaction
from marketplace.platform.embedded_nats import EmbeddedNats
from node_agent import protocol
from node_agent.protocol import Accepted, Delta, End, Failed, FailureCode


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


async def test_a65_a_thousand_parallel_requests_never_overdraw(gateway: RunningGateway) -> None:
    """What all of them together cost is fifty times the balance."""
    await gateway.add_node(saying(["x" * 40]))
    price = cost(tokens_in=prompt_tokens("Hi"), tokens_out=40, price_in=PRICE_IN, price_out=PRICE_OUT).n
    await gateway.leave(20 * price)
    connector = aiohttp.TCPConnector(limit=100)
    async with aiohttp.ClientSession(gateway.url, headers=gateway.headers, connector=connector) as http:

        async def ask() -> tuple[int, int]:
            async with http.post("/v1/chat/completions", json={**HELLO, "max_tokens": 40}) as answer:
                body = await answer.json()
                return answer.status, body.get("usage", {}).get("cost_nano", 0)

        answers = await asyncio.gather(*(ask() for _ in range(1000)))
    statuses = [status for status, _ in answers]
    assert set(statuses) <= {200, 402, 503}
    assert 1 <= statuses.count(200) <= 21  # the last one may lack money
    spent = sum(paid for _, paid in answers)
    balance = await gateway.get("/api/balance")
    assert balance["available_nano"] > -price
    async with gateway.owner.connect() as connection:
        from marketplace.ledger.accounts import buyer, read_balance

        account = await read_balance(connection, buyer(str(gateway.person)))
    assert account is not None
    assert account.posted.n == 20 * price - spent > -price  # the last one may lack a part of its own cost
    await gateway.assert_proved()


async def test_a66_nothing_unbounded_reaches_a_node(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["ok"]))
    for field, value, code in (
        ("n", 1000, "invalid_value"),
        ("max_tokens", 10**9, "context_length_exceeded"),
        ("max_tokens", 10**30, "invalid_value"),
        ("max_tokens", -1, "invalid_value"),
        ("top_logprobs", 1000, "invalid_value"),
        ("logit_bias", {str(at): 1 for at in range(2000)}, "invalid_value"),
        ("stop", ["x"] * 100, "invalid_value"),
    ):
        answer = await gateway.chat({**HELLO, field: value})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), (field, value)
    assert node.requests == []
    body = {"model": MODEL, "messages": HELLO["messages"], "best_of": 50, "n": 2, "use_beam_search": True}
    node.answer = whole(said("a", finish="stop"), said("b", index=1, finish="stop"))
    assert (await gateway.chat(body)).status_code == 200
    sent = json.loads(node.requests[0].body)
    assert sent["max_tokens"] == 4096 - prompt_tokens("Hi")  # absent: all that fits
    assert set(sent) == {"messages", "max_tokens", "n", "cache_salt"}


async def test_a67_bodies_are_bounded_before_they_are_understood(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["ok"]))
    plain = json.dumps(HELLO).encode()
    deep, wide = b"[" * 10_000 + b"]" * 10_000, b"[" * 100 + b"]" * 100
    for body, status in (
        (b" " * (50 * 1024 * 1024), 413),
        (plain[:-1] + b',"unknown":' + deep + b"}", 400),
        (plain[:-1] + b',"response_format":{"a":' + deep + b"}}", 400),
        (plain[:-1] + b',"response_format":{"a":' + wide + b"}}", 400),
        (plain.replace(b"50", b"NaN"), 400),
        (plain.replace(b"50", b"Infinity"), 400),
        (plain[:-1] + b',"temperature":1e999}', 400),
        (plain.replace(b"Hi", b"\\ud800"), 400),
        (plain.replace(b"Hi", b"\xff\xfe"), 400),
        (plain + b"{}", 400),
    ):
        answer = await gateway.chat(body)
        assert answer.status_code == status, (body[:200], answer.text)
    assert node.requests == []


async def test_a68_the_price_is_the_one_at_admission(gateway: RunningGateway) -> None:
    raised = asyncio.Event()

    async def answer(node: StubNode, request: protocol.Request, reply: str) -> None:
        await node.send(reply, Accepted(0))
        await node.send(reply, Delta(1, [said("Hel")]))
        await raised.wait()
        await node.send(reply, Delta(2, [said("lo", finish="stop")]))
        await node.send(reply, End(3))

    node = await gateway.add_node(answer)
    before = gateway.process.fabric.registry.views(MODEL)[0]
    asking = asyncio.create_task(gateway.chat(STREAM))
    while not node.requests:
        await asyncio.sleep(0.01)
    gateway.process.fabric.registry.set_price(
        before.node_id, MODEL, 100 * PRICE_IN, 100 * PRICE_OUT, before.price_version + 1
    )
    raised.set()
    await asking
    row = await gateway.only_row()
    agreed = cost(tokens_in=prompt_tokens("Hi"), tokens_out=5, price_in=PRICE_IN, price_out=PRICE_OUT)
    assert (row["cost_nano"], row["price_version"]) == (agreed.n, before.price_version)


async def test_a66_many_prompts_and_best_of_are_multiplied_into_the_hold(gateway: RunningGateway) -> None:
    node = await gateway.add_node(whole(*(said("ab", index=at, finish="stop") for at in range(4))))
    body = {"model": MODEL, "prompt": ["One", "Two"], "n": 2, "max_tokens": 100}
    quoted = (await gateway.post("/v1/quote", body)).json()
    tokens_in = quoted["prompt_tokens"]
    worst = cost(tokens_in=tokens_in, tokens_out=400, price_in=PRICE_IN, price_out=PRICE_OUT)
    assert quoted["worst_cost_nano"] == worst.n
    assert (await gateway.post("/v1/completions", {**body, "best_of": 50})).status_code == 400
    assert (await gateway.post("/v1/completions", {**body, "best_of": 3})).status_code == 400
    served = (await gateway.post("/v1/completions", body)).json()
    assert served["usage"]["completion_tokens"] == 8
    assert [request.kind for request in node.requests] == ["completion"]


URLS = [
    "http://169.254.169.254/latest/meta-data", "http://localhost:22", "http://[::ffff:10.0.0.1]/",
    "http://0177.0.0.1/", "file:///etc/passwd",
]  # fmt: skip


async def test_a69_nothing_a_node_or_a_buyer_says_is_an_address_we_connect_to(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agents dial in, so there is no URL of theirs; one in their words or the buyer's is only text."""
    reached: list[object] = []
    connect = asyncio.BaseEventLoop.create_connection

    async def watched(loop: object, factory: object, *address: object, **options: object) -> object:
        reached.append(address)
        return await connect(loop, factory, *address, **options)  # type: ignore[arg-type]

    node = await gateway.add_node(saying(["ok"]))
    monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", watched)
    for url in URLS:
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        for body in (
            {**HELLO, "messages": [{"role": "user", "content": parts}]},
            {**HELLO, "model": url},
            {**HELLO, "provider": {"only": [url]}},
            {**HELLO, "base_url": url, "api_base": url, "messages": [{"role": "user", "content": "Hi"}]},
        ):
            await gateway.chat(body)
        node.answer = whole(said(url, finish=url, stop_reason=url))
        assert (await gateway.chat({**HELLO, "max_tokens": 100})).status_code == 200
    own = {gateway.url.rsplit(":", 1)[1], gateway.nats.url.rsplit(":", 1)[1]}
    assert all(str(address[1]) in own for address in reached if address), reached  # type: ignore[index]
    assert not any(b"base_url" in request.body for request in node.requests)


SMUGGLED = [
    "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
    "Content-Length: +5\r\n\r\n12345",
    "Content-Length : 5\r\n\r\n12345",
    "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding: chunked\r\n\r\n5\n12345\r\n0\r\n\r\n",
    "Transfer-Encoding: chunked\r\n\r\n5\r\n12345XX0\r\n\r\n",
    "Transfer-Encoding: chunked\r\n\r\n-5\r\n12345\r\n0\r\n\r\n",
    "X: a\nY: b\r\nContent-Length: 0\r\n\r\n",
]


async def test_a70_ambiguous_requests_are_refused(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["ok"]))
    second = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    for path in ("/v1/chat/completions", "/api/auth/login"):
        for rest in SMUGGLED:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n"
            answer = await gateway.raw((head + rest + second).encode())
            assert b" 400 " in answer.splitlines()[0], (rest, answer)
            assert answer.count(b"HTTP/1.1") == 1, rest  # and what was behind it was not served
    assert node.requests == []


async def test_a70_a_key_given_twice_is_refused(gateway: RunningGateway) -> None:
    """Whoever reads the same bytes after us might believe the other one."""
    node = await gateway.add_node(saying(["ok"]))
    plain = json.dumps(HELLO).encode()[:-1]
    for repeated in (b',"max_tokens":2}', b',"max\\u005ftokens":2}', b',"x":1,"x":1}', b',"x\\"y":1}'):
        answer = await gateway.chat(plain + repeated)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "repeated_key"), repeated
    assert node.requests == []
    assert (await gateway.chat(plain + b',"x":"a \\" b","y":{"y":"\\""}}')).status_code == 200


async def test_a71_nothing_of_the_buyers_headers_goes_further(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["ok"]))
    await gateway.chat({**HELLO, "user": "ann@example.org"}, **{"X-Secret": "canary", "X-Request-Id": "mine"})
    body = node.requests[0].body.decode()
    for secret in (gateway.key, "canary", "mine", "ann@example.org", str(gateway.person)):
        assert secret not in body
    assert set(json.loads(body)) == {"messages", "max_tokens", "cache_salt"}
    answer = await gateway.chat({**HELLO, "model": "x\r\nSet-Cookie: a=b"}, **{"X-Request-Id": "mine"})
    assert answer.status_code == 400
    assert "set-cookie" not in answer.headers
    assert answer.headers["x-tollway-request-id"] != "mine"


OUR_HEADERS = {
    "content-type", "content-length", "transfer-encoding", "cache-control", "connection", "retry-after",
    "x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset", "x-tollway-request-id",
    "x-tollway-node", "x-tollway-price-in", "x-tollway-price-out", "x-tollway-route", "x-tollway-cost",
    "x-tollway-max-tokens",
}  # fmt: skip


async def test_a72_an_operator_sets_no_headers(gateway: RunningGateway) -> None:
    evil = "x\r\nSet-Cookie: a=b\r\nLocation: http://example.org\r\n\r\n"
    node = await gateway.add_node(whole(said(evil, finish=evil[:100], role=evil[:100], stop_reason=evil)))
    answers = [await gateway.chat(body) for body in (HELLO, STREAM)]
    node.answer = sending(Failed(0, FailureCode.BAD_REQUEST, evil, is_retriable=False))
    answers += [await gateway.chat(body) for body in (HELLO, STREAM)]
    for answer in answers:
        assert set(answer.headers) <= OUR_HEADERS
        assert answer.headers["content-type"] in {"application/json", "text/event-stream; charset=utf-8"}
    assert [answer.status_code for answer in answers] == [200, 200, 400, 400]
    assert answers[0].json()["choices"][0]["finish_reason"] == "stop"  # not the operator's own words
    assert answers[0].json()["choices"][0]["message"]["role"] == "assistant"


async def test_a73_a_node_cannot_inject_events(gateway: RunningGateway) -> None:
    evil = 'data: [DONE]\n\nevent: x\r\ndata: {"a":1}\n\n\u2028\u0085\x00'
    await gateway.add_node(saying([evil, "!"]))
    answer = await gateway.chat({**STREAM, "max_tokens": 100})
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.count("data: [DONE]") == 1
    assert lines[-1] == "data: [DONE]"
    pieces = [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines[:-1]]
    assert "".join(pieces) == evil + "!"


async def test_a75_prompts_answers_and_keys_are_in_no_log_line(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Everything a buyer or a node says, on every kind of way out."""
    caplog.set_level("DEBUG")
    node = await gateway.add_node(saying(["canary-answer"]))
    chat = {**HELLO, "max_tokens": 100, "messages": [{"role": "user", "content": "canary-prompt"}]}
    text = {"model": MODEL, "prompt": "canary-prompt", "max_tokens": 100, "stop": ["canary-stop"]}
    for body in (
        chat,
        {**chat, "stream": True},
        {**chat, "model": "canary-model"},
        {**chat, "n": "canary-n"},
    ):
        await gateway.chat(body)
    for body in (text, {**text, "prompt": ["canary-prompt", 1]}):
        await gateway.post("/v1/completions", body)
    await gateway.post("/v1/quote", chat)
    node.answer = sending(Failed(0, FailureCode.BAD_REQUEST, "canary-reason", is_retriable=False))
    await gateway.chat(chat)
    printed = capfd.readouterr()
    everything = caplog.text + printed.out + printed.err
    assert "a node failed a request" in everything  # the logs are looked at
    assert "canary" not in everything
    assert gateway.key not in everything


async def test_a74_buyers_share_neither_answers_nor_caches(gateway: RunningGateway) -> None:
    async def echo(node: StubNode, request: protocol.Request, reply: str) -> None:
        await node.send(reply, Accepted(0))
        content = json.loads(request.body)["messages"][0]["content"]
        await node.send(reply, Delta(1, [said(content[:3])]))
        await asyncio.sleep(0.05)
        await node.send(reply, Delta(2, [said(content[3:], finish="stop")]))
        await node.send(reply, End(3))

    node = await gateway.add_node(echo)
    async with transaction(gateway.owner) as connection:
        other = await create_person(connection, display_name="other")
        key = await create_key(connection, gateway.process.settings.secret, other, "t", {"inference"})
    async with transaction(gateway.process.engine) as connection:
        await post_transfer(
            connection, deposit(chain="base", person=str(other), amount=Nano(DOLLAR), ref="base:other")
        )

    async def ask(who: str, key: str, at: int) -> None:
        said_by_me = f"{who}-{at}"
        body = {**HELLO, "stream": at % 2 == 0, "messages": [{"role": "user", "content": said_by_me}]}
        async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as http:
            headers = {"Authorization": f"Bearer {key}"}
            answer = await http.post("/v1/chat/completions", json=body, headers=headers)
            while "credentials_unavailable" in answer.text:  # a machine that stood still for 4 s (K2)
                await asyncio.sleep(0.5)
                answer = await http.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        if at % 2:
            assert answer.json()["choices"][0]["message"]["content"] == said_by_me
        else:
            assert f'"content":"{said_by_me[3:]}"' in answer.text

    await asyncio.gather(
        *(ask("ann", gateway.key, at) for at in range(10)), *(ask("bob", key, at) for at in range(10))
    )
    salts: dict[str, set[str]] = {"ann": set(), "bob": set()}
    for request in node.requests:
        body = json.loads(request.body)
        salts[body["messages"][0]["content"][:3]].add(body["cache_salt"])
    assert [len(found) for found in salts.values()] == [1, 1]
    assert not salts["ann"] & salts["bob"]
    assert len({request.id for request in node.requests}) == 20
    assert str(other) not in "".join(salts["bob"])
