"""The fabric on a real nats-server: who may connect, what he may do, and how a reply travels."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import nats
import nats.aio.client
import nats.aio.msg
import nats.errors
import pytest
import uvloop
from fabric_parts import (
    NodeKey,
    Prices,
    SpeakingNode,
    a_request,
    an_operator,
    connect,
    delta,
    enrolled,
    eventually,
    fabric_settings,
    knock,
)
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.fabric import enrolment
from marketplace.fabric.connection import Connection
from marketplace.fabric.errors import (
    ConnectionLost,
    FabricUnavailable,
    NodeAbsent,
    NodeFailed,
    NodeSilent,
    ProtocolBroken,
)
from marketplace.fabric.node_client import Limits, NodeClient, Reply
from marketplace.platform import embedded_nats
from marketplace.platform.database import transaction
from marketplace.platform.embedded_nats import EmbeddedNats
from marketplace.platform.processes import free_port
from marketplace.platform.settings import Settings
from marketplace.routing.service import FabricService
from node_agent import protocol
from node_agent.protocol import Accepted, Delta, End, Failed, FailureCode, Heartbeat, NodeId

SHORT = Limits(accept_ms=800, first_token_ms=1_200, idle_ms=800, wall_ms=2_000)


# -- servers and people


@pytest.fixture
def settings(nats_server: EmbeddedNats, database_url: str) -> Settings:
    return fabric_settings(nats_server, database_url)


@pytest.fixture
async def service(settings: Settings, engine: AsyncEngine) -> AsyncIterator[FabricService]:
    service = FabricService(settings, engine, Prices())
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


# -- who may connect


async def test_an_enrolled_key_connects_and_an_unknown_one_does_not(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats
) -> None:
    key = NodeKey()
    await enrolled(engine, key)
    assert await knock(nats_server.url, key.answer) == "PONG"
    assert "Authorization Violation" in await knock(nats_server.url, NodeKey().answer)


async def test_nobody_connects_without_a_key_or_with_a_guessed_password(
    service: FabricService, nats_server: EmbeddedNats
) -> None:
    for options in ({}, {"user": "marketplace", "pass": "guess"}, {"auth_token": "guess"}):
        assert "Authorization Violation" in await knock(nats_server.url, lambda _nonce, o=options: dict(o))


async def test_a82_a_recorded_signature_does_not_open_a_second_connection(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats
) -> None:
    key = NodeKey()
    await enrolled(engine, key)
    recorded: dict[str, object] = {}

    def record(nonce: str) -> dict[str, object]:
        recorded.update(key.answer(nonce))
        return recorded

    assert await knock(nats_server.url, record) == "PONG"
    assert "Authorization Violation" in await knock(nats_server.url, lambda _nonce: recorded)


async def test_a82_another_nodes_public_key_does_not_help(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats
) -> None:
    known, unknown = NodeKey(), NodeKey()
    await enrolled(engine, known)
    stolen = lambda nonce: {**unknown.answer(nonce), "nkey": known.public_key}  # noqa: E731
    assert "Authorization Violation" in await knock(nats_server.url, stolen)


# -- what a node may do


async def test_a_node_can_neither_hear_another_node_nor_speak_for_it(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats
) -> None:
    one, two = NodeKey(), NodeKey()
    node_one, node_two = await enrolled(engine, one), await enrolled(engine, two)
    errors: list[Exception] = []
    client = await connect(nats_server, one, errors)
    heard: list[nats.aio.msg.Msg] = []

    async def hear(message: nats.aio.msg.Msg) -> None:
        heard.append(message)

    try:
        await client.subscribe(f"node.{node_one}.request", cb=hear)
        await client.flush()
        assert errors == []
        forbidden = [f"node.{node_two}.request", "node.*.request", ">", "status.*", "reply.>", "_INBOX.>"]
        for subject in forbidden:
            await client.subscribe(subject, cb=hear)
        for subject in (
            f"status.{node_two}",
            "reply.gateway.1",
            f"node.{node_two}.control",
            "$SYS.x",
        ):
            await client.publish(subject, b"forged")
            forbidden.append(subject)
        await client.flush()
        await eventually(lambda: len(errors) == len(forbidden))
        assert all("permissions violation" in str(error).lower() for error in errors)
    finally:
        await client.close()


async def test_a82_a_newer_connection_of_a_node_cuts_the_older(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats
) -> None:
    key = NodeKey()
    await enrolled(engine, key)
    older = await connect(nats_server, key)
    newer = await connect(nats_server, key)
    try:
        await eventually(lambda: older.is_closed)
        assert newer.is_connected
    finally:
        await newer.close()
        await older.close()


async def test_revocation_cuts_a_live_connection_within_five_seconds_and_for_ever(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats
) -> None:
    key = NodeKey()
    operator = await an_operator(engine)
    node_id = await enrolled(engine, key, operator)
    client = await connect(nats_server, key)
    async with transaction(engine) as connection:
        assert await enrolment.revoke(
            connection, operator_id=operator, node_id=node_id, now=datetime.now(UTC)
        )
    try:
        assert await eventually(lambda: client.is_closed) < 5
    finally:
        await client.close()
    assert "Authorization Violation" in await knock(nats_server.url, key.answer)
    with pytest.raises(enrolment.KeyRefused):
        await enrolled(engine, key, operator)


# -- a reply's way


@pytest.fixture
async def node(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats
) -> AsyncIterator[SpeakingNode]:
    key = NodeKey()
    node_id = await enrolled(engine, key)
    node = SpeakingNode(node_id, await connect(nats_server, key))
    await node.start()
    try:
        yield node
    finally:
        await node.client.close()


async def read_until_error(reply: Reply, frames: list[protocol.Frame]) -> None:
    async for frame in reply:
        frames.append(frame)  # noqa: PERF401 - a comprehension would lose them when it raises


async def test_a_stream_arrives_whole_and_in_order(service: FabricService, node: SpeakingNode) -> None:
    async with service.nodes.request(node.node_id, a_request(credit=8)) as reply:

        async def serve() -> None:
            _, subject = await node.taken()
            await node.say(subject, Accepted(0))
            for number in range(100):
                if number >= 8:
                    await eventually(lambda n=number: node.credit > n)
                await node.say(subject, delta(number + 1, str(number)))
            await node.say(subject, End(101, prompt_tokens=3, completion_tokens=100))

        serving = asyncio.create_task(serve())
        frames = [frame async for frame in reply]
        await serving
    assert [type(frame) for frame in frames] == [Accepted, *[Delta] * 100, End]
    texts = [frame.choices[0].content for frame in frames if isinstance(frame, Delta)]
    assert texts == [str(number) for number in range(100)]
    assert service.nodes.in_flight == 0
    assert node.cancelled == []


async def test_frames_that_came_together_are_given_together(
    service: FabricService, node: SpeakingNode
) -> None:
    async with service.nodes.request(node.node_id, a_request()) as reply:
        _, subject = await node.taken()
        await node.say(subject, Accepted(0), delta(1), delta(2), End(3))
        await eventually(lambda: reply.is_over)
        assert len(await reply.batch()) == 4
        assert await reply.batch() == []


@pytest.mark.parametrize(
    ("frames", "before"),
    [
        pytest.param([Accepted(0), delta(1), delta(3)], 2, id="gap"),
        pytest.param([Accepted(0), delta(1), delta(1)], 2, id="duplicate"),
        pytest.param([delta(0)], 0, id="no-accepted"),
        pytest.param([Accepted(0), Accepted(1)], 1, id="accepted-twice"),
        pytest.param([Accepted(0), delta(1), delta(2), delta(3)], 3, id="above-credit"),
    ],
)
async def test_a_broken_protocol_fails_after_what_was_whole(
    service: FabricService, node: SpeakingNode, frames: list[protocol.Frame], before: int
) -> None:
    request = a_request(credit=2)
    async with service.nodes.request(node.node_id, request) as reply:
        _, subject = await node.taken()
        await node.say(subject, *frames)
        await eventually(lambda: reply.is_over)  # unread: no further credit was granted
        read: list[protocol.Frame] = []
        with pytest.raises(ProtocolBroken) as caught:
            await read_until_error(reply, read)
    assert len(read) == before
    assert caught.value.had_delta is any(isinstance(frame, Delta) for frame in read)
    assert caught.value.is_retriable is not caught.value.had_delta
    await eventually(lambda: node.cancelled == [request.id])


async def test_a62_an_oversized_or_senseless_frame_fails_the_request(
    service: FabricService, node: SpeakingNode
) -> None:
    whole = protocol.encode(delta(0, "x" * protocol.FRAME_BYTES_MAX))
    not_utf_8 = protocol.encode(Failed(0, FailureCode.INTERNAL, "ab", False)).replace(b"ab", b"\xff\xfe")
    for payload in (b"\xc1", b"x" * 100, b"", whole, not_utf_8):
        async with service.nodes.request(node.node_id, a_request()) as reply:
            _, subject = await node.taken()
            await node.client.publish(subject, payload)
            with pytest.raises(ProtocolBroken):
                async with asyncio.timeout(2):
                    await anext(reply)


async def test_a_nodes_own_failure_is_told_with_its_code(service: FabricService, node: SpeakingNode) -> None:
    async with service.nodes.request(node.node_id, a_request()) as reply:
        _, subject = await node.taken()
        await node.say(subject, Failed(0, FailureCode.OVERLOADED, "full", is_retriable=True))
        with pytest.raises(NodeFailed) as caught:
            await anext(reply)
    assert caught.value.code is FailureCode.OVERLOADED
    assert caught.value.is_retriable
    async with service.nodes.request(node.node_id, a_request()) as reply:
        _, subject = await node.taken()
        await node.say(
            subject, Accepted(0), delta(1), Failed(2, FailureCode.ENGINE_DOWN, "", is_retriable=True)
        )
        with pytest.raises(NodeFailed) as caught:
            await read_until_error(reply, [])
    assert caught.value.had_delta
    assert not caught.value.is_retriable


@pytest.mark.parametrize(
    ("frames", "limit"),
    [
        ([], "accept"),
        ([Accepted(0)], "idle"),
        ([Accepted(0), delta(1)], "idle"),
    ],
)
async def test_silence_is_an_error_that_names_its_limit(
    service: FabricService, node: SpeakingNode, frames: list[protocol.Frame], limit: str
) -> None:
    service.nodes.limits = SHORT
    request = a_request()
    async with service.nodes.request(node.node_id, request) as reply:
        _, subject = await node.taken()
        await node.say(subject, *frames)
        with pytest.raises(NodeSilent) as caught:
            await read_until_error(reply, [])
    assert caught.value.limit == limit
    await eventually(lambda: node.cancelled == [request.id])


async def test_a62_heartbeats_bridge_silence_but_neither_the_first_token_nor_the_wall(
    service: FabricService, node: SpeakingNode
) -> None:
    service.nodes.limits = SHORT
    cases = (
        (True, [Accepted(0)], "first_token"),
        (True, [Accepted(0), delta(1)], "wall"),
        (False, [Accepted(0)], "wall"),  # gathered answers come all at once
    )
    for is_stream, opening, limit in cases:
        async with service.nodes.request(node.node_id, a_request(stream=is_stream)) as reply:
            _, subject = await node.taken()
            await node.say(subject, *opening)

            async def beat(subject: str, seq: int) -> None:
                while True:
                    await node.say(subject, Heartbeat(seq))
                    seq += 1
                    await asyncio.sleep(0.05)

            beating = asyncio.create_task(beat(subject, len(opening)))
            try:
                with pytest.raises(NodeSilent) as caught:
                    await read_until_error(reply, [])
            finally:
                beating.cancel()
        assert caught.value.limit == limit


async def test_a_node_that_is_not_connected_is_known_at_once(
    service: FabricService, engine: AsyncEngine
) -> None:
    absent = await enrolled(engine, NodeKey())
    began = time.monotonic()
    async with service.nodes.request(absent, a_request()) as reply:
        with pytest.raises(NodeAbsent):
            await anext(reply)
    assert time.monotonic() - began < protocol.ACCEPT_MS_MAX / 1000 / 2


async def test_a_slow_consumer_slows_the_node(service: FabricService, node: SpeakingNode) -> None:
    async with service.nodes.request(node.node_id, a_request(credit=4)) as reply:
        _, subject = await node.taken()
        await node.say(subject, Accepted(0), delta(1), delta(2), delta(3), delta(4))
        await node.client.flush()
        await asyncio.sleep(0.2)
        assert node.credit == 0
        assert isinstance(await anext(reply), Accepted)
        await asyncio.sleep(0.05)
        assert node.credit == 0
        for _ in range(2):
            await anext(reply)
        await eventually(lambda: node.credit == 8)
        await node.say(subject, *(delta(seq) for seq in range(5, 9)), End(9))
        assert len([frame async for frame in reply]) == 7


async def test_deltas_are_passed_on_where_they_arrive_and_in_order(
    service: FabricService, node: SpeakingNode
) -> None:
    seen: list[str] = []
    is_clear = True

    def passage(frame: Delta) -> bool:
        if is_clear:
            seen.append(f"passed {frame.seq}")
        return is_clear

    async with service.nodes.request(node.node_id, a_request(credit=4)) as reply:
        reply.pass_on(passage)
        _, subject = await node.taken()
        await node.say(subject, Accepted(0), delta(1))
        await eventually(lambda: reply.had_delta)
        assert seen == [], "what was said before it waits to be read, so it waits too"
        assert [type(frame) for frame in await reply.batch()] == [Accepted, Delta]
        reading = asyncio.create_task(reply.batch())
        await node.say(subject, delta(2), delta(3))
        await eventually(lambda: seen == ["passed 2", "passed 3"])
        assert not reading.done(), "nobody is woken for what was passed on"
        await eventually(lambda: node.credit == 6)  # what was passed on makes room for more
        is_clear = False
        await node.say(subject, delta(4))
        (left,) = await reading
        assert isinstance(left, Delta)
        assert left.seq == 4
        await node.say(subject, End(5))
        assert [type(frame) for frame in await reply.batch()] == [End]
    assert node.cancelled == []


async def test_the_more_streams_the_further_apart_their_frames_are_wanted(
    service: FabricService, node: SpeakingNode
) -> None:
    assert service.nodes.frame_gap_ms == 0
    async with contextlib.AsyncExitStack() as stack:
        for at in range(600):
            request = msgspec.structs.replace(a_request(), id=f"r{at}", stream=at % 6 != 0)
            await stack.enter_async_context(service.nodes.request(NodeId("n-1"), request))
            if at == 20:
                assert service.nodes.frame_gap_ms == 0  # a shorter gap than engines have would gather nothing
            if at == 59:
                assert service.nodes.frame_gap_ms == 12  # fifty streams; whole answers do not count
        assert service.nodes.frame_gap_ms == 48
        assert service.nodes.cancel("r1")
    assert service.nodes.frame_gap_ms == 0


async def test_leaving_early_cancels_and_late_frames_are_dropped(
    service: FabricService, node: SpeakingNode
) -> None:
    request = a_request()
    async with service.nodes.request(node.node_id, request) as reply:
        _, subject = await node.taken()
        await node.say(subject, Accepted(0))
        assert isinstance(await anext(reply), Accepted)
    await eventually(lambda: node.cancelled == [request.id])
    await node.say(subject, delta(1), End(2))
    await node.client.flush()
    assert service.nodes.in_flight == 0
    assert not service.nodes.cancel(request.id)


async def test_cancel_by_request_id_ends_the_readers_loop(service: FabricService, node: SpeakingNode) -> None:
    request = a_request()
    async with service.nodes.request(node.node_id, request) as reply:
        reading = asyncio.create_task(read_until_error(reply, []))
        await node.taken()
        assert service.nodes.cancel(request.id)
        await asyncio.wait_for(reading, 5)
    await eventually(lambda: node.cancelled == [request.id])


async def test_one_node_cannot_answer_for_another(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats, node: SpeakingNode
) -> None:
    errors: list[Exception] = []
    key = NodeKey()
    await enrolled(engine, key)
    other = await connect(nats_server, key, errors)
    try:
        async with service.nodes.request(node.node_id, a_request()) as reply:
            _, subject = await node.taken()
            await other.publish(
                subject, protocol.encode(Failed(0, FailureCode.INTERNAL, "", is_retriable=False))
            )
            await other.flush()
            await eventually(lambda: len(errors) == 1)
            await node.say(subject, Accepted(0), End(1))
            assert [type(frame) async for frame in reply] == [Accepted, End]
    finally:
        await other.close()


async def test_a63_a_node_that_dies_mid_stream_is_noticed(service: FabricService, node: SpeakingNode) -> None:
    service.nodes.limits = SHORT
    async with service.nodes.request(node.node_id, a_request()) as reply:
        _, subject = await node.taken()
        await node.say(subject, Accepted(0), delta(1))
        await node.client.flush()
        await node.client.close()
        read: list[protocol.Frame] = []
        with pytest.raises(NodeSilent) as caught:
            await read_until_error(reply, read)
    assert caught.value.had_delta
    assert len(read) == 2


# -- our own connection


async def test_a_lost_server_fails_what_is_under_way_and_comes_back(
    tmp_path: Path,
) -> None:
    credentials = embedded_nats.load_or_make_credentials(tmp_path / "secrets")
    server = EmbeddedNats(tmp_path / "nats", free_port(), credentials)
    server.start()
    connection = Connection(server.url, user="marketplace", password=credentials.password, name="test")
    responder = Connection(server.url, user="marketplace", password=credentials.password, name="node")
    await connection.start()
    await responder.start()
    client = NodeClient(connection)
    client.start()
    taken: list[bytes] = []
    responder.subscribe("node.n-1.request", lambda _subject, reply, _payload: taken.append(reply))
    await responder.flush()
    try:
        async with client.request(NodeId("n-1"), a_request()) as reply:
            await eventually(lambda: len(taken) == 1)
            server.stop()
            with pytest.raises(ConnectionLost):
                await anext(reply)
        with pytest.raises(FabricUnavailable):
            client.request(NodeId("n-1"), a_request())
        server.start()
        await eventually(lambda: connection.is_connected and responder.is_connected, within_s=10)
        await responder.flush()
        async with client.request(NodeId("n-1"), a_request()) as reply:
            await eventually(lambda: len(taken) == 2)
            responder.publish(taken[1].decode(), protocol.encode(Accepted(0)))
            assert await anext(reply) == Accepted(0)
    finally:
        await client.close()
        await connection.close()
        await responder.close()
        server.stop()


def test_the_client_runs_on_the_gateways_event_loop(nats_server: EmbeddedNats) -> None:
    password = nats_server.credentials.password

    async def ask() -> list[type]:
        gateway = Connection(nats_server.url, user="marketplace", password=password, name="gateway")
        node = Connection(nats_server.url, user="marketplace", password=password, name="node")
        await gateway.start()
        await node.start()

        def answer(_subject: bytes, reply: bytes, _payload: bytes) -> None:
            for frame in (Accepted(0), delta(1), End(2)):
                node.publish(reply.decode(), protocol.encode(frame))

        node.subscribe("node.n-1.request", answer)
        await node.flush()
        client = NodeClient(gateway)
        client.start()
        try:
            async with client.request(NodeId("n-1"), a_request()) as reply:
                return [type(frame) async for frame in reply]
        finally:
            await client.close()
            await gateway.close()
            await node.close()

    assert uvloop.run(ask()) == [Accepted, Delta, End]


async def test_a_wrong_password_is_a_typed_error_in_time(nats_server: EmbeddedNats) -> None:
    connection = Connection(nats_server.url, user="marketplace", password="wrong", name="test")
    with pytest.raises(FabricUnavailable, match="marketplace"):
        await connection.start(deadline_s=1)


# -- the registry behind it


async def test_statuses_make_offers_and_revocation_ends_them(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats
) -> None:
    key = NodeKey()
    operator = await an_operator(engine)
    node_id = await enrolled(engine, key, operator)
    client = await connect(nats_server, key)

    def status(seq: int) -> bytes:
        model = protocol.ModelStatus("m", context=2048, price_in=100, price_out=200, capacity=4)
        return protocol.encode(protocol.Status(1, node_id, seq, 0, "test", is_draining=False, models=[model]))

    try:
        for seq in range(20):
            if service.registry.models():
                break
            await client.publish(f"status.{node_id}", status(seq))
            await client.flush()
            await asyncio.sleep(0.3)
        (view,) = service.registry.views("m")
        assert (view.node_id, view.operator_id, view.price_version) == (node_id, str(operator), 1)
        live = service.registry.live(node_id)
        assert live is not None
        assert live.models[0].capacity == 4
        async with transaction(engine) as connection:
            await enrolment.revoke(connection, operator_id=operator, node_id=node_id, now=datetime.now(UTC))
        assert await eventually(lambda: not service.registry.views("m")) < 5
    finally:
        await client.close()
