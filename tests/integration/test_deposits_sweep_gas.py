"""Sweeps on a real chain whose gas gets dear: what does not pay waits, what is stuck is sent for more."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import msgspec
import pytest
from deposits_nodes import LAG, start_base
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.evm.forwarders import Forwarders
from chain.evm.gas import GasPayer
from chain.evm.reader import EvmReader
from chain.evm.rpc import JsonRpc, quantity
from chain.evm.sweeps import Sweeper
from chain.localnet import evm as localnet
from chain.localnet.evm import Anvil, EvmDeployment
from chain.networks import BASE, Chain
from chain.units import Micro
from marketplace.deposits.booking import Rules
from marketplace.deposits.reconcile import check_chain
from marketplace.deposits.sweeper import REBROADCAST_S, EvmSweeper
from marketplace.deposits.tables import deposit_addresses, sweeps
from marketplace.deposits.watcher import Watcher
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction

pytestmark = pytest.mark.chains
GWEI = 10**9
PAYER = bytes([9]) * 32


class SteppingClock(SystemClock):
    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture(scope="module")
def anvil(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Anvil, EvmDeployment]]:
    node, there = asyncio.run(start_base(tmp_path_factory.mktemp("sweeps")))
    yield node, there
    asyncio.run(node.stop())


@dataclass
class Field:
    """One deposit address with money on it, its watcher and its sweeper."""

    engine: AsyncEngine
    rpc: JsonRpc
    watcher: Watcher
    sweeper: EvmSweeper
    clock: SteppingClock

    async def settle(self) -> None:
        while await self.watcher.tick():
            pass

    async def base_fee(self, wei: int) -> None:
        await self.rpc.call("anvil_setNextBlockBaseFeePerGas", hex(wei), shape=msgspec.Raw)
        await localnet.mine(self.rpc, 1)

    async def pooled(self) -> list[str]:
        """Transactions that wait to be mined."""
        found = await self.rpc.call(
            "txpool_content", shape=dict[str, dict[str, dict[str, dict[str, object]]]]
        )
        return [str(tx["hash"]) for of_sender in found["pending"].values() for tx in of_sender.values()]

    async def swept(self) -> list[str]:
        async with transaction(self.engine) as conn:
            return list(await conn.scalars(select(sweeps.c.tx)))


@pytest.fixture
async def field(engine: AsyncEngine, anvil: tuple[Anvil, EvmDeployment]) -> AsyncIterator[Field]:
    node, there = anvil
    forwarders, person, clock = Forwarders(there.forwarder_factory), uuid.uuid4(), SteppingClock()
    salt = person.bytes * 2
    address = str(forwarders.address_of(salt))
    async with JsonRpc(node.url) as rpc:
        await rpc.call("evm_setAutomine", True, shape=msgspec.Raw)
        await localnet.fund(rpc, BASE, localnet.address_of(PAYER), eth_wei=10**18)
        await localnet.mine(rpc, LAG + 1)
        async with transaction(engine) as conn:
            row = {"person_id": person, "chain_family": "evm", "address": address, "watched": address}
            await conn.execute(insert(deposit_addresses).values(**row, salt=salt, created_at=clock.now()))
        watcher = Watcher(Rules(Chain.BASE, there.safe, 5_000_000), EvmReader(BASE, rpc), engine, clock)
        rail = Sweeper(forwarders, rpc, GasPayer(rpc, BASE.chain_id, PAYER))
        here = Field(engine, rpc, watcher, EvmSweeper(Chain.BASE, engine, rail, clock), clock)
        await here.settle()
        await localnet.fund(rpc, BASE, address, usdc=Micro(20_000_000))
        await localnet.mine(rpc, LAG)
        await here.settle()
        yield here


async def test_a_sweep_waits_until_its_gas_pays(field: Field) -> None:
    await field.base_fee(50 * GWEI)
    assert await field.sweeper.tick() is None  # $20 for some $23 of gas
    await field.base_fee(GWEI // 100)
    tx = await field.sweeper.tick()
    assert tx is not None
    await localnet.mine(field.rpc, LAG)
    await field.settle()
    assert await field.swept() == [tx]


async def test_a_stuck_sweep_is_sent_again_for_more_and_lands_once(field: Field) -> None:
    await field.base_fee(GWEI // 100)
    await field.rpc.call("evm_setAutomine", False, shape=msgspec.Raw)
    first = await field.sweeper.tick()
    assert first is not None
    assert await field.sweeper.tick() is None
    assert await field.pooled() == [first]
    field.clock.seconds += REBROADCAST_S
    assert await field.sweeper.tick() is None
    (second,) = await field.pooled()  # in the first one's place
    assert second != first
    await field.base_fee(GWEI // 10)  # dearer than either offers: the node drops it
    assert await field.pooled() == []
    field.clock.seconds += REBROADCAST_S
    assert await field.sweeper.tick() is None
    (third,) = await field.pooled()
    await localnet.mine(field.rpc, 1)
    field.clock.seconds += REBROADCAST_S
    assert await field.sweeper.tick() is None  # mined, not final: nothing is sent
    assert await field.pooled() == []
    await localnet.mine(field.rpc, LAG)
    await field.settle()
    assert await field.swept() == [third]
    assert await field.sweeper.tick() is None
    for result in await check_chain(field.engine, field.watcher.reader, field.watcher.rules.escrow):
        assert result.is_equal, result


async def test_a_restarted_settler_takes_up_the_sweep_that_is_still_stuck(field: Field) -> None:
    await field.base_fee(GWEI // 100)
    await field.rpc.call("evm_setAutomine", False, shape=msgspec.Raw)
    first = await field.sweeper.tick()
    field.sweeper = EvmSweeper(Chain.BASE, field.engine, field.sweeper.rail, field.clock)
    assert await field.sweeper.tick() in (None, first)  # the same bytes, unless gas costs something else now
    assert await field.pooled() == [first]
    field.clock.seconds += REBROADCAST_S
    assert await field.sweeper.tick() is None
    (second,) = await field.pooled()
    await localnet.mine(field.rpc, LAG + 1)
    await field.settle()
    assert await field.swept() == [second]


async def test_a_sweep_whose_nonce_another_took_is_made_anew(field: Field) -> None:
    await field.base_fee(GWEI // 100)
    await field.rpc.call("evm_setAutomine", False, shape=msgspec.Raw)
    first = await field.sweeper.tick()
    assert first is not None
    await field.rpc.call("anvil_dropTransaction", first, shape=msgspec.Raw)
    payer = localnet.address_of(PAYER)
    nonce = quantity(await field.rpc.call("eth_getTransactionCount", payer, "latest", shape=str))
    await field.rpc.call("anvil_setNonce", payer, hex(nonce + 1), shape=msgspec.Raw)  # another used it
    field.clock.seconds += REBROADCAST_S
    second = await field.sweeper.tick()
    assert second not in (None, first)
    await localnet.mine(field.rpc, LAG + 1)
    await field.settle()
    assert await field.swept() == [second]


async def test_an_older_offer_that_lands_after_all_is_this_sweep(field: Field) -> None:
    await field.base_fee(GWEI // 100)
    await field.rpc.call("evm_setAutomine", False, shape=msgspec.Raw)
    first = await field.sweeper.tick()
    assert first is not None
    raw = await field.rpc.call("eth_getRawTransactionByHash", first, shape=str)
    field.clock.seconds += REBROADCAST_S
    assert await field.sweeper.tick() is None
    (second,) = await field.pooled()
    await field.rpc.call("anvil_dropTransaction", second, shape=msgspec.Raw)
    await field.rpc.call("eth_sendRawTransaction", raw, shape=str)
    await localnet.mine(field.rpc, 1)
    field.clock.seconds += REBROADCAST_S
    assert await field.sweeper.tick() is None  # not another one, for gas and nothing
    await localnet.mine(field.rpc, LAG)
    await field.settle()
    assert await field.swept() == [first]
    assert await field.sweeper.tick() is None
