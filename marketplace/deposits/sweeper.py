"""The settler's part on EVM: moving what lies on deposit addresses into the escrow.

What is due is read from the books (final deposits minus final sweeps, per address); the transaction goes
through the forwarder factory, which anybody may call and which can pay nobody but the escrow.  The books
change only when the watcher finds the transfers final on chain, whoever triggered them.

One sweep per chain is on its way at a time, remembered in memory only: after a crash the next one may
find addresses empty, which costs some gas and moves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chain.evm.forwarders import Forwarders
from chain.evm.gas import GasPayer
from chain.evm.rpc import JsonRpc
from chain.evm.sweeps import Sweeper
from chain.networks import Chain
from chain.ports import Landed, SignedTransaction
from chain.units import Micro
from marketplace.deposits.tables import chain_cursors, deposit_addresses, deposits, sweeps
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.platform.settings import EvmChainConfig

REBROADCAST_S: Final = 60
"""How long a sent sweep may stay unseen before the same bytes are sent again."""
_log: Final = structlog.get_logger("marketplace.deposits")


class SweepRail(Protocol):
    """How one EVM chain sweeps; `chain.evm.sweeps.Sweeper`."""

    async def assemble(self, salts: Sequence[bytes]) -> SignedTransaction:
        """Dry-run and sign."""
        ...

    async def broadcast(self, signed: SignedTransaction) -> None:
        """Send the same bytes."""
        ...

    async def landed(self, signed: SignedTransaction) -> Landed | None:
        """The transaction at finality, or None."""
        ...


@dataclass(frozen=True, slots=True)
class SweepPolicy:
    """When a sweep is worth its gas."""

    address_micro_min: int = 1_000_000
    """Addresses with less are left for later."""
    total_micro_min: int = 5_000_000
    """No sweep that brings in less than this."""
    addresses_max: int = 200


@dataclass(frozen=True, slots=True)
class Due:
    """A deposit address and what lies on it, final and unswept."""

    address: str
    salt: bytes
    amount: Micro


async def due_for_sweep(conn: AsyncConnection, chain: Chain, policy: SweepPolicy) -> list[Due]:
    """Addresses worth sweeping, largest first; retired ones too."""
    received = (
        select(deposits.c.to_address.label("address"), func.sum(deposits.c.amount_micro).label("total"))
        .where(deposits.c.chain == chain.value, deposits.c.status == "final", ~deposits.c.is_direct)
        .group_by(deposits.c.to_address)
        .subquery()
    )
    gone = (
        select(sweeps.c.from_address.label("address"), func.sum(sweeps.c.amount_micro).label("total"))
        .where(sweeps.c.chain == chain.value)
        .group_by(sweeps.c.from_address)
        .subquery()
    )
    left = received.c.total - func.coalesce(gone.c.total, 0)
    statement = (
        select(deposit_addresses.c.watched, deposit_addresses.c.salt, left)
        .join(received, received.c.address == deposit_addresses.c.watched)
        .outerjoin(gone, gone.c.address == deposit_addresses.c.watched)
        .where(left >= max(policy.address_micro_min, 1), deposit_addresses.c.salt.is_not(None))
        .order_by(left.desc(), deposit_addresses.c.watched)
        .limit(policy.addresses_max)
    )
    return [Due(address, salt, Micro(int(amount))) for address, salt, amount in await conn.execute(statement)]


@dataclass(frozen=True, slots=True)
class _Sent:
    signed: SignedTransaction
    last_sent: float
    """Monotonic seconds."""


@dataclass(slots=True)
class EvmSweeper:
    """Sweeps one EVM chain; call `tick` in a loop from the one process that settles it."""

    chain: Chain
    engine: AsyncEngine
    rail: SweepRail
    clock: Clock
    policy: SweepPolicy = field(default_factory=SweepPolicy)
    _sent: _Sent | None = None

    async def tick(self) -> str | None:
        """Send a sweep if one is worth it and none is on its way; gives its transaction.

        Raises ChainError; calling again is safe.
        """
        if self._sent is not None and not await self._is_booked(self._sent):
            return None
        self._sent = None
        async with transaction(self.engine) as conn:
            due = await due_for_sweep(conn, self.chain, self.policy)
        total = sum(address.amount.n for address in due)
        if total < self.policy.total_micro_min or not due:
            return None
        signed = await self.rail.assemble([address.salt for address in due])
        self._sent = _Sent(signed, self.clock.monotonic())  # even if the send's result stays unknown
        await self.rail.broadcast(signed)
        _log.info("sweep sent", chain=self.chain.value, tx=signed.tx, addresses=len(due), amount_micro=total)
        return signed.tx

    async def _is_booked(self, sent: _Sent) -> bool:
        """Tell whether the sweep is final and the watcher is past it; repeats a send that is not seen."""
        landed = await self.rail.landed(sent.signed)
        if landed is None:
            now = self.clock.monotonic()
            if now - sent.last_sent >= REBROADCAST_S:
                self._sent = _Sent(sent.signed, now)
                await self.rail.broadcast(sent.signed)
            return False
        if not landed.is_success:
            _log.error("sweep reverted", chain=self.chain.value, tx=landed.tx)
        async with transaction(self.engine) as conn:
            height = await conn.scalar(
                select(chain_cursors.c.final_height).where(chain_cursors.c.chain == self.chain.value)
            )
        return height is not None and height >= landed.height


def evm_sweeper(
    chain: Chain,
    engine: AsyncEngine,
    clock: Clock,
    rpc: JsonRpc,
    config: EvmChainConfig,
    *,
    gas_key: bytes,
    policy: SweepPolicy | None = None,
) -> EvmSweeper:
    """A sweeper on the real chain.  Its gas key is its own: two senders with one take each other's nonces."""
    payer = GasPayer(rpc, config.chain_id, gas_key)
    rail = Sweeper(Forwarders(config.forwarder_factory), rpc, payer)
    return EvmSweeper(chain, engine, rail, clock, policy or SweepPolicy())
