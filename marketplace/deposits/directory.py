"""Which addresses are ours: the watchers' filter in memory, and the tables that decide.

Why no deposit can slip by: an address is shown only after the transaction that stored it has committed,
so a payment to it is mined later still; the watcher asks for the final block *first*, then reads new
addresses, then reads the range.  Everything mined in that range to one of our addresses is therefore to an
address it knows.  New rows are found by `seq`, which grows in commit order because writers hold
`lock_directory` until they commit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Final, Literal
from uuid import UUID

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.networks import Chain
from chain.ports import TransferSeen
from marketplace.deposits.attribution import Directory, Owner
from marketplace.deposits.tables import deposit_addresses, deposit_intents, screened_senders, solana_pool
from marketplace.platform.database import is_among

Family = Literal["evm", "solana"]

REFERENCE_GRACE: Final = timedelta(days=7)
"""How long after its expiry a payment with an intent's reference still finds its owner by itself."""
DIRECTORY_LOCK: Final = 0x746F6C6C_64697265  # "tolldire"
_FROZEN: Final = text("SELECT id FROM people WHERE frozen_at IS NOT NULL AND id = ANY (:people)")


def family_of(chain: Chain) -> Family:
    return "evm" if chain.is_evm else "solana"


async def lock_directory(conn: AsyncConnection) -> None:
    """Make the rows this transaction is about to insert visible before any with a higher number."""
    await conn.execute(select(func.pg_advisory_xact_lock(DIRECTORY_LOCK)))


class KnownAddresses:
    """`chain.ports.WatchSet` of one chain; `refresh` adds what has been stored since."""

    def __init__(self, chain: Chain, escrow: str) -> None:
        self._family = family_of(chain)
        self._escrow = self._spelt(escrow)
        self._addresses: set[str] = set()
        """On EVM in lower case: a reader asks before it spells an address out."""
        self._references: dict[str, datetime] = {}
        self._last_address = 0
        self._last_pool_index = -1
        self._last_intent = 0

    def __len__(self) -> int:
        return len(self._addresses)

    def is_watched(self, address: str) -> bool:
        address = self._spelt(address)
        return address in self._addresses or address == self._escrow

    def is_reference(self, key: str) -> bool:
        return key in self._references

    def _spelt(self, address: str) -> str:
        return address.lower() if self._family == "evm" else address

    async def refresh(self, conn: AsyncConnection, now: datetime) -> None:
        """Read what was added since the last call."""
        if self._family == "evm":
            await self._refresh_forwarders(conn)
        else:
            await self._refresh_pool(conn)
            await self._refresh_intents(conn, now)

    async def _refresh_forwarders(self, conn: AsyncConnection) -> None:
        statement = (
            select(deposit_addresses.c.seq, deposit_addresses.c.watched)
            .where(deposit_addresses.c.chain_family == "evm", deposit_addresses.c.seq > self._last_address)
            .order_by(deposit_addresses.c.seq)
        )
        for seq, watched in await conn.execute(statement):
            self._addresses.add(self._spelt(watched))
            self._last_address = seq

    async def _refresh_pool(self, conn: AsyncConnection) -> None:
        statement = (
            select(solana_pool.c.pool_index, solana_pool.c.owner, solana_pool.c.token_account)
            .where(solana_pool.c.pool_index > self._last_pool_index)
            .order_by(solana_pool.c.pool_index)
        )
        for index, owner, token_account in await conn.execute(statement):
            self._addresses |= {token_account, owner}  # the owner for tokens we do not take
            self._last_pool_index = index

    async def _refresh_intents(self, conn: AsyncConnection, now: datetime) -> None:
        oldest = now - REFERENCE_GRACE
        statement = (
            select(deposit_intents.c.seq, deposit_intents.c.reference, deposit_intents.c.expires_at)
            .where(deposit_intents.c.seq > self._last_intent, deposit_intents.c.expires_at > oldest)
            .order_by(deposit_intents.c.seq)
        )
        rows = (await conn.execute(statement)).all()
        if not rows:
            return
        self._references = {key: until for key, until in self._references.items() if until > oldest}
        for seq, reference, expires_at in rows:
            self._references[reference] = expires_at
            self._last_intent = seq


async def look_up(
    conn: AsyncConnection, chain: Chain, escrow: str, transfers: Sequence[TransferSeen]
) -> Directory:
    """Read what the tables say of the addresses in `transfers`, as of this transaction."""
    reached = {transfer.to for transfer in transfers}
    senders = {transfer.sender for transfer in transfers if transfer.to == escrow}
    references = {reference for transfer in transfers for reference in transfer.references}
    family = family_of(chain)
    owners = await _owners(conn, family, reached)
    screened = await _screened(conn, {who for t in transfers for who in (t.sender, *t.also_sent)})
    intents: dict[str, UUID] = {}
    ours: frozenset[str] = frozenset()
    if family == "solana":
        owners |= {account: owners.get(account, owner) for account, owner in await _pool(conn, reached)}
        owners |= await _wallets(conn, reached)
        intents = await _intents(conn, references)
    else:
        ours = frozenset(await _owners(conn, family, senders))
    frozen = await _frozen(conn, {*(o.person_id for o in owners.values() if o.person_id), *intents.values()})
    return Directory(escrow, owners, ours, intents, screened, frozen)


async def _owners(conn: AsyncConnection, family: Family, watched: Iterable[str]) -> dict[str, Owner]:
    statement = select(
        deposit_addresses.c.watched, deposit_addresses.c.person_id, deposit_addresses.c.retired_at
    ).where(deposit_addresses.c.chain_family == family, is_among(deposit_addresses.c.watched, set(watched)))
    return {
        row.watched: Owner(row.person_id, row.retired_at is not None) for row in await conn.execute(statement)
    }


async def _pool(conn: AsyncConnection, accounts: Iterable[str]) -> list[tuple[str, Owner]]:
    """Pool accounts among `accounts`; without a row in deposit_addresses they are nobody's yet."""
    statement = select(solana_pool.c.token_account).where(
        is_among(solana_pool.c.token_account, set(accounts))
    )
    return [(account, Owner(None, is_retired=False)) for account in await conn.scalars(statement)]


async def _wallets(conn: AsyncConnection, owners: Iterable[str]) -> dict[str, Owner]:
    """People by the wallet they are shown, for tokens we do not take."""
    statement = select(
        deposit_addresses.c.address, deposit_addresses.c.person_id, deposit_addresses.c.retired_at
    ).where(deposit_addresses.c.chain_family == "solana", is_among(deposit_addresses.c.address, set(owners)))
    return {
        row.address: Owner(row.person_id, row.retired_at is not None) for row in await conn.execute(statement)
    }


async def _screened(conn: AsyncConnection, senders: Iterable[str]) -> frozenset[str]:
    statement = select(screened_senders.c.address).where(is_among(screened_senders.c.address, set(senders)))
    return frozenset(await conn.scalars(statement))


async def _intents(conn: AsyncConnection, references: Iterable[str]) -> dict[str, UUID]:
    statement = select(deposit_intents.c.reference, deposit_intents.c.person_id).where(
        is_among(deposit_intents.c.reference, set(references))
    )
    return {row.reference: row.person_id for row in await conn.execute(statement)}


async def _frozen(conn: AsyncConnection, people: Collection[UUID]) -> frozenset[UUID]:
    """Those of `people` whose accounts are frozen now."""
    if not people:
        return frozenset()
    return frozenset(await conn.scalars(_FROZEN, {"people": list(people)}))
