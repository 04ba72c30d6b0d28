"""The settler's part on EVM: moving what lies on deposit addresses into the escrow.

What is due is read from the books (final deposits minus final sweeps, per address); the transaction goes
through the forwarder factory, which anybody may call and which can pay nobody but the escrow.  The books
change only when the watcher finds the transfers final on chain, whoever triggered them.

An address is swept when its gas pays: below a share of what lies on it (`worth_sweeping`).  What does not pay
yet stays where it is and grows; its owner has long been credited.

One sweep per chain is on its way at a time, remembered in memory only: after a crash the next one takes the
place of one that is not mined, or finds addresses empty, which costs some gas and moves nothing.  One that
is not mined is sent again for a better fee, on the same nonce, up to the gas payer's cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chain.evm.forwarders import Forwarders
from chain.evm.gas import FeesTooHigh, GasPayer, OuterNonceTaken
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
"""How long a sent sweep may stay unseen before it is sent again, for a better fee."""
WEI_PER_ETHER: Final = 10**18
GAS_PER_SWEEP, GAS_FIRST, GAS_AGAIN = 40_000, 54_000, 16_000
"""Of a transaction, of an address whose forwarder does not exist yet, and of one swept before (measured at
ten addresses: 53,781 and 15,948 each; alone 90,008 and 51,248)."""
_log: Final = structlog.get_logger("marketplace.deposits")


class SweepRail(Protocol):
    """How one EVM chain sweeps; `chain.evm.sweeps.Sweeper`."""

    async def gas_price_wei(self) -> int:
        """What a unit of gas costs now; FeesTooHigh above the cap."""
        ...

    async def assemble(self, salts: Sequence[bytes]) -> SignedTransaction:
        """Dry-run and sign."""
        ...

    async def replace(self, signed: SignedTransaction) -> SignedTransaction | None:
        """The same on the same nonce for a better fee; None if the nonce is used."""
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
    cost_bps_max: int = 1_000
    """Gas may cost this share (hundredths of a percent) of what it brings in: of each address, and of all."""
    ether_micro: int = 5_000_000_000
    """What an ether is taken to cost, in micro-USDC: rather too much, for nobody here knows its price."""

    def cost_micro(self, gas: int, wei_per_gas: int) -> int:
        """What so much gas costs in micro-USDC, rounded up."""
        return -(-gas * wei_per_gas * self.ether_micro // WEI_PER_ETHER)

    def pays(self, amount: Micro, gas: int, wei_per_gas: int) -> bool:
        """Tell whether bringing in `amount` is worth so much gas."""
        return self.cost_micro(gas, wei_per_gas) * 10_000 <= amount.n * self.cost_bps_max


@dataclass(frozen=True, slots=True)
class Due:
    """A deposit address and what lies on it, final and unswept."""

    address: str
    salt: bytes
    amount: Micro
    is_first: bool
    """Never swept before: its forwarder must be made."""

    @property
    def gas(self) -> int:
        return GAS_FIRST if self.is_first else GAS_AGAIN


def worth_sweeping(due: Sequence[Due], wei_per_gas: int, policy: SweepPolicy) -> list[Due]:
    """Those of `due` whose gas pays, or none if not even all of these pay for one transaction."""
    chosen = [address for address in due if policy.pays(address.amount, address.gas, wei_per_gas)]
    total = Micro(sum(address.amount.n for address in chosen))
    gas = GAS_PER_SWEEP + sum(address.gas for address in chosen)
    is_enough = total.n >= policy.total_micro_min and policy.pays(total, gas, wei_per_gas)
    return chosen if is_enough else []


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
        select(deposit_addresses.c.watched, deposit_addresses.c.salt, left, gone.c.total.is_(None))
        .join(received, received.c.address == deposit_addresses.c.watched)
        .outerjoin(gone, gone.c.address == deposit_addresses.c.watched)
        .where(left >= max(policy.address_micro_min, 1), deposit_addresses.c.salt.is_not(None))
        .order_by(left.desc(), deposit_addresses.c.watched)
        .limit(policy.addresses_max)
    )
    return [
        Due(address, salt, Micro(int(amount)), is_first)
        for address, salt, amount, is_first in await conn.execute(statement)
    ]


@dataclass(frozen=True, slots=True)
class _Sent:
    variants: tuple[SignedTransaction, ...]
    """On one nonce, for better and better fees: at most one of them lands."""
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
        if sum(address.amount.n for address in due) < self.policy.total_micro_min:
            return None
        due = worth_sweeping(due, await self.rail.gas_price_wei(), self.policy)
        if not due:
            return None
        total = sum(address.amount.n for address in due)
        signed = await self.rail.assemble([address.salt for address in due])
        self._sent = _Sent((signed,), self.clock.monotonic())  # even if the send's result stays unknown
        try:
            await self.rail.broadcast(signed)
        except OuterNonceTaken:  # by one that an earlier process sent: this offers more than it, before long
            _log.info("an earlier sweep waits to be mined", chain=self.chain.value)
            return None
        _log.info("sweep sent", chain=self.chain.value, tx=signed.tx, addresses=len(due), amount_micro=total)
        return signed.tx

    async def _is_booked(self, sent: _Sent) -> bool:
        """Tell whether the sweep is final and the watcher is past it, or can never land; repeats its send."""
        landed = None
        for signed in sent.variants:
            landed = landed or await self.rail.landed(signed)
        if landed is None:
            if self.clock.monotonic() - sent.last_sent < REBROADCAST_S:
                return False
            return not await self._send_again(sent)
        if not landed.is_success:
            _log.error("sweep reverted", chain=self.chain.value, tx=landed.tx)
        async with transaction(self.engine) as conn:
            height = await conn.scalar(
                select(chain_cursors.c.final_height).where(chain_cursors.c.chain == self.chain.value)
            )
        return height is not None and height >= landed.height

    async def _send_again(self, sent: _Sent) -> bool:
        """Send it for a better fee, while the nonce is free; False if another transaction has taken that."""
        better = None
        with suppress(FeesTooHigh):
            better = await self.rail.replace(sent.variants[-1])
        variants = sent.variants if better is None else (*sent.variants, better)
        self._sent = _Sent(variants, self.clock.monotonic())
        for signed in reversed(variants):
            try:
                await self.rail.broadcast(signed)
            except OuterNonceTaken:
                continue
            return True
        _log.warning("sweep lost its nonce", chain=self.chain.value, tx=variants[-1].tx)
        return False


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
