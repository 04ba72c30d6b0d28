"""Operators who say more than they did, and buyers who leave before the bill."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from gateway_parts import (
    DOLLAR,
    HELLO,
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

from marketplace.fabric.node_client import Limits
from marketplace.fabric.node_ids import node_uuid
from marketplace.ledger.money import cost
from marketplace.platform.embedded_nats import EmbeddedNats
from node_agent import protocol
from node_agent.protocol import Accepted, ChoiceDelta, Delta, End, Failed, FailureCode, Heartbeat


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


def _priced(completion: int) -> int:
    tokens_in = prompt_tokens("Hi")
    return cost(tokens_in=tokens_in, tokens_out=completion, price_in=PRICE_IN, price_out=PRICE_OUT).n


async def test_a57_an_operator_who_overstates_is_billed_on_our_count(gateway: RunningGateway) -> None:
    node = await gateway.add_node(whole(said("Hello", finish="stop"), prompt=5_000, completion=5_000))
    special, high_byte = 256, said("é").token_ids[0]  # type: ignore[index]
    lies = [
        whole(said("Hello", finish="stop"), prompt=5_000, completion=5_000),
        whole(ChoiceDelta(content="Hello", token_ids=list(range(40)), finish_reason="stop"), completion=40),
        whole(said("Hello", finish="stop", token_ids=[*said("Hello").token_ids, *[special] * 30])),  # type: ignore[list-item, misc]
        whole(said("Hello", finish="stop", token_ids=[*said("Hello").token_ids, *[high_byte] * 30])),  # type: ignore[misc]
        whole(said("Hello, and more", content="Hello", finish="stop", stop_reason=",")),
        whole(said("Hello, and more", content="Hello", finish="stop", stop_reason=7)),
        whole(said("Hello" + " " * 900, content="Hello", reasoning="", finish="stop", tool_calls=[])),
        whole(said("<think>hm" + "m" * 900, content="Hello", reasoning="", finish="stop")),
    ]
    for lie in lies:
        node.answer = lie
        for body in (HELLO, STREAM):
            assert (await gateway.chat(body)).status_code == 200
    rows = await gateway.usage()
    assert [(row["completion_tokens"], row["cost_nano"]) for row in rows] == [(5, _priced(5))] * 2 * len(lies)
    await gateway.assert_proved()


async def test_a57_drift_is_on_record_for_the_nodes_standing(gateway: RunningGateway) -> None:
    """More than 2 % and 16 tokens apart, either way; a node that counts as we do leaves nothing."""
    node = await gateway.add_node(
        whole(said("Hello", finish="stop"), prompt=prompt_tokens("Hi"), completion=5)
    )
    await gateway.chat(HELLO)
    node.answer = whole(said("Hello", finish="stop"), completion=22)
    lied = (await gateway.chat(HELLO)).json()["usage"]["receipt_id"]
    node.answer = whole(said("Hello", finish="stop"), completion=21)  # 16 apart: the edges of tokenization
    await gateway.chat(HELLO)
    query = text("SELECT CAST(id AS TEXT), node, model, prompt_counted, prompt_reported, completion_counted, "
                 "completion_reported FROM metering_drift")  # fmt: skip
    async with asyncio.timeout(5):
        while True:
            async with gateway.owner.connect() as connection:
                rows = (await connection.execute(query)).all()
            if rows:
                break
            await asyncio.sleep(0.05)
    assert [tuple(row) for row in rows] == [
        (lied, node_uuid(node.node_id), "letters", prompt_tokens("Hi"), None, 5, 22)
    ]


@pytest.mark.parametrize(
    "count", [-1, 1.5, float("nan"), 2**63, "5", [5], {"a": 1}], ids=lambda count: repr(count)[:12]
)
async def test_a58_usage_that_is_no_count_is_refused(gateway: RunningGateway, count: object) -> None:
    async def answer(node: StubNode, request: protocol.Request, reply: str) -> None:
        await node.send(reply, Accepted(0))
        await node.send(reply, Delta(1, [said("Hello", finish="stop")]))
        await node.connection.publish(reply, msgspec.msgpack.encode([3, 2, count, count]))

    await gateway.add_node(answer)
    usage = (await gateway.chat(HELLO)).json()["usage"]
    assert usage["cost_nano"] == _priced(5)
    assert usage["counted_by"] == "gateway"


async def test_a58_two_usages_or_none_change_nothing(gateway: RunningGateway) -> None:
    node = await gateway.add_node(
        sending(Accepted(0), Delta(1, [said("Hello", finish="stop")]), End(2), End(3, completion_tokens=900))
    )
    assert (await gateway.chat(HELLO)).json()["usage"]["cost_nano"] == _priced(5)
    node.answer = whole(said("Hello", finish="stop"))
    assert (await gateway.chat(HELLO)).json()["usage"]["cost_nano"] == _priced(5)


async def test_a60_filler_beyond_the_limit_earns_nothing(gateway: RunningGateway) -> None:
    node = await gateway.add_node(whole(said("x" * 900, finish="length")))
    for body in (HELLO, STREAM):
        assert (await gateway.chat(body)).status_code == 200
    assert [row["cost_nano"] for row in await gateway.usage()] == [_priced(50)] * 2
    node.answer = sending(Accepted(0), Delta(1, [said("a"), said("b" * 900, index=1)]))
    refused = await gateway.chat(HELLO)  # a second choice nobody asked for
    assert refused.status_code == 503
    assert (await gateway.usage())[0]["cost_nano"] == 0
    await gateway.assert_proved()


async def test_a61_an_old_answer_is_not_paid_again(gateway: RunningGateway) -> None:
    replies: list[str] = []

    async def answer(node: StubNode, request: protocol.Request, reply: str) -> None:
        replies.append(reply)
        old = replies[0]
        for subject in {old, reply}:  # the second time, the first answer once more
            await node.send(subject, Accepted(0))
            await node.send(subject, Delta(1, [said("Hello", finish="stop")]))
            await node.send(subject, End(2))

    node = await gateway.add_node(answer)
    for _ in range(3):
        assert (await gateway.chat(HELLO)).json()["usage"]["cost_nano"] == _priced(5)
    assert len(set(replies)) == 3
    assert len({request.id for request in node.requests}) == 3
    rows = await gateway.usage()
    assert [row["cost_nano"] for row in rows] == [_priced(5)] * 3
    await gateway.assert_proved()


async def test_a62_endless_slow_and_oversized_answers_end(gateway: RunningGateway) -> None:
    gateway.process.fabric.nodes.limits = Limits(
        accept_ms=300, first_token_ms=600, idle_ms=600, wall_ms=2_000
    )
    beats = [Heartbeat(seq) for seq in range(1, 30)]
    floods = [Delta(seq, [said("x")]) for seq in range(1, protocol.CREDIT_DEFAULT * 3)]
    died = Failed(0, FailureCode.INTERNAL, "ab", is_retriable=True)
    node = await gateway.add_node(sending())
    unbegun = {
        "never accepts": sending(),
        "never begins": sending(Accepted(0), *beats, pause_s=0.05),
        "too large a frame": sending(Accepted(0), Delta(1, [ChoiceDelta(content="x" * 300_000)])),
        "no frame": _publishing(b"\xc1" * 10),
        "a bomb": _publishing(b"\xdd\xff\xff\xff\xff" * 8),
        "not UTF-8": _publishing(protocol.encode(died).replace(b"ab", b"\xff\xfe")),
        "a crowd of nothing": sending(Accepted(0), Delta(1, [ChoiceDelta()] * 10_000)),
    }
    for name, behaviour in unbegun.items():
        node.answer = behaviour
        _forgive(gateway)
        async with asyncio.timeout(5):
            answer = await gateway.chat(STREAM)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "nodes_failed"), name
    begun = {
        "falls silent": sending(Accepted(0), Delta(1, [said("Hello")])),
        "drips for ever": sending(
            Accepted(0), Delta(1, [said("Hello")]), *(Heartbeat(seq) for seq in range(2, 60)), pause_s=0.2
        ),
        "ignores credit": sending(Accepted(0), *floods),
        "skips a frame": sending(Accepted(0), Delta(1, [said("Hello")]), Delta(3, [said("!")])),
    }
    for name, behaviour in begun.items():
        node.answer = behaviour
        _forgive(gateway)
        async with asyncio.timeout(8):
            answer = await gateway.chat({**STREAM, "max_tokens": 1_000})
        assert '"node_failed"' in answer.text, name
        row = (await gateway.usage())[0]
        assert row["status"] == 502
        assert 5 <= row["completion_tokens"] < 3 * protocol.CREDIT_DEFAULT
    await gateway.assert_proved()


def _publishing(payload: bytes) -> Any:
    async def answer(node: StubNode, request: protocol.Request, reply: str) -> None:
        await node.connection.publish(reply, payload)

    return answer


def _forgive(gateway: RunningGateway) -> None:
    """Forget the node's failures, so that it is asked again."""
    for node in gateway.process.fabric.registry._nodes.values():
        for offer in node.offers.values():
            offer.health = type(offer.health)()
            offer.view = None


async def test_a63_a_node_that_dies_in_mid_stream_is_paid_for_what_was_delivered(
    gateway: RunningGateway,
) -> None:
    died = Failed(2, FailureCode.ENGINE_DOWN, "crash", is_retriable=True)
    await gateway.add_node(sending(Accepted(0), Delta(1, [said("Hel")]), died))
    answer = await gateway.chat(STREAM)
    assert answer.status_code == 200
    assert '"content":"Hel"' in answer.text
    assert '"node_failed"' in answer.text
    assert "[DONE]" not in answer.text
    row = await gateway.only_row()
    assert (row["status"], row["completion_tokens"], row["cost_nano"]) == (502, 3, _priced(3))
    await gateway.assert_proved()


async def test_a64_a_buyer_who_leaves_stops_the_node_and_pays_for_what_came(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["a"] * 200, pause_s=0.02))
    async with (
        httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers) as http,
        http.stream("POST", "/v1/chat/completions", json={**STREAM, "max_tokens": 500}) as answer,
    ):
        received = 0
        async for line in answer.aiter_lines():
            received += '"content":"a"' in line
            if received == 5:
                break
    row = await gateway.only_row()
    assert row["status"] == 499
    assert 5 <= row["completion_tokens"] < 200
    assert row["cost_nano"] == _priced(row["completion_tokens"])
    assert node.cancelled == [node.requests[0].id]
    await gateway.assert_proved()


async def test_a64_leaving_before_anything_came_costs_nothing(gateway: RunningGateway) -> None:
    node = await gateway.add_node(sending(Accepted(0)))
    with pytest.raises(httpx.ReadTimeout):
        async with httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers, timeout=0.5) as http:
            await http.post("/v1/chat/completions", json=HELLO)
    row = await gateway.only_row()
    assert (row["status"], row["cost_nano"]) == (499, 0)
    assert node.cancelled == [node.requests[0].id]
    await gateway.assert_proved()
