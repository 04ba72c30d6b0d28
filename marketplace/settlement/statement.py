"""An operator's statement: every request that earned, every payout, and the transaction that paid it (B4).

Newest first.  A forecast is arithmetic on settled demand, no promise: what the last days earned, per day.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger.accounts import read_balance
from marketplace.ledger.money import Nano
from marketplace.ledger.tables import charges
from marketplace.platform.ids import first_uuid7_at

LINES_MAX: Final = 500
FORECAST_DAYS: Final = 7


@dataclass(frozen=True, slots=True)
class Line:
    """One movement of an operator's earnings."""

    id: UUID
    """Of the request's charge (which is the request's id), or of the transfer."""
    kind: str
    """`request`, `bank_payout`, or the transfer's kind."""
    amount: Nano
    """What it added; below zero: what it took."""
    model: str | None
    tokens: int | None
    withdrawal_id: UUID | None
    batch_id: UUID | None
    tx: str | None
    """The transaction that paid it, once final; of a bank payout the bank's reference."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What settled demand says of the days to come."""

    days: int
    earned: Nano
    """In the last `days` days."""

    @property
    def per_day(self) -> Nano:
        return Nano(self.earned.n // self.days)


async def lines(
    conn: AsyncConnection, person: UUID, *, before: UUID | None = None, limit: int = LINES_MAX
) -> list[Line]:
    """The newest movements older than `before`; ids are time-ordered."""
    balance = await read_balance(conn, ledger_accounts.operator_earnings(str(person)))
    if balance is None:
        return []
    parameters = {"account": balance.account_id, "before": before, "limit": min(limit, LINES_MAX)}
    rows = await conn.execute(_LINES, parameters)
    return [
        Line(r.id, r.kind, Nano(r.amount), r.model, r.tokens, r.withdrawal_id, r.batch_id, r.final_tx)
        for r in rows
    ]


async def forecast(conn: AsyncConnection, person: UUID, *, now: datetime) -> Forecast:
    """What the last seven days' requests earned."""
    balance = await read_balance(conn, ledger_accounts.operator_earnings(str(person)))
    if balance is None:
        return Forecast(FORECAST_DAYS, Nano(0))
    since = first_uuid7_at(now - timedelta(days=FORECAST_DAYS))
    share = func.coalesce(func.sum(charges.c.amount - charges.c.fee), 0)
    earned = select(share).where(charges.c.operator == balance.account_id, charges.c.id >= since)
    return Forecast(FORECAST_DAYS, Nano(int(await conn.scalar(earned) or 0)))


_LINES: Final = text(
    """
    WITH moved AS (
        (SELECT c.id, 'request' AS kind, c.amount - c.fee AS amount, c.model,
                c.tok_in + c.tok_out AS tokens, NULL AS ref
         FROM charges c
         WHERE c.operator = :account AND (CAST(:before AS UUID) IS NULL OR c.id < CAST(:before AS UUID))
         ORDER BY c.id DESC LIMIT :limit)
        UNION ALL
        (SELECT t.id, t.kind, CASE WHEN t.credit = :account THEN t.amount ELSE -t.amount END,
                NULL, NULL, t.ref
         FROM transfers t
         WHERE (t.credit = :account OR t.debit = :account)
           AND (CAST(:before AS UUID) IS NULL OR t.id < CAST(:before AS UUID))
         ORDER BY t.id DESC LIMIT :limit)
    )
    SELECT m.id, CASE WHEN w.id IS NULL THEN m.kind ELSE 'bank_payout' END AS kind,
           m.amount, m.model, m.tokens, coalesce(p.withdrawal_id, w.id) AS withdrawal_id, p.batch_id,
           coalesce(w.reference, (SELECT b.final_tx FROM broadcasts b
            WHERE b.batch_id = p.batch_id AND b.final_tx IS NOT NULL LIMIT 1)) AS final_tx
    FROM moved m
    LEFT JOIN payouts p ON m.kind IN ('withdrawal_planned', 'payout_failed') AND p.id::text = m.ref
    LEFT JOIN bank_withdrawals w
        ON w.id = CASE WHEN m.kind = 'correction' AND m.ref LIKE 'bank:%' THEN substr(m.ref, 6)::uuid END
    ORDER BY m.id DESC LIMIT :limit"""
)
