"""A receipt's whole life: real gateway, real NATS, a real agent, and both verifiers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp.web
import httpx
import pytest
from gateway_parts import DOLLAR, HELLO, MODEL, STREAM, RunningGateway, running_gateway
from letters import letters_tokenizer, prompt_tokens
from sqlalchemy import text
from typer.testing import CliRunner

from marketplace.cli import app as marketplace_app
from marketplace.fabric.node_ids import node_id_of
from marketplace.gateway.receipts_commands import ReceiptInvalid, check
from marketplace.gateway.receipts_work import keep_receipts
from marketplace.platform.embedded_nats import EmbeddedNats
from marketplace.platform.ids import uuid7
from node_agent import protocol
from node_agent.cli import app as node_app
from node_agent.config import Config, EngineSettings, Model
from node_agent.identity import create_identity
from node_agent.journal import find_entries
from node_agent.service import Service

CANARY = "purple-elephant"
WORDS = ["Hello", " there", " " + CANARY]


async def _speak(request: aiohttp.web.Request) -> aiohttp.web.StreamResponse:
    """An engine as honest as vLLM."""
    tokenizer = letters_tokenizer()
    response = aiohttp.web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await request.json()
    total, prompt = 0, prompt_tokens("Hi")
    for at, word in enumerate(WORDS):
        ids = tokenizer.encode(word, add_special_tokens=False).ids
        total += len(ids)
        finish = "stop" if at == len(WORDS) - 1 else None
        event = {
            "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": finish, "token_ids": ids}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": total},
        }
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


@pytest.fixture
async def engine_url() -> AsyncIterator[str]:
    application = aiohttp.web.Application()
    application.router.add_post("/v1/chat/completions", _speak)

    async def models(_: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.json_response({"data": [{"id": MODEL, "max_model_len": 4096}]})

    application.router.add_get("/v1/models", models)
    runner = aiohttp.web.AppRunner(application, shutdown_timeout=0.2)
    await runner.setup()
    site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


@pytest.fixture
async def folder(gateway: RunningGateway, engine_url: str, tmp_path: Path) -> AsyncIterator[Path]:
    """An enrolled agent at work; its folder."""
    folder = tmp_path / "node"
    identity, node_id = create_identity(folder), node_id_of(uuid7())
    async with gateway.owner.begin() as connection:
        await connection.execute(
            text(
                "INSERT INTO nodes (id, operator_id, name, public_key) VALUES (:id, :operator, 'rig', :key)"
            ),
            {"id": node_id, "operator": gateway.operator, "key": identity.public_key},
        )
    model = Model(name=MODEL, input=Decimal(1), output=Decimal(2), context=4096, capacity=8)
    engine = EngineSettings(name="engine", kind="attach", url=engine_url, models=[model])
    config = Config(
        node_id=node_id, api=gateway.url, nats_url=gateway.nats.url, engines=[engine], drain_seconds=2
    )
    service = Service(config, identity, folder, version="test")
    running = asyncio.create_task(service.run())
    async with asyncio.timeout(20):
        while not gateway.process.fabric.registry.views(MODEL):
            await asyncio.sleep(0.05)
    yield folder
    service.stop()
    await asyncio.wait_for(running, 10)


async def _receipt(gateway: RunningGateway, request_id: str, *, with_node: bool = True) -> dict[str, Any]:
    """The public receipt, waited for."""
    async with httpx.AsyncClient(base_url=gateway.url) as http, asyncio.timeout(15):
        while True:
            answer = await http.get(f"/api/receipts/{request_id}")
            assert answer.status_code == 200, answer.text
            receipt: dict[str, Any] = answer.json()
            if receipt["page"] is not None and (receipt["node"] is not None or not with_node):
                return receipt
            await asyncio.sleep(0.1)


def _run(app: Any, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.output


async def test_a_request_is_receipted_signed_twice_kept_and_verified(
    gateway: RunningGateway, folder: Path, tmp_path: Path
) -> None:
    stop = asyncio.Event()
    sealing = asyncio.create_task(keep_receipts(gateway.process.settings, gateway.process.engine, stop))
    body = json.dumps(STREAM).encode()
    answers = [await gateway.chat(body), await gateway.chat(HELLO)]
    assert all(answer.status_code == 200 for answer in answers), answers[0].text
    streamed, whole = [row["id"] for row in reversed(await gateway.usage())]
    receipt = await _receipt(gateway, streamed)
    await _receipt(gateway, whole)
    stop.set()
    await asyncio.wait_for(sealing, 10)

    # Both parties said the same of the same answer.
    says = receipt["says"]
    entry = find_entries(folder, [streamed.replace("-", "")])[streamed.replace("-", "")]
    assert says["response_sha256"] == entry.response_sha256
    assert says["completion_tokens"] == entry.completion_tokens
    assert says["id"] == streamed
    assert receipt["node"]["is_disputed"] is False

    # The buyer checks it with what he sent, the operator by the id alone.
    file, sent = tmp_path / "receipt.json", tmp_path / "body.json"
    file.write_text(json.dumps(receipt))
    sent.write_bytes(body)
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        (key,) = (await http.get("/api/receipts/keys")).json()["data"]
    assert key["is_current"] is True
    trusting = ("receipts", "verify", str(file), "--key", key["public_key"], "--request", str(sent), "--json")
    code, output = await asyncio.to_thread(_run, marketplace_app, *trusting)
    assert code == 0, output
    assert json.loads(output)["is_countersigned"] is True
    for which in (streamed, str(file)):
        at = ("verify-receipt", which, "--data-dir", str(folder), "--request", str(sent), "--json")
        code, output = await asyncio.to_thread(_run, node_app, *at)
        assert code == 0, output
        facts = json.loads(output)
        assert (facts["is_countersigned"], facts["is_disputed"], facts["is_known_key"]) == (True, False, True)
    sent.write_bytes(body + b" ")
    assert (await asyncio.to_thread(_run, marketplace_app, *trusting))[0] == 1

    # Whatever is changed, it proves nothing any more.
    for change in (
        {"statement": receipt["statement"].replace('"completion_tokens":', '"completion_tokens":1')},
        {"page": {**receipt["page"], "position": receipt["page"]["count"]}},
        {"node": {**receipt["node"], "disputed": [0]}},
        {"marketplace": {**receipt["marketplace"], "signature": "00" * 64}},
        {"page": None},
        {"page": {**receipt["page"], "proof": ["zz"]}},
        {"statement": 7},
        {"says": {**says, "cost_nano": 1}},
    ):
        with pytest.raises(ReceiptInvalid):
            check({**receipt, **change})
        file.write_text(json.dumps({**receipt, **change}))
        code, _ = await asyncio.to_thread(
            _run, node_app, "verify-receipt", str(file), "--data-dir", str(folder)
        )
        assert code == 1
    with pytest.raises(ReceiptInvalid):
        check(receipt, public_key="00" * 32)

    # Nothing anybody said was written down.
    for path in folder.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path
    assert protocol.decode_statement(receipt["statement"].encode()).v == 1


async def test_a_receipt_nobody_has_is_404_and_one_not_signed_yet_says_so(
    gateway: RunningGateway, folder: Path
) -> None:
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        missing = await http.get(f"/api/receipts/{uuid7()}")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "receipt_not_found")
        usage = (await gateway.chat(HELLO)).json()["usage"]
        early = (await http.get(f"/api/receipts/{usage['receipt_id']}")).json()
    assert (early["page"], early["marketplace"], early["node"]) == (None, None, None)
    assert early["says"]["cost_nano"] == usage["cost_nano"]
    with pytest.raises(ReceiptInvalid):
        check(early)
