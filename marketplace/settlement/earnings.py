"""What an operator has earned, and how much of it is mature.

matured = posted − held − maturing, never below zero, where maturing is the operator's share of charges
younger than their reserve time.  A charge's id is a uuid7, so its age is its id and the sum is a range of
the index on (operator, id).

Money has no colour in a balance, so which of a buyer's dollars paid for a request cannot be told.  The rule
errs towards waiting: **a charge is card-funded if its buyer had topped up by card, ever, before it** (a
`top_up` in the ledger).  It matures after `Reserve.card_s`, all others after `Reserve.usdc_s`.  No marker is
kept, the ledger says it; a card buyer who pays in USDC from then on stays a card buyer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Self
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger.accounts import ensure_account, read_balance
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import lock_balances
from marketplace.platform.ids import first_uuid7_at
from marketplace.platform.settings import Settings


@dataclass(frozen=True, slots=True)
class Reserve:
    """How long earnings wait before they can be withdrawn, by what paid for them; seconds."""

    usdc_s: int
    card_s: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(settings.reserve_s, settings.card_reserve_s)


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


async def read_earnings(conn: AsyncConnection, person: UUID, *, now: datetime, reserve: Reserve) -> Earnings:
    """Read a person's earnings as of the last commit; zeros for somebody who never earned."""
    balance = await read_balance(conn, ledger_accounts.operator_earnings(str(person)))
    if balance is None:
        return Earnings(Nano(0), Nano(0), Nano(0))
    maturing = await _maturing(conn, balance.account_id, now, reserve)
    return Earnings(balance.posted, balance.held, maturing)


async def lock_earnings(conn: AsyncConnection, person: UUID, *, now: datetime, reserve: Reserve) -> Earnings:
    """Read a person's earnings and keep them as they are until the transaction ends (A33).

    New charges wait for the lock too, so what is matured cannot be promised twice.
    """
    identity = await ensure_account(conn, ledger_accounts.operator_earnings(str(person)))
    balance = (await lock_balances(conn, [identity]))[identity]
    maturing = await _maturing(conn, identity, now, reserve)
    return Earnings(balance.posted, balance.held, maturing)


async def _maturing(conn: AsyncConnection, account: int, now: datetime, reserve: Reserve) -> Nano:
    found = await conn.scalar(_MATURING, {"account": account, **_since(now, reserve)})
    return Nano(int(found or 0))


def _since(now: datetime, reserve: Reserve) -> dict[str, UUID]:
    """The first ids that are younger than each reserve; a card's is never the shorter one."""
    card_s = max(reserve.card_s, reserve.usdc_s)
    return {
        "usdc": first_uuid7_at(now - timedelta(seconds=reserve.usdc_s)),
        "card": first_uuid7_at(now - timedelta(seconds=card_s)),
    }


async def pages(
    conn: AsyncConnection, *, now: datetime, reserve: Reserve
) -> AsyncIterator[list[tuple[str, Earnings]]]:
    """Every operator's earnings, `PAGE` at a time in account order, so memory stays flat."""
    after, since = 0, _since(now, reserve)
    while True:
        rows = (await conn.execute(_PAGE, {"after": after, "limit": PAGE, **since})).all()
        if rows:
            yield [(r.owner, Earnings(Nano(r.posted), Nano(r.held), Nano(int(r.maturing)))) for r in rows]
        if len(rows) < PAGE:
            return
        after = rows[-1].id


PAGE: Final = 5_000
_CARD: Final = """
    card AS (
        SELECT DISTINCT ON (t.credit) t.credit AS buyer, t.id AS since
        FROM transfers t JOIN accounts a ON a.id = t.debit AND a.kind = 'stripe_pending'
        WHERE t.kind = 'top_up' ORDER BY t.credit, t.id
    )"""
"""Who has ever topped up by card, and since when: few rows, all of them debits of one account (indexed)."""
_MATURING: Final = text(  # _CARD is our own constant, as below
    f"""
    WITH {_CARD}
    SELECT (SELECT coalesce(sum(c.amount - c.fee), 0) FROM charges c
            WHERE c.operator = :account AND c.id >= :usdc)
         + (SELECT coalesce(sum(c.amount - c.fee), 0) FROM charges c JOIN card ON card.buyer = c.buyer
            WHERE c.operator = :account AND c.id >= :card AND c.id < :usdc AND c.id > card.since)"""  # noqa: S608
)
_PAGE: Final = text(
    f"""
    WITH {_CARD}, page AS (
        SELECT a.id, a.owner, b.posted, b.held FROM accounts a JOIN balances b ON b.account_id = a.id
        WHERE a.kind = 'operator_earnings' AND a.id > :after ORDER BY a.id LIMIT :limit
    ), young AS (
        SELECT operator, sum(share) AS maturing FROM (
            SELECT c.operator, c.amount - c.fee AS share FROM charges c
            WHERE c.operator IN (SELECT id FROM page) AND c.id >= :usdc
            UNION ALL
            SELECT c.operator, c.amount - c.fee FROM charges c JOIN card ON card.buyer = c.buyer
            WHERE c.operator IN (SELECT id FROM page)
              AND c.id >= :card AND c.id < :usdc AND c.id > card.since
        ) AS maturing GROUP BY operator
    )
    SELECT p.id, p.owner, p.posted, p.held, coalesce(y.maturing, 0) AS maturing
    FROM page p LEFT JOIN young y ON y.operator = p.id ORDER BY p.id"""  # noqa: S608
)
