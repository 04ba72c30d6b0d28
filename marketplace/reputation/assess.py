"""Judging everybody: facts → standing → hold, once a minute, by whichever process comes first."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.reputation import facts, holds
from marketplace.reputation.standing import NodeFacts, Policy, Standing, judge

_log = logging.getLogger(__name__)

_TURN: Final = text("SELECT pg_try_advisory_xact_lock(1919250793)")  # "repu"


Judged = dict[UUID, tuple[Standing, list[NodeFacts]]]
"""By operator: his standing and the facts it follows from."""


async def assess(engine: AsyncEngine, clock: Clock) -> list[UUID]:
    """Judge every operator; give those newly held. Empty too where another process is at it."""
    async with transaction(engine) as connection:
        if not await connection.scalar(_TURN):
            return []
        now = clock.now()
        await facts.add_lengths(connection, now=now)
        held = []
        for operator, (standing, _) in (await standings(connection, now=now)).items():
            if await holds.hold(connection, operator, standing, now=now):
                _log.warning("operator %s is not in good standing: %s", operator, standing.reason)
                held.append(operator)
        return held


async def standings(connection: AsyncConnection, *, now: datetime) -> Judged:
    """Give the standing of every operator of whom something is known, and the facts it follows from."""
    policy = await facts.read_policy(connection)
    since = now - timedelta(hours=policy.window_hours)
    found = await facts.read_facts(connection, since=since, forgiven=await _forgiven(connection))
    return {operator: (judge(nodes, policy), nodes) for operator, nodes in found.items()}


async def policy_of(engine: AsyncEngine) -> Policy:
    async with transaction(engine) as connection:
        return await facts.read_policy(connection)


async def _forgiven(connection: AsyncConnection) -> dict[UUID, datetime]:
    """Give who was found good by a person, and when."""
    decided = await holds.decided(connection)
    return {person: decision.at for person, decision in decided.items() if decision.is_good}
