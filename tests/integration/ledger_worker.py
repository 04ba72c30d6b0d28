"""A gateway's money in a process of its own, for tests that kill it: leases, a poster, no HTTP.

    python ledger_worker.py URL BUYER OPERATOR COST SECONDS [POINT NTH PHASE PID_FILE]

Serves for SECONDS (0: until the account is empty), or until a little after the crash it brought about.
Prints `ack <charge id> <cost>` once a charge is durable, `done` at the end.  With POINT (the ledger's
function that commits, as `lane.claim`), SIGKILL goes to the process named in PID_FILE's first line (-:
itself) around that function's NTH commit: `before` it is sent, `sent` and unanswered, or `after` the answer.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from asyncpg.connection import Connection
from asyncpg.transaction import Transaction
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import lane
from marketplace.ledger.accounts import buyer, ensure_account
from marketplace.ledger.charges import Charge
from marketplace.ledger.errors import InsufficientFunds, LedgerFault
from marketplace.ledger.ids import uuid7
from marketplace.ledger.lease_book import Hold, Slice
from marketplace.ledger.lease_keeper import LeaseKeeper
from marketplace.ledger.money import Nano, split
from marketplace.ledger.overdrafts import Overdraft
from marketplace.ledger.poster import Poster
from marketplace.ledger.posting import post_transfer
from marketplace.ledger.templates import top_up
from marketplace.platform.database import connect

TTL_MS: Final = 900
PATIENCE_S: Final = 20.0
LIVES_ON_S: Final = 3.0
"""After a server was killed."""


def committing() -> str:
    """The ledger's function whose transaction is being committed, as module.function."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent.name == "ledger":
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return ""


class Crash:
    """When it happened, for who outlives it."""

    at: float = math.inf


def die_at(point: str, nth: int, phase: str, pid_file: str) -> None:
    """Patch the driver: a commit goes through one of two methods, a transaction's and the one call's."""
    seen = 0

    def around(real: Callable[..., Awaitable[Any]], is_commit: Callable[..., bool]) -> Callable[..., Any]:
        async def call(self: Any, *arguments: Any, **named: Any) -> Any:
            nonlocal seen
            is_it = is_commit(*arguments) and committing() == point
            seen += is_it
            if not is_it or seen != nth:
                return await real(self, *arguments, **named)
            victim = os.getpid() if pid_file == "-" else int(Path(pid_file).read_text().split()[0])
            print(f"dying at {point} {phase}", file=sys.stderr, flush=True)
            Crash.at = time.monotonic()
            if phase == "before":
                os.kill(victim, signal.SIGKILL)
            if phase == "sent":
                sending = asyncio.ensure_future(real(self, *arguments, **named))
                await asyncio.sleep(0)  # the bytes are with the kernel now
                os.kill(victim, signal.SIGKILL)
                return await sending
            answer = await real(self, *arguments, **named)
            if phase == "after":
                os.kill(victim, signal.SIGKILL)
            return answer

        return call

    name = "_Transaction__commit"
    setattr(Transaction, name, around(getattr(Transaction, name), lambda: True))
    one_call = around(Connection.execute, lambda query, *_: query == lane._POST)
    Connection.execute = one_call  # type: ignore[method-assign]


BEYOND = ("lease_keeper._authorise_beyond", "lease_keeper._give_back")
"""What only an overdraft brings about."""


class Server:
    """Serves one buyer's requests one after the other, in ways that bring every commit about."""

    def __init__(
        self, engine: AsyncEngine, keeper: LeaseKeeper, poster: Poster, people: tuple[int, int], cost: int
    ) -> None:
        self._engine = engine
        self._keeper = keeper
        self._poster = poster
        self._buyer, self._operator = people
        self._cost = cost

    async def serve(self, n: int, point: str) -> None:
        """The n-th request; raises `InsufficientFunds`, `LedgerFault`."""
        if n % 20 == 5:  # a large hold, given back: leaves excess in the slice
            self._keeper.release(await self._keeper.authorise(self._buyer, Nano(60 * self._cost)))
        if n % 30 == 15:
            await asyncio.sleep(TTL_MS / 400)  # idle: the slice is returned
        if n > 16 and point == "lease_keeper._revive":
            time.sleep(TTL_MS / 1000)
        if n > 10 and point in BEYOND:
            self._keeper.release(await self._keeper.authorise(self._buyer, Nano(2**60), minimum=Nano(1)))
        hold = await self._keeper.authorise(self._buyer, Nano(2 * self._cost), minimum=Nano(1))
        try:
            beside = lane.ONE_CALL_ROWS_MAX if point == "lane._commit_by_copy" else 0
            spent = Nano(min(self._cost, hold.amount_nano))
            await asyncio.gather(self._post(spent, hold), *(self._post(Nano(0)) for _ in range(beside)))
        finally:
            self._keeper.release(hold)
        if n > 10 and point == "lane._commit_by_steps":  # its lease is gone: no usual batch
            bob = await self._another_buyer(3 * self._cost)
            await self._post(Nano(self._cost), Hold(Slice(uuid7(), bob, 0, self._cost), self._cost))

    async def _another_buyer(self, nano: int) -> int:
        """Whose money nobody else leases."""
        async with self._engine.begin() as conn:
            await post_transfer(conn, top_up(person="bob", amount=Nano(nano), ref=str(uuid4())))
            return await ensure_account(conn, buyer("bob"))

    async def _post(self, cost: Nano, hold: Hold | None = None) -> None:
        payer = self._buyer if hold is None else hold.buyer
        charge = Charge(
            id=uuid7(), buyer=payer, operator=self._operator, amount=cost, fee=split(cost)[1], model="m"
        )
        await self._poster.post(charge, hold)
        print(f"ack {charge.id} {cost.n}", flush=True)


async def run(url: str, people: tuple[int, int], cost: int, seconds: int, point: str) -> None:
    engine = connect(url, pool_size=4)
    terms = Overdraft(limit=Nano(cost)) if point in BEYOND else None
    give_up_at = time.monotonic() + (seconds or 3 * PATIENCE_S)
    async with (
        LeaseKeeper(
            engine, worker=f"w-{uuid4()}", ttl_ms=TTL_MS, slice_max=Nano(20 * cost), overdraft=terms
        ) as keeper,
        Poster(engine, settle=keeper.settle, patience_s=PATIENCE_S) as poster,
    ):
        server, n = Server(engine, keeper, poster, people, cost), 0
        while time.monotonic() < min(give_up_at, Crash.at + LIVES_ON_S):
            n += 1
            try:
                await server.serve(n, point)
            except InsufficientFunds:
                if not seconds:
                    break
                await asyncio.sleep(0.05)
            except (LedgerFault, SQLAlchemyError, OSError):
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
