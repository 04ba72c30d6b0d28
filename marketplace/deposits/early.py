"""Early credit: a loan against a deposit that is seen and not yet final.  Off unless a watcher is given caps.

    seen, within both caps      early_credit           platform → buyer     explicit receivable
    final, and credited         early_credit_repaid    buyer → platform     right after the deposit itself
    orphaned, or set aside      early_credit_repaid    buyer → platform     with a case

A loan ends even if its money is spent, and more: an overdraft or a dispute may have come in between.

A buyer's balance can only be spent on answers, never withdrawn, so a loan cannot leave as USDC.  One loan per
movement for ever.  The caps count open loans: of one person, and of all people on all chains.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.networks import Chain
from chain.ports import TransferSeen
from chain.units import Micro
from marketplace.deposits.tables import early_credits
from marketplace.ledger import templates
from marketplace.ledger.money import from_micro
from marketplace.ledger.templates import Transfer
from marketplace.platform.database import is_among

EARLY_LOCK: Final = 0x746F6C6C_6561726C  # "tollearl": the caps are read and used by one watcher at a time


@dataclass(frozen=True, slots=True)
class EarlyCredit:
    """How much may be lent at once."""

    account_max: Micro
    total_max: Micro


async def lend(
    conn: AsyncConnection,
    caps: EarlyCredit,
    seen: Sequence[tuple[TransferSeen, UUID]],
    now: datetime,
) -> list[Transfer]:
    """Lend against these new deposits, each wholly or not at all, while both caps allow."""
    if not seen:
        return []
    await conn.execute(select(func.pg_advisory_xact_lock(EARLY_LOCK)))
    entries: list[Transfer] = []
    for transfer, person_id in seen:
        lent = func.coalesce(func.sum(early_credits.c.amount_micro), 0)
        is_open = early_credits.c.status == "open"
        of_person = await conn.scalar(select(lent).where(is_open, early_credits.c.person_id == person_id))
        of_all = await conn.scalar(select(lent).where(is_open))
        amount = transfer.amount.n
        if int(of_person or 0) + amount > caps.account_max.n or int(of_all or 0) + amount > caps.total_max.n:
            continue
        statement = (
            postgresql.insert(early_credits)
            .values(
                chain=transfer.chain.value,
                key=transfer.key,
                person_id=person_id,
                amount_micro=amount,
                status="open",
                lent_at=now,
            )
            .on_conflict_do_nothing()
            .returning(early_credits.c.key)
        )
        if await conn.scalar(statement) is not None:
            ref = f"{transfer.chain.value}:{transfer.key}"
            entries.append(templates.early_credit(person=str(person_id), amount=from_micro(amount), ref=ref))
    return entries


async def end_loans(
    conn: AsyncConnection, chain: Chain, keys: Collection[str], *, is_called_in: bool, now: datetime
) -> list[tuple[str, Transfer]]:
    """End the open loans against these movements; gives key and entry of each."""
    if not keys:
        return []
    statement = (
        update(early_credits)
        .where(
            early_credits.c.chain == chain.value,
            is_among(early_credits.c.key, set(keys)),
            early_credits.c.status == "open",
        )
        .values(status="called_in" if is_called_in else "repaid", ended_at=now)
        .returning(early_credits.c.key, early_credits.c.person_id, early_credits.c.amount_micro)
    )
    return [
        (
            row.key,
            templates.early_credit_repaid(
                person=str(row.person_id),
                amount=from_micro(row.amount_micro),
                ref=f"{chain.value}:{row.key}",
            ),
        )
        for row in (await conn.execute(statement)).all()
    ]
