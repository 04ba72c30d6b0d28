"""S1, books meet chain: for each chain, at the block the cursor stands on, to the micro.

    balance of the escrow              = −escrow:c
    Σ balances of deposit addresses    = −unswept:c

On EVM the chain is asked *at the cursor's height*, so that timing does not come into it.  A Solana node
tells its newest final balance only, so there the check waits until the watcher stands on the node's
final block and the two agree; a payout that is final on chain but not yet in the books (or the other way
round) is waited for in the same way.  What still differs when patience ends is a real difference.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import ChainFault
from chain.ports import ChainReader
from marketplace.deposits.directory import family_of
from marketplace.deposits.tables import chain_cursors, deposit_addresses, solana_pool
from marketplace.ledger import accounts
from marketplace.ledger.accounts import read_balance
from marketplace.ledger.money import NANO_PER_MICRO
from marketplace.platform.database import transaction

RETRY_S: Final = 0.3
QUESTIONS_AT_ONCE: Final = 16


@dataclass(frozen=True, slots=True)
class Reconciled:
    """One account of the books against the chain, in micro-USDC."""

    chain: str
    account: str
    height: int
    onchain_micro: int
    books_nano: int

    @property
    def books_micro(self) -> int:
        """Whole micros in the books; `is_equal` also sees a remainder that should not be there."""
        return self.books_nano // NANO_PER_MICRO

    @property
    def is_equal(self) -> bool:
        return self.onchain_micro * NANO_PER_MICRO == self.books_nano


@dataclass(frozen=True, slots=True)
class _Books:
    height: int
    escrow_nano: int
    unswept_nano: int
    addresses: tuple[str, ...]


async def check_chain(
    engine: AsyncEngine, reader: ChainReader, escrow: str, *, patience_s: int = 30
) -> list[Reconciled]:
    """Compare one chain's books with the chain; retries for up to `patience_s` while they differ.

    Gives escrow:c and unswept:c.  Raises RpcUnavailable, LookupError if no watcher ever started.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_s
    while True:
        is_last = loop.time() >= deadline
        try:
            results, is_caught_up = await _check_once(engine, reader, escrow)
            if is_last or (is_caught_up and all(result.is_equal for result in results)):
                return results
        except ChainFault:  # say, a node that forgot the balances at a cursor still catching up
            if is_last:
                raise
        await asyncio.sleep(RETRY_S)


async def _check_once(engine: AsyncEngine, reader: ChainReader, escrow: str) -> tuple[list[Reconciled], bool]:
    books = await _read_books(engine, reader)
    height = books.height if reader.chain.is_evm else None
    limit = asyncio.Semaphore(QUESTIONS_AT_ONCE)

    async def balance(address: str) -> int:
        async with limit:
            return (await reader.usdc_balance(address, height=height)).n

    held, *unswept = await asyncio.gather(*(balance(address) for address in (escrow, *books.addresses)))
    is_caught_up = reader.chain.is_evm or (await reader.final()).height <= books.height
    chain = reader.chain.value
    return [
        Reconciled(chain, f"escrow:{chain}", books.height, held, books.escrow_nano),
        Reconciled(chain, f"unswept:{chain}", books.height, sum(unswept), books.unswept_nano),
    ], is_caught_up


async def _read_books(engine: AsyncEngine, reader: ChainReader) -> _Books:
    """Cursor and books of one moment."""
    chain, family = reader.chain.value, family_of(reader.chain)
    async with transaction(engine, isolation="REPEATABLE READ") as conn:
        height = await conn.scalar(select(chain_cursors.c.final_height).where(chain_cursors.c.chain == chain))
        if height is None:
            raise LookupError(f"no watcher of {chain} has ever started")
        escrow = await read_balance(conn, accounts.escrow(chain))
        unswept = await read_balance(conn, accounts.unswept(chain))
        watched = (
            select(deposit_addresses.c.watched).where(deposit_addresses.c.chain_family == "evm")
            if family == "evm"
            else select(solana_pool.c.token_account)
        )
        addresses = tuple(await conn.scalars(watched))
    # Assets are negative in the books.
    return _Books(
        int(height),
        -escrow.posted.n if escrow else 0,
        -unswept.posted.n if unswept else 0,
        addresses,
    )
