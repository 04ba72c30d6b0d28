"""A watcher in a process of its own, for tests that kill it.

    python deposits_worker.py DATABASE_URL RPC_URL ESCROW COMMIT PHASE

Ticks until there is nothing to do, then prints `done`.  Kills itself with SIGKILL at its COMMIT-th commit:
`before` it is sent, `sent` and unanswered, or `after` the answer.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from asyncpg.transaction import Transaction

from chain.evm.reader import EvmReader
from chain.evm.rpc import JsonRpc
from chain.networks import BASE, Chain
from marketplace.deposits.booking import Rules
from marketplace.deposits.watcher import Pace, Watcher
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import connect


def die_at_commit(wanted: int, phase: str) -> None:
    """Patch the driver: every commit goes through this one method."""
    real, seen = Transaction.commit, 0

    async def commit(self: Any) -> None:
        nonlocal seen
        seen += 1
        if seen != wanted:
            await real(self)
            return
        if phase == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if phase == "sent":
            sending = asyncio.ensure_future(real(self))
            await asyncio.sleep(0)  # the bytes are with the kernel now
            os.kill(os.getpid(), signal.SIGKILL)
            await sending
        await real(self)
        os.kill(os.getpid(), signal.SIGKILL)

    Transaction.commit = commit  # type: ignore[method-assign]


async def work(database_url: str, rpc_url: str, escrow: str) -> None:
    engine = connect(database_url)
    async with JsonRpc(rpc_url) as rpc:
        rules = Rules(Chain.BASE, escrow, 5_000_000)
        watcher = Watcher(rules, EvmReader(BASE, rpc), engine, SystemClock(), pace=Pace(blocks_per_tick=4))
        while await watcher.tick():
            pass
    await engine.dispose()
    print("done")


if __name__ == "__main__":
    die_at_commit(int(sys.argv[4]), sys.argv[5])
    asyncio.run(work(*sys.argv[1:4]))
