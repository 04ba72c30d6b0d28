"""Idempotency keys on a real gateway: sent twice, served once, billed once (B9)."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from fabric_parts import eventually
from gateway_parts import (
    DOLLAR,
    HELLO,
    STREAM,
    Reply,
    RunningGateway,
    StubNode,
    another_gateway,
    running_gateway,
    said,
    saying,
    whole,
)
from sqlalchemy import text

from marketplace.gateway import idempotency
from marketplace.platform.embedded_nats import EmbeddedNats
from node_agent import protocol
from node_agent.protocol import Accepted, Delta, Failed, FailureCode

KEY = {"Idempotency-Key": "order-1"}


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


async def _charged(gateway: RunningGateway) -> list[int]:
    return [row["cost_nano"] for row in await gateway.usage() if row["cost_nano"]]


def _code(answer: httpx.Response) -> str:
    code: str = answer.json()["error"]["code"]
    return code


def _answering_after(*may_end: asyncio.Event) -> Reply:
    """The first request is answered after the first event, and so on."""
    nth = itertools.count()

    async def answer(node: StubNode, request: protocol.Request, reply: str) -> None:
        await may_end[next(nth)].wait()
        await saying(["Hello"])(node, request, reply)

    return answer


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["whole", "stream"])
async def test_a_repeated_request_gets_the_first_answer_to_the_byte(
    gateway: RunningGateway, body: dict[str, Any]
) -> None:
    node = await gateway.add_node(saying(["Hello", " there", "!"]))
    first = await gateway.chat(body, **KEY)
    again = await gateway.chat(body, **KEY)
    assert first.status_code == again.status_code == 200
    assert again.content == first.content
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-tollway-request-id"] == first.headers["x-tollway-request-id"]
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert len(node.requests) == 1
    assert len(await gateway.usage()) == 1
    await gateway.assert_proved()


async def test_without_a_key_or_with_another_each_request_is_its_own(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["Hello"]))
    for headers in ({}, {}, KEY, {"Idempotency-Key": "order-2"}):
        assert (await gateway.chat(HELLO, **headers)).status_code == 200
    assert len(node.requests) == 4


async def test_a_request_sent_while_the_first_runs_waits_for_its_answer(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["Hello", " there"], pause_s=0.3))
    first, second = await asyncio.gather(gateway.chat(HELLO, **KEY), gateway.chat(HELLO, **KEY))
    assert first.content == second.content
    assert len(node.requests) == 1
    assert len(await _charged(gateway)) == 1


async def test_who_waits_too_long_is_told_to_come_again(gateway: RunningGateway) -> None:
    gateway.process.idempotency._wait_s = 0.3
    may_end = asyncio.Event()
    node = await gateway.add_node(_answering_after(may_end))
    first = asyncio.create_task(gateway.chat(HELLO, **KEY))
    await eventually(lambda: bool(node.requests))
    second = await gateway.chat(HELLO, **KEY)
    may_end.set()
    assert (second.status_code, _code(second)) == (409, "idempotency_in_progress")
    assert second.headers["retry-after"]
    assert (await first).status_code == 200


async def test_a_refusal_frees_the_key(gateway: RunningGateway) -> None:
    assert (await gateway.chat(HELLO, **KEY)).status_code == 503  # no node yet
    await gateway.add_node(saying(["Hello"]))
    answer = await gateway.chat(HELLO, **KEY)
    assert answer.status_code == 200
    assert "idempotent-replayed" not in answer.headers


async def test_an_answer_cut_short_is_told_and_not_billed_again(gateway: RunningGateway) -> None:
    async def dies(node: StubNode, request: protocol.Request, reply: str) -> None:
        await node.send(reply, Accepted(0))
        await node.send(reply, Delta(1, [said("abc")]))
        await node.send(reply, Failed(2, FailureCode.ENGINE_DOWN, "gone", is_retriable=True))

    node = await gateway.add_node(dies)
    assert "node_failed" in (await gateway.chat(STREAM, **KEY)).text
    (row,) = await gateway.usage()
    again = await gateway.chat(STREAM, **KEY)
    assert (again.status_code, _code(again)) == (409, "idempotency_response_lost")
    assert row["id"] in again.json()["error"]["message"]
    assert len(node.requests) == 1
    assert len(await _charged(gateway)) == 1


async def test_a_charge_whose_answer_could_not_be_kept_is_not_repeated(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway dies between charge and keeping: the claim lapses, and the charge is found."""
    node = await gateway.add_node(saying(["Hello"]))

    async def nothing(*_: object) -> None:
        """What a dead gateway does."""

    with monkeypatch.context() as patch:
        patch.setattr(idempotency.Idempotency, "_end", nothing)
        await gateway.chat(HELLO, **KEY)
    gateway.process.idempotency._running.clear()
    await _let_claims_lapse(gateway)
    again = await gateway.chat(HELLO, **KEY)
    assert (again.status_code, _code(again)) == (409, "idempotency_response_lost")
    assert len(node.requests) == 1
    assert len(await _charged(gateway)) == 1


async def _let_claims_lapse(gateway: RunningGateway, seconds: int = 1) -> None:
    lapse = text("UPDATE idempotency SET alive_until = now() - :seconds * interval '1 second'")
    async with gateway.owner.begin() as connection:
        await connection.execute(lapse, {"seconds": seconds})


@pytest.mark.parametrize("faster", ["the heir", "the ghost"])
@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["whole", "stream"])
async def test_who_takes_over_from_a_dead_gateway_keeps_the_request_id(
    gateway: RunningGateway, faster: str, body: dict[str, Any]
) -> None:
    """So that the two together cannot charge twice: the request's id is the charge's key."""
    events = asyncio.Event(), asyncio.Event()
    node = await gateway.add_node(_answering_after(*events))
    ghosts = asyncio.create_task(gateway.chat(body, **KEY))  # paused and not dead, which nobody can tell
    await eventually(lambda: bool(node.requests))
    async with another_gateway(gateway) as heir:
        await _let_claims_lapse(gateway)
        heirs = asyncio.create_task(heir.chat(body, **KEY))
        await eventually(lambda: len(node.requests) == 2)
        assert len({request.id for request in node.requests}) == 1
        (first, may_first), (last, may_last) = zip((ghosts, heirs), events, strict=True)
        if faster == "the heir":
            (first, may_first), (last, may_last) = (last, may_last), (first, may_first)
        may_first.set()
        answer = await first
        may_last.set()
        assert "idempotency_overtaken" in (await last).text
        assert (answer.status_code, "Hello" in answer.text) == (200, True)
        assert len(await _charged(gateway)) == 1
        again = await heir.chat(body, **KEY)
        if faster == "the heir":
            assert (again.content, again.headers["idempotent-replayed"]) == (answer.content, "true")
        else:  # whose answer was not kept: the key was no longer its own
            assert (again.status_code, _code(again)) == (409, "idempotency_response_lost")
        assert len(node.requests) == 2
        await heir.assert_proved()
    await gateway.assert_proved()


async def test_a_receipt_says_nothing_of_the_answer_of_a_gateway_that_died_before_it_charged(
    gateway: RunningGateway,
) -> None:
    """It had noted the hashes of its answer, which are noted before the charge, under the same id."""
    may_end = asyncio.Event(), asyncio.Event()
    node = await gateway.add_node(_answering_after(*may_end))
    ghosts = asyncio.create_task(gateway.chat(HELLO, **KEY))
    await eventually(lambda: bool(node.requests))
    request_id = UUID(node.requests[0].id)
    note = (
        "INSERT INTO receipts (id, request_sha256, response_sha256, counted_on) VALUES (:id, :hash, :hash, 0)"
    )
    async with gateway.owner.begin() as connection:
        await connection.execute(text(note), {"id": request_id, "hash": b"g" * 32})
    async with another_gateway(gateway) as heir:
        await _let_claims_lapse(gateway)
        heir.process.idempotency._wait_s = 0.3
        early = await heir.chat(HELLO, **KEY)  # the answer's gateway may still be charging it
        assert (early.status_code, _code(early)) == (409, "idempotency_in_progress")
        await _let_claims_lapse(gateway, seconds=idempotency.DOUBT_S + 1)
        may_end[1].set()
        assert (await heir.chat(HELLO, **KEY)).status_code == 200
        async with gateway.owner.connect() as connection:
            noted = await connection.execute(text("SELECT id, response_sha256 FROM receipts"))
            ((found, response_sha256),) = noted.all()
        assert found == request_id
        assert bytes(response_sha256) != b"g" * 32
        may_end[0].set()
        await ghosts
        await heir.assert_proved()


async def test_a_gateway_does_not_take_over_from_itself(gateway: RunningGateway) -> None:
    """The database was away for long: no claim was kept alive, but the first request still runs here."""
    may_end = asyncio.Event()
    node = await gateway.add_node(_answering_after(may_end))
    first = asyncio.create_task(gateway.chat(HELLO, **KEY))
    await eventually(lambda: bool(node.requests))
    await _let_claims_lapse(gateway)
    second = asyncio.create_task(gateway.chat(HELLO, **KEY))
    await eventually(lambda: gateway.process.idempotency._waiting == 1 or second.done())
    may_end.set()
    answers = await asyncio.gather(first, second)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content
    assert len(node.requests) == 1
    assert len(await _charged(gateway)) == 1
    await gateway.assert_proved()


async def test_kept_answers_have_an_end_and_a_limit(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await gateway.add_node(whole(said("abc", finish="stop")))
    assert (await gateway.chat(HELLO, **KEY)).status_code == 200
    monkeypatch.setattr(idempotency, "BUYER_BYTES_MAX", 10)
    other = {"Idempotency-Key": "order-2"}
    assert (await gateway.chat(HELLO, **other)).status_code == 200
    assert _code(await gateway.chat(HELLO, **other)) == "idempotency_response_lost"
    async with gateway.owner.begin() as connection:
        await connection.execute(text("UPDATE idempotency SET expires_at = now() - interval '1 second'"))
    assert (await gateway.chat(HELLO, **KEY)).status_code == 200  # a day later it is a new request
    assert len(node.requests) == 3
    assert await idempotency.drop_expired(gateway.process.engine) == 1


async def test_keys_are_visible_characters(gateway: RunningGateway) -> None:
    for key in ("x" * 256, "a b", ""):
        answer = await gateway.chat(HELLO, **{"Idempotency-Key": key})
        assert (answer.status_code, _code(answer)) == (400, "invalid_idempotency_key")


async def test_a_stream_the_buyer_left_is_told_as_cut_short(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["a"] * 40, pause_s=0.05))
    async with (
        httpx.AsyncClient(base_url=gateway.url, headers={**gateway.headers, **KEY}) as http,
        http.stream("POST", "/v1/chat/completions", content=json.dumps(STREAM)) as answer,
    ):
        async for _ in answer.aiter_lines():
            break
    assert (await gateway.only_row())["status"] == 499
    again = await gateway.chat(STREAM, **KEY)
    assert (again.status_code, _code(again)) == (409, "idempotency_response_lost")
