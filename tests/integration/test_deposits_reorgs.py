"""Reorgs of every depth on real nodes: above finality nothing is lost or kept, below it the chain halts.

The watcher is driven tick by tick, the node makes blocks only when told.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.evm.reader import EvmReader
from chain.evm.rpc import JsonRpc
from chain.localnet import evm as localnet
from chain.localnet import settings as localnet_settings
from chain.localnet.evm import Anvil, EvmDeployment
from chain.localnet.solana import deploy, fund
from chain.localnet.solana_vm.server import serving
from chain.localnet.solana_wallet import SolanaWallet
from chain.networks import BASE
from chain.ports import ChainReader
from chain.solana.keystore import from_seed
from chain.solana.reader import SolanaReader
from chain.solana.rpc import SolanaRpc
from chain.units import Micro
from marketplace.deposits.booking import Rules
from marketplace.deposits.cursor import load_cursor
from marketplace.deposits.reconcile import check_chain
from marketplace.deposits.tables import deposit_addresses, deposits, solana_pool
from marketplace.deposits.watcher import Pace, Watcher
from marketplace.ledger import accounts
from marketplace.ledger.accounts import read_balance
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction

pytestmark = [pytest.mark.chains]

EPOCH = 3
LAG = 2 * EPOCH
"""Blocks the finalized one is behind."""
OWNERS = [bytes([i]) * 32 for i in (1, 2, 3)]
CLOCK = SystemClock()


@pytest.fixture(scope="module")
def anvil(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Anvil, EvmDeployment]]:
    """One for all depths: each test brings a book of its own, and starts above the newest final block."""
    settings = msgspec.structs.replace(localnet_settings.read().base, slots_in_an_epoch=EPOCH)
    folder = tmp_path_factory.mktemp("reorgs")

    async def start() -> tuple[Anvil, EvmDeployment]:
        node = await Anvil.start(BASE, settings, folder)
        async with JsonRpc(node.url) as rpc:
            there = await localnet.deploy(rpc, BASE, settings, [localnet.address_of(key) for key in OWNERS])
            await rpc.call("evm_setIntervalMining", 0, shape=msgspec.Raw)
            await rpc.call("evm_setAutomine", True, shape=msgspec.Raw)
        return node, there

    node, there = asyncio.run(start())
    yield node, there
    asyncio.run(node.stop())


@dataclass
class Town:
    """One chain, its watcher, one buyer."""

    engine: AsyncEngine
    reader: ChainReader
    watcher: Watcher
    person: uuid.UUID
    address: str
    escrow: str

    async def settle(self) -> None:
        for _ in range(50):
            if not await self.watcher.tick():
                return
        raise AssertionError("the watcher never came to rest")

    async def micro(self) -> int:
        async with transaction(self.engine) as conn:
            found = await read_balance(conn, accounts.buyer(str(self.person)))
        return found.posted.n // 1000 if found else 0

    async def statuses(self) -> dict[str, str]:
        async with transaction(self.engine) as conn:
            rows = await conn.execute(select(deposits.c.tx, deposits.c.status))
            return {row.tx: row.status for row in rows}

    async def is_halted(self) -> bool:
        async with transaction(self.engine) as conn:
            cursor = await load_cursor(conn, self.reader.chain)
        assert cursor is not None
        assert cursor.halt is None or cursor.halt.by == "watcher"
        return cursor.halt is not None

    async def books_hold(self) -> None:
        for result in await check_chain(self.engine, self.reader, self.escrow, patience_s=5):
            assert result.is_equal, result


async def a_town(engine: AsyncEngine, reader: ChainReader, escrow: str, address: str, watched: str) -> Town:
    person = uuid.uuid4()
    family = "evm" if reader.chain.is_evm else "solana"
    async with transaction(engine) as conn:
        if family == "solana":
            row = {"pool_index": 0, "owner": address, "token_account": watched, "person_id": person}
            await conn.execute(insert(solana_pool).values(**row, ready_at=CLOCK.now()))
        await conn.execute(
            insert(deposit_addresses).values(
                person_id=person,
                chain_family=family,
                address=address,
                watched=watched,
                salt=person.bytes * 2 if family == "evm" else None,
                pool_index=0 if family == "solana" else None,
                created_at=CLOCK.now(),
            )
        )
    pace = Pace(blocks_per_tick=4)
    watcher = Watcher(Rules(reader.chain, escrow, 5_000_000), reader, engine, CLOCK, pace=pace)
    town = Town(engine, reader, watcher, person, address, escrow)
    await town.settle()
    return town


# ── Base, on anvil ────────────────────────────────────────────────────────────────────────────────────


@dataclass
class EvmTown(Town):
    rpc: JsonRpc

    async def pay(self, usdc: int) -> str:
        tx = await localnet.fund(self.rpc, BASE, self.address, usdc=Micro(usdc * 1_000_000))
        assert tx is not None
        return tx

    async def mine(self, blocks: int) -> None:
        if blocks:
            await localnet.mine(self.rpc, blocks)

    async def reorg(self, depth: int, *again: str) -> None:
        """Replace the newest `depth` blocks; `again` are raw transactions for the newest of the new ones."""
        placed = [[raw, depth - 1] for raw in again]
        await self.rpc.call("anvil_reorg", depth, placed, shape=msgspec.Raw)


@pytest.fixture
async def base(engine: AsyncEngine, anvil: tuple[Anvil, EvmDeployment]) -> AsyncIterator[EvmTown]:
    node, there = anvil
    async with JsonRpc(node.url) as rpc:
        await localnet.mine(rpc, LAG + 2)
        address = localnet.address_of(os.urandom(32))
        town = await a_town(engine, EvmReader(BASE, rpc), there.safe, address, address)
        yield EvmTown(**vars(town), rpc=rpc)


@pytest.mark.parametrize("depth", range(1, LAG + 1))
async def test_a14_a_reorg_above_finality_takes_what_was_only_seen(base: EvmTown, depth: int) -> None:
    lost = await base.pay(9)
    await base.mine(depth - 1)
    await base.settle()
    assert await base.statuses() == {lost: "seen"}
    await base.reorg(depth)
    await base.mine(1)
    await base.settle()
    assert await base.statuses() == {lost: "orphaned"}
    kept = await base.pay(6)
    await base.mine(LAG)
    await base.settle()
    assert await base.statuses() == {lost: "orphaned", kept: "final"}
    assert await base.micro() == 6_000_000
    assert not await base.is_halted()
    await base.books_hold()


@pytest.mark.parametrize("depth", [1, 3, LAG])
async def test_a16_a_payment_mined_again_by_a_reorg_is_credited_once(base: EvmTown, depth: int) -> None:
    again = await base.pay(9)
    raw = await base.rpc.call("eth_getRawTransactionByHash", again, shape=str)
    await base.mine(depth - 1)
    await base.settle()
    await base.reorg(depth, raw)
    await base.settle()
    await base.mine(LAG)
    await base.settle()
    assert await base.statuses() == {again: "final"}
    assert await base.micro() == 9_000_000
    await base.books_hold()


@pytest.mark.parametrize("below", range(1, 5))
async def test_a15_a_reorg_below_finality_halts_the_chain(base: EvmTown, below: int) -> None:
    """`below` final blocks are replaced; the newest final one always among them."""
    paid = await base.pay(9)
    await base.mine(LAG + below - 1)
    await base.settle()
    assert (await base.statuses(), await base.micro()) == ({paid: "final"}, 9_000_000)
    await base.reorg(LAG + below)
    await base.settle()
    assert await base.is_halted()
    await base.pay(50)
    await base.mine(LAG + 2)
    await base.settle()
    assert (await base.statuses(), await base.micro()) == ({paid: "final"}, 9_000_000)


# ── Solana ────────────────────────────────────────────────────────────────────────────────────────────


SOLANA_LAG = 8


@dataclass
class SolanaTown(Town):
    rpc: SolanaRpc
    wallet: SolanaWallet

    async def tick(self, slots: int) -> None:
        await self.rpc.call("dev_tick", [slots], int)

    async def pay(self, usdc: int) -> str:
        paying = asyncio.create_task(self.wallet.pay(self.address, Micro(usdc * 1_000_000)))
        while not paying.done():
            await asyncio.sleep(0.01)
            await self.tick(1)
        return await paying

    async def fork(self, slots: int, *, reuse: bool) -> None:
        await self.rpc.call("dev_fork", [slots, {"reuse": reuse}], int)


@pytest.fixture
async def solana(engine: AsyncEngine, tmp_path: Path) -> AsyncIterator[SolanaTown]:
    async with (
        serving(
            tmp_path / "solana",
            port=0,
            clock=lambda: 1_000,
            slot_ms=0,
            finalized_after=SOLANA_LAG,
            empty_every=4,
        ) as (port, _),
        SolanaRpc(f"http://127.0.0.1:{port}") as rpc,
    ):
        names = [str(from_seed(bytes([i]) * 32).pubkey()) for i in (1, 2, 3, 4)]
        wallet, payee = SolanaWallet(rpc), SolanaWallet(rpc)

        async def prepare() -> str:
            there = await deploy(rpc, signers=names[:3], gas_payer=names[3])
            await fund(rpc, wallet.address, usdc=Micro(10**9), lamports=10**10)
            await wallet.pay(payee.address, Micro(1))  # the account is there before it is watched
            return there.escrow

        making = asyncio.create_task(prepare())
        while not making.done():
            await asyncio.sleep(0.01)
            await rpc.call("dev_tick", [1], int)
        await rpc.call("dev_tick", [2 * SOLANA_LAG], int)
        town = await a_town(engine, SolanaReader(rpc), await making, payee.address, payee.token_account)
        yield SolanaTown(**vars(town), rpc=rpc, wallet=wallet)


@pytest.mark.parametrize("reuse", [True, False])
async def test_a14_a_solana_fork_takes_what_was_only_seen(solana: SolanaTown, reuse: bool) -> None:
    """With `reuse` the same slots get other blocks; without, the dropped slots count as skipped."""
    lost = await solana.pay(9)
    await solana.tick(1)
    await solana.settle()
    assert await solana.statuses() == {lost: "seen"}
    await solana.fork(SOLANA_LAG - 2, reuse=reuse)
    await solana.tick(SOLANA_LAG - 1)
    await solana.settle()
    assert await solana.statuses() == {lost: "orphaned"}
    kept = await solana.pay(6)
    await solana.tick(2 * SOLANA_LAG)
    await solana.settle()
    assert await solana.statuses() == {lost: "orphaned", kept: "final"}
    assert await solana.micro() == 6_000_000
    assert not await solana.is_halted()


@pytest.mark.parametrize("reuse", [True, False])
async def test_a15_a_solana_fork_below_finality_halts_the_chain(solana: SolanaTown, reuse: bool) -> None:
    paid = await solana.pay(9)
    await solana.tick(2 * SOLANA_LAG)
    await solana.settle()
    assert (await solana.statuses(), await solana.micro()) == ({paid: "final"}, 9_000_000)
    await solana.fork(2 * SOLANA_LAG + 2, reuse=reuse)
    await solana.tick(4 * SOLANA_LAG)
    await solana.settle()
    assert await solana.is_halted()
    assert (await solana.statuses(), await solana.micro()) == ({paid: "final"}, 9_000_000)
