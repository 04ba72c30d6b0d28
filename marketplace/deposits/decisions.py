"""What people decide about money that nobody was credited for, and whose money they want to see first.

A decision is a fact with actor and reason (`deposit_decisions`); an attribution moves the money in the same
transaction, once.  Leaving it is a decision too, and can be changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, and_, delete, insert, or_, select, text, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.errors import BadAddress
from chain.evm.addresses import parse_address
from chain.networks import Chain
from chain.units import Micro
from marketplace.deposits.alarms import HALTED
from marketplace.deposits.booking import Credit, post_entries, tell_credited
from marketplace.deposits.errors import NoDecision
from marketplace.deposits.tables import (
    chain_cursors,
    deposit_decisions,
    deposits,
    screened_senders,
    screening_decisions,
    support_cases,
)
from marketplace.ledger import templates
from marketplace.ledger.accounts import TransferKind
from marketplace.ledger.money import from_micro
from marketplace.ledger.posting import find_transfer

CASES_MAX: Final = 100
"""A page, unless asked else."""
LIST: Final = "sanctions list"
"""Who screens what a list names; a refresh of the list takes back only what is its own."""
_IS_FROZEN: Final = text("SELECT frozen_at IS NOT NULL FROM people WHERE id = :id")


async def attribute_deposit(
    conn: AsyncConnection,
    chain: Chain,
    key: str,
    person_id: UUID,
    *,
    actor: str,
    reason: str,
    now: datetime,
) -> Micro:
    """Give a final deposit that waits to a person; gives the amount.

    NoDecision if it does not wait, was the treasury's own (`rebalance`), or the person's account is frozen:
    whoever releases what was held for that says so first, by unfreezing it.
    """
    row = (
        await conn.execute(
            select(deposits)
            .where(
                deposits.c.chain == chain.value,
                deposits.c.key == key.partition("#")[0],
                deposits.c.transfer_ref == f"{chain.value}:{key}",
            )
            .with_for_update()
        )
    ).one_or_none()
    if row is None or row.status != "final" or row.credited_at is not None:
        raise NoDecision(f"{chain.value} {key}: no final deposit waits under this key")
    # Asked under the row's lock, which a rebalance holds too.
    ours = await find_transfer(conn, TransferKind.CORRECTION, f"rebalance:{chain.value}:{row.key}")
    if ours is not None:
        raise NoDecision(f"{chain.value} {key}: the treasury has booked it as USDC that it moved itself")
    is_frozen = await conn.scalar(_IS_FROZEN, {"id": person_id})
    if is_frozen is None:
        raise NoDecision(f"there is no person {person_id}")
    if is_frozen:
        raise NoDecision(f"the account of {person_id} is frozen: unfreeze it first")
    await _journal(conn, chain, key, "attribute", person_id, actor, reason, now)
    await conn.execute(
        update(deposits).where(deposits.c.id == row.id).values(person_id=person_id, credited_at=now)
    )
    entry = templates.attribution(
        chain=chain.value,
        person=str(person_id),
        amount=from_micro(row.amount_micro),
        ref=row.transfer_ref,
    )
    await post_entries(conn, [entry])
    amount = Micro(row.amount_micro)
    await tell_credited(conn, [Credit(person_id, chain, key, amount)], now)
    return amount


async def leave_deposit(
    conn: AsyncConnection, chain: Chain, key: str, *, actor: str, reason: str, now: datetime
) -> None:
    """Decide that a case stays as it is; NoDecision if there is no case under this key."""
    found = await conn.scalar(
        select(support_cases.c.id)
        .where(support_cases.c.chain == chain.value, support_cases.c.key == key)
        .limit(1)
    )
    if found is None:
        raise NoDecision(f"{chain.value} {key}: no case under this key")
    await _journal(conn, chain, key, "leave", None, actor, reason, now)


async def open_cases(
    conn: AsyncConnection, *, kind: str | None = None, before: UUID | None = None, limit: int = CASES_MAX
) -> Sequence[Row[Any]]:
    """The newest cases that nobody has decided, those older than `before`: of one `kind`, or all.

    A halt is decided by whoever resumes the chain.
    """
    decided = and_(
        deposit_decisions.c.chain == support_cases.c.chain, deposit_decisions.c.key == support_cases.c.key
    )
    stands = and_(
        chain_cursors.c.chain == support_cases.c.chain,
        chain_cursors.c.halted_at == support_cases.c.created_at,
    )
    statement = (
        select(support_cases)
        .where(~select(deposit_decisions.c.id).where(decided).exists())
        .where(or_(support_cases.c.kind != HALTED, select(chain_cursors.c.chain).where(stands).exists()))
        .order_by(support_cases.c.id.desc())
        .limit(limit)
    )
    if kind is not None:
        statement = statement.where(support_cases.c.kind == kind)
    if before is not None:
        statement = statement.where(support_cases.c.id < before)
    return (await conn.execute(statement)).all()


async def screen_sender(
    conn: AsyncConnection, address: str, *, actor: str, reason: str, now: datetime
) -> None:
    """Set aside what this address sends from now on, until a person decides each time (A20).

    A person's word outlives the list's: an address on the list becomes his.
    """
    address = spelled(address)
    if actor != LIST:
        t = screened_senders.c
        await conn.execute(delete(screened_senders).where(t.address == address, t.added_by == LIST))
    added = await conn.scalar(
        postgresql.insert(screened_senders)
        .values(address=address, reason=reason[:1000], added_by=actor, added_at=now)
        .on_conflict_do_nothing()
        .returning(screened_senders.c.address)
    )
    if added is not None:
        await _journal_screening(conn, address, "screen", actor, reason, now)


async def unscreen_sender(
    conn: AsyncConnection, address: str, *, actor: str, reason: str, now: datetime
) -> None:
    """Take an address off the list; NoDecision if it is not on it.  The list takes off only its own."""
    address, t = spelled(address), screened_senders.c
    statement = delete(screened_senders).where(t.address == address).returning(t.address)
    if actor == LIST:
        statement = statement.where(t.added_by == LIST)
    if await conn.scalar(statement) is None:
        if actor == LIST:
            return  # a person has taken it on, or off, meanwhile
        raise NoDecision(f"{address} is not screened")
    await _journal_screening(conn, address, "lift", actor, reason, now)


def spelled(address: str) -> str:
    """As the readers spell a sender: EVM addresses with their checksum, others as they are."""
    try:
        return parse_address(address)
    except BadAddress:
        return address


async def _journal_screening(
    conn: AsyncConnection, address: str, action: str, actor: str, reason: str, now: datetime
) -> None:
    row = {"address": address, "action": action, "actor": actor, "reason": reason[:1000], "at": now}
    await conn.execute(insert(screening_decisions).values(row))


async def _journal(
    conn: AsyncConnection,
    chain: Chain,
    key: str,
    decision: str,
    person_id: UUID | None,
    actor: str,
    reason: str,
    now: datetime,
) -> None:
    await conn.execute(
        insert(deposit_decisions).values(
            chain=chain.value,
            key=key,
            decision=decision,
            person_id=person_id,
            actor=actor,
            reason=reason[:1000],
            at=now,
        )
    )
