"""Gateways, posters and PostgreSQL killed with SIGKILL at every commit: nothing overspent, nothing lost."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    "lane._commit_by_copy",
    "lane._commit_by_steps",
    "lane._commit_in_one_call",
    "lane.claim",
    "lease_keeper._authorise_beyond",
    "lease_keeper._extend",
    "lease_keeper._give_back",
    "lease_keeper._grant",
    "lease_keeper._reap",
    "lease_keeper._renew_all",
    "lease_keeper._return_excess",
    "lease_keeper._return_idle",
    "lease_keeper._revive",
)
"""Every function of the ledger that commits; `test_no_commit_is_left_out` keeps the list complete."""
PHASES = ("before", "sent", "after")
Acknowledged = dict[UUID, int]
"""What each charge cost of which a worker said that it is durable."""
IN_EVERY_RUN = [
    *(("lane._commit_in_one_call", phase) for phase in PHASES),
    ("lane._commit_by_copy", "sent"),
    ("lane._commit_by_steps", "sent"),
]
"""The commits that matter most: a batch's."""


def at(point: str, phase: str, pid_file: str = "-") -> tuple[str, str, str, str]:
    """A worker's arguments: that point's first commit; of the one call, which prepares first, the second."""
    return point, "2" if point == "lane._commit_in_one_call" else "1", phase, pid_file


async def start(engine: AsyncEngine, balance: int) -> tuple[int, int]:
    async with engine.begin() as conn:
        await post_transfer(conn, templates.top_up(person="ann", amount=Nano(balance), ref="start"))
        buyer = await ensure_account(conn, accounts.buyer("ann"))
        return buyer, await ensure_account(conn, accounts.operator_earnings("olga"))


@dataclass(frozen=True)
class Workers:
    """Starts processes that serve `people` on the book at `url`."""

    url: str
    people: tuple[int, int]

    async def run(
        self, *crashes: Sequence[str], cost: int = COST, seconds: int = 0
    ) -> tuple[Acknowledged, str]:
        """One for each of these, until they end: what they acknowledged, and what they said to stderr."""
        ends = await asyncio.gather(*(self._run_one(*crash, cost=cost, seconds=seconds) for crash in crashes))
        lines = [line.split() for out, _ in ends for line in out.splitlines() if line.startswith("ack")]
        acknowledged = {UUID(line[1]): int(line[2]) for line in lines if len(line) == 3}
        return acknowledged, "".join(said for _, said in ends)

    async def _run_one(self, *crash: str, cost: int, seconds: int) -> tuple[str, str]:
        # Read by the loop: threads would be too few for so many, and a worker whose words nobody reads stops.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(WORKER), self.url, *map(str, self.people), str(cost), str(seconds), *crash),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=WORKER.parent.parent.parent,
        )
        try:
            async with asyncio.timeout(seconds + 120):
                out, said = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        return out.decode(), said.decode()


def died_at(said: str) -> list[str]:
    return sorted(line.split()[2] for line in said.splitlines() if line.startswith("dying at"))


async def reap_now(engine: AsyncEngine) -> None:
    """As after the dead workers' time."""
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE leases SET expires = now() - interval '1 minute'"))
        await leases.reap(conn)


async def drain(engine: AsyncEngine, workers: Workers, *, count: int) -> Acknowledged:
    """What is left is taken by so many processes at once, to the last nano."""
    await reap_now(engine)
    async with engine.connect() as conn:
        left = await read_balance(conn, accounts.buyer("ann"))
    assert left is not None
    cost = left.available.n // 40 + 1
    return (await workers.run(*[()] * count, cost=cost))[0]


async def nothing_is_lost_or_overspent(engine: AsyncEngine, acknowledged: Acknowledged, balance: int) -> None:
    await reap_now(engine)
    async with engine.connect() as conn:
        rows = (await conn.execute(text("SELECT id, buyer, amount FROM charges"))).all()
        left = await read_balance(conn, accounts.buyer("ann"))
        loss = await read_balance(conn, accounts.LOSS)
    assert left is not None
    stored = {row.id: row.amount for row in rows}
    spent = sum(row.amount for row in rows if row.buyer == left.account_id)
    assert {charge: stored.get(charge) for charge in acknowledged} == acknowledged
    assert (left.posted.n, left.held.n) == (balance - spent, 0)
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
            is_one_call = any(isinstance(n, ast.Name) and n.id == "_POST" for n in ast.walk(node))
            if is_one_call or any(call.endswith((".begin", ".transaction")) for call in calls):
                found.add(f"{path.stem}.{node.name}")
    assert found == set(POINTS)


async def test_gateways_killed_around_a_batchs_commit_lose_and_overspend_nothing(engine, database_url):
    """Before it is sent, while it is, after its answer; whichever way the batch goes."""
    workers = Workers(database_url, await start(engine, BALANCE))
    acknowledged, said = await workers.run(*(at(*point) for point in IN_EVERY_RUN), seconds=60)
    assert died_at(said) == sorted(point for point, _ in IN_EVERY_RUN), said
    await nothing_is_lost_or_overspent(engine, acknowledged, BALANCE)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", PHASES)
async def test_a_gateway_killed_at_any_commit_loses_and_overspends_nothing(engine, database_url, phase):
    """One process per kind of commit, all on one account at once; then eight that live take the rest."""
    workers = Workers(database_url, await start(engine, BALANCE))
    acknowledged, said = await workers.run(*(at(point, phase) for point in POINTS), seconds=60)
    assert died_at(said) == list(POINTS), said
    acknowledged |= await drain(engine, workers, count=8)
    await nothing_is_lost_or_overspent(engine, acknowledged, BALANCE)


@pytest.fixture
def own_server() -> Iterator[tuple[EmbeddedPostgres, Path]]:
    """A server that may be killed, and the file in which it says who it is."""
    with tempfile.TemporaryDirectory(prefix="tollway-crash-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        server = EmbeddedPostgres(folder / "postgres")
        server.start()
        try:
            yield server, folder / "postgres" / "data" / "postmaster.pid"
        finally:
            server.stop()


async def up_again(server: EmbeddedPostgres) -> None:
    """Start it; the dead server's last processes may still be letting go of their memory."""
    server.stop()
    async with asyncio.timeout(120):
        while True:
            try:
                await asyncio.to_thread(server.start)
            except ServerFault:
                await asyncio.sleep(0.2)
            else:
                return


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", PHASES)
async def test_postgresql_killed_around_any_commit_loses_and_overspends_nothing(own_server, phase):
    """A process per kind of commit on one account, each of which kills the server at its own; all live on."""
    server, pid_file = own_server
    url = server.url("crash")
    await database.create_database(url)
    await asyncio.to_thread(database.migrate, url)
    engine = database.connect(url)
    workers = Workers(url, await start(engine, BALANCE))
    crashes = [at(point, phase, str(pid_file)) for point in POINTS]
    running = asyncio.create_task(workers.run(*crashes, seconds=400))
    while not running.done():
        if not server.is_alive():
            await up_again(server)
        await asyncio.sleep(0.02)
    acknowledged, said = await running
    assert died_at(said) == list(POINTS), said
    await engine.dispose()
    acknowledged |= await drain(engine, workers, count=8)
    await nothing_is_lost_or_overspent(engine, acknowledged, BALANCE)
    await engine.dispose()
