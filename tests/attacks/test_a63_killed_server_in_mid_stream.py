"""A63 beyond a dying node: the NATS server itself is killed in mid-stream, and comes back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from gateway_parts import DOLLAR, HELLO, MODEL, STREAM, RunningGateway, StubNode, running_gateway

from marketplace.platform.embedded_nats import EmbeddedNats
from node_agent import protocol
from node_agent.protocol import Accepted, ChoiceDelta, Delta, End


@pytest.fixture
async def gateway(
    database_url: str, own_nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, own_nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


async def test_a63_a_killed_nats_server_ends_streams_honestly_and_is_forgotten(
    gateway: RunningGateway, own_nats_server: EmbeddedNats
) -> None:
    """The buyer is told and pays for what came; once the server is back, nobody need do anything."""
    may_end = asyncio.Event()

    async def answer(node: StubNode, request: protocol.Request, reply: str) -> None:
        await node.send(reply, Accepted(0))
        await node.send(reply, Delta(1, [ChoiceDelta(content="Hello", token_ids=[1, 2, 3, 4, 5])]))
        await may_end.wait()
        await node.send(reply, Delta(2, [ChoiceDelta(content="!", token_ids=[6], finish_reason="stop")]))
        await node.send(reply, End(3))

    node = await gateway.add_node(answer)
    async with (
        httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers, timeout=30) as http,
        http.stream("POST", "/v1/chat/completions", content=json.dumps(STREAM)) as stream,
    ):
        lines = stream.aiter_lines()
        assert "Hello" in await anext(lines)
        assert own_nats_server.pid is not None
        os.kill(own_nats_server.pid, signal.SIGKILL)
        rest = "\n".join([line async for line in lines])
    assert '"error"' in rest
    assert "[DONE]" not in rest
    row = await gateway.only_row()
    assert row["status"] == 502
    assert row["cost_nano"] > 0

    refused = await gateway.chat(HELLO)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0

    own_nats_server.stop()
    own_nats_server.start()
    may_end.set()
    async with asyncio.timeout(20):
        seq = 1_000
        while not (gateway.process.fabric.is_connected and gateway.process.fabric.registry.views(MODEL)):
            seq += 1
            await node.say_status(seq)
            await asyncio.sleep(0.2)
        while (answered := await gateway.chat(HELLO)).status_code != 200:
            await asyncio.sleep(0.2)
    assert answered.json()["choices"][0]["message"]["content"] == "Hello!"
    await gateway.assert_proved()
