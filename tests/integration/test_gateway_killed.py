"""kill -9 of a gateway in mid-answer: the node is free again, nobody pays for what was not served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp.web
import httpx
import pytest
from gateway_parts import DOLLAR, HELLO, MODEL, STREAM, RunningGateway, running_gateway
from letters import letters_tokenizer, prompt_tokens
from sqlalchemy import text

from marketplace.fabric.node_ids import node_id_of
from marketplace.ledger.accounts import Balance, buyer, read_balance
from marketplace.ledger.leases import LEASE_TTL_MS, REAP_MARGIN_MS
from marketplace.platform.embedded_nats import EmbeddedNats
from marketplace.platform.ids import uuid7
from marketplace.platform.processes import free_port
from node_agent.config import Config, EngineSettings, Model
from node_agent.identity import create_identity
from node_agent.service import Service

REAPED_S = (LEASE_TTL_MS + REAP_MARGIN_MS + LEASE_TTL_MS / 3) / 1000


class Talker:
    """An engine that says `a` until it is told to be brief, or nobody listens."""

    def __init__(self) -> None:
        self.is_brief = False
        self.running = 0
        self.url = ""

    async def chat(self, request: aiohttp.web.Request) -> aiohttp.web.StreamResponse:
        response = aiohttp.web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        is_warm_up = (await request.json())["messages"][0]["content"] == "Say hello."
        ids = letters_tokenizer().encode("a", add_special_tokens=False).ids
        self.running += 1
        try:
            last = 2 if self.is_brief or is_warm_up else 100_000
            for count in range(1, last + 1):
                finish = "stop" if count == last else None
                choice = {
                    "index": 0, "delta": {"content": "a"}, "token_ids": ids, "finish_reason": finish,
                }  # fmt: skip
                usage = {"prompt_tokens": prompt_tokens("Hi"), "completion_tokens": count * len(ids)}
                event = {"choices": [choice], "usage": usage}
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                await asyncio.sleep(0.1)
            await response.write(b"data: [DONE]\n\n")
        finally:
            self.running -= 1
        return response


@pytest.fixture
async def talker() -> AsyncIterator[Talker]:
    made, application = Talker(), aiohttp.web.Application()
    application.router.add_post("/v1/chat/completions", made.chat)

    async def models(_: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.json_response({"data": [{"id": MODEL, "max_model_len": 4096}]})

    application.router.add_get("/v1/models", models)
    runner = aiohttp.web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


@pytest.fixture
async def survivor(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path, talker: Talker
) -> AsyncIterator[RunningGateway]:
    """The gateway that goes on, and a real agent, enrolled, at work for every gateway."""
    async with running_gateway(database_url, nats_server, tmp_path) as gateway:
        await gateway.fund(10 * DOLLAR)
        identity, node_id = create_identity(tmp_path / "node"), node_id_of(uuid7())
        async with gateway.owner.begin() as connection:
            await connection.execute(
                text("INSERT INTO nodes (id, operator_id, name, public_key) VALUES (:id, :who, 'rig', :key)"),
                {"id": node_id, "who": gateway.operator, "key": identity.public_key},
            )
        model = Model(name=MODEL, input=Decimal(1), output=Decimal(2), context=4096, capacity=1)
        engines = [EngineSettings(name="engine", kind="attach", url=talker.url, models=[model])]
        config = Config(node_id=node_id, api=gateway.url, nats_url=nats_server.url, engines=engines)
        service = Service(config, identity, tmp_path / "node", version="test")
        running = asyncio.create_task(service.run())
        async with asyncio.timeout(30):
            while not gateway.process.fabric.registry.views(MODEL):
                await asyncio.sleep(0.05)
        yield gateway
        service.stop()
        service.stop()
        await asyncio.wait_for(running, 15)


@asynccontextmanager
async def another(
    gateway: RunningGateway, folder: Path
) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """`tollway serve`, which knows the node; its URL and process."""
    settings, port = gateway.process.settings, free_port()
    values = {
        "database_url": settings.database_url.get_secret_value(), "nats_url": settings.nats_url,
        "nats_password": settings.nats_password.get_secret_value(), "environment": "development",
        "nats_issuer_seed": settings.nats_issuer_seed.get_secret_value(), "api_port": port,
        "secret": settings.secret.get_secret_value(), "data_dir": settings.data_dir,
        "chains_file": settings.chains_file,
    }  # fmt: skip
    environment = {**os.environ, **{f"TOLLWAY_{name.upper()}": str(value) for name, value in values.items()}}
    with (folder / "serve.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "marketplace", "serve", env=environment, stdout=log, stderr=log
        )
    try:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, headers=gateway.headers) as http, asyncio.timeout(90):
            while True:
                assert process.returncode is None, (folder / "serve.log").read_text()[-2000:]
                with contextlib.suppress(httpx.TransportError):
                    if (await http.get("/healthz")).status_code == 200:
                        break
                await asyncio.sleep(0.2)
        yield url, process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _balance(gateway: RunningGateway) -> Balance:
    async with gateway.owner.connect() as connection:
        found = await read_balance(connection, buyer(str(gateway.person)))
    assert found is not None
    return found


async def _served(http: httpx.AsyncClient, body: dict[str, object]) -> httpx.Response:
    """The answer of a gateway that may not have heard of the node yet."""
    async with asyncio.timeout(30):
        while (answer := await http.post("/v1/chat/completions", json=body)).status_code == 503:
            await asyncio.sleep(0.2)
    return answer


async def _served_rows(gateway: RunningGateway) -> list[dict[str, Any]]:
    return [row for row in await gateway.usage() if row["status"] != 503]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("body", [STREAM, HELLO], ids=["stream", "whole"])
async def test_a_killed_gateway_frees_the_node_and_charges_nothing_unserved(
    survivor: RunningGateway, talker: Talker, tmp_path: Path, body: dict[str, object]
) -> None:
    registry = survivor.process.fabric.registry
    before = await _balance(survivor)
    endless = {**body, "max_tokens": 3000}
    async with (
        another(survivor, tmp_path) as (url, doomed),
        httpx.AsyncClient(base_url=url, headers=survivor.headers, timeout=30) as http,
    ):
        asking = asyncio.create_task(_served(http, endless))
        async with asyncio.timeout(30):
            while not talker.running:
                assert not asking.done(), asking.result().text
                await asyncio.sleep(0.02)
        await asyncio.sleep(1)  # something of it is said
        doomed.kill()
        with pytest.raises(httpx.TransportError):
            await asking
    # The engine is told to stop, although nobody was left to cancel; its only place is free.
    async with asyncio.timeout(15):
        while talker.running:
            await asyncio.sleep(0.05)
        while not (views := registry.views(MODEL)) or views[0].running:
            await asyncio.sleep(0.05)
    # What it had set aside is still held: nobody can spend it twice. Nothing is charged.
    held = await _balance(survivor)
    assert held.held.n > 0
    assert (held.posted, await _served_rows(survivor)) == (before.posted, [])
    async with asyncio.timeout(REAPED_S + 20):
        while (await _balance(survivor)).held.n:
            await asyncio.sleep(0.2)
    assert (await _balance(survivor)).posted == before.posted
    # Started again, it serves, and this is charged.
    talker.is_brief = True
    async with (
        another(survivor, tmp_path) as (url, _),
        httpx.AsyncClient(base_url=url, headers=survivor.headers, timeout=30) as http,
    ):
        answer = await _served(http, HELLO)
        assert answer.status_code == 200, answer.text
    (row,) = await _served_rows(survivor)
    assert before.posted.n - (await _balance(survivor)).posted.n == row["cost_nano"] > 0
    await survivor.assert_proved()
