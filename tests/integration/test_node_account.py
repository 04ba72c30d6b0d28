"""The operator's money from his node's terminal: the real routes and book, over HTTP, proofs checked here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest
import uvicorn
from aiohttp import web
from click.testing import Result
from fastapi import FastAPI, Request
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncEngine
from typer.testing import CliRunner

from chain.networks import BASE, ETHEREUM, SOLANA
from marketplace.catalog.models import Tier, TokenizerFiles, add_model
from marketplace.fabric.requirement_routes import router as requirement_router
from marketplace.fabric.routes import router as fabric_router
from marketplace.platform.database import transaction
from marketplace.platform.http import Identity, Refusal, Services, install_error_handlers
from marketplace.platform.settings import (
    ChainsConfig,
    Environment,
    EvmChainConfig,
    Settings,
    SolanaChainConfig,
)
from marketplace.reputation.routes import router as reputation_router
from marketplace.settlement import bank
from marketplace.settlement.routes import router
from node_agent import chain_check, config
from node_agent.cli import app as node_app
from tests.settlement_parts import Desk, run_out

ESCROW = "0x" + "2" * 40
KEY = "sk-tollway-of-ann"


def evm(usdc: str, chain_id: int) -> EvmChainConfig:
    return EvmChainConfig(
        rpc=(),
        chain_id=chain_id,
        usdc=usdc,
        escrow=ESCROW,
        forwarder_factory="0x" + "3" * 40,
        multi_send="0x" + "4" * 40,
        signers=("0x" + "5" * 40, "0x" + "6" * 40, "0x" + "7" * 40),
        threshold=2,
    )


CHAINS = ChainsConfig(
    ethereum=evm(ETHEREUM.usdc, 1),
    base=evm(BASE.usdc, 8453),
    solana=SolanaChainConfig(
        rpc=(),
        usdc_mint=SOLANA.usdc_mint,
        multisig="4Nd1mBQtrMJVYVfKf2PJy9NZUZdTAsp7D4xWLs4gDB4T",
        escrow="7UX2i7SucgLMQcfZ75s3VXmZZY4YRUyJN9X1RgfMoDUi",
        nonce_account="n",
        gas_payer="g",
        signers=("a", "b", "c"),
        threshold=2,
    ),
)


@dataclass
class Keys:
    people: dict[str, UUID] = field(default_factory=dict)

    async def authenticate(self, request: Request) -> Identity:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if given not in self.people:
            raise Refusal(401, "invalid_api_key", "this key is not in use")
        return Identity(self.people[given], None, frozenset({"account"}))


@dataclass
class Terminal:
    desk: Desk
    ann: UUID
    folder: Path
    keys: Keys

    async def type(self, *arguments: str, stdin: str | None = None) -> Result:
        def run() -> Result:
            command = [*arguments, "--data-dir", str(self.folder)]
            return CliRunner().invoke(node_app, command, input=stdin, env={"COLUMNS": "220"})

        return await asyncio.to_thread(run)

    async def told(self, *arguments: str) -> dict[str, Any]:
        result = await self.type(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture
async def terminal(
    engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Terminal]:
    monkeypatch.delenv("TOLLWAY_API_KEY", raising=False)
    desk, keys, app = Desk(engine), Keys(), FastAPI()
    for part in (router, requirement_router, fabric_router, reputation_router):
        app.include_router(part)
    install_error_handlers(app)
    settings = Settings(
        environment=Environment.DEVELOPMENT,
        database_url=SecretStr("postgresql://given@elsewhere/db"),
        secret=SecretStr("s" * 40),
        cooling_s=3600,
    )
    app.state.services = Services(engine, settings, CHAINS, desk.clock, keys)
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, ws="none"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    config.write_settings(
        tmp_path, node_id="n1", api=f"http://127.0.0.1:{port}", nats_url="nats://127.0.0.1:1"
    )
    ann = await desk.operator(40)
    keys.people[KEY] = ann
    yield Terminal(desk, ann, tmp_path, keys)
    server.should_exit = True
    await serving


async def test_a_key_is_stored_for_its_owner_only_and_never_shown(terminal: Terminal) -> None:
    refused = await terminal.type("earnings")
    assert refused.exit_code == 1
    assert "tollway-node login" in refused.stderr
    stored = await terminal.type("login", stdin=KEY + "\n")
    assert stored.exit_code == 0, stored.output
    assert KEY not in stored.output
    path = terminal.folder / "account.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert (await terminal.told("earnings"))["earnings"]["matured"] == "40.00"
    path.chmod(0o644)
    assert "open to other users" in (await terminal.type("earnings")).stderr
    await terminal.type("login", "--forget")
    assert not path.exists()


async def test_an_unknown_key_and_nonsense_are_one_sentence(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOLLWAY_API_KEY", "sk-unknown")
    refused = await terminal.type("earnings")
    assert "401: this key is not in use. Store a key" in refused.stderr
    monkeypatch.setenv("TOLLWAY_API_KEY", "two words")
    assert "not an API key" in (await terminal.type("earnings")).stderr
    assert "two words" not in (await terminal.type("earnings")).stderr


async def test_from_earnings_to_a_payout_that_is_proven(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOLLWAY_API_KEY", KEY)
    desk, address = terminal.desk, terminal.desk.address_of(terminal.ann)
    assert (await terminal.told("addresses"))["addresses"][0]["address"] == address
    asked = ("withdraw", "25", "--chain", "base", "--to", address, "--idempotency-key", "mine-1")
    first = await terminal.told(*asked)
    again = await terminal.told(*asked)
    assert first["withdrawal"]["id"] == again["withdrawal"]["id"]
    assert "idempotency key mine-1" in (await terminal.type(*asked)).stdout
    other = await terminal.type("withdraw", "26", *asked[2:])
    assert (other.exit_code, "409" in other.stderr) == (1, True)
    small = await terminal.type("withdraw", "9.99", "--chain", "base", "--to", address)
    assert "422" in small.stderr
    withdrawal = first["withdrawal"]["id"]
    early = await terminal.type("payouts", "verify", withdrawal)
    assert "404" in early.stderr

    for n in range(4):
        await desk.request(await desk.operator(20 + n), None)
    await desk.approved()
    await run_out(desk, desk.settler())
    listed = (await terminal.told("payouts"))["withdrawals"][0]
    assert (listed["status"], listed["amount"]) == ("paid", "25.000000")
    proven = await terminal.told("payouts", "verify", withdrawal)
    assert (proven["is_included"], proven["is_on_chain"], proven["batch"]["count"]) == (True, None, 5)
    shown = await terminal.type("payouts", "verify", withdrawal)
    assert "Proven: 25.000000 USDC" in shown.stdout
    earned = await terminal.told("earnings")
    assert earned["earnings"]["matured"] == "15.00"
    assert earned["statement"]["data"][0]["tx"] == listed["tx"]
    for command in (("earnings",), ("payouts",), ("addresses",)):
        assert (await terminal.type(*command)).exit_code == 0


async def test_a_withdrawal_to_the_bank_from_asking_to_cancelling(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOLLWAY_API_KEY", KEY)
    async with transaction(terminal.desk.engine) as conn:
        account = await bank.add_account(
            conn, person=terminal.ann, holder="Ann [/x]", iban="GB82WEST12345698765432", cooling_s=0,
            now=terminal.desk.clock.now(),
        )  # fmt: skip
    asked = ("bank", "withdraw", "25", "--account", str(account.id), "--idempotency-key", "mine-1")
    first, again = await terminal.told(*asked), await terminal.told(*asked)
    assert first["withdrawal"]["id"] == again["withdrawal"]["id"]
    assert "idempotency key mine-1" in (await terminal.type(*asked)).stdout
    small = await terminal.type("bank", "withdraw", "9.99", "--account", str(account.id))
    assert "422" in small.stderr
    listed = await terminal.told("bank")
    assert [a["id"] for a in listed["accounts"]] == [str(account.id)]
    assert [w["status"] for w in listed["withdrawals"]] == ["requested"]
    assert "GB82WEST12345698765432  Ann [/x], usable" in (await terminal.type("bank")).stdout
    gone = await terminal.type("bank", "cancel", first["withdrawal"]["id"])
    assert "cancelled; the money is earnings again" in gone.stdout
    assert await terminal.desk.available(terminal.ann) == 40 * 10**9


async def test_a_proof_of_another_amount_is_not_proven(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marketplace lies: the proof's numbers are changed, or the public root is another."""
    monkeypatch.setenv("TOLLWAY_API_KEY", KEY)
    made = await terminal.desk.request(terminal.ann, 25)
    await terminal.desk.request(await terminal.desk.operator(20), None)
    await terminal.desk.approved()
    real = config.load_config(terminal.folder).api
    changes: dict[str, Any] = {}

    async with aiohttp.ClientSession() as client:

        async def lie(request: web.Request) -> web.Response:
            async with client.get(real + request.path, headers=request.headers) as answer:
                body = await answer.json()
                kind = "proof" if request.path.endswith("/proof") else "batch"
                return web.json_response(body | changes.get(kind, {}), status=answer.status)

        liar = web.Application()
        liar.router.add_get("/{path:.*}", lie)
        runner = web.AppRunner(liar)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        config.write_settings(
            terminal.folder, node_id="n1", api=f"http://127.0.0.1:{port}", nats_url="nats://127.0.0.1:1"
        )
        assert (await terminal.told("payouts", "verify", str(made.id)))["is_included"] is True
        for lies in (
            {"proof": {"amount_micro": 25_000_001}},
            {"proof": {"address": "0x" + "9" * 40}},
            {"proof": {"position": 7}},
            {"proof": {"proof": []}},
            {"batch": {"merkle_root": "0" * 64}},
            {"proof": {"merkle_root": "0" * 64}, "batch": {"merkle_root": "0" * 64}},
            {"batch": {"count": 3}},
        ):
            changes.clear()
            changes.update(lies)
            result = await terminal.type("payouts", "verify", str(made.id))
            assert (result.exit_code, "NOT PROVEN" in result.stderr) == (3, True), lies
        await runner.cleanup()


async def test_status_and_standing_are_the_marketplaces(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOLLWAY_API_KEY", KEY)
    told = json.loads((await terminal.type("status", "--json")).stdout)
    assert told["is_running"] is False
    assert (told["account"]["trouble"], told["account"]["report"]["nodes"]) == ("", [])
    assert told["account"]["standing"]["standing"] == "good"
    assert (await terminal.told("standing"))["standing"] == "good"
    refused = await terminal.type("dispute", "nothing is held")
    assert (refused.exit_code, "409" in refused.stderr) == (1, True)


async def test_requirements_name_the_pinned_tokenizer(terminal: Terminal) -> None:
    files = TokenizerFiles(b"{}", "{{ x }}", {})
    async with transaction(terminal.desk.engine) as connection:
        await add_model(connection, name="a/b", tier=Tier.SMALL, context=4096, files=files)
    url = config.load_config(terminal.folder).api + "/api/nodes/requirements"
    async with aiohttp.ClientSession() as client:
        async with client.get(url, params={"model": "a/b"}) as answer:
            assert await answer.json() == {"model": "a/b", "context": 4096, "tokenizer_sha256": files.sha256}
        async with client.get(url, params={"model": "other"}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "model_not_found")
        async with client.get(url, params={"model": "x" * 201}) as answer:
            assert answer.status == 400


# -- the chain itself ---------------------------------------------------------------------------------

PAID = chain_check.Expected("base", BASE.usdc, ESCROW, "0x" + "a" * 40, 25_000_000, "0x1")


def receipt(**changes: Any) -> dict[str, Any]:
    log = {
        "address": BASE.usdc,
        "topics": [
            chain_check.TRANSFER_TOPIC,
            "0x" + "0" * 24 + ESCROW[2:],
            "0x" + "0" * 24 + "A" * 40,
        ],
        "data": hex(25_000_000),
    }
    return {"status": "0x1", "blockNumber": "0x10", "logs": [log | changes.pop("log", {})]} | changes


@pytest.mark.parametrize(
    ("found", "final", "is_paid"),
    [
        (receipt(), "0x10", True),
        (receipt(), "0xf", False),
        (receipt(status="0x0"), "0x10", False),
        (receipt(log={"address": "0x" + "b" * 40}), "0x10", False),
        (receipt(log={"data": hex(24_999_999)}), "0x10", False),
        (receipt(log={"topics": [chain_check.TRANSFER_TOPIC]}), "0x10", False),
        (None, "0x10", False),
    ],
    ids=["paid", "not final", "reverted", "another token", "less", "another event", "unknown"],
)
async def test_only_a_final_transfer_of_the_very_usdc_counts(
    found: dict[str, Any] | None, final: str, is_paid: bool
) -> None:
    answers = {"eth_getTransactionReceipt": found, "eth_getBlockByNumber": {"number": final}}
    assert await ask_a_chain(answers, PAID) is is_paid


def balances(before: int, after: int, **changes: Any) -> dict[str, Any]:
    def one(amount: int) -> list[dict[str, Any]]:
        return [{"mint": SOLANA.usdc_mint, "owner": "W", "uiTokenAmount": {"amount": str(amount)}} | changes]

    return {"meta": {"err": None, "preTokenBalances": one(before), "postTokenBalances": one(after)}}


@pytest.mark.parametrize(
    ("found", "is_paid"),
    [
        (balances(5, 25_000_005), True),
        (balances(5, 25_000_004), False),
        (balances(5, 25_000_005, mint="other"), False),
        (balances(5, 25_000_005, owner="other"), False),
        (None, False),
    ],
    ids=["paid", "less", "another mint", "another wallet", "unknown"],
)
async def test_on_solana_the_wallets_balance_counts(found: dict[str, Any] | None, is_paid: bool) -> None:
    paid = chain_check.Expected("solana", SOLANA.usdc_mint, "e", "W", 25_000_000, "sig")
    assert await ask_a_chain({"getTransaction": found}, paid) is is_paid


async def ask_a_chain(answers: dict[str, Any], expected: chain_check.Expected) -> bool:
    async def answer(request: web.Request) -> web.Response:
        asked = await request.json()
        return web.json_response({"jsonrpc": "2.0", "id": asked["id"], "result": answers[asked["method"]]})

    provider = web.Application()
    provider.router.add_post("/", answer)
    runner = web.AppRunner(provider)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        return await chain_check.is_paid_on_chain(f"http://127.0.0.1:{runner.addresses[0][1]}", expected)
    finally:
        await runner.cleanup()
