"""The switch that stops payouts: of a chain, of the bank, or `payouts` for all.  Each turn is on record.

A halt stops planning, signing and the first send.  What has been sent is followed to its end all the same.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final, Literal

from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.networks import Chain
from marketplace.settlement.errors import NotFound
from marketplace.settlement.tables import payout_halts

ALL_RAILS: Final = "payouts"
BANK: Final = "bank"
RAILS: Final = frozenset({ALL_RAILS, BANK, *(chain.value for chain in Chain)})


async def halt(conn: AsyncConnection, *, rail: str, actor: str, reason: str, now: datetime) -> None:
    """Stop a rail; stopping it twice keeps the first reason."""
    if rail not in RAILS:
        raise NotFound(f"there is no rail {rail!r}; choose one of {', '.join(sorted(RAILS))}")
    row = insert(payout_halts).values(rail=rail, actor=actor, reason=reason, at=now)
    await conn.execute(row.on_conflict_do_nothing())


async def lift(conn: AsyncConnection, *, rail: str, actor: str, reason: str, now: datetime) -> None:
    """Let a rail run again."""
    t = payout_halts.c
    done = await conn.execute(
        update(payout_halts)
        .where(t.rail == rail, t.lifted_at.is_(None))
        .values(lifted_at=now, lifted_by=actor, lift_reason=reason)
    )
    if done.rowcount == 0:
        raise NotFound(f"{rail!r} is not halted")


async def halted(conn: AsyncConnection, rail: Chain | Literal["bank"]) -> str | None:
    """Why payouts by `rail` are halted, by its own switch or that for all; None if they are not."""
    t = payout_halts.c
    statement = select(t.reason).where(t.lifted_at.is_(None), t.rail.in_([ALL_RAILS, str(rail)]))
    return await conn.scalar(statement.order_by(t.id).limit(1))
