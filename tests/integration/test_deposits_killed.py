"""A watcher's process, killed −9 at every commit it makes: before it, during it, after it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from deposits_nodes import LAG, EvmTown, a_base_town, start_base
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.localnet.evm import Anvil, EvmDeployment
from marketplace.notices.tables import notices
from marketplace.platform.database import transaction

pytestmark = [pytest.mark.slow, pytest.mark.chains]

WORKER = Path(__file__).with_name("deposits_worker.py")
COMMITS = 12
"""A run makes so many: four ranges of final blocks with three each (state, alarms, books), the head's two."""


@pytest.fixture(scope="module")
def anvil(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Anvil, EvmDeployment]]:
    node, there = asyncio.run(start_base(tmp_path_factory.mktemp("killed")))
    yield node, there
    asyncio.run(node.stop())


@pytest.fixture
async def base(engine: AsyncEngine, anvil: tuple[Anvil, EvmDeployment]) -> AsyncIterator[EvmTown]:
    async with a_base_town(engine, anvil) as town:
        yield town


async def run_worker(database_url: str, town: EvmTown, commit: int, phase: str) -> int:
    arguments = (database_url, town.rpc.url, town.escrow, str(commit), phase)
    process = await asyncio.create_subprocess_exec(sys.executable, str(WORKER), *arguments)
    return await process.wait()


@pytest.mark.parametrize("phase", ["before", "sent", "after"])
@pytest.mark.parametrize("commit", range(1, COMMITS + 1))
async def test_a_watcher_killed_at_a_commit_credits_once(
    base: EvmTown, database_url: str, commit: int, phase: str
) -> None:
    small, large = await base.pay(2), await base.pay(4)
    await base.mine(LAG)
    waits = await base.pay(9)  # seen, not final
    assert await run_worker(database_url, base, commit, phase) == -signal.SIGKILL
    await base.books_hold()  # whatever was committed is whole
    assert await base.micro() in (0, 6_000_000)
    await base.settle()
    assert await base.statuses() == {small: "final", large: "final", waits: "seen"}
    assert await base.micro() == 6_000_000
    async with transaction(base.engine) as conn:
        assert await conn.scalar(select(func.count()).select_from(notices)) == 1
    await base.books_hold()


async def test_a_worker_that_is_not_killed_ends(base: EvmTown, database_url: str) -> None:
    """So that the test above means something, and the number of commits is known."""
    await base.pay(6)
    await base.mine(LAG)
    await base.pay(9)
    assert await run_worker(database_url, base, 1_000, "before") == 0
    assert await base.micro() == 6_000_000
