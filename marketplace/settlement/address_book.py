"""Where a person may be paid: parsed once, cooled before its first use, never changed, only retired.

A new address waits `cooling_s` (A43): a stolen session cannot add one and empty the account before its
owner reads the notice.  Adding a retired address again starts a new wait.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.addresses import parse_payout_address
from chain.networks import Chain
from marketplace.notices import outbox
from marketplace.platform.ids import uuid7
from marketplace.platform.settings import ChainsConfig
from marketplace.settlement import sanctions
from marketplace.settlement.errors import NotFound, WrongState
from marketplace.settlement.tables import payout_addresses

ADDRESSES_MAX: Final = 50
"""Addresses one person may have in use."""
LISTED_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class PayoutAddress:
    """One entry of the address book."""

    id: UUID
    chain: Chain
    address: str
    created_at: datetime
    usable_at: datetime
    retired_at: datetime | None


def ours(chains: ChainsConfig) -> frozenset[str]:
    """Name the addresses of this installation, which are never paid out to (A44)."""
    evm = (chains.ethereum, chains.base)
    named = {address for c in evm for address in (c.usdc, c.escrow, c.forwarder_factory, c.multi_send)}
    solana = chains.solana
    return frozenset(
        named | {solana.usdc_mint, solana.multisig, solana.escrow, solana.nonce_account, solana.gas_payer}
    )


async def add(
    conn: AsyncConnection,
    *,
    person: UUID,
    chain: Chain,
    text: str,
    forbidden: Collection[str],
    cooling_s: int,
    now: datetime,
) -> tuple[PayoutAddress, bool]:
    """Add an address; gives it, and whether this call added it.

    BadAddress, Sanctioned, WrongState at the limit.
    The owner is told by a notice, to the contact on record.
    """
    address = parse_payout_address(chain, text, forbidden)
    if await sanctions.listed(conn, [address]):
        raise sanctions.Sanctioned(f"{address} is on a sanctions list; use another address")
    if (found := await find_in_use(conn, person, chain, address)) is not None:
        return found, False
    t = payout_addresses.c
    in_use = select(func.count()).where(t.person_id == person, t.retired_at.is_(None))
    if (await conn.scalar(in_use) or 0) >= ADDRESSES_MAX:
        raise WrongState(f"at most {ADDRESSES_MAX} payout addresses are in use at once; retire one first")
    entry = PayoutAddress(uuid7(), chain, address, now, now + timedelta(seconds=cooling_s), None)
    statement = insert(payout_addresses).values(
        id=entry.id,
        person_id=person,
        chain=chain.value,
        address=address,
        created_at=entry.created_at,
        usable_at=entry.usable_at,
    )
    added = await conn.scalar(statement.on_conflict_do_nothing().returning(t.id))
    if added is None:  # the same request a moment ago
        found = await find_in_use(conn, person, chain, address)
        if found is None:
            raise WrongState("the address is being retired; try again")
        return found, False
    message = (
        f"{address} on {chain.value} was added to your payout addresses; it can be used from "
        f"{entry.usable_at.isoformat(timespec='minutes')}. If it was not you, retire it and tell us."
    )
    await outbox.enqueue(conn, "payout_address_added", person, {"message": message}, now=now)
    return entry, True


async def find_in_use(
    conn: AsyncConnection, person: UUID, chain: Chain, address: str
) -> PayoutAddress | None:
    """Find the entry in use for a canonical address; None if the person does not have it."""
    t = payout_addresses.c
    row = (
        await conn.execute(
            select(payout_addresses).where(
                t.person_id == person, t.chain == chain.value, t.address == address, t.retired_at.is_(None)
            )
        )
    ).one_or_none()
    return None if row is None else _entry(row)


async def listing(conn: AsyncConnection, person: UUID) -> list[PayoutAddress]:
    """A person's entries: every one in use, oldest first, then the retired ones, the last retired first."""
    t = payout_addresses.c
    rows = await conn.execute(
        select(payout_addresses)
        .where(t.person_id == person)
        .order_by(t.retired_at.desc().nulls_first(), t.id)
        .limit(LISTED_MAX)
    )
    return [_entry(row) for row in rows]


async def retire(conn: AsyncConnection, *, person: UUID, address_id: UUID, now: datetime) -> None:
    """Take an address out of use.  Withdrawals already requested keep the address they were given."""
    t = payout_addresses.c
    done = await conn.execute(
        update(payout_addresses)
        .where(t.id == address_id, t.person_id == person, t.retired_at.is_(None))
        .values(retired_at=now)
    )
    if done.rowcount == 0:
        raise NotFound("you have no such payout address in use")
    message = f"payout address {address_id} was retired. If it was not you, tell us."
    await outbox.enqueue(conn, "payout_address_retired", person, {"message": message}, now=now)


def _entry(r: Row[Any]) -> PayoutAddress:
    return PayoutAddress(r.id, Chain(r.chain), r.address, r.created_at, r.usable_at, r.retired_at)
