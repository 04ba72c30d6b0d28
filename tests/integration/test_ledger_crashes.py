"""Gateways, posters and PostgreSQL killed with SIGKILL at every commit: nothing overspent, nothing lost."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import accounts, leases, templates
from marketplace.ledger.accounts import ensure_account, read_balance
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.ledger.reconcile import prove
from marketplace.platform import database
from marketplace.platform.embedded_postgres import EmbeddedPostgres
from marketplace.platform.errors import ServerFault

WORKER = Path(__file__).with_name("ledger_worker.py")
COST = 1_000_000
BALANCE = 30_000 * COST
POINTS = (
    "lane.claim",
    "lane.commit",
    "lease_keeper._authorise_beyond",
    "lease_keeper._extend",
    "lease_keeper._fetch",
    "lease_keeper._give_back",
    "lease_keeper._reap",
    "lease_keeper._renew_all",
    "lease_keeper._return_excess",
    "lease_keeper._revive",
)
"""Every function of the ledger that commits; `test_no_commit_is_left_out` keeps the list complete."""
PHASES = ("before", "sent", "after")


async def start(engine: AsyncEngine, balance: int) -> tuple[int, int]:
    async with engine.begin() as conn:
        await post_transfer(conn, templates.top_up(person="ann", amount=Nano(balance), ref="start"))
        buyer = await ensure_account(conn, accounts.buyer("ann"))
        return buyer, await ensure_account(conn, accounts.operator_earnings("olga"))


def a_worker(
    url: str, people: tuple[int, int], *crash: str, cost: int = COST, seconds: int = 0
) -> subprocess.Popen[str]:
    argv = [sys.executable, str(WORKER), url, *map(str, people), str(cost), str(seconds), *crash]
    root = WORKER.parent.parent.parent
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


def died_at(said: str) -> list[str]:
    return sorted(line.split()[2] for line in said.splitlines() if line.startswith("dying at"))


async def reap_now(engine: AsyncEngine) -> None:
    """As after the dead workers' time."""
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE leases SET expires = now() - interval '1 minute'"))
        await leases.reap(conn)


async def drain(engine: AsyncEngine, url: str, people: tuple[int, int], *, workers: int) -> dict[UUID, int]:
    """What is left is taken by so many processes at once, to the last nano."""
    await reap_now(engine)
    async with engine.connect() as conn:
        left = await read_balance(conn, accounts.buyer("ann"))
    assert left is not None
    cost = left.available.n // 40 + 1
    return (await outcome(*(a_worker(url, people, cost=cost) for _ in range(workers))))[0]


async def outcome(*workers: subprocess.Popen[str]) -> tuple[dict[UUID, int], str]:
    """What was acknowledged, and what the workers said to stderr."""
    ends = await asyncio.gather(*(asyncio.to_thread(worker.communicate, None, 120) for worker in workers))
    lines = [line.split() for out, _ in ends for line in out.splitlines() if line.startswith("ack")]
    return {UUID(line[1]): int(line[2]) for line in lines if len(line) == 3}, "".join(
        said for _, said in ends
    )


async def nothing_is_lost_or_overspent(
    engine: AsyncEngine, acknowledged: dict[UUID, int], balance: int
) -> None:
    await reap_now(engine)
    async with engine.connect() as conn:
        rows = await conn.execute(text("SELECT id, amount FROM charges"))
        stored = {row.id: row.amount for row in rows}
        left = await read_balance(conn, accounts.buyer("ann"))
        loss = await read_balance(conn, accounts.LOSS)
    assert left is not None
    assert {charge: stored.get(charge) for charge in acknowledged} == acknowledged
    assert (left.posted.n, left.held.n) == (balance - sum(stored.values()), 0)
    assert left.posted.n >= 0
    assert loss is None or loss.posted.n == 0
    async with engine.connect() as conn:
        assert [check async for check in prove(conn) if not check.ok] == []


def test_no_commit_is_left_out():
    """The functions in which the ledger opens a transaction of its own are the points of these tests."""
    found = set()
    for path in Path(accounts.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.AsyncFunctionDef):
                continue
            calls = {ast.unparse(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)}
            if any(call.endswith((".begin", ".transaction")) for call in calls):
                found.add(f"{path.stem}.{node.name}")
    assert found == set(POINTS)


async def test_gateways_killed_around_a_batchs_commit_lose_and_overspend_nothing(engine, database_url):
    """The commit that matters most, in every run: before it is sent, while it is, after its answer."""
    people = await start(engine, 100 * COST)
    workers = [a_worker(database_url, people, "lane.commit", "2", phase, "-", seconds=20) for phase in PHASES]
    acknowledged, said = await outcome(*workers)
    assert died_at(said) == ["lane.commit"] * 3
    acknowledged |= await drain(engine, database_url, people, workers=1)
    await nothing_is_lost_or_overspent(engine, acknowledged, 100 * COST)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
async def test_a_gateway_killed_at_any_commit_loses_and_overspends_nothing(engine, database_url, phase):
    """One process per kind of commit, all on one account at once; then eight that live take the rest."""
    people = await start(engine, BALANCE)
    acknowledged, said = await outcome(
        *(a_worker(database_url, people, point, "1", phase, "-", seconds=30) for point in POINTS)
    )
    assert died_at(said) == list(POINTS)
    acknowledged |= await drain(engine, database_url, people, workers=8)
    await nothing_is_lost_or_overspent(engine, acknowledged, BALANCE)


@pytest.fixture
def own_server() -> Iterator[EmbeddedPostgres]:
    """A server that may be killed."""
    with tempfile.TemporaryDirectory(prefix="tollway-crash-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        server = EmbeddedPostgres(folder / "postgres")
        server.start()
        try:
            yield server
        finally:
            server.stop()


async def up_again(server: EmbeddedPostgres) -> None:
    """Start it; the dead server's last processes may still be letting go of their memory."""
    server.stop()
    async with asyncio.timeout(30):
        while True:
            try:
                await asyncio.to_thread(server.start)
            except ServerFault:
                await asyncio.sleep(0.2)
            else:
                return


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
async def test_postgresql_killed_around_any_commit_loses_and_overspends_nothing(own_server, tmp_path, phase):
    """Ten processes on one account, each of which kills the server at its kind of commit; all live on."""
    url = own_server.url("crash")
    await database.create_database(url)
    await asyncio.to_thread(database.migrate, url)
    engine = database.connect(url)
    people = await start(engine, BALANCE)
    pid_file = tmp_path / "pid"
    pid_file.write_text(str(own_server.pid))
    crashes = [(point, "1", phase, str(pid_file)) for point in POINTS]
    running = asyncio.create_task(
        outcome(*(a_worker(url, people, *crash, seconds=45) for crash in crashes)),
    )
    while not running.done():
        if not own_server.is_alive():
            await up_again(own_server)
            pid_file.write_text(str(own_server.pid))
        await asyncio.sleep(0.02)
    acknowledged, said = await running
    assert died_at(said) == list(POINTS)
    await engine.dispose()
    acknowledged |= await drain(engine, url, people, workers=8)
    await nothing_is_lost_or_overspent(engine, acknowledged, BALANCE)
    await engine.dispose()
