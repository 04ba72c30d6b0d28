"""What a slow or hostile node, and a buyer who does not read, cannot do to a gateway and to the others."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import nats.errors
import psutil
import pytest
from fabric_parts import (
    NodeKey,
    Prices,
    SpeakingNode,
    a_request,
    connect,
    delta,
    enrolled,
    eventually,
    fabric_settings,
    knock,
)
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.fabric import callout, permissions, sessions
from marketplace.fabric.errors import TooMuchHeld
from marketplace.fabric.node_client import Limits
from marketplace.platform.database import transaction
from marketplace.platform.embedded_nats import EmbeddedNats
from marketplace.routing.service import FabricService
from node_agent import protocol
from node_agent.protocol import Accepted, ChoiceDelta, Delta, End, NodeId

MIB = 1024 * 1024


@pytest.fixture
async def service(
    nats_server: EmbeddedNats, database_url: str, engine: AsyncEngine
) -> AsyncIterator[FabricService]:
    service = FabricService(fabric_settings(nats_server, database_url), engine, Prices())
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def a_node(engine: AsyncEngine, server: EmbeddedNats) -> tuple[NodeKey, SpeakingNode]:
    key = NodeKey()
    node = SpeakingNode(await enrolled(engine, key), await connect(server, key))
    await node.start()
    return key, node


async def answers(service: FabricService, node: SpeakingNode, deltas: int) -> float:
    """Let `node` answer one request in full; give the seconds it took."""
    began = time.monotonic()
    async with service.nodes.request(node.node_id, a_request(credit=deltas + 1)) as reply:
        _, subject = await node.taken()
        await node.say(subject, Accepted(0), *(delta(seq) for seq in range(1, deltas + 1)), End(deltas + 1))
        assert len([frame async for frame in reply]) == deltas + 2
    return time.monotonic() - began


# -- what NATS permits


async def test_a61_a_node_answers_only_so_often_and_so_long_where_it_was_asked(
    nats_server: EmbeddedNats, database_url: str, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The permission to answer is NATS' own: by count and by time, and it is used up."""

    def short(node: NodeId) -> dict[str, object]:
        return {**permissions.node_permissions(node), "resp": {"max": 3, "ttl": 500_000_000}}

    monkeypatch.setattr(callout, "node_permissions", short)
    service = FabricService(fabric_settings(nats_server, database_url), engine, Prices())
    await service.start()
    key, refused = NodeKey(), list[Exception]()
    node = SpeakingNode(await enrolled(engine, key), await connect(nats_server, key, refused))
    try:
        await node.start()
        async with service.nodes.request(node.node_id, a_request()):
            _, subject = await node.taken()
            await node.say(subject, Accepted(0), delta(1), delta(2))
            await node.client.flush()
            assert refused == []
            await node.say(subject, delta(3))
            await eventually(lambda: len(refused) == 1)
        async with service.nodes.request(node.node_id, a_request()):
            _, subject = await node.taken()
            await asyncio.sleep(1)
            await node.say(subject, Accepted(0))
            await eventually(lambda: len(refused) == 2)
    finally:
        await node.client.close()
        await service.stop()
    assert all("permissions violation" in str(error).lower() for error in refused)


def test_the_permission_to_answer_covers_the_longest_answer_and_no_more() -> None:
    allowed = permissions.node_permissions(NodeId("n-1"))["resp"]
    shortest = len(protocol.encode(delta(1000, "x")))
    assert allowed["max"] >= protocol.REPLY_BYTES_MAX // shortest
    assert protocol.WALL_MS_MAX < allowed["ttl"] / 1e6 < 2 * protocol.WALL_MS_MAX


# -- hostile nodes


async def flood(node: SpeakingNode, subject: str, payload: bytes) -> None:
    """Publish as fast as the server takes it, until cut off."""
    with contextlib.suppress(nats.errors.Error, OSError):  # cut off, in whatever way the client notices
        while node.client.is_connected:
            for _ in range(50):
                await node.client.publish(subject, payload)
            await node.client.flush()


@pytest.mark.parametrize("where", ["reply", "status"])
async def test_a62_a_node_that_floods_is_cut_off_and_barred(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats, where: str
) -> None:
    key, node = await a_node(engine, nats_server)
    _, honest = await a_node(engine, nats_server)
    await service._reload()
    if where == "reply":
        async with service.nodes.request(node.node_id, a_request()):
            _, subject = await node.taken()
    else:
        subject = protocol.status_subject(node.node_id)
    before = psutil.Process().memory_info().rss
    flooding = asyncio.create_task(flood(node, subject, b"x" * protocol.FRAME_BYTES_MAX))
    try:
        took_s = await eventually(lambda: node.client.is_closed, within_s=10)
        assert took_s < 5
        assert await answers(service, honest, 50) < 3
        gc.collect()
        assert psutil.Process().memory_info().rss - before < 150 * MIB
        assert "Authorization Violation" in await knock(nats_server.url, key.answer)
        assert service.is_connected
        async with transaction(engine) as connection:
            rows = (await connection.execute(text("SELECT node_id, kind FROM node_offences"))).all()
        assert {(row.node_id, row.kind) for row in rows} == {(node.node_id, "flood")}
    finally:
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        await honest.client.close()
        await node.client.close()


async def test_a_barred_node_may_come_back_later(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "BARRED_S", 1)
    key, node = await a_node(engine, nats_server)
    assert await service._sessions.expel(node.node_id)
    await eventually(lambda: node.client.is_closed)
    assert "Authorization Violation" in await knock(nats_server.url, key.answer)
    await asyncio.sleep(1.1)
    assert await knock(nats_server.url, key.answer) == "PONG"
    assert not await service._sessions.expel(NodeId("n-unknown"))


async def test_answers_nobody_reads_are_bounded_for_the_whole_gateway(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats
) -> None:
    """Buyers who do not read and a node that sends all it may: the longest answers are given up."""
    service.nodes.limits = replace(Limits(), held_bytes=16 * MIB)
    _, node = await a_node(engine, nats_server)
    long = "x" * 250_000
    before, given_up, read = psutil.Process().memory_info().rss, 0, 0
    async with contextlib.AsyncExitStack() as stack:
        replies = []
        for _ in range(6):
            reply = await stack.enter_async_context(service.nodes.request(node.node_id, a_request(credit=40)))
            replies.append(reply)
            _, subject = await node.taken()
            await node.say(subject, Accepted(0))
            for seq in range(1, 31):
                await node.say(subject, Delta(seq, [ChoiceDelta(content=long)]))
            await node.client.flush()
        await asyncio.sleep(0.3)
        assert service.nodes.held_bytes <= 16 * MIB
        assert psutil.Process().memory_info().rss - before < 100 * MIB
        for reply in replies:
            try:
                read += len(await reply.batch())
            except TooMuchHeld as error:
                given_up += error.had_delta and not error.blames_node
        assert (given_up, read) == (4, 2 * 31)
    assert service.nodes.held_bytes == 0
    await node.client.close()


async def test_a_buyer_who_reads_slowly_never_slows_another(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats
) -> None:
    """Twenty answers stand still, their readers gone for coffee; one more is read as fast as ever."""
    _, node = await a_node(engine, nats_server)
    alone_s = min([await answers(service, node, 500) for _ in range(3)])
    unread = set()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(service.nodes.request(node.node_id, a_request(credit=64)))
            request, subject = await node.taken()
            unread.add(request.id)
            await node.say(subject, Accepted(0), *(delta(seq) for seq in range(1, 65)))
        beside_s = min([await answers(service, node, 500) for _ in range(3)])
    assert beside_s < 2 * alone_s + 0.1
    granted = {control.id for control in node.controls if isinstance(control, protocol.Credit)}
    assert unread.isdisjoint(granted), "nobody read, so nothing more may be sent"
    await node.client.close()
