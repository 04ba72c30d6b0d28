"""A real node, its watcher driven tick by tick, and one buyer: what tests of reorgs and crashes work with."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.evm.reader import EvmReader
from chain.evm.rpc import JsonRpc
from chain.localnet import evm as localnet
from chain.localnet import settings as localnet_settings
from chain.localnet.evm import Anvil, EvmDeployment
from chain.networks import BASE, EVM_NETWORKS, SOLANA, Chain
from chain.ports import ChainReader
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
from marketplace.platform.settings import ChainsConfig, EvmChainConfig, SolanaChainConfig

EPOCH = 3
LAG = 2 * EPOCH
"""Blocks the finalized one is behind."""
OWNERS = [bytes([i]) * 32 for i in (1, 2, 3)]
CLOCK = SystemClock()


async def start_base(folder: Path) -> tuple[Anvil, EvmDeployment]:
    """Base with finality LAG blocks behind, which makes a block for every transaction and else when told."""
    settings = msgspec.structs.replace(localnet_settings.read().base, slots_in_an_epoch=EPOCH)
    node = await Anvil.start(BASE, settings, folder)
    async with JsonRpc(node.url) as rpc:
        there = await localnet.deploy(rpc, BASE, settings, [localnet.address_of(key) for key in OWNERS])
        await rpc.call("evm_setIntervalMining", 0, shape=msgspec.Raw)
        await rpc.call("evm_setAutomine", True, shape=msgspec.Raw)
    return node, there


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


@asynccontextmanager
async def a_base_town(engine: AsyncEngine, anvil: tuple[Anvil, EvmDeployment]) -> AsyncIterator[EvmTown]:
    """A town of its own on a shared node."""
    node, there = anvil
    async with JsonRpc(node.url) as rpc:
        await localnet.mine(rpc, LAG + 2)
        address = localnet.address_of(os.urandom(32))
        town = await a_town(engine, EvmReader(BASE, rpc), there.safe, address, address)
        yield EvmTown(**vars(town), rpc=rpc)


def chains_file(folder: Path, url: str, there: EvmDeployment) -> Path:
    """Settings of a stack whose EVM chains are this node; its Solana is nowhere."""

    def evm(chain: Chain) -> EvmChainConfig:
        return EvmChainConfig(
            rpc=(url,),
            chain_id=EVM_NETWORKS[chain].chain_id,
            usdc=EVM_NETWORKS[chain].usdc,
            escrow=there.safe,
            forwarder_factory=there.forwarder_factory,
            multi_send=there.multi_send_call_only,
            signers=there.owners,
            threshold=2,
        )

    nobody = "1" * 32
    solana = SolanaChainConfig(
        rpc=(),
        usdc_mint=SOLANA.usdc_mint,
        multisig=nobody,
        escrow=nobody,
        nonce_account=nobody,
        gas_payer=nobody,
        signers=(nobody,),
        threshold=1,
    )
    config = ChainsConfig(ethereum=evm(Chain.ETHEREUM), base=evm(Chain.BASE), solana=solana)
    path = folder / "chains.json"
    path.write_text(config.model_dump_json())
    return path
