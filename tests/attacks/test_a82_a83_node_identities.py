"""A82, A83: a stolen enrolment token, a copied key, and a node whose clock is wrong.

Connections and their proofs one by one: tests/integration/test_fabric_nats.py; enrolment over HTTP:
tests/integration/test_fabric_routes.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from fabric_parts import (
    SECRET,
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
from marketplace.fabric.errors import RequestBroken
from marketplace.fabric.node_client import Limits
from marketplace.platform.database import transaction
from marketplace.platform.embedded_nats import EmbeddedNats
from marketplace.routing.service import FabricService
from node_agent import protocol
from node_agent.protocol import Accepted, End, NodeId, ProofInvalidError


@pytest.fixture
async def service(
    nats_server: EmbeddedNats, database_url: str, engine: AsyncEngine
) -> AsyncIterator[FabricService]:
    limits = Limits(accept_ms=800, first_token_ms=1_200, idle_ms=800, wall_ms=3_000)
    settings = fabric_settings(nats_server, database_url)
    service = FabricService(settings, engine, Prices(), limits=limits)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def present(engine: AsyncEngine, token: str, key: NodeKey, *, skew: timedelta = timedelta()) -> NodeId:
    now = datetime.now(UTC)
    time_ms = int((now + skew).timestamp() * 1000)
    async with transaction(engine) as connection:
        found = await enrolment.enroll(
            connection, secret=SECRET.encode(), request=key.enroll_request(token, time_ms=time_ms), now=now
        )
    return found.node_id


async def a_token(engine: AsyncEngine, operator: UUID) -> str:
    async with transaction(engine) as connection:
        token, _ = await enrolment.make_token(
            connection, secret=SECRET.encode(), operator_id=operator, now=datetime.now(UTC)
        )
    return token


async def test_a82_a_thief_of_a_token_is_seen_and_put_out_and_gains_no_other_identity(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats
) -> None:
    """The thief came first: the operator's own agent is refused, so he learns of it and revokes the thief."""
    operator, thief, own = await an_operator(engine), NodeKey(), NodeKey()
    token = await a_token(engine, operator)
    stolen = await present(engine, token, thief)
    with pytest.raises(enrolment.TokenRefused):
        await present(engine, token, own)
    client = await connect(nats_server, thief)
    try:
        async with transaction(engine) as connection:
            assert await enrolment.revoke(
                connection, operator_id=operator, node_id=stolen, now=datetime.now(UTC)
            )
        assert await eventually(lambda: client.is_closed) < 5
    finally:
        await client.close()
    assert "Authorization Violation" in await knock(nats_server.url, thief.answer)
    fresh = await present(engine, await a_token(engine, operator), own)
    assert fresh != stolen
    assert await knock(nats_server.url, own.answer) == "PONG"


async def test_a82_of_a_copied_key_one_session_lives_and_no_answer_is_mixed(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats
) -> None:
    """A copy of the key takes the node's place; what the first session was answering fails unmixed."""
    key = NodeKey()
    node_id = await enrolled(engine, key)
    first = SpeakingNode(node_id, await connect(nats_server, key))
    await first.start()
    async with service.nodes.request(node_id, a_request()) as reply:
        _, subject = await first.taken()
        await first.say(subject, Accepted(0), delta(1))
        await first.client.flush()
        copy = SpeakingNode(node_id, await connect(nats_server, key))
        await eventually(lambda: first.client.is_closed)
        await copy.start()
        errors: list[Exception] = []
        copy.client._error_cb = _noting(errors)
        await copy.say(subject, delta(2), End(3))  # it was never asked: NATS does not let it answer
        await copy.client.flush()
        await eventually(lambda: len(errors) == 2)
        assert [await anext(reply), await anext(reply)] == [Accepted(0), delta(1)]
        with pytest.raises(RequestBroken):
            await anext(reply)
    await copy.client.close()
    await first.client.close()


def _noting(errors: list[Exception]):  # type: ignore[no-untyped-def]
    async def note(error: Exception) -> None:
        errors.append(error)

    return note


@pytest.mark.parametrize("skew_s", [-31, 31, 86_400])
async def test_a83_a_proof_from_another_time_is_refused(engine: AsyncEngine, skew_s: int) -> None:
    operator = await an_operator(engine)
    token = await a_token(engine, operator)
    with pytest.raises(ProofInvalidError, match="clocks differ"):
        await present(engine, token, NodeKey(), skew=timedelta(seconds=skew_s))
    assert await present(engine, token, NodeKey(), skew=timedelta(seconds=29)), "the token is not spent"


async def test_a83_only_our_time_counts_for_presence(
    service: FabricService, engine: AsyncEngine, nats_server: EmbeddedNats
) -> None:
    """A node a year ahead is heard now, and a year of silence is still 60 s of ours."""
    key = NodeKey()
    node = SpeakingNode(await enrolled(engine, key), await connect(nats_server, key))
    await service._reload()
    ahead_ms = int((time.time() + 365 * 86_400) * 1000)
    model = protocol.ModelStatus("m", context=2048, price_in=1, price_out=2, capacity=4)
    status = protocol.Status(1, node.node_id, 0, ahead_ms, "t", is_draining=False, models=[model])
    try:
        await node.say(protocol.status_subject(node.node_id), status)  # type: ignore[arg-type]
        await node.client.flush()
        await eventually(lambda: bool(service.registry.views("m")))
        (view,) = service.registry.views("m")
        assert abs(view.last_seen_ms - service.registry.now_ms) < 5_000
        later = service.registry.now_ms + protocol.NODE_SILENT_MS_MAX + 1
        service.registry._clock_ms = lambda: later
        assert service.registry.live(node.node_id) is None
        service.registry.expire()
        assert not service.registry.views("m")
    finally:
        await node.client.close()
    await asyncio.sleep(0)
