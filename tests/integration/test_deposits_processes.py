"""`tollway watch` as processes: two of them at once, killed −9 again and again; every deposit counts once."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from deposits_nodes import chains_file
from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.evm.reader import EvmReader
from chain.evm.rpc import JsonRpc
from chain.localnet import evm as localnet
from chain.localnet import settings as localnet_settings
from chain.localnet.evm import Anvil, EvmDeployment
from chain.networks import BASE
from chain.units import Micro
from marketplace.deposits.reconcile import check_chain
from marketplace.deposits.tables import chain_cursors, deposit_addresses, deposits
from marketplace.ledger import accounts
from marketplace.ledger.accounts import read_balance
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction
from marketplace.platform.settings import settings_environment

pytestmark = [pytest.mark.slow, pytest.mark.chains, pytest.mark.timeout(180)]

OWNERS = [bytes([i]) * 32 for i in (1, 2, 3)]
SCRIPT = "from marketplace.cli import main; main()"


@pytest.fixture
async def base(tmp_path: Path) -> AsyncIterator[tuple[JsonRpc, EvmDeployment]]:
    settings = localnet_settings.read().evm(BASE)
    async with await Anvil.start(BASE, settings, tmp_path) as node, JsonRpc(node.url) as rpc:
        there = await localnet.deploy(rpc, BASE, settings, [localnet.address_of(key) for key in OWNERS])
        yield rpc, there


def start_watcher(database_url: str, chains: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = settings_environment(
        {
            "environment": "development",
            "database_url": database_url,
            "secret": "x" * 40,
            "chains_file": str(chains),
        }
    )
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, "watch", "base"], env=environment, stdout=sink, stderr=sink
        )


async def test_killed_watchers_and_standbys_credit_every_deposit_once(
    engine: AsyncEngine, database_url: str, base: tuple[JsonRpc, EvmDeployment], tmp_path: Path
) -> None:
    rpc, there = base
    chance = random.Random(4)
    person, address = uuid.uuid4(), localnet.address_of(os.urandom(32))
    async with transaction(engine) as conn:
        await conn.execute(
            insert(deposit_addresses).values(
                person_id=person,
                chain_family="evm",
                address=address,
                watched=address,
                salt=person.bytes * 2,
                created_at=SystemClock().now(),
            )
        )
    chains, log = chains_file(tmp_path, rpc.url, there), tmp_path / "watch.log"

    async def started() -> bool:
        async with transaction(engine) as conn:
            return bool(await conn.scalar(select(func.count()).select_from(chain_cursors)))

    async def credited() -> int:
        async with transaction(engine) as conn:
            found = await read_balance(conn, accounts.buyer(str(person)))
        return found.posted.n // 1000 if found else 0

    running = [start_watcher(database_url, chains, log) for _ in range(2)]
    paid = 0
    try:
        async with asyncio.timeout(150):
            while not await started():
                await asyncio.sleep(0.05)
            for _ in range(3):
                for _ in range(3):
                    amount = chance.randint(5_000_000, 9_000_000)
                    await localnet.fund(rpc, BASE, address, usdc=Micro(amount))
                    paid += amount
                    await asyncio.sleep(chance.random() * 0.3)
                victim = running.pop(0)  # the one that works; the standby takes over
                victim.kill()
                victim.wait()
                running.append(start_watcher(database_url, chains, log))
            await localnet.mine(rpc, localnet_settings.read().evm(BASE).finality_lag_blocks + 1)
            while await credited() < paid:
                assert all(process.poll() is None for process in running), log.read_text()[-2000:]
                await asyncio.sleep(0.1)
            await asyncio.sleep(1)
            assert await credited() == paid
            async with transaction(engine) as conn:
                assert await conn.scalar(select(func.count()).select_from(deposits)) == 9
            for result in await check_chain(engine, EvmReader(BASE, rpc), there.safe, patience_s=10):
                assert result.is_equal, result
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    assert [process.returncode for process in running] == [0, 0], log.read_text()[-2000:]
