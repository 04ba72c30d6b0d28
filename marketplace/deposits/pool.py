"""The settler's part on Solana: deposit addresses kept ready before anybody asks.

An address' row is stored, and so watched, before its account exists on chain: nobody can pay an address
that the watcher does not know.  Then its token account is made and the escrow multisig approved as delegate;
only after that may it be given to a person.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import structlog
from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import Reverted
from chain.solana.deposits import PoolAddress, pool_address, prepare_pool_address
from chain.solana.keystore import from_seed
from chain.solana.rpc import SolanaRpc
from marketplace.deposits.directory import lock_directory
from marketplace.deposits.tables import solana_pool
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.platform.settings import SolanaChainConfig

READY_DEFAULT: Final = 8
"""Each costs 2,039,280 lamports of rent, which come back when its account is closed."""
REFUSED_WAIT_S: Final = 600.0
_log: Final = structlog.get_logger("marketplace.deposits")


@dataclass(slots=True)
class PoolKeeper:
    """Keeps `ready` addresses free; call `tick` in a loop from the one process that settles Solana."""

    engine: AsyncEngine
    clock: Clock
    address_at: Callable[[int], PoolAddress]
    """Compute an address, offline."""
    prepare: Callable[[int], Awaitable[PoolAddress]]
    """Make it payable and sweepable on chain; does nothing if it already is."""
    ready: int = READY_DEFAULT
    _put_off_until_s: dict[int, float] = field(default_factory=dict)
    """Until when to leave an address alone that the chain refuses: it must not keep the others waiting."""

    async def tick(self) -> bool:
        """Prepare one address; False if enough are free.  Raises ChainFault; calling again is safe."""
        now_s = self.clock.monotonic()
        self._put_off_until_s = {
            index: until_s for index, until_s in self._put_off_until_s.items() if until_s > now_s
        }
        index = await self._next()
        if index is None:
            return False
        try:
            made = await self.prepare(index)
        except Reverted as e:
            self._put_off_until_s[index] = now_s + REFUSED_WAIT_S
            _log.error("pool address refused", index=index, reason=str(e))
            return True
        async with transaction(self.engine) as conn:
            await conn.execute(
                update(solana_pool)
                .where(solana_pool.c.pool_index == index, solana_pool.c.ready_at.is_(None))
                .values(ready_at=self.clock.now())
            )
        _log.info("pool address ready", index=index, address=made.owner)
        return True

    async def _next(self) -> int | None:
        """An address that was begun, else a new one if too few are free."""
        async with transaction(self.engine) as conn:
            begun = await conn.scalar(
                select(func.min(solana_pool.c.pool_index)).where(
                    solana_pool.c.ready_at.is_(None), solana_pool.c.pool_index.not_in(self._put_off_until_s)
                )
            )
            if begun is not None:
                return int(begun)
            await lock_directory(conn)
            free = await conn.scalar(select(func.count()).where(solana_pool.c.person_id.is_(None)))
            if (free or 0) >= self.ready:
                return None
            newest = await conn.scalar(select(func.max(solana_pool.c.pool_index)))
            index = 0 if newest is None else int(newest) + 1
            address = self.address_at(index)
            await conn.execute(
                insert(solana_pool).values(
                    pool_index=index, owner=address.owner, token_account=address.token_account
                )
            )
        return index


def pool_keeper(
    engine: AsyncEngine,
    clock: Clock,
    rpc: SolanaRpc,
    config: SolanaChainConfig,
    *,
    pool_seed: bytes,
    gas_seed: bytes,
    ready: int = READY_DEFAULT,
) -> PoolKeeper:
    """A keeper on the real chain.  `pool_seed` derives the addresses' keys; `gas_seed` is the fee payer's."""
    gas_key = from_seed(gas_seed)

    async def prepare(index: int) -> PoolAddress:
        return await prepare_pool_address(
            rpc, gas_key, pool_seed, index, multisig=config.multisig, mint=config.usdc_mint
        )

    return PoolKeeper(
        engine, clock, lambda index: pool_address(pool_seed, index, mint=config.usdc_mint), prepare, ready
    )
