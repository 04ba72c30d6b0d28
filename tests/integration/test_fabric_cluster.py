"""The fabric as production runs it: behind TLS, three servers, several gateways, and one server killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
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
    make_tls,
)
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.fabric import enrolment
from marketplace.fabric.connection import Connection
from marketplace.fabric.errors import FabricError, FabricUnavailable
from marketplace.platform.database import transaction
from marketplace.platform.embedded_nats import EmbeddedNats, load_or_make_credentials
from marketplace.platform.nats_configuration import Cluster, Tls
from marketplace.platform.processes import free_port
from marketplace.routing.service import FabricService
from node_agent.protocol import Accepted, End

# -- a cluster


@dataclass
class Three:
    """Three nats-servers that are one fabric, behind TLS."""

    servers: list[EmbeddedNats]
    tls: Tls

    @property
    def urls(self) -> str:
        return ",".join(server.url for server in self.servers)

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.tls.ca)


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Three]:
    tls, credentials = make_tls(tmp_path / "tls"), load_or_make_credentials(tmp_path / "secrets")
    listens = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    servers = [
        EmbeddedNats(
            tmp_path / f"nats-{at}", free_port(), credentials, tls=tls,
            cluster=Cluster("test", listen, tuple(other for other in listens if other != listen), "p" * 20),
        )
        for at, listen in enumerate(listens)
    ]  # fmt: skip
    for server in servers:
        server.start()
    yield Three(servers, tls)
    for server in servers:
        server.stop()


async def gateways_on(three: Three, database_url: str, engine: AsyncEngine) -> list[FabricService]:
    """Give three gateways, each dialling another server first."""
    services = []
    for at in range(3):
        urls = ",".join(server.url for server in (*three.servers[at:], *three.servers[:at]))
        settings = fabric_settings(three.servers[at], database_url, nats_url=urls, nats_ca_file=three.tls.ca)
        service = FabricService(settings, engine, Prices())
        await service.start()
        services.append(service)
    return services


@pytest.fixture
async def gateways(
    three: Three, database_url: str, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[FabricService]]:
    monkeypatch.setattr("random.shuffle", lambda urls: None)  # each on a server of its own
    services = await gateways_on(three, database_url, engine)
    try:
        yield services
    finally:
        for service in services:
            await service.stop()


async def ask(service: FabricService, node: SpeakingNode) -> None:
    """Have one request answered; raises FabricError."""
    async with service.nodes.request(node.node_id, a_request()) as reply:
        assert [type(frame).__name__ async for frame in reply] == ["Accepted", "Delta", "End"]


async def answering(node: SpeakingNode) -> None:
    while True:
        _, subject = await node.requests.get()
        await node.say(subject, Accepted(0), delta(1), End(2))


async def test_tls_is_demanded_and_checked(tmp_path: Path) -> None:
    """No gateway speaks to a server whose certificate it cannot check, nor without encryption."""
    tls, credentials = make_tls(tmp_path / "tls"), load_or_make_credentials(tmp_path / "secrets")
    server = EmbeddedNats(tmp_path / "nats", free_port(), credentials, tls=tls)
    server.start()
    plain = EmbeddedNats(tmp_path / "plain", free_port(), credentials)
    plain.start()

    def dial(url: str, ca_file: Path | None) -> Connection:
        password = credentials.password
        return Connection(url, user="marketplace", password=password, name="test", ca_file=ca_file)

    try:
        good = dial(server.url, tls.ca)
        await good.start()
        await good.flush()
        big = b"x" * 1_000_000
        heard: list[int] = []
        good.subscribe("echo", lambda _subject, _reply, payload: heard.append(len(payload)))
        other = dial(server.url.replace("tls", "nats"), tls.ca)  # the server asks for TLS: so be it
        await other.start()
        await good.flush()
        for _ in range(10):  # more at once than asyncio's usual buffer
            other.publish("echo", big)
            await asyncio.sleep(0)
        await other.flush()
        await eventually(lambda: heard == [len(big)] * 10)
        await good.close()
        await other.close()
        for bad in (dial(server.url, None), dial(plain.url.replace("nats", "tls"), tls.ca)):
            with pytest.raises(FabricUnavailable):
                await bad.start(deadline_s=1)
    finally:
        server.stop()
        plain.stop()


async def test_a_cluster_of_three_loses_a_server_and_requests_go_on(
    three: Three, gateways: list[FabricService], engine: AsyncEngine
) -> None:
    """Every gateway reaches every node across servers; one server is killed under load and comes back."""
    operator = await an_operator(engine)
    nodes, working = [], []
    for server in three.servers:  # each node on a server of its own
        key = NodeKey()
        node = SpeakingNode(
            await enrolled(engine, key, operator), await connect(server, key, tls=three.trust())
        )
        await node.start()
        nodes.append(node)
        working.append(asyncio.create_task(answering(node)))
    await eventually_all(gateways, nodes)

    answered, broken = 0, 0
    stop = asyncio.Event()

    async def load(service: FabricService) -> None:
        nonlocal answered, broken
        while not stop.is_set():
            try:
                await ask(service, nodes[0])
                answered += 1
            except FabricError:  # the gateway on the killed server, until it has found another
                broken += 1
                await asyncio.sleep(0.02)

    loads = [asyncio.create_task(load(service)) for service in gateways]
    await asyncio.sleep(0.3)
    killed = three.servers[2].pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    await eventually(lambda: broken > 0)
    await eventually(lambda: all(service.is_connected for service in gateways), within_s=10)
    before = answered
    await eventually(lambda: answered > before + 100)
    stop.set()
    await asyncio.gather(*loads)
    for service in gateways:
        for node in nodes[:2]:
            await ask(service, node)
    await eventually(lambda: nodes[2].client.is_closed)

    # Who watches over the connections still does, wherever they are.
    revoked = nodes[1]
    async with transaction(engine) as connection:
        assert await enrolment.revoke(
            connection, operator_id=operator, node_id=revoked.node_id, now=datetime.now(UTC)
        )
    assert await eventually(lambda: revoked.client.is_closed) < 5

    three.servers[2].stop()
    three.servers[2].start()
    key = NodeKey()
    back = SpeakingNode(
        await enrolled(engine, key, operator), await connect(three.servers[2], key, tls=three.trust())
    )
    await back.start()
    working.append(asyncio.create_task(answering(back)))
    await eventually_all(gateways, [nodes[0], back])
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    for node in (*nodes, back):
        await node.client.close()


async def eventually_all(gateways: list[FabricService], nodes: list[SpeakingNode]) -> None:
    """Wait until every gateway reaches every node: routes between servers are made after the start."""
    async with asyncio.timeout(15):
        for service in gateways:
            for node in nodes:
                while True:
                    with contextlib.suppress(FabricError):
                        await ask(service, node)
                        break
                    await asyncio.sleep(0.1)
