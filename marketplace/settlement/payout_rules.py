"""Who must agree to how much: approvals by amount and the most that may be planned in a day, as data.

Each change is a row with actor and reason; the newest counts, the older ones are the journal (K4).  The
multisig's own threshold is the least, whatever the rules say; more than it has signers is never asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.payouts import GIVES_BACK
from chain.units import Micro
from marketplace.settlement.tables import payout_rules, settlement_batches

DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class PayoutRules:
    """The rules in force."""

    large_above: Micro
    """A batch that pays more needs `large_approvals`."""
    large_approvals: int
    daily_max: Micro
    """All chains together, over any 24 hours."""

    def approvals_needed(self, total: Micro, *, threshold: int, signers: int) -> int:
        """How many distinct signers a batch of `total` needs."""
        wanted = self.large_approvals if total > self.large_above else threshold
        return max(threshold, min(wanted, signers))


async def in_force(conn: AsyncConnection) -> PayoutRules:
    """The newest rules; the migration wrote the first."""
    t = payout_rules.c
    row = (await conn.execute(select(payout_rules).order_by(t.id.desc()).limit(1))).one()
    return PayoutRules(Micro(row.large_above_micro), row.large_approvals, Micro(row.daily_micro_max))


async def change(
    conn: AsyncConnection, rules: PayoutRules, *, actor: str, reason: str, now: datetime
) -> None:
    """Put other rules in force, from now on."""
    await conn.execute(
        insert(payout_rules).values(
            large_above_micro=rules.large_above.n,
            large_approvals=rules.large_approvals,
            daily_micro_max=rules.daily_max.n,
            actor=actor,
            reason=reason,
            at=now,
        )
    )


async def left_today(conn: AsyncConnection, *, now: datetime) -> Micro:
    """What may still be planned: the daily maximum less the batches of the last 24 hours."""
    t = settlement_batches.c
    statement = select(func.coalesce(func.sum(t.total_micro), 0)).where(
        t.planned_at > now - DAY, t.status.not_in([s.value for s in GIVES_BACK])
    )
    planned = int(await conn.scalar(statement) or 0)
    return Micro(max(0, (await in_force(conn)).daily_max.n - planned))
