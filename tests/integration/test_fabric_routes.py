"""Enrolment and nodes over HTTP, on real PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import httpx
import nkeys
import pytest
from fastapi import FastAPI, Request
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.fabric import reports
from marketplace.fabric.live import LiveModel, LiveNode
from marketplace.fabric.node_ids import node_id_of, node_uuid
from marketplace.fabric.routes import router
from marketplace.platform.database import transaction
from marketplace.platform.http import Identity, Refusal, Services, install_error_handlers
from marketplace.platform.settings import ChainsConfig, Environment, Settings
from node_agent import protocol


class Hours:
    """The machine's clock, plus what a test has let pass."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def monotonic(self) -> float:
        return time.monotonic()


class ByHeader:
    """Whoever the header names is calling."""

    async def authenticate(self, request: Request) -> Identity:
        name = request.headers.get("authorization")
        if name is None:
            raise Refusal(401, "missing_credentials", "who are you?")
        return Identity(uuid.UUID(name), None, frozenset({"account"}))


class OneLive:
    """Says that every node is live."""

    def live(self, node_id: str) -> LiveNode | None:
        del node_id
        model = LiveModel("m", 4096, 1, 2, 0, 0, 4, is_ready=True, success_permille=None, latency_ms=None)
        return LiveNode(5, is_draining=False, version="t", models=(model,))


@dataclass
class Site:
    client: httpx.AsyncClient
    engine: AsyncEngine
    clock: Hours
    app: FastAPI

    async def person(self, *, is_operator: bool = True) -> str:
        person = uuid.uuid4()
        async with transaction(self.engine) as connection:
            await connection.execute(
                text("INSERT INTO people (id, display_name, is_operator) VALUES (:id, 'P', :o)"),
                {"id": person, "o": is_operator},
            )
        return str(person)

    async def token(self, operator: str) -> str:
        answer = await self.client.post("/api/nodes/enrolment-tokens", headers={"authorization": operator})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["token"])

    async def enroll(self, body: dict[str, Any]) -> httpx.Response:
        return await self.client.post(protocol.ENROLL_PATH, json=body)

    async def nodes(self, operator: str) -> list[dict[str, Any]]:
        answer = await self.client.get("/api/nodes", headers={"authorization": operator})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"])


def a_seed() -> bytes:
    return bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))


def proof(token: str, seed: bytes, *, at: datetime | None = None, **changes: object) -> dict[str, Any]:
    pair = nkeys.from_seed(seed)
    public_key = pair.public_key.decode()
    time_ms = int((at or datetime.now(UTC)).timestamp() * 1000)
    signature = pair.sign(protocol.enroll_signing_bytes(token, public_key, time_ms))
    body: dict[str, Any] = {
        "token": token,
        "public_key": public_key,
        "time_ms": time_ms,
        "signature": protocol.to_base64url(signature),
        "agent_version": "1",
        "name": "rack 1",
    }
    return {**body, **changes}


@pytest.fixture
async def site(database_url: str, engine: AsyncEngine) -> AsyncIterator[Site]:
    app = FastAPI()
    install_error_handlers(app)
    app.include_router(router)
    clock = Hours()
    settings = Settings(
        environment=Environment.DEVELOPMENT,
        database_url=SecretStr(database_url),
        secret=SecretStr("s" * 32),
        public_nats_url="nats://nodes.example.org:4222",
    )
    app.state.services = Services(engine, settings, cast("ChainsConfig", None), clock, ByHeader())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield Site(client, engine, clock, app)


async def test_an_operator_enrols_a_machine_sees_it_and_revokes_it(site: Site) -> None:
    operator = await site.person()
    answer = await site.enroll(proof(await site.token(operator), a_seed()))
    assert answer.status_code == 200, answer.text
    reply = protocol.EnrollReply(**answer.json())
    assert reply.nats_url == "nats://nodes.example.org:4222"
    assert node_id_of(node_uuid(reply.node_id)) == protocol.parse_node_id(reply.node_id)
    (node,) = await site.nodes(operator)
    assert (node["id"], node["name"], node["live"], node["revoked_at"]) == (
        reply.node_id,
        "rack 1",
        None,
        None,
    )
    site.app.state.live_nodes = OneLive()
    (node,) = await site.nodes(operator)
    assert node["live"]["models"][0]["price_out_nano_per_million"] == 2
    path = f"/api/nodes/{reply.node_id}"
    stranger = await site.person()
    assert (await site.client.delete(path, headers={"authorization": stranger})).status_code == 404
    for _ in range(2):
        assert (await site.client.delete(path, headers={"authorization": operator})).status_code == 204
    (node,) = await site.nodes(operator)
    assert node["revoked_at"] is not None
    assert node["live"] is None
    assert await site.nodes(stranger) == []


async def test_only_an_operator_in_good_standing_makes_tokens(site: Site) -> None:
    buyer = await site.person(is_operator=False)
    answer = await site.client.post("/api/nodes/enrolment-tokens", headers={"authorization": buyer})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_an_operator")
    assert "POST /api/me/operator" in answer.json()["error"]["message"]
    assert (await site.client.post("/api/nodes/enrolment-tokens")).status_code == 401
    operator = await site.person()
    token = await site.token(operator)
    async with transaction(site.engine) as connection:
        await connection.execute(text("UPDATE people SET frozen_at = now() WHERE id = :id"), {"id": operator})
    assert (await site.enroll(proof(token, a_seed()))).json()["error"]["code"] == "not_an_operator"


async def test_the_database_holds_no_token(site: Site) -> None:
    token = await site.token(await site.person())
    async with transaction(site.engine) as connection:
        rows = (await connection.execute(text("SELECT enrolment_tokens::text FROM enrolment_tokens"))).all()
    assert len(rows) == 1
    assert token not in str(rows)


async def test_a82_a83_expired_replayed_foreign_and_unproven_tokens_are_refused(site: Site) -> None:
    operator = await site.person()
    token = await site.token(operator)
    seed = a_seed()
    other = nkeys.from_seed(a_seed()).public_key.decode()
    for body, status, code in (
        (proof("enroll-guess", seed), 403, "enrolment_token_refused"),
        (proof(token, seed, public_key=other), 403, "proof_invalid"),
        (proof(token, seed, signature="AAAA"), 403, "proof_invalid"),
        (proof(token, seed, public_key="U" * 56), 403, "proof_invalid"),
        (proof(token, seed, at=datetime.now(UTC) - timedelta(seconds=31)), 403, "proof_invalid"),
        (proof(token, seed, name="x" * 201), 400, "invalid_request"),
    ):
        answer = await site.enroll(body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    site.clock.ahead = timedelta(minutes=60, seconds=1)
    answer = await site.enroll(proof(token, seed, at=site.clock.now()))
    assert answer.json()["error"]["code"] == "enrolment_token_refused"
    assert await site.nodes(operator) == []


async def test_a82_a_token_enrols_once_whoever_comes_first(site: Site) -> None:
    operator = await site.person()
    token = await site.token(operator)
    bodies = [proof(token, a_seed()) for _ in range(4)]
    answers = await asyncio.gather(*(site.enroll(body) for body in [*bodies, bodies[0]]))
    assert sorted(answer.status_code for answer in answers) == [200, 403, 403, 403, 403]
    assert len(await site.nodes(operator)) == 1


async def test_a_key_stays_with_its_operator(site: Site) -> None:
    operator, other, seed = await site.person(), await site.person(), a_seed()
    first = await site.enroll(proof(await site.token(operator), seed))
    again = await site.enroll(proof(await site.token(operator), seed))
    assert again.json() == first.json()  # the first answer may have been lost
    stolen = await site.enroll(proof(await site.token(other), seed))
    assert (stolen.status_code, stolen.json()["error"]["code"]) == (409, "key_refused")


def test_node_ids_are_strict() -> None:
    for text_ in ("", "n-", "x-af7sfytzwb6mhgge3qgaybzzr4", "n-AF7SFYTZWB6MHGGE3QGAYBZZR4", "n-" + "1" * 26):
        with pytest.raises(ValueError):
            node_uuid(text_)


async def test_an_operator_is_told_why_requests_went_to_others(site: Site) -> None:
    """Gateways add up their sums; each operator sees his own nodes, of the hours he asks for."""
    operator, other = await site.person(), await site.person()
    mine = (await site.enroll(proof(await site.token(operator), a_seed()))).json()["node_id"]
    theirs = (await site.enroll(proof(await site.token(other), a_seed()))).json()["node_id"]
    price, unknown = 100_000_000, node_id_of(uuid.uuid4())
    old = [(mine, "m", "full", 5, 0, 0)]
    async with transaction(site.engine) as connection:
        await reports.add(connection, old, now=site.clock.now() - timedelta(hours=30))
        for _gateway in range(2):
            rows = [
                (mine, "m", "chosen", 10, 0, 0),
                (mine, "m", "price", 30, 30 * price, 24 * price),
                (theirs, "m", "chosen", 30, 0, 0),
                (unknown, "m", "chosen", 1, 0, 0),
            ]
            await reports.add(connection, rows, now=site.clock.now())

    async def report(who: str, hours: int) -> dict[str, Any]:
        answer = await site.client.get(
            "/api/operator/report", params={"hours": hours}, headers={"authorization": who}
        )
        assert answer.status_code == 200, answer.text
        (node,) = answer.json()["nodes"]
        (model,) = node["models"]
        assert node["name"] == "rack 1"
        return {"node": node["node_id"], **model}

    assert await report(operator, 24) == {
        "node": mine, "model": "m", "considered": 80, "chosen": 20, "share_permille": 250,
        "lost": [
            {
                "reason": "price", "requests": 60, "share_permille": 750, "own": price,
                "winner": 80_000_000, "unit": "nano_per_million_tokens",
                "message": "others were cheaper: they asked $0.08 per million tokens on average, you $0.10",
            }
        ],
    }  # fmt: skip
    assert (await report(operator, 48))["considered"] == 85
    assert (await report(other, 24))["chosen"] == 60
    answer = await site.client.get("/api/operator/report?hours=0", headers={"authorization": operator})
    assert answer.status_code == 400
    async with transaction(site.engine) as connection:
        await reports.add(connection, rows, now=site.clock.now() + reports.KEPT - timedelta(hours=20))
    assert (await report(operator, 48))["considered"] == 120, "what is older than a week is gone"
