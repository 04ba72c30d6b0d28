"""`payouts verify --rpc` asks the chain itself: a payout of a real Safe on anvil, of a real SPL multisig."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

import pytest
import uvicorn
from click.testing import Result
from fastapi import FastAPI, Request
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncEngine
from typer.testing import CliRunner

from chain.networks import Chain
from chain.payouts import Payout
from chain.units import Micro
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction
from marketplace.platform.http import Identity, Services, install_error_handlers
from marketplace.platform.settings import Environment, Settings
from marketplace.settlement import address_book, commands, service, withdrawals
from marketplace.settlement.routes import router
from marketplace.settlement.service import Schedule
from node_agent import config
from node_agent.chain_check import Expected, is_paid_on_chain
from node_agent.cli import app as node_app
from tests.settlement_parts import LIMITS, a_person, earn
from tests.settlement_rigs import PASSPHRASE, Rig, a_base_rig, a_solana_rig

pytestmark = pytest.mark.chains
AMOUNT = Micro(33_000_000)


@pytest.fixture(params=[a_base_rig, a_solana_rig], ids=["base", "solana"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    (tmp_path / "vm").mkdir()
    async with request.param(tmp_path, 100_000_000) as made:
        made.chains_file.write_text(made.chains.model_dump_json())
        yield made


@dataclass
class OneKey:
    """Whoever asks is this person."""

    person: UUID

    async def authenticate(self, request: Request) -> Identity:
        del request
        return Identity(self.person, None, frozenset({"account"}))


@asynccontextmanager
async def _api(engine: AsyncEngine, rig: Rig, person: UUID) -> AsyncIterator[str]:
    """The marketplace's own routes about withdrawals, batches and chains."""
    settings = Settings(
        environment=Environment.DEVELOPMENT,
        database_url=SecretStr("postgresql://given@elsewhere/db"),
        secret=SecretStr("s" * 40),
    )
    app = FastAPI()
    app.include_router(router)
    install_error_handlers(app)
    app.state.services = Services(engine, settings, rig.chains, SystemClock(), OneKey(person))
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, ws="none"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await serving


async def _paid(engine: AsyncEngine, rig: Rig, person: UUID) -> withdrawals.Withdrawal:
    """Ask for a withdrawal, sign its batch as two of three, and settle it to finality."""
    clock, stop = SystemClock(), asyncio.Event()
    async with transaction(engine) as conn:
        entry, _ = await address_book.add(
            conn, person=person, chain=rig.chain, text=rig.wallet,
            forbidden=address_book.ours(rig.chains), cooling_s=0, now=clock.now(),
        )  # fmt: skip
        made, _ = await withdrawals.request(
            conn, person=person, chain=rig.chain, address=entry.address, amount=AMOUNT, key="one",
            limits=LIMITS, now=clock.now(),
        )  # fmt: skip
    settling = asyncio.create_task(
        service.settle(
            engine, rig.chains, clock, stop, settler_dir=rig.folder, which=[rig.chain],
            schedule=Schedule(tick_s=0.05, standby_s=0.1),
        )
    )  # fmt: skip
    asked = await commands.plan(engine, clock, rig.chain, asked_by="ada", wait_s=60)
    assert asked.batch_id is not None, asked.outcome
    export = rig.folder / "export.json"
    export.write_bytes(await commands.export(engine, asked.batch_id))
    for keystore in rig.keystores[:2]:
        _, approval = commands.sign(
            export, keystore, chains_file=rig.chains_file, passphrase=PASSPHRASE, limit=AMOUNT,
            recipients=frozenset({rig.wallet}),
        )  # fmt: skip
        await commands.approve(engine, rig.chains, clock, approval.read_bytes(), pushed_by="bo")
    async with asyncio.timeout(60):
        while (await commands.show(engine, asked.batch_id))[0].status is not Payout.FINAL:
            await rig.hurry()
            await asyncio.sleep(0.05)
    stop.set()
    await settling
    return made


async def test_the_operator_proves_a_payout_against_the_chain_itself(
    engine: AsyncEngine, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOLLWAY_API_KEY", "sk-any")
    person, folder = await a_person(engine), rig.folder / "node"
    await earn(engine, person, 100, rig.chain)
    made = await _paid(engine, rig, person)

    async def verify(*more: str) -> Result:
        command = ["payouts", "verify", str(made.id), "--rpc", rig.rpc.url, "--data-dir", str(folder), *more]
        return await asyncio.to_thread(CliRunner().invoke, node_app, command)

    async with _api(engine, rig, person) as api:
        config.write_settings(folder, node_id="n1", api=api, nats_url="nats://127.0.0.1:1")
        told = await verify("--json")
        assert told.exit_code == 0, told.output
        shown = await verify()
    found = json.loads(told.stdout)
    assert (found["is_included"], found["is_on_chain"]) == (True, True)
    assert "paid and final" in shown.stdout

    # The same transaction proves nothing else.
    is_base = rig.chain is Chain.BASE
    usdc = rig.chains.base.usdc if is_base else rig.chains.solana.usdc_mint
    paid = Expected(rig.chain.value, usdc, rig.escrow, rig.wallet, AMOUNT.n, found["batch"]["tx"])
    assert await is_paid_on_chain(rig.rpc.url, paid)
    others: list[dict[str, object]] = [
        {"amount_micro": AMOUNT.n + 1}, {"address": rig.new_wallet(1)}, {"usdc": rig.new_wallet(2)},
    ]  # fmt: skip
    if is_base:  # on Solana several payouts to one wallet add up
        others += [
            {"amount_micro": AMOUNT.n - 1}, {"escrow": rig.new_wallet(3)}, {"tx": "0x" + "ab" * 32},
        ]  # fmt: skip
    for other in others:
        assert not await is_paid_on_chain(rig.rpc.url, replace(paid, **other)), other
