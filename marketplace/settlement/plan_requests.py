"""Asking the settler to plan.

Only the settler's machine has the keys a dry run may need (on Solana it creates missing token accounts), so
the API and the command line leave a request, and read its outcome.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.networks import Chain
from marketplace.platform.ids import uuid7
from marketplace.settlement.errors import NotFound
from marketplace.settlement.tables import plan_requests


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """One request to plan, and what came of it."""

    id: UUID
    chain: Chain
    asked_by: str
    asked_at: datetime
    done_at: datetime | None
    batch_id: UUID | None
    code: str | None
    """`planned`, or the code of the refusal."""
    outcome: str | None


async def ask(conn: AsyncConnection, *, chain: Chain, asked_by: str, now: datetime) -> PlanRequest:
    """Leave a request; one that is open already is given back instead."""
    if (found := await next_open(conn, chain)) is not None:
        return found
    identity = uuid7()
    row = insert(plan_requests).values(id=identity, chain=chain.value, asked_by=asked_by, asked_at=now)
    await conn.execute(row)
    return PlanRequest(identity, chain, asked_by, now, None, None, None, None)


async def find(conn: AsyncConnection, request_id: UUID) -> PlanRequest:
    """One request; NotFound."""
    statement = select(plan_requests).where(plan_requests.c.id == request_id)
    row = (await conn.execute(statement)).one_or_none()
    if row is None:
        raise NotFound(f"there is no plan request {request_id}")
    return _request(row)


async def next_open(conn: AsyncConnection, chain: Chain) -> PlanRequest | None:
    """The oldest request the settler has not answered."""
    t = plan_requests.c
    statement = select(plan_requests).where(t.chain == chain.value, t.done_at.is_(None)).order_by(t.asked_at)
    row = (await conn.execute(statement.limit(1))).one_or_none()
    return None if row is None else _request(row)


async def newest_at(conn: AsyncConnection, chain: Chain) -> datetime | None:
    """When planning was last asked for."""
    statement = select(func.max(plan_requests.c.asked_at)).where(plan_requests.c.chain == chain.value)
    found: datetime | None = await conn.scalar(statement)
    return found


async def finish(
    conn: AsyncConnection, request_id: UUID, *, batch_id: UUID | None, code: str, outcome: str, now: datetime
) -> None:
    """Answer a request."""
    t = plan_requests.c
    await conn.execute(
        update(plan_requests)
        .where(t.id == request_id, t.done_at.is_(None))
        .values(done_at=now, batch_id=batch_id, code=code, outcome=outcome[:2000])
    )


def _request(r: Row[Any]) -> PlanRequest:
    return PlanRequest(r.id, Chain(r.chain), r.asked_by, r.asked_at, r.done_at, r.batch_id, r.code, r.outcome)
