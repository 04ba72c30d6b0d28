"""What an operator of Tollway sees of the watchers: commands, metrics, progress."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import aiohttp
import httpx
import pytest
from deposits_parts import ESCROW, QUICK, Bench, a_known_person, final, start
from fastapi import FastAPI, Request
from prometheus_client import REGISTRY
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine
from structlog.testing import capture_logs
from typer.testing import CliRunner, Result

from chain.errors import RpcUnavailable
from chain.networks import EVM_NETWORKS, SOLANA, Chain
from chain.simulated import SimulatedChain
from chain.units import Micro
from marketplace.cli_deposits import deposits_app
from marketplace.deposits import routes, service
from marketplace.deposits.alarms import halt_and_ask
from marketplace.deposits.booking import open_case
from marketplace.deposits.cursor import load_cursor
from marketplace.deposits.decisions import CASES_MAX
from marketplace.deposits.early import EarlyCredit
from marketplace.deposits.tables import chain_cursors, chain_halts, deposit_addresses, screening_decisions
from marketplace.deposits.watcher import PROGRESS_EVERY_S, STALL_S
from marketplace.platform.database import connect, transaction
from marketplace.platform.errors import SetupFault
from marketplace.platform.http import Identity, Refusal, install_error_handlers
from marketplace.platform.operations import answering_operations
from marketplace.platform.settings import load_chains, settings_environment


@pytest.fixture
def bench(engine: AsyncEngine) -> Bench:
    return Bench(engine, SimulatedChain(chain=Chain.BASE))


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, {"chain": "base", **labels}) or 0.0


async def test_metrics_tell_head_final_lag_halt_reorgs_and_credits(bench: Bench) -> None:
    _, address = await bench.a_buyer()
    watcher = await start(bench)
    reorgs, credited = metric("tollway_chain_reorgs_total"), metric("tollway_deposits_credited_micro_total")
    for _ in range(4):
        bench.node.mine()
    bench.node.finalize(behind=2)
    await bench.settle(watcher)
    assert metric("tollway_chain_head_height") == 4
    assert metric("tollway_chain_final_height") == 2
    assert metric("tollway_chain_final_lag_blocks") == 0
    bench.node.drop(1)
    bench.node.mine()
    bench.node.mine(bench.pays(address, 7))
    await bench.settle(watcher)
    assert metric("tollway_chain_reorgs_total") == reorgs + 1
    for _ in range(2 * QUICK.blocks_per_tick):
        bench.node.mine()
    bench.node.finalize()
    await watcher.tick()  # one step of several: the lag shows
    assert metric("tollway_chain_final_lag_blocks") > 0
    await bench.settle(watcher)
    assert metric("tollway_chain_final_lag_blocks") == 0
    assert metric("tollway_deposits_credited_micro_total") == credited + 7_000_000
    assert metric("tollway_chain_halted") == 0
    bench.node.drop(2)  # final ones: the chain broke its word
    bench.node.mine()
    bench.node.mine()
    bench.node.finalize()
    await bench.settle(watcher)
    await watcher.tick()
    assert metric("tollway_chain_halted") == 1


async def test_a_lagging_node_and_a_regressed_final_are_counted_and_are_no_reorg(bench: Bench) -> None:
    _, address = await bench.a_buyer()
    watcher = await start(bench)
    bench.node.mine(bench.pays(address, 7))
    bench.node.mine()
    await bench.settle(watcher)
    before = {
        kind: metric("tollway_chain_oddities_total", kind=kind) for kind in ("lagging", "final_regressed")
    }
    reorgs = metric("tollway_chain_reorgs_total")
    bench.node.head_lag = 2  # the node has not heard of the newest blocks
    await bench.settle(watcher)
    assert metric("tollway_chain_oddities_total", kind="lagging") == before["lagging"] + 1
    assert list((await bench.statuses()).values()) == ["seen"]
    bench.node.head_lag = 0
    bench.node.finalize()
    await bench.settle(watcher)
    bench.node.finalize(behind=1)
    await bench.settle(watcher)
    assert metric("tollway_chain_oddities_total", kind="final_regressed") == before["final_regressed"] + 1
    assert metric("tollway_chain_reorgs_total") == reorgs
    assert list((await bench.statuses()).values()) == ["final"]


async def test_finality_that_stalls_is_said_once_and_nothing_is_lent_on_it(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = await start(bench, early=EarlyCredit(Micro(50_000_000), Micro(50_000_000)))
    before = metric("tollway_chain_oddities_total", chain="base", kind="final_stalled")
    bench.clock.at += timedelta(seconds=STALL_S / 2)
    bench.node.mine(bench.pays(address, 6))
    await bench.settle(watcher)
    assert await bench.buyer(person) == 6_000_000_000  # lent
    bench.clock.at += timedelta(seconds=STALL_S)
    bench.node.mine(bench.pays(address, 7))
    await bench.settle(watcher)
    assert await bench.buyer(person) == 6_000_000_000
    assert metric("tollway_chain_oddities_total", chain="base", kind="final_stalled") == before + 1
    assert metric("tollway_chain_final_unmoved_seconds", chain="base") > STALL_S
    bench.node.finalize()
    bench.node.mine(bench.pays(address, 8))
    await bench.settle(watcher)
    assert await bench.buyer(person) == 21_000_000_000  # credited, and lent again
    assert metric("tollway_chain_final_unmoved_seconds", chain="base") < STALL_S
    await bench.books_hold()


async def test_a_watcher_after_days_shows_how_far_it_is(bench: Bench) -> None:
    watcher = await start(bench)
    for _ in range(40):
        bench.node.mine()
    bench.node.finalize()
    with capture_logs() as logs:
        while await watcher.tick():
            bench.clock.at += timedelta(seconds=PROGRESS_EVERY_S)
    told = [line for line in logs if line["event"] == "catching up"]
    assert len(told) >= 5
    heights = [line["height"] for line in told]
    assert heights == sorted(set(heights))
    assert {line["target"] for line in told} == {40}
    assert all(line["blocks_per_s"] > 0 and line["left_s"] > 0 for line in told)


async def test_a_first_start_from_a_chosen_height_reads_everything_above_it(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    bench.node.mine(bench.pays(address, 5))
    bench.node.mine(bench.pays(address, 6))
    bench.node.mine(bench.pays(address, 7))
    bench.node.finalize()
    watcher = bench.a_watcher()
    watcher.start_height = 1
    await bench.settle(watcher)
    assert await bench.buyer(person) == 13_000_000_000
    watcher = bench.a_watcher()
    watcher.start_height = 0  # it counts at the very first start only
    await bench.settle(watcher)
    assert await bench.buyer(person) == 13_000_000_000


async def test_a_provider_that_does_not_answer_is_counted_by_name(tmp_path: Path) -> None:
    chains = load_chains(chains_file(tmp_path))
    dead = chains.base.model_copy(update={"rpc": ("http://127.0.0.1:1", "http://127.0.0.1:2")})
    chains = chains.model_copy(update={"base": dead})
    before = metric("tollway_chain_provider_faults_total", provider="base-2", kind="failed")
    async with service.open_reader(Chain.BASE, chains) as reader:
        with pytest.raises(RpcUnavailable):
            await reader.final()
    assert metric("tollway_chain_provider_faults_total", provider="base-2", kind="failed") == before + 1


async def test_operations_are_answered_over_http(engine: AsyncEngine) -> None:
    async with (
        answering_operations(engine, host="127.0.0.1", port=0) as port,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http,
    ):
        async with http.get("/metrics") as answer:
            assert "tollway_chain_final_lag_blocks" in await answer.text()
        async with http.get("/healthz") as answer:
            assert answer.status == 200
        async with http.get("/readyz") as answer:
            assert (answer.status, await answer.json()) == (200, {"ready": True, "reasons": []})
        with pytest.raises(SetupFault, match="METRICS_PORT"):
            async with answering_operations(engine, host="127.0.0.1", port=port):
                pass
    async with answering_operations(engine, host="127.0.0.1", port=None) as nowhere:
        assert nowhere == 0


async def test_a_process_without_its_database_is_not_ready() -> None:
    engine = connect("postgresql+asyncpg://nobody@127.0.0.1:1/nothing")
    async with (
        answering_operations(engine, host="127.0.0.1", port=0) as port,
        aiohttp.ClientSession() as http,
        http.get(f"http://127.0.0.1:{port}/readyz") as answer,
    ):
        assert answer.status == 503
    await engine.dispose()


# ── commands ──────────────────────────────────────────────────────────────────────────────────────────


def chains_file(folder: Path) -> Path:
    """Addresses nobody has: these commands ask no chain."""

    def evm(chain: Chain) -> dict[str, object]:
        return {
            "rpc": [],
            "chain_id": EVM_NETWORKS[chain].chain_id,
            "usdc": EVM_NETWORKS[chain].usdc,
            "escrow": "0x" + "e" * 40,
            "forwarder_factory": "0x" + "f" * 40,
            "multi_send": "0x" + "d" * 40,
            "signers": [],
            "threshold": 2,
        }

    nobody = "1" * 32
    solana = dict.fromkeys(("multisig", "escrow", "nonce_account", "gas_payer"), nobody)
    config = {
        "ethereum": evm(Chain.ETHEREUM),
        "base": evm(Chain.BASE),
        "solana": solana | {"rpc": [], "usdc_mint": SOLANA.usdc_mint, "signers": [], "threshold": 2},
    }
    path = folder / "chains.json"
    path.write_text(json.dumps(config))
    return path


def environment(database_url: str, folder: Path) -> dict[str, str]:
    settings = {"database_url": database_url, "secret": "s" * 40, "chains_file": str(chains_file(folder))}
    return settings_environment(settings) | {"COLUMNS": "300"}


def run(database_url: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "marketplace", "deposits", *arguments],
        env=environment(database_url, folder),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_a_person_explains_halts_and_resumes_by_command(
    bench: Bench, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, address = await bench.a_buyer()
    watcher = await start(bench)
    payment = bench.pays(address, 7, tx="0x" + "ab" * 32)
    await final(bench, watcher, payment)

    for name, value in environment(database_url, tmp_path).items():
        monkeypatch.setenv(name, value)

    async def command(*arguments: str) -> Result:
        """Without a process of its own, which takes a second to start: the first shows that it does."""
        return await asyncio.to_thread(CliRunner().invoke, deposits_app, arguments)

    said = await asyncio.to_thread(run, database_url, tmp_path, "explain", payment.tx, "--chain", "base")
    assert said.returncode == 0, said.stderr
    assert "credited" in said.stdout
    assert f"7.000000 USDC to {address}" in said.stdout
    why = ("--as", "ann", "--reason", "a drill")
    assert (await command("halt", "--chain", "base", *why)).exit_code == 0
    bench.node.mine(bench.pays(address, 50))
    bench.node.finalize()
    await bench.settle(watcher)
    async with transaction(bench.engine) as conn:
        cursor = await load_cursor(conn, Chain.BASE)
        assert cursor is not None
        assert cursor.halt is not None
        assert (cursor.halt.by, cursor.halt.reason) == ("ann", "a drill")
        assert (await conn.scalar(select(chain_cursors.c.final_height))) < bench.node.final_height
    assert (await command("resume", "--chain", "base", *why)).exit_code == 0
    again = await command("resume", "--chain", "base", *why)
    assert again.exit_code == 1
    assert "not halted" in again.stderr
    await bench.settle(watcher)
    async with transaction(bench.engine) as conn:
        assert (await conn.scalar(select(chain_cursors.c.final_height))) == bench.node.final_height
        journal = await conn.execute(
            select(chain_halts.c.action, chain_halts.c.actor).order_by(chain_halts.c.id)
        )
        assert [tuple(row) for row in journal] == [("halt", "ann"), ("resume", "ann")]


async def many_cases(bench: Bench) -> None:
    """A large one, a halt, and then as many small ones as a page has."""
    watcher = await start(bench)
    await final(bench, watcher, bench.pays(ESCROW, 5000, tx="0xlarge"))
    async with transaction(bench.engine) as conn:
        await halt_and_ask(conn, Chain.BASE, actor="watcher", reason="a drill", now=bench.clock.now())
        small = {"kind": "no_reference", "detail": "5.000000 USDC"}
        for number in range(CASES_MAX):
            await open_case(conn, Chain.BASE, key=f"0x{number}:0", now=bench.clock.now(), **small)


async def test_a_person_pages_through_cases_by_command(
    bench: Bench, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(database_url, tmp_path).items():
        monkeypatch.setenv(name, value)

    async def listed(*arguments: str) -> str:
        done = await asyncio.to_thread(CliRunner().invoke, deposits_app, ["cases", *arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    await many_cases(bench)
    newest = await listed()
    assert newest.count("no_reference") == CASES_MAX
    assert "0xlarge:0" not in newest
    before = re.search(r"--before (\S+)", newest)
    assert before is not None
    rest = await listed("--before", before[1])
    assert ("0xlarge:0" in rest, "chain_halted" in rest, "--before" in rest) == (True, True, False)
    halts = await listed("--kind", "chain_halted")
    assert (halts.count("chain_halted"), "no_reference" in halts) == (1, False)


async def test_cases_are_listed_as_json_and_the_next_page_by_the_last_id(
    bench: Bench, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(database_url, tmp_path).items():
        monkeypatch.setenv(name, value)

    async def listed(*arguments: str) -> list[dict[str, str]]:
        command = ["cases", "--json", *arguments]
        done = await asyncio.to_thread(CliRunner().invoke, deposits_app, command, env={"COLUMNS": "80"})
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]

    await many_cases(bench)
    newest = await listed()
    assert len(newest) == CASES_MAX
    rest = await listed("--before", newest[-1]["id"])
    assert [row["kind"] for row in rest] == ["chain_halted", "no_reference"]
    assert list(rest[1]) == ["id", "at", "kind", "chain", "key", "detail"]
    assert (rest[1]["chain"], rest[1]["key"]) == ("base", "0xlarge:0")


@asynccontextmanager
async def admins_client(bench: Bench, person: UUID) -> AsyncIterator[httpx.AsyncClient]:
    class Admin:
        async def authenticate(self, _: Request) -> Identity:
            return Identity(person, None, frozenset({"account", "admin"}))

    app = FastAPI()
    app.include_router(routes.router)
    install_error_handlers(app)
    app.state.services = SimpleNamespace(engine=bench.engine, authenticator=Admin(), clock=bench.clock)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://tollway/api/admin") as client:
        yield client


async def test_cases_are_listed_in_pages_and_by_kind_over_http(bench: Bench) -> None:
    await many_cases(bench)
    async with admins_client(bench, UUID(int=1)) as client:
        keys, before = [], {}
        for _ in range(3):
            page = (await client.get("/deposit-cases", params={"limit": 34, **before})).json()
            keys += [case["key"] for case in page["data"]]
            before = {"before": page["next_before"]}
        assert (len(keys), len(set(keys)), before) == (CASES_MAX + 2, CASES_MAX + 2, {"before": None})
        assert keys[-1] == "0xlarge:0"
        (halt,) = (await client.get("/deposit-cases", params={"kind": "chain_halted"})).json()["data"]
        assert halt["kind"] == "chain_halted"


async def test_one_person_leaves_the_others_their_status_streams(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ann, _), (bob, _) = await bench.a_buyer(), await bench.a_buyer()
    monkeypatch.setattr(routes, "STREAMS_MAX", routes.STREAMS_OF_A_PERSON_MAX + 1)
    services = SimpleNamespace(engine=bench.engine, clock=bench.clock)
    async with AsyncExitStack() as open_ones:

        async def opened(person: UUID) -> None:
            identity = Identity(person, None, frozenset({"account"}))
            answer = await routes.stream_deposits(identity, services)
            asking = asyncio.create_task(anext(answer.body_iterator))
            await asyncio.sleep(0.01)

            async def close() -> None:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

            open_ones.push_async_callback(close)

        for _ in range(routes.STREAMS_OF_A_PERSON_MAX):
            await opened(ann)
        with pytest.raises(Refusal) as refused:
            await opened(ann)
        assert (refused.value.status, refused.value.code) == (429, "too_many_streams")
        await opened(bob)
        with pytest.raises(Refusal) as refused:
            await opened(bob)
        assert refused.value.status == 503
    assert routes._open_streams.total() == 0


async def test_a47_no_admin_gives_a_deposit_to_himself(bench: Bench) -> None:
    watcher = await start(bench)
    await final(bench, watcher, bench.pays(ESCROW, 5, tx="0xstray"))
    admin, other = await a_known_person(bench), await a_known_person(bench)
    async with admins_client(bench, admin) as client:
        decision = {"chain": "base", "key": "0xstray:0", "reason": "it is mine"}
        own = await client.post("/deposit-decisions", json=decision | {"person_id": str(admin)})
        assert (own.status_code, own.json()["error"]["code"]) == (403, "own_case")
        assert await bench.buyer(admin) == 0
        given = await client.post("/deposit-decisions", json=decision | {"person_id": str(other)})
        assert given.status_code == 204, given.text
    assert await bench.buyer(other) == 5_000_000_000


async def test_a_person_retires_an_address_and_screens_a_sender_by_command(
    bench: Bench, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(database_url, tmp_path).items():
        monkeypatch.setenv(name, value)
    why = ("--as", "ann", "--reason", "a drill")

    async def command(*arguments: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, deposits_app, [*arguments, *why])

    person, address = await bench.a_buyer()
    watcher = await start(bench)
    sender = "0xd8dA6BF26964aF9D7eEd9e03E53415D37aA96045"  # as readers spell it
    assert (await command("screen", sender.lower())).exit_code == 0
    await final(bench, watcher, bench.pays(address, 7, sender=sender))
    assert (await command("screen", sender.lower(), "--lift")).exit_code == 0
    await final(bench, watcher, bench.pays(address, 8, sender=sender))
    assert await bench.buyer(person) == 8_000_000_000
    done = await command("retire", str(person), "--chain", "base")
    assert (done.exit_code, address in done.stdout) == (0, True)
    assert (await command("retire", str(person), "--chain", "ethereum")).exit_code == 1  # the same one
    await final(bench, watcher, bench.pays(address, 9))
    assert await bench.buyer(person) == 8_000_000_000
    assert sorted(await bench.cases()) == ["retired_address", "screened_sender"]
    async with transaction(bench.engine) as conn:
        rows = await conn.execute(select(screening_decisions).order_by(screening_decisions.c.id))
        journal = [(row.address, row.action, row.actor, row.reason) for row in rows]
        said = await conn.execute(select(deposit_addresses.c.retired_by, deposit_addresses.c.retire_reason))
        assert [tuple(row) for row in said] == [("ann", "a drill")]
    assert journal == [(sender, "screen", "ann", "a drill"), (sender, "lift", "ann", "a drill")]
    await bench.books_hold()


async def test_halting_one_chain_leaves_the_others(engine: AsyncEngine) -> None:
    base, ethereum = (
        Bench(engine, SimulatedChain(chain=Chain.BASE)),
        Bench(engine, SimulatedChain(chain=Chain.ETHEREUM)),
    )
    person, address = await base.a_buyer()
    watchers = [await start(base), await start(ethereum)]
    base.node.mine()
    base.node.finalize()
    await base.settle(watchers[0])
    base.node.drop(1)
    base.node.mine(base.pays(address, 5))
    base.node.finalize()
    await final(ethereum, watchers[1], ethereum.pays(address, 6, tx="0xon-ethereum"))
    await base.settle(watchers[0])
    assert await ethereum.buyer(person) == 6_000_000_000
