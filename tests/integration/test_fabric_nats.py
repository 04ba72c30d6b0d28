"""The fabric on a real nats-server: who may connect, what he may do, and how a reply travels."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import nats
import nats.aio.client
import nats.aio.msg
import nats.errors
import nkeys
import pytest
from pydantic import SecretStr
from sqlalchemy import text
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
from marketplace.platform.settings import Environment, Settings
from marketplace.routing.service import FabricService
from node_agent import protocol
from node_agent.protocol import Accepted, ChoiceDelta, Delta, End, Failed, FailureCode, Heartbeat, NodeId

SECRET = "s" * 40
SHORT = Limits(accept_ms=300, first_token_ms=500, idle_ms=400, wall_ms=1_500)


# -- servers and people


def _with_nonces(configuration: Callable[..., str], public_key: str) -> Callable[..., str]:
    """nats-server sends nonces once an nkey user exists; harmless where the product's own has one."""

    def written(*arguments: object) -> str:
        found = configuration(*arguments)
        if "nkey:" in found:
            return found
        return re.sub(r"(AUTH \{ users: \[ \{[^}]*\})", rf'\1, {{ nkey: "{public_key}" }}', found)

    return written


@pytest.fixture(scope="module")
def fabric_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    folder = tmp_path_factory.mktemp("fabric-nats")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            embedded_nats, "_configuration", _with_nonces(embedded_nats._configuration, _Key().public_key)
        )
        credentials = embedded_nats.load_or_make_credentials(folder / "secrets")
        server = EmbeddedNats(folder / "nats", free_port(), credentials)
        server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def settings(fabric_nats: EmbeddedNats, database_url: str) -> Settings:
    return Settings(
        environment=Environment.DEVELOPMENT,
        data_dir=Path("unused"),
        database_url=SecretStr(database_url),
        nats_url=fabric_nats.url,
        nats_password=SecretStr(fabric_nats.credentials.password),
        nats_issuer_seed=SecretStr(fabric_nats.credentials.issuer_seed),
        secret=SecretStr(SECRET),
    )


class _Prices:
    """Numbers versions in memory."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int, int]] = []

    async def version_of(self, node_id: str, model: str, price_in: int, price_out: int) -> int:
        self.asked.append((node_id, model, price_in, price_out))
        return len(self.asked)


@pytest.fixture
async def service(settings: Settings, engine: AsyncEngine) -> AsyncIterator[FabricService]:
    service = FabricService(settings, engine, _Prices(), limits=SHORT)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


class _Key:
    """A node's key pair."""

    def __init__(self) -> None:
        self.seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode()
        self.pair = nkeys.from_seed(self.seed.encode())
        self.public_key = str(self.pair.public_key.decode())

    def answer(self, nonce: str) -> dict[str, object]:
        """CONNECT options that prove the key."""
        return {"nkey": self.public_key, "sig": protocol.to_base64url(self.pair.sign(nonce.encode()))}

    def enroll_request(
        self, token: str, *, time_ms: int | None = None, name: str = ""
    ) -> protocol.EnrollRequest:
        at = int(time.time() * 1000) if time_ms is None else time_ms
        signature = self.pair.sign(protocol.enroll_signing_bytes(token, self.public_key, at))
        return protocol.EnrollRequest(
            token=token,
            public_key=self.public_key,
            time_ms=at,
            signature=protocol.to_base64url(signature),
            agent_version="test",
            name=name,
        )


async def an_operator(engine: AsyncEngine) -> uuid.UUID:
    person = uuid.uuid4()
    async with transaction(engine) as connection:
        await connection.execute(
            text("INSERT INTO people (id, display_name, is_operator) VALUES (:id, 'Olga', true)"),
            {"id": person},
        )
    return person


async def enrolled(engine: AsyncEngine, key: _Key, operator: uuid.UUID | None = None) -> NodeId:
    operator = operator or await an_operator(engine)
    now = datetime.now(UTC)
    async with transaction(engine) as connection:
        token, _ = await enrolment.make_token(
            connection, secret=SECRET.encode(), operator_id=operator, now=now
        )
        found = await enrolment.enroll(
            connection, secret=SECRET.encode(), request=key.enroll_request(token), now=now
        )
    return found.node_id


async def connect(
    server: EmbeddedNats, key: _Key, errors: list[Exception] | None = None
) -> nats.aio.client.Client:
    async def note(error: Exception) -> None:
        if errors is not None:
            errors.append(error)

    return await nats.connect(
        server.url, nkeys_seed_str=key.seed, allow_reconnect=False, connect_timeout=3, error_cb=note
    )


async def eventually(holds: Callable[[], bool], within_s: float = 5) -> float:
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            raise AssertionError("it never happened")
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def knock(url: str, options: Callable[[str], dict[str, object]]) -> str:
    """Connect with raw options made from the server's nonce; give the server's last word."""
    port = int(url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        info = json.loads((await reader.readline())[5:])
        connect = {"verbose": False, "pedantic": False, "protocol": 1, **options(info["nonce"])}
        writer.write(b"CONNECT " + json.dumps(connect).encode() + b"\r\nPING\r\n")
        async with asyncio.timeout(8):
            while line := await reader.readline():
                if not line.startswith(b"INFO"):
                    return line.decode().strip()
        return "closed"
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


# -- who may connect


async def test_an_enrolled_key_connects_and_an_unknown_one_does_not(
    service: FabricService, engine: AsyncEngine, fabric_nats: EmbeddedNats
) -> None:
    key = _Key()
    await enrolled(engine, key)
    assert await knock(fabric_nats.url, key.answer) == "PONG"
    assert "Authorization Violation" in await knock(fabric_nats.url, _Key().answer)


async def test_nobody_connects_without_a_key_or_with_a_guessed_password(
    service: FabricService, fabric_nats: EmbeddedNats
) -> None:
    for options in ({}, {"user": "marketplace", "pass": "guess"}, {"auth_token": "guess"}):
        assert "Authorization Violation" in await knock(fabric_nats.url, lambda _nonce, o=options: dict(o))


async def test_a_recorded_signature_does_not_open_a_second_connection(
    service: FabricService, engine: AsyncEngine, fabric_nats: EmbeddedNats
) -> None:
    key = _Key()
    await enrolled(engine, key)
    recorded: dict[str, object] = {}

    def record(nonce: str) -> dict[str, object]:
        recorded.update(key.answer(nonce))
        return recorded

    assert await knock(fabric_nats.url, record) == "PONG"
    assert "Authorization Violation" in await knock(fabric_nats.url, lambda _nonce: recorded)


async def test_another_nodes_public_key_does_not_help(
    service: FabricService, engine: AsyncEngine, fabric_nats: EmbeddedNats
) -> None:
    known, unknown = _Key(), _Key()
    await enrolled(engine, known)
    stolen = lambda nonce: {**unknown.answer(nonce), "nkey": known.public_key}  # noqa: E731
    assert "Authorization Violation" in await knock(fabric_nats.url, stolen)
