"""A gateway's money in a process of its own, for tests that kill it: leases, a poster, no HTTP.

    python ledger_worker.py URL BUYER OPERATOR COST SECONDS [POINT NTH PHASE PID_FILE]

Serves for SECONDS (0: until the account is empty).  Prints `ack <charge id> <cost>` once a charge is durable,
`done` at the end.  With POINT (the ledger's function that commits, as `lane.commit`), SIGKILL goes to the
process named in PID_FILE (-: itself) around that function's NTH commit: `before` it is sent, `sent` and
unanswered, or `after` the answer.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from asyncpg.transaction import Transaction

from marketplace.ledger.charges import Charge
from marketplace.ledger.errors import InsufficientFunds, LedgerFault
from marketplace.ledger.ids import uuid7
from marketplace.ledger.lease_keeper import LeaseKeeper
from marketplace.ledger.money import Nano, split
from marketplace.ledger.overdrafts import Overdraft
from marketplace.ledger.poster import Poster
from marketplace.platform.database import connect

TTL_MS: Final = 900
PATIENCE_S: Final = 20.0


def committing() -> str:
    """The ledger's function whose transaction is being committed, as module.function."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent.name == "ledger":
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def die_at(point: str, nth: int, phase: str, pid_file: str) -> None:
    """Patch the driver: every commit goes through this one method, by `commit()` and by leaving a block."""
    name = "_Transaction__commit"
    real, seen = getattr(Transaction, name), 0

    async def commit(self: Any) -> None:
        nonlocal seen
        seen += committing() == point
        if seen != nth or committing() != point:
            await real(self)
            return
        victim = os.getpid() if pid_file == "-" else int(Path(pid_file).read_text())
        print(f"dying at {point} {phase}", file=sys.stderr, flush=True)
        if phase == "before":
            os.kill(victim, signal.SIGKILL)
        if phase == "sent":
            sending = asyncio.ensure_future(real(self))
            await asyncio.sleep(0)  # the bytes are with the kernel now
            os.kill(victim, signal.SIGKILL)
            await sending
            return
        await real(self)
        if phase == "after":
            os.kill(victim, signal.SIGKILL)

    setattr(Transaction, name, commit)


class Server:
    """Serves one buyer's requests one after the other, in ways that bring every commit about."""

    def __init__(self, keeper: LeaseKeeper, poster: Poster, people: tuple[int, int], cost: int) -> None:
        self._keeper = keeper
        self._poster = poster
        self._buyer, self._operator = people
        self._cost = cost

    async def serve(self, n: int, point: str) -> None:
        """The n-th request; raises `InsufficientFunds`, `LedgerFault`."""
        if n % 20 == 5:  # a large hold, given back: leaves excess in the slice
            self._keeper.release(await self._keeper.authorise(self._buyer, Nano(60 * self._cost)))
        if n == 15:
            await asyncio.sleep(TTL_MS / 400)  # idle: the slice is returned
        if n > 16 and point == "lease_keeper._revive":
            time.sleep(TTL_MS / 1000)
        if n > 10 and point == "lease_keeper._authorise_beyond":
            self._keeper.release(await self._keeper.authorise(self._buyer, Nano(2**60), minimum=Nano(1)))
        hold = await self._keeper.authorise(self._buyer, Nano(2 * self._cost), minimum=Nano(1))
        spent = Nano(min(self._cost, hold.amount_nano))
        charge = Charge(
            id=uuid7(), buyer=self._buyer, operator=self._operator, amount=spent, fee=split(spent)[1],
            model="m",
        )  # fmt: skip
        try:
            await self._poster.post(charge, hold)
            print(f"ack {charge.id} {spent.n}", flush=True)
        finally:
            self._keeper.release(hold)


async def run(url: str, people: tuple[int, int], cost: int, seconds: int, point: str) -> None:
    engine = connect(url, pool_size=4)
    terms = Overdraft(limit=Nano(cost)) if point == "lease_keeper._authorise_beyond" else None
    give_up_at = time.monotonic() + (seconds or 3 * PATIENCE_S)
    async with (
        LeaseKeeper(
            engine, worker=f"w-{uuid4()}", ttl_ms=TTL_MS, slice_max=Nano(20 * cost), overdraft=terms
        ) as keeper,
        Poster(engine, settle=keeper.settle, patience_s=PATIENCE_S) as poster,
    ):
        server, n = Server(keeper, poster, people, cost), 0
        while time.monotonic() < give_up_at:
            n += 1
            try:
                await server.serve(n, point)
            except InsufficientFunds:
                if not seconds:
                    break
                await asyncio.sleep(0.05)
            except LedgerFault:
                await asyncio.sleep(0.1)  # not acknowledged: the request gets a 503, or asks again by id
            if seconds:
                await asyncio.sleep(0.02)
    await engine.dispose()
    print("done", flush=True)


if __name__ == "__main__":
    _, where, payer, payee, price, duration, *crash = sys.argv
    if crash:
        die_at(crash[0], int(crash[1]), crash[2], crash[3])
    asyncio.run(run(where, (int(payer), int(payee)), int(price), int(duration), crash[0] if crash else ""))
