"""What `tollway settle` runs: one settler per chain, each active in one process at a time.

`Turn` is a PostgreSQL session lock: it ends with the connection that holds it, so a settler that dies or
loses its database gives up its turn by that alone, and a standby takes over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, Self

import structlog
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chain.errors import ChainBroken
from chain.networks import Chain
from chain.ports import PayoutRail
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.platform.settings import ChainsConfig
from marketplace.settlement import halts, plan_requests
from marketplace.settlement.batches import live_batch, lock_key
from marketplace.settlement.rails import open_rails
from marketplace.settlement.settler import Pace, Settler

log = structlog.get_logger(__name__)

ACTOR: Final = "settler"


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often things happen, in seconds."""

    tick_s: float = 1.0
    standby_s: float = 5.0
    plan_every_s: int | None = None
    """None: batches are planned when somebody asks."""


class Turn:
    """The right to settle one chain; ends with its connection."""

    def __init__(self, engine: AsyncEngine, chain: Chain) -> None:
        self._engine = engine
        self._key = lock_key("settler", chain)
        self._conn: AsyncConnection | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.give_up()

    async def is_ours(self) -> bool:
        """Tell whether it is our turn, taking it if it is nobody's."""
        try:
            if self._conn is not None:
                await self._conn.execute(text("SELECT 1"))  # the lock lives as long as this connection
                return True
            return await self._take()
        except (DBAPIError, OSError):
            await self.give_up()
            return False

    async def give_up(self) -> None:
        """Let another process have it."""
        conn, self._conn = self._conn, None
        if conn is not None:
            with contextlib.suppress(DBAPIError, OSError):
                await conn.invalidate()  # a pooled connection would keep the lock
            await conn.close()

    async def _take(self) -> bool:
        conn = await self._engine.connect()
        await conn.execution_options(isolation_level="AUTOCOMMIT")
        if await conn.scalar(select(func.pg_try_advisory_lock(self._key))):
            self._conn = conn
            return True
        await conn.close()
        return False


async def settle(
    engine: AsyncEngine,
    chains: ChainsConfig,
    clock: Clock,
    stop: asyncio.Event,
    *,
    settler_dir: Path,
    which: Sequence[Chain] = tuple(Chain),
    schedule: Schedule | None = None,
    pace: Pace | None = None,
) -> None:
    """Settle these chains until `stop` is set; each settler ends the step it is in."""
    async with open_rails(chains, settler_dir, which) as rails:
        await run_settlers(engine, rails, clock, stop, schedule=schedule, pace=pace)


async def run_settlers(
    engine: AsyncEngine,
    rails: Mapping[Chain, PayoutRail],
    clock: Clock,
    stop: asyncio.Event,
    *,
    schedule: Schedule | None = None,
    pace: Pace | None = None,
) -> None:
    """Run one settler per rail until `stop` is set."""
    async with asyncio.TaskGroup() as group:
        for rail in rails.values():
            settler = Settler(engine, rail, clock, pace=pace)
            group.create_task(_run(engine, settler, clock, stop, schedule or Schedule()))


async def _run(
    engine: AsyncEngine, settler: Settler, clock: Clock, stop: asyncio.Event, schedule: Schedule
) -> None:
    async with Turn(engine, settler.chain) as turn:
        while not stop.is_set():
            if not await turn.is_ours():
                await _sleep(stop, schedule.standby_s)
            elif not await _tick(engine, settler, clock, schedule):
                await _sleep(stop, schedule.tick_s)


async def _tick(engine: AsyncEngine, settler: Settler, clock: Clock, schedule: Schedule) -> bool:
    """One step; faults of the environment are logged and tried again, a broken chain is halted."""
    try:
        if schedule.plan_every_s is not None:
            await _ask_when_due(engine, settler.chain, clock, schedule.plan_every_s)
        return await settler.tick()
    except ChainBroken as e:
        log.critical("chain broken, payouts halted", chain=settler.chain.value, reason=str(e))
        async with transaction(engine) as conn:
            rail, reason = settler.chain.value, f"{type(e).__name__}: {e}"[:1000]
            await halts.halt(conn, rail=rail, actor=ACTOR, reason=reason, now=clock.now())
    except (DBAPIError, OSError) as e:
        log.warning("settler waits for the database", chain=settler.chain.value, reason=str(e))
    return False


async def _ask_when_due(engine: AsyncEngine, chain: Chain, clock: Clock, plan_every_s: int) -> None:
    now = clock.now()
    async with transaction(engine) as conn:
        if await live_batch(conn, chain) is not None:
            return
        asked_at = await plan_requests.newest_at(conn, chain)
        if asked_at is None or now >= asked_at + timedelta(seconds=plan_every_s):
            await plan_requests.ask(conn, chain=chain, asked_by=ACTOR, now=now)


async def _sleep(stop: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
