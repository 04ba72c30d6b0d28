"""The gateway on a real socket, with real PostgreSQL and NATS, and a node that answers as told."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
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
from sqlalchemy import text

from marketplace.ledger.accounts import buyer as buyer_account
from marketplace.ledger.accounts import ensure_account
from marketplace.ledger.money import Nano, cost, split
from marketplace.ledger.overdrafts import set_limit
from marketplace.platform.database import transaction
from marketplace.platform.embedded_nats import EmbeddedNats
from node_agent import protocol
from node_agent.protocol import Accepted, ChoiceDelta, Delta, End, Failed, FailureCode, ToolCallDelta


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


def _priced(completion: int) -> int:
    """What HELLO costs with so many completion tokens."""
    tokens_in = prompt_tokens("Hi")
    return cost(tokens_in=tokens_in, tokens_out=completion, price_in=PRICE_IN, price_out=PRICE_OUT).n


def _events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# ---- the official client, billed to the token


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
    assert raw.headers["x-tollway-price-out"] == "2.00"
    assert raw.headers["x-ratelimit-limit"]
    row = await gateway.only_row()
    assert row["cost_nano"] == expected.n
    assert row["operator_nano"] == split(expected)[0].n
    assert row["status"] == 200
    assert row["node"] is not None
    assert row["ttft_ms"] <= row["latency_ms"]
    await gateway.assert_proved()


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
    text_said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text_said == "Hello there!"
    assert len([chunk for chunk in chunks if chunk.choices]) == 3  # each event stays one
    assert chunks[-1].usage is not None
    assert not chunks[-1].choices
    complete = await gateway.chat(HELLO)
    assert chunks[-1].usage.cost_nano == complete.json()["usage"]["cost_nano"]  # type: ignore[attr-defined]
    assert [row["stream"] for row in await gateway.usage()] == [False, True]


async def test_the_last_byte_waits_for_the_commit(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["Hello", "!"]))
    receipt, found = None, None
    async with (
        httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers) as http,
        http.stream("POST", "/v1/chat/completions", json=STREAM) as answer,
    ):
        async for line in answer.aiter_lines():
            if '"usage"' in line:
                receipt = json.loads(line[6:])["usage"]["receipt_id"]
                async with gateway.owner.connect() as connection:
                    found = await connection.scalar(
                        text("SELECT count(*) FROM charges WHERE id = :id"), {"id": receipt}
                    )
    assert receipt is not None
    assert found == 1


async def test_every_choice_is_billed_and_held_for(gateway: RunningGateway) -> None:
    node = await gateway.add_node(whole(said("abc", finish="stop"), said("de", index=1, finish="length")))
    answer = (await gateway.chat({**HELLO, "n": 2})).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["abc", "de"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]
    assert answer["usage"]["cost_nano"] == _priced(5)
    assert json.loads(node.requests[0].body)["n"] == 2
    await gateway.assert_proved()


async def test_a_stop_string_is_billed_and_not_delivered(gateway: RunningGateway) -> None:
    await gateway.add_node(whole(said("one, ", content="one", finish="stop", stop_reason=", "), completion=5))
    answer = (await gateway.chat({**HELLO, "stop": ", "})).json()
    assert answer["choices"][0]["message"]["content"] == "one"
    assert answer["usage"]["completion_tokens"] == 5
    # The same from a node that stopped at a string nobody named is counted on the text.
    assert (await gateway.chat(HELLO)).json()["usage"]["completion_tokens"] == 3


async def test_a_tool_call_arrives_whole_and_in_pieces(gateway: RunningGateway) -> None:
    sampled = '<tool_call>{"name": "weather", "arguments": {"place": "Bonn"}}</tool_call>'
    ids = said(sampled).token_ids
    first = ToolCallDelta(0, "call-7", "weather", '{"place":')
    second = ToolCallDelta(0, None, None, ' "Bonn"}')
    await gateway.add_node(
        sending(
            Accepted(0),
            Delta(1, [ChoiceDelta(tool_calls=[first], token_ids=ids)]),
            Delta(2, [ChoiceDelta(tool_calls=[second], finish_reason="tool_calls", token_ids=[])]),
            End(3),
        )
    )
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    body = {**HELLO, "tools": tools, "max_tokens": 200}
    answer = (await gateway.chat(body)).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call == {
        "id": "call-7",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"place": "Bonn"}'},
    }
    assert answer["choices"][0]["message"]["content"] is None
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    streamed = _events(await gateway.chat({**body, "stream": True}))
    pieces = [event["choices"][0]["delta"]["tool_calls"][0]["function"] for event in streamed]
    assert "".join(piece["arguments"] for piece in pieces) == '{"place": "Bonn"}'
    assert streamed[-1]["usage"]["cost_nano"] == answer["usage"]["cost_nano"]


async def test_reasoning_is_delivered_apart_and_billed(gateway: RunningGateway) -> None:
    ids = said("<think>hmm</think>yes").token_ids
    await gateway.add_node(
        whole(ChoiceDelta(reasoning="hmm", content="yes", finish_reason="stop", token_ids=ids))
    )
    answer = (await gateway.chat(HELLO)).json()
    assert answer["choices"][0]["message"]["reasoning_content"] == "hmm"
    assert answer["choices"][0]["message"]["content"] == "yes"
    assert answer["usage"]["completion_tokens"] == len("<think>hmm</think>yes")


async def test_an_empty_answer_costs_its_one_token_and_silence_costs_nothing(gateway: RunningGateway) -> None:
    node = await gateway.add_node(whole(ChoiceDelta(content="", finish_reason="stop", token_ids=[257])))
    for body in (HELLO, STREAM):
        answer = await gateway.chat(body)
        assert answer.status_code == 200
    assert [row["completion_tokens"] for row in await gateway.usage()] == [1, 1]
    node.answer = whole(ChoiceDelta(content="", finish_reason="stop"))
    usage = (await gateway.chat(HELLO)).json()["usage"]
    assert (usage["cost_nano"], usage["prompt_tokens"]) == (0, 0)
    node.answer = sending(Accepted(0), End(1))  # no choice at all: broken, not empty
    assert (await gateway.chat(HELLO)).json()["error"]["code"] == "nodes_failed"
    await gateway.assert_proved()


# ---- refusals


BAD_BODIES: list[tuple[object, int, str]] = [
    (b"{", 400, "invalid_json"),
    (b"[]", 400, "invalid_value"),
    (b'{"model": "\xff"}', 400, "invalid_json"),
    ({"model": MODEL, "messages": []}, 400, "invalid_value"),
    ({**HELLO, "temperature": 3}, 400, "invalid_value"),
    ({**HELLO, "min_tokens": 60}, 400, "invalid_value"),
    ({**HELLO, "messages": [{"role": "user", "content": 7}]}, 400, "invalid_value"),
    ({**HELLO, "messages": [{"content": "x"}]}, 400, "invalid_value"),
    (
        {**HELLO, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400, "unsupported_content",
    ),
    ({**HELLO, "messages": [{"role": "assistant", "tool_calls": [1]}]}, 400, "invalid_value"),
    ({**HELLO, "tools": [{"type": "function"}]}, 400, "invalid_value"),
    ({**HELLO, "model": "unknown"}, 404, "model_not_found"),
    ({**HELLO, "messages": [{"role": "user", "content": "x" * 5000}]}, 400, "context_length_exceeded"),
]  # fmt: skip


async def test_bad_bodies_are_refused_in_words_and_on_record(gateway: RunningGateway) -> None:
    for body, status, code in BAD_BODIES:
        answer = await gateway.chat(body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-ratelimit-remaining"]
    rows = await gateway.usage()
    assert [(row["status"], row["finish_reason"]) for row in reversed(rows)] == [
        (status, code) for _, status, code in BAD_BODIES
    ]
    assert all(row["cost_nano"] == 0 for row in rows)


async def test_credentials_are_refused_in_words(gateway: RunningGateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        none = await http.post("/v1/chat/completions", json=HELLO)
        wrong = await http.post(
            "/v1/chat/completions", json=HELLO, headers={"Authorization": "Bearer sk-tollway-nonsense"}
        )
        query = await http.post("/v1/chat/completions?api_key=sk-x", json=HELLO, headers=gateway.headers)
    assert (none.status_code, none.json()["error"]["code"]) == (401, "missing_credentials")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    session = await gateway.chat(HELLO, Authorization="Bearer st-" + "a" * 43)
    assert "make a key" in session.json()["error"]["message"]
    assert (query.status_code, query.json()["error"]["code"]) == (400, "query_refused")


async def test_a_revoked_key_is_refused_within_five_seconds(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["ok"]))
    assert (await gateway.chat(HELLO)).status_code == 200
    async with gateway.owner.begin() as connection:
        await connection.execute(text("UPDATE api_keys SET revoked_at = now()"))
    async with asyncio.timeout(5):
        while (await gateway.chat(HELLO)).status_code != 401:
            await asyncio.sleep(0.1)


async def test_too_many_requests_are_429_with_the_time_to_wait(gateway: RunningGateway) -> None:
    async with gateway.owner.begin() as connection:
        await connection.execute(text("UPDATE people SET requests_per_minute = 1"))
    await gateway.process.keys.refresh()
    assert (await gateway.chat({**HELLO, "model": "none"})).headers["x-ratelimit-remaining"] == "0"
    answer = await gateway.chat(HELLO)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert answer.headers["x-ratelimit-remaining"] == "0"
    assert 0 < int(answer.headers["retry-after"]) <= 62
    assert [row["status"] for row in await gateway.usage()] == [404]


async def test_no_node_is_503_with_retry_after(gateway: RunningGateway) -> None:
    answer = await gateway.chat(HELLO)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_node_available")
    assert int(answer.headers["retry-after"]) > 0
    assert (await gateway.only_row())["status"] == 503


async def test_an_empty_balance_is_402_and_has_a_usage_row(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> None:
    async with running_gateway(database_url, nats_server, tmp_path) as gateway:
        node = await gateway.add_node(saying(["ok"]))
        answer = await gateway.chat(HELLO)
        assert (answer.status_code, answer.json()["error"]["code"]) == (402, "insufficient_funds")
        assert answer.json()["error"]["type"] == "insufficient_funds"
        row = await gateway.only_row()
        assert (row["status"], row["cost_nano"]) == (402, 0)
        assert node.requests == []
        await gateway.assert_proved()


async def test_max_tokens_is_clamped_to_what_the_balance_affords_and_told(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> None:
    async with running_gateway(database_url, nats_server, tmp_path) as gateway:
        node = await gateway.add_node(saying(["1234567"]))
        await gateway.fund(_priced(7))
        async with transaction(gateway.owner) as connection:  # no overdraft for this buyer
            account = await ensure_account(connection, buyer_account(str(gateway.person)))
            await set_limit(connection, account, Nano(0))
        refused = await gateway.chat({**HELLO, "min_tokens": 8})
        assert refused.status_code == 402  # what he insists on does not fit
        answer = await gateway.chat(HELLO)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-tollway-max-tokens"] == "7; wanted=50"
        assert json.loads(node.requests[0].body)["max_tokens"] == 7
        assert (await gateway.get("/api/balance"))["available_nano"] == 0
        await gateway.assert_proved()


# ---- nodes that fail


async def test_a_node_that_refuses_is_replaced_before_the_first_byte(gateway: RunningGateway) -> None:
    refuse = sending(Failed(0, FailureCode.ENGINE_DOWN, "engine is down", is_retriable=True))
    broken = await gateway.add_node(refuse, price_in=1, price_out=1)
    await gateway.add_node(saying(["fine"]))
    for body in (HELLO, STREAM, HELLO, STREAM):
        answer = await gateway.chat(body)
        assert answer.status_code == 200
        assert "fine" in answer.text
    assert broken.requests
    assert all(row["cost_nano"] == _priced(4) for row in await gateway.usage())


async def test_a_busy_gateway_asks_for_streams_frames_further_apart(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await gateway.add_node(saying(["ok"]))
    await gateway.chat(STREAM)
    monkeypatch.setattr(gateway.process.fabric.nodes, "_streams", 250)  # as if so many were under way
    await gateway.chat(STREAM)
    await gateway.chat(HELLO)
    assert [(request.stream, request.frame_gap_ms) for request in node.requests] == [
        (True, 0), (True, 48), (False, 0),
    ]  # fmt: skip


async def test_who_does_not_stream_gets_a_whole_answer_from_another_node(gateway: RunningGateway) -> None:
    async def die_half_way(node: StubNode, request: protocol.Request, reply: str) -> None:
        await node.send(reply, Accepted(0))
        await node.send(reply, Delta(1, [said("half an ans")]))
        await node.send(reply, Failed(2, FailureCode.ENGINE_DOWN, "crash", is_retriable=True))

    broken = await gateway.add_node(die_half_way, price_in=1, price_out=1)
    await gateway.add_node(saying(["fine"]))
    while not broken.requests:
        answer = (await gateway.chat(HELLO)).json()
        assert answer["choices"][0]["message"]["content"] == "fine"
        assert answer["usage"]["cost_nano"] == _priced(4)
    await gateway.assert_proved()


async def test_a_node_that_only_owes_its_last_word_has_answered(gateway: RunningGateway) -> None:
    await gateway.add_node(
        sending(
            Accepted(0),
            Delta(1, [said("done", finish="stop")]),
            Failed(2, FailureCode.INTERNAL, "late crash", is_retriable=True),
        )
    )
    for body in (HELLO, STREAM):
        answer = await gateway.chat(body)
        assert answer.status_code == 200
        assert "done" in answer.text
        assert "error" not in answer.text
    assert [row["cost_nano"] for row in await gateway.usage()] == [_priced(4), _priced(4)]


async def test_what_the_engine_refuses_is_400_in_its_words(gateway: RunningGateway) -> None:
    node = await gateway.add_node(
        sending(Failed(0, FailureCode.BAD_REQUEST, "seed\r\nis too odd", is_retriable=False))
    )
    answer = await gateway.chat(HELLO)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "refused_by_engine")
    assert "seed  is too odd" in answer.json()["error"]["message"]
    assert len(node.requests) == 1
    assert (await gateway.only_row())["status"] == 400


async def test_at_most_three_nodes_are_asked(gateway: RunningGateway) -> None:
    refuse = sending(Failed(0, FailureCode.OVERLOADED, "full", is_retriable=True))
    nodes = [await gateway.add_node(refuse) for _ in range(4)]
    answer = await gateway.chat(HELLO)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "nodes_failed")
    assert sum(len(node.requests) for node in nodes) == 3
    await gateway.assert_proved()


# ---- the ledger is away


async def test_a_charge_in_doubt_is_told_and_found_later(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["Hello"]))
    assert (await gateway.chat(HELLO)).status_code == 200
    gateway.process.poster._patience_s = 0.4
    async with gateway.owner.connect() as blocker:
        await blocker.execute(text("LOCK TABLE charges IN SHARE MODE"))  # readers go on, the poster waits
        whole_answer, stream = await asyncio.gather(gateway.chat(HELLO), gateway.chat(STREAM))
        await blocker.rollback()
    assert (whole_answer.status_code, whole_answer.json()["error"]["code"]) == (503, "charge_unconfirmed")
    assert "Hello" not in whole_answer.text
    assert "charge_unconfirmed" in stream.text
    assert "[DONE]" not in stream.text
    async with asyncio.timeout(5):
        while len(rows := await gateway.usage()) < 3:
            await asyncio.sleep(0.05)
    assert [row["cost_nano"] for row in rows] == [_priced(5)] * 3
    await gateway.assert_proved()


async def test_a_whole_answer_the_ledger_does_not_take_is_neither_given_nor_billed(
    gateway: RunningGateway,
) -> None:
    await gateway.add_node(saying(["Hel", "lo"]))
    poster = gateway.process.poster
    patience_s, poster._patience_s, poster._queue_max = poster._patience_s, 0.1, 0
    answer = await gateway.chat(HELLO, **{"Idempotency-Key": "order-1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
    await gateway.assert_proved()  # nothing is held for it
    poster._patience_s, poster._queue_max = patience_s, 100
    assert (await gateway.chat(HELLO, **{"Idempotency-Key": "order-1"})).status_code == 200
    await asyncio.sleep(1.2)  # the first pause of a charge that is posted later
    assert [row["cost_nano"] for row in await gateway.usage()] == [_priced(5)]
    await gateway.assert_proved()


async def test_who_is_charged_while_the_gateway_stops_is_not_told_to_try_again(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    await gateway.add_node(saying(["Hello"]))
    posting, may_post = asyncio.Event(), asyncio.Event()
    post = gateway.process.poster.post

    async def slow(*args: Any) -> None:
        posting.set()
        await may_post.wait()
        await post(*args)

    monkeypatch.setattr(gateway.process.poster, "post", slow)
    asking = asyncio.create_task(gateway.chat(HELLO))
    await posting.wait()
    gateway.server.should_exit = True  # with two seconds left
    answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "charge_unconfirmed")
    may_post.set()


async def test_what_the_poster_does_not_take_is_posted_later(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["Hel", "lo"]))
    poster = gateway.process.poster
    poster._patience_s, poster._queue_max = 0.1, 0
    stream = await gateway.chat(STREAM)
    assert "ledger_unavailable" in stream.text
    assert "[DONE]" not in stream.text
    assert sum(part.reserved_nano for part in gateway.process.keeper.book) > 0  # still held for
    poster._patience_s, poster._queue_max = 5, 100
    row = await gateway.only_row()
    assert (row["status"], row["cost_nano"]) == (200, _priced(5))
    await gateway.assert_proved()


async def test_a_request_that_is_cancelled_while_it_is_billed_is_billed(gateway: RunningGateway) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def answer(node: StubNode, request: protocol.Request, reply: str) -> None:
        asked.set()
        await go_on.wait()
        await saying(["Hel", "lo"])(node, request, reply)

    await gateway.add_node(answer)
    async with gateway.owner.connect() as blocker:
        asking = asyncio.create_task(gateway.chat(STREAM))
        await asked.wait()
        # The bill needs the operator's account, which nobody has asked for yet.
        await blocker.execute(text("LOCK TABLE accounts IN ACCESS EXCLUSIVE MODE"))
        go_on.set()
        async with asyncio.timeout(5):
            while not gateway.process.chat._billing._tasks:
                await asyncio.sleep(0.01)
        for task in list(gateway.server.server_state.tasks):
            task.cancel()
        assert "gateway_stopping" in (await asking).text
        await blocker.rollback()
    row = await gateway.only_row()
    assert (row["status"], row["cost_nano"]) == (200, _priced(5))
    await gateway.assert_proved()


async def test_a_stopping_gateway_bills_what_it_has_delivered(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> None:
    lines: list[str] = []

    async def read(gateway: RunningGateway) -> None:
        async with (
            httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers) as http,
            http.stream("POST", "/v1/chat/completions", json={**STREAM, "max_tokens": 900}) as answer,
        ):
            lines.extend([line async for line in answer.aiter_lines() if line])

    async with running_gateway(database_url, nats_server, tmp_path) as gateway:
        await gateway.fund(DOLLAR)
        await gateway.add_node(saying(["a"] * 900, pause_s=0.02))
        reading = asyncio.create_task(read(gateway))
        while len(gateway.nodes[0].requests) == 0:
            await asyncio.sleep(0.01)
        engine = gateway.owner
    await reading
    assert "gateway_stopping" in lines[-1]
    delivered = sum('"content":"a"' in line for line in lines)
    async with engine.connect() as connection:
        row = (await connection.execute(text("SELECT status, tok_out, amount FROM charges"))).one()
        held = await connection.scalar(text("SELECT sum(held) FROM balances"))
    await engine.dispose()
    assert (row.status, row.amount) == (503, _priced(row.tok_out))
    assert 0 < delivered <= row.tok_out < 900
    assert held == 0


# ---- what it says about itself


async def test_models_and_openapi_tell_the_truth(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["ok"]))
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        listed = (await http.get("/v1/models")).json()
        one = (await http.get(f"/v1/models/{MODEL}")).json()
        missing = await http.get("/v1/models/none")
        described = (await http.get("/openapi.json")).json()
        ready = await http.get("/readyz")
        wrong_method = await http.get("/v1/chat/completions")
        answer = (await gateway.chat(HELLO)).json()
        lines = (await gateway.chat(STREAM)).text.split("\n\n")
        metrics = (await http.get("/metrics")).text
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert events
    assert [model["id"] for model in listed["data"]] == [MODEL]
    assert one["price_out"] == "2.00"
    assert one["offers"][0]["is_healthy"]
    assert missing.status_code == 404
    assert wrong_method.status_code == 405
    chat = described["paths"]["/v1/chat/completions"]["post"]
    properties = chat["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"model", "messages", "stream", "max_tokens", "tools", "provider"} <= set(properties)
    assert "$ref" not in json.dumps(chat["requestBody"])
    told = chat["responses"]["200"]["content"]
    whole, event = told["application/json"]["schema"], told["text/event-stream"]["x-event-schema"]
    assert set(answer) == set(whole["required"]) == set(whole["properties"])
    assert {"cost", "cost_nano", "receipt_id"} <= set(whole["properties"]["usage"]["required"])
    assert answer["object"] in whole["properties"]["object"]["enum"]
    assert "$ref" not in json.dumps(told)
    assert all(set(event["required"]) <= set(one) <= set(event["properties"]) for one in events)
    assert ready.status_code == 200, ready.text
    assert 'tollway_requests_total{status="200"}' in metrics


async def test_neither_prompts_nor_answers_nor_keys_are_logged(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    canary = {**HELLO, "messages": [{"role": "user", "content": "canary-prompt"}], "max_tokens": 100}
    node = await gateway.add_node(saying(["canary-answer"]))
    assert (await gateway.chat(canary)).status_code == 200
    node.answer = sending(Failed(0, FailureCode.BAD_REQUEST, "canary-prompt is bad", is_retriable=False))
    await gateway.chat(canary)
    node.answer = sending(Accepted(0), Delta(1, [said("canary-answer", index=9)]))
    await gateway.chat({**canary, "stream": True})
    broken = gateway.process.shelf._counters
    for name in list(broken):  # an error of our own in the middle of everything
        counter = broken[name].result()
        counter.prompt_tokens = _explode
    assert (await gateway.chat(canary)).status_code == 500
    await gateway.chat(b'{"model": "canary-prompt')
    printed = capfd.readouterr()
    everything = caplog.text + printed.out + printed.err
    assert "failed" in everything  # the logs are looked at
    assert "canary" not in everything
    assert gateway.key not in everything


def _explode(messages: Any, *others: Any, **owner: Any) -> int:
    raise RuntimeError(f"cannot count {messages}")
