"""A gateway's money in a process of its own, for tests that kill it: leases, a poster, no HTTP.

    python ledger_worker.py URL BUYER OPERATOR COST [COMMIT PHASE]

Prints `ack <charge id> <cost>` once a charge is durable, `done` at the end.  With COMMIT and PHASE it kills
itself with SIGKILL at its COMMIT-th commit (0: never): `before` it is sent, `sent` and unanswered, or `after`
the answer; PHASE may also kill the PostgreSQL server whose pid is appended to it (`sent:1234`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import Any
from uuid import uuid4

from asyncpg.transaction import Transaction

from marketplace.ledger.charges import Charge
from marketplace.ledger.errors import InsufficientFunds, LedgerFault
from marketplace.ledger.ids import uuid7
from marketplace.ledger.lease_keeper import LeaseKeeper
from marketplace.ledger.money import Nano, split
from marketplace.ledger.poster import Poster
from marketplace.platform.database import connect


def die_at_commit(wanted: int, phase: str) -> None:
    """Patch the driver: every commit of the ledger goes through this one method."""
    real, seen = Transaction.commit, 0
    when, _, server = phase.partition(":")
    victim = int(server) if server else os.getpid()

    async def commit(self: Any) -> None:
        nonlocal seen
        seen += 1
        if seen != wanted:
            await real(self)
            return
        print(f"dying at commit {seen} {phase}", file=sys.stderr, flush=True)
        if when == "before":
            os.kill(victim, signal.SIGKILL)
        if when == "sent":
            sending = asyncio.ensure_future(real(self))
            await asyncio.sleep(0)  # the bytes are with the kernel now
            os.kill(victim, signal.SIGKILL)
            await sending
            return
        await real(self)
        if when == "after":
            os.kill(victim, signal.SIGKILL)

    Transaction.commit = commit  # type: ignore[method-assign]


async def serve(url: str, buyer: int, operator: int, cost: int, patience_s: float) -> None:
    engine = connect(url, pool_size=4)
    started = time.monotonic()
    async with (
        LeaseKeeper(engine, worker=f"w-{uuid4()}", ttl_ms=3_000, slice_max=Nano(20 * cost)) as keeper,
        Poster(engine, settle=keeper.settle, patience_s=patience_s) as poster,
    ):
        while time.monotonic() < started + 3 * patience_s:
            try:
                hold = await keeper.authorise(buyer, Nano(2 * cost), minimum=Nano(1))
            except InsufficientFunds:
                break
            except LedgerFault:
                await asyncio.sleep(0.1)
                continue
            spent = Nano(min(cost, hold.amount_nano))
            charge = Charge(
                id=uuid7(), buyer=buyer, operator=operator, amount=spent, fee=split(spent)[1], model="m"
            )
            try:
                await poster.post(charge, hold)
                print(f"ack {charge.id} {spent.n}", flush=True)
            except LedgerFault:
                pass  # not acknowledged: the request gets a 503, or asks again by id
            finally:
                keeper.release(hold)
    await engine.dispose()
    print("done", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 5:
        die_at_commit(int(sys.argv[5]), sys.argv[6])
    asyncio.run(serve(sys.argv[1], *map(int, sys.argv[2:5]), patience_s=20.0))
