"""Gateways, posters and PostgreSQL killed with SIGKILL at every commit: nothing overspent, nothing lost."""

from __future__ import annotations

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

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("ledger_worker.py")
COST = 1_000_000
COMMITS = 8
"""A worker draining twelve charges' worth of money commits at least so often: lease, the lane's accounts,
batches, refills; `test_the_points_are_all_there` counts them."""


async def start(engine: AsyncEngine, balance: int) -> tuple[int, int]:
    async with engine.begin() as conn:
        await post_transfer(conn, templates.top_up(person="ann", amount=Nano(balance), ref="start"))
        buyer = await ensure_account(conn, accounts.buyer("ann"))
        return buyer, await ensure_account(conn, accounts.operator_earnings("olga"))


def a_worker(url: str, people: tuple[int, int], *crash: str) -> subprocess.Popen[str]:
    argv = [sys.executable, str(WORKER), url, *map(str, people), str(COST), *crash]
    root = WORKER.parent.parent.parent
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


async def outcome(*workers: subprocess.Popen[str]) -> tuple[dict[UUID, int], str]:
    """What was acknowledged, and what the workers said to stderr."""
    ends = await asyncio.gather(*(asyncio.to_thread(worker.communicate, None, 90) for worker in workers))
    lines = [line.split() for out, _ in ends for line in out.splitlines() if line.startswith("ack")]
    return {UUID(line[1]): int(line[2]) for line in lines if len(line) == 3}, "".join(
        said for _, said in ends
    )


async def nothing_is_lost_or_overspent(
    engine: AsyncEngine, acknowledged: dict[UUID, int], balance: int
) -> None:
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE leases SET expires = now() - interval '1 minute'"))
        await leases.reap(conn)  # as after their time
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


async def test_the_points_are_all_there(engine, database_url):
    """An undisturbed worker gets past every commit that the tests below choose."""
    people = await start(engine, 12 * COST)
    acknowledged, said = await outcome(a_worker(database_url, people, str(COMMITS), "nothing"))
    assert "dying" in said
    assert len(acknowledged) == 12
    await nothing_is_lost_or_overspent(engine, acknowledged, 12 * COST)


@pytest.mark.parametrize("phase", ["before", "sent", "after"])
async def test_a_gateway_killed_at_any_commit_loses_and_overspends_nothing(engine, database_url, phase):
    """One worker per commit, all draining one account at once; then one that lives takes the rest."""
    people = await start(engine, 60 * COST)
    workers = [a_worker(database_url, people, str(n), phase) for n in range(1, COMMITS + 1)]
    acknowledged, said = await outcome(*workers)
    assert said.count("dying") >= 4  # the others found the account drained first
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE leases SET expires = now() - interval '1 minute'"))
        await leases.reap(conn)
    more, _ = await outcome(a_worker(database_url, people))
    await nothing_is_lost_or_overspent(engine, acknowledged | more, 60 * COST)


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


@pytest.mark.parametrize("phase", ["before", "sent", "after"])
async def test_postgresql_killed_around_a_commit_loses_and_overspends_nothing(own_server, phase):
    """The server dies around one commit after the other, under gateways draining one account."""
    url = own_server.url("crash")
    await database.create_database(url)
    await asyncio.to_thread(database.migrate, url)
    engine = database.connect(url)
    balance = 300 * COST
    people = await start(engine, balance)
    acknowledged: dict[UUID, int] = {}
    for commit in (1, 2, 4):
        workers = [a_worker(url, people, str(commit), f"{phase}:{own_server.pid}"), a_worker(url, people)]
        running = asyncio.create_task(outcome(*workers))
        async with asyncio.timeout(60):
            while own_server.is_alive() and not running.done():
                await asyncio.sleep(0.02)
        for worker in workers:
            worker.kill()
        acknowledged |= (await running)[0]
        await engine.dispose()
        await up_again(own_server)
        async with engine.begin() as conn:
            await conn.execute(text("UPDATE leases SET expires = now() - interval '1 minute'"))
            await leases.reap(conn)
    acknowledged |= (await outcome(*(a_worker(url, people) for _ in range(8))))[0]
    await nothing_is_lost_or_overspent(engine, acknowledged, balance)
    await engine.dispose()
