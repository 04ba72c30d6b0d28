"""Where a person pays: one EVM address for Ethereum and Base, one Solana address, payment links.

An EVM address costs nothing: it is computed (CREATE2) and stored.  Its salt is keyed with the platform's
secret, so that nobody can pay an address before the watchers know it, not even the one it will belong to.
A Solana address comes from the pool that the settler keeps ready.  An address is shown only after the
transaction that stored it has committed (see `directory`).
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.evm.forwarders import Forwarders
from chain.solana.pay import new_reference, solana_pay_url
from chain.units import Micro
from marketplace.deposits.directory import Family, lock_directory
from marketplace.deposits.errors import TooManyIntents
from marketplace.deposits.tables import deposit_addresses, deposit_intents, solana_pool
from marketplace.platform.errors import SetupFault
from marketplace.platform.settings import ChainsConfig

INTENT_LIFE: Final = timedelta(hours=24)
OPEN_INTENTS_MAX: Final = 20
"""Per person: every watcher keeps every open reference in memory."""
PAY_LABEL: Final = "Tollway"


@dataclass(frozen=True, slots=True)
class Intent:
    """A Solana Pay link; `amount` None lets the payer choose."""

    reference: str
    url: str
    amount: Micro | None
    expires_at: datetime


def shared_forwarders(chains: ChainsConfig) -> Forwarders:
    """The factory of both EVM chains; SetupFault unless it is one and the same."""
    if chains.ethereum.forwarder_factory != chains.base.forwarder_factory:
        raise SetupFault("the forwarder factory must have one address on Ethereum and Base")
    return Forwarders(chains.ethereum.forwarder_factory)


def forwarder_salt(secret: bytes, person_id: UUID, generation: int) -> bytes:
    """The 32-byte CREATE2 salt of a person's address; `generation` counts the retired ones before it."""
    message = b"tollway/deposit-address/v1/" + person_id.bytes + generation.to_bytes(4)
    return hmac.digest(secret, message, "sha256")


async def evm_address(
    conn: AsyncConnection, forwarders: Forwarders, person_id: UUID, *, secret: bytes, now: datetime
) -> str:
    """Give the person's EVM deposit address, making it on first request."""
    found = await _active(conn, person_id, "evm")
    if found is None:
        await lock_directory(conn)
        found = await _active(conn, person_id, "evm")  # somebody else may have held the lock
    if found is not None:
        return found
    retired = await conn.scalar(
        select(func.count()).where(
            deposit_addresses.c.person_id == person_id, deposit_addresses.c.chain_family == "evm"
        )
    )
    salt = forwarder_salt(secret, person_id, retired or 0)
    address = str(forwarders.address_of(salt))
    await conn.execute(
        insert(deposit_addresses).values(
            person_id=person_id,
            chain_family="evm",
            address=address,
            watched=address,
            salt=salt,
            created_at=now,
        )
    )
    return address


async def solana_address(conn: AsyncConnection, person_id: UUID, *, now: datetime) -> str | None:
    """Give the person's Solana deposit address (a wallet address), taking one from the pool on first request.

    None while the pool is empty: the settler refills it within seconds; ask again.
    """
    found = await _active(conn, person_id, "solana")
    if found is None:
        await lock_directory(conn)
        found = await _active(conn, person_id, "solana")
    if found is not None:
        return found
    free = (
        select(solana_pool.c.pool_index)
        .where(solana_pool.c.person_id.is_(None), solana_pool.c.ready_at.is_not(None))
        .order_by(solana_pool.c.pool_index)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    taken = (
        await conn.execute(
            update(solana_pool)
            .where(solana_pool.c.pool_index == free)
            .values(person_id=person_id)
            .returning(solana_pool.c.pool_index, solana_pool.c.owner, solana_pool.c.token_account)
        )
    ).one_or_none()
    if taken is None:
        return None
    await conn.execute(
        insert(deposit_addresses).values(
            person_id=person_id,
            chain_family="solana",
            address=taken.owner,
            watched=taken.token_account,
            pool_index=taken.pool_index,
            created_at=now,
        )
    )
    return str(taken.owner)


async def create_intent(
    conn: AsyncConnection, chains: ChainsConfig, person_id: UUID, amount: Micro | None, *, now: datetime
) -> Intent:
    """Make a Solana Pay link into the escrow with a reference of the person's own; raises TooManyIntents."""
    await lock_directory(conn)
    open_now = await conn.scalar(
        select(func.count()).where(
            deposit_intents.c.person_id == person_id, deposit_intents.c.expires_at > now
        )
    )
    if (open_now or 0) >= OPEN_INTENTS_MAX:
        raise TooManyIntents(f"{OPEN_INTENTS_MAX} payment links are open; use one of them or wait")
    reference, expires_at = new_reference(), now + INTENT_LIFE
    await conn.execute(
        insert(deposit_intents).values(
            reference=reference,
            person_id=person_id,
            amount_micro=amount.n if amount else None,
            expires_at=expires_at,
            created_at=now,
        )
    )
    return Intent(reference, _pay_url(chains, reference, amount), amount, expires_at)


async def intent_url(
    conn: AsyncConnection, chains: ChainsConfig, person_id: UUID, reference: str, *, now: datetime
) -> str | None:
    """Give the link of one of the person's open intents; None if there is none."""
    row = (
        await conn.execute(
            select(deposit_intents.c.amount_micro).where(
                deposit_intents.c.reference == reference,
                deposit_intents.c.person_id == person_id,
                deposit_intents.c.expires_at > now,
            )
        )
    ).one_or_none()
    if row is None:
        return None
    return _pay_url(chains, reference, None if row.amount_micro is None else Micro(row.amount_micro))


def _pay_url(chains: ChainsConfig, reference: str, amount: Micro | None) -> str:
    solana = chains.solana
    return solana_pay_url(
        solana.multisig, reference=reference, label=PAY_LABEL, amount=amount, mint=solana.usdc_mint
    )


async def retire_address(
    conn: AsyncConnection, person_id: UUID, family: Family, *, actor: str, reason: str, now: datetime
) -> str | None:
    """Stop using the person's address: what still arrives there goes to `unattributed` with a case.

    Gives it, or None if he has none; the next request makes a new one.
    """
    retired: str | None = await conn.scalar(
        update(deposit_addresses)
        .where(
            deposit_addresses.c.person_id == person_id,
            deposit_addresses.c.chain_family == family,
            deposit_addresses.c.retired_at.is_(None),
        )
        .values(retired_at=now, retired_by=actor, retire_reason=reason[:1000])
        .returning(deposit_addresses.c.address)
    )
    return retired


async def _active(conn: AsyncConnection, person_id: UUID, family: Family) -> str | None:
    return await conn.scalar(
        select(deposit_addresses.c.address).where(
            deposit_addresses.c.person_id == person_id,
            deposit_addresses.c.chain_family == family,
            deposit_addresses.c.retired_at.is_(None),
        )
    )
