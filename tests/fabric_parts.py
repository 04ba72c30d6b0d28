"""Parts for tests of the fabric: node keys, enrolment, a node that speaks as a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import nats
import nats.aio.client
import nats.aio.msg
import nkeys
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.fabric import enrolment
from marketplace.platform.database import transaction
from marketplace.platform.embedded_nats import EmbeddedNats
from marketplace.platform.nats_configuration import Tls
from marketplace.platform.settings import Environment, Settings
from node_agent import protocol
from node_agent.protocol import ChoiceDelta, Delta, NodeId

SECRET = "s" * 40
DAY = timedelta(days=1)


def fabric_settings(server: EmbeddedNats, database_url: str, **others: object) -> Settings:
    """Give settings of a gateway on `server`; `others` override."""
    return Settings(
        **{
            "environment": Environment.DEVELOPMENT,
            "data_dir": Path("unused"),
            "database_url": SecretStr(database_url),
            "nats_url": server.url,
            "nats_password": SecretStr(server.credentials.password),
            "nats_issuer_seed": SecretStr(server.credentials.issuer_seed),
            "secret": SecretStr(SECRET),
            **others,
        }  # type: ignore[arg-type]
    )


class Prices:
    """Numbers versions in memory."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int, int]] = []

    async def version_of(self, node_id: str, model: str, price_in: int, price_out: int) -> int:
        self.asked.append((node_id, model, price_in, price_out))
        return len(self.asked)


class NodeKey:
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


async def enrolled(engine: AsyncEngine, key: NodeKey, operator: uuid.UUID | None = None) -> NodeId:
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
    server: EmbeddedNats | str,
    key: NodeKey,
    errors: list[Exception] | None = None,
    tls: ssl.SSLContext | None = None,
) -> nats.aio.client.Client:
    """Connect as a node to a server, or to one of a cluster's (addresses, comma separated)."""
    urls = server if isinstance(server, str) else server.url

    async def note(error: Exception) -> None:
        if errors is not None:
            errors.append(error)

    return await nats.connect(
        urls.split(","),
        nkeys_seed_str=key.seed,
        allow_reconnect=False,
        connect_timeout=3,
        error_cb=note,
        tls=tls,
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


class SpeakingNode:
    """A node that speaks the protocol as a test tells it to."""

    def __init__(self, node_id: NodeId, client: nats.aio.client.Client) -> None:
        self.node_id = node_id
        self.client = client
        self.requests: asyncio.Queue[tuple[protocol.Request, str]] = asyncio.Queue()
        self.controls: list[protocol.Control] = []

    async def start(self) -> None:
        async def requested(message: nats.aio.msg.Msg) -> None:
            self.requests.put_nowait((protocol.decode_request(message.data), message.reply))

        async def controlled(message: nats.aio.msg.Msg) -> None:
            self.controls.append(protocol.decode_control(message.data))

        await self.client.subscribe(protocol.request_subject(self.node_id), cb=requested)
        await self.client.subscribe(protocol.control_subject(self.node_id), cb=controlled)
        await self.client.flush()
        await self.client.flush()  # nats-py's first ping may overtake the subscriptions

    async def taken(self) -> tuple[protocol.Request, str]:
        return await asyncio.wait_for(self.requests.get(), 5)

    async def say(self, reply: str, *frames: protocol.Frame) -> None:
        for frame in frames:
            await self.client.publish(reply, protocol.encode(frame))

    @property
    def credit(self) -> int:
        """The largest `up_to` granted so far by `Credit`s."""
        return max((c.up_to for c in self.controls if isinstance(c, protocol.Credit)), default=0)

    @property
    def cancelled(self) -> list[str]:
        return [c.id for c in self.controls if isinstance(c, protocol.Cancel)]


def a_request(credit: int = protocol.CREDIT_DEFAULT, *, stream: bool = True) -> protocol.Request:
    return protocol.Request(
        v=1, id=uuid.uuid4().hex, model="m", body=b"{}", stream=stream, deadline_ms=60_000, credit=credit
    )


def delta(seq: int, text: str = "x") -> Delta:
    return Delta(seq, [ChoiceDelta(content=text)])


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def make_tls(folder: Path) -> Tls:
    """Make an authority and a certificate of 127.0.0.1 signed by it, good for one day."""
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)

    def builder(subject: str, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(_name("test authority"))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
        )

    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip
    root = (
        builder("test authority", authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )
    leaf = (
        builder("nats", server.public_key())
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False
        )
        .sign(authority, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    tls = Tls(folder / "server.pem", folder / "server.key", folder / "ca.pem")
    assert tls.ca is not None
    tls.ca.write_bytes(root.public_bytes(serialization.Encoding.PEM))
    tls.certificate.write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    tls.key.write_bytes(
        server.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return tls
