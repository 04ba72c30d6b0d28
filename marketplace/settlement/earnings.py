"""What an operator has earned, and how much of it is mature.

matured = posted − held − maturing, never below zero, where maturing is the operator's share of charges
younger than the reserve time.  A charge's id is a uuid7, so its age is its id and the sum is a range of
the index on (operator, id).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger.accounts import ensure_account, read_balance
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import lock_balances
from marketplace.ledger.tables import charges
from marketplace.platform.ids import first_uuid7_at


@dataclass(frozen=True, slots=True)
class Earnings:
    """One operator's money, in nano-dollars."""

    posted: Nano
    held: Nano
    """Set aside for withdrawals not yet planned."""
    maturing: Nano

    @property
    def matured(self) -> Nano:
        """What can be withdrawn now."""
        return Nano(max(0, self.posted.n - self.held.n - self.maturing.n))


async def read_earnings(conn: AsyncConnection, person: UUID, *, now: datetime, reserve_s: int) -> Earnings:
    """Read a person's earnings as of the last commit; zeros for somebody who never earned."""
    balance = await read_balance(conn, ledger_accounts.operator_earnings(str(person)))
    if balance is None:
        return Earnings(Nano(0), Nano(0), Nano(0))
    maturing = await _maturing(conn, balance.account_id, now - timedelta(seconds=reserve_s))
    return Earnings(balance.posted, balance.held, maturing)


async def lock_earnings(conn: AsyncConnection, person: UUID, *, now: datetime, reserve_s: int) -> Earnings:
    """Read a person's earnings and keep them as they are until the transaction ends (A33).

    New charges wait for the lock too, so what is matured cannot be promised twice.
    """
    identity = await ensure_account(conn, ledger_accounts.operator_earnings(str(person)))
    balance = (await lock_balances(conn, [identity]))[identity]
    maturing = await _maturing(conn, identity, now - timedelta(seconds=reserve_s))
    return Earnings(balance.posted, balance.held, maturing)


async def _maturing(conn: AsyncConnection, account: int, since: datetime) -> Nano:
    share = func.coalesce(func.sum(charges.c.amount - charges.c.fee), 0)
    statement = select(share).where(charges.c.operator == account, charges.c.id >= first_uuid7_at(since))
    return Nano(int(await conn.scalar(statement) or 0))


async def pages(
    conn: AsyncConnection, *, now: datetime, reserve_s: int
) -> AsyncIterator[list[tuple[str, Earnings]]]:
    """Every operator's earnings, `PAGE` at a time in account order, so memory stays flat."""
    after, since = 0, first_uuid7_at(now - timedelta(seconds=reserve_s))
    while True:
        rows = (await conn.execute(_PAGE, {"after": after, "since": since, "limit": PAGE})).all()
        if rows:
            yield [(r.owner, Earnings(Nano(r.posted), Nano(r.held), Nano(int(r.maturing)))) for r in rows]
        if len(rows) < PAGE:
            return
        after = rows[-1].id


PAGE: Final = 5_000
_PAGE: Final = text(
    """
    WITH page AS (
        SELECT a.id, a.owner, b.posted, b.held FROM accounts a JOIN balances b ON b.account_id = a.id
        WHERE a.kind = 'operator_earnings' AND a.id > :after ORDER BY a.id LIMIT :limit
    ), young AS (
        SELECT c.operator, sum(c.amount - c.fee) AS maturing FROM charges c
        WHERE c.operator IN (SELECT id FROM page) AND c.id >= :since GROUP BY c.operator
    )
    SELECT p.id, p.owner, p.posted, p.held, coalesce(y.maturing, 0) AS maturing
    FROM page p LEFT JOIN young y ON y.operator = p.id ORDER BY p.id"""
)
