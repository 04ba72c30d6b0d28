"""Reorgs of every depth on real nodes: above finality nothing is lost or kept, below it the chain halts.

The watcher is driven tick by tick, the node makes blocks only when told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from deposits_nodes import CLOCK, LAG, EvmTown, Town, a_base_town, a_town, chains_file, start_base
from sqlalchemy.ext.asyncio import AsyncEngine
from typer.testing import CliRunner, Result

from chain.errors import Reverted
from chain.localnet.evm import Anvil, EvmDeployment
from chain.localnet.solana import deploy, fund
from chain.localnet.solana_vm.server import serving
from chain.localnet.solana_wallet import SolanaWallet
from chain.solana.deposits import PoolAddress, prepare_pool_address
from chain.solana.keystore import from_seed
from chain.solana.reader import SolanaReader
from chain.solana.rpc import LatestBlockhash, SolanaRpc
from chain.units import Micro
from marketplace.cli_deposits import deposits_app
from marketplace.deposits.recovery import Accepted, accept_history
from marketplace.platform.settings import settings_environment

T = TypeVar("T")

pytestmark = [pytest.mark.chains]


@pytest.fixture(scope="module")
def anvil(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Anvil, EvmDeployment]]:
    """One for all depths: each test brings a book of its own, and starts above the newest final block."""
    node, there = asyncio.run(start_base(tmp_path_factory.mktemp("reorgs")))
    yield node, there
    asyncio.run(node.stop())


# ── Base, on anvil ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def base(engine: AsyncEngine, anvil: tuple[Anvil, EvmDeployment]) -> AsyncIterator[EvmTown]:
    async with a_base_town(engine, anvil) as town:
        yield town


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


async def accept(town: Town, height: int) -> Accepted:
    said = {"actor": "ann", "reason": "the network says so"}
    return await accept_history(
        town.engine, CLOCK, town.reader, town.watcher.rules, from_height=height, **said
    )


@pytest.mark.parametrize("below", range(1, 5))
async def test_a15_a_reorg_below_finality_halts_the_chain_until_it_is_accepted(
    base: EvmTown, below: int
) -> None:
    """`below` final blocks are replaced; the newest final one always among them."""
    untouched = (await base.reader.head()).height
    paid = await base.pay(9)
    await base.mine(LAG + below - 1)
    await base.settle()
    assert (await base.statuses(), await base.micro()) == ({paid: "final"}, 9_000_000)
    await base.reorg(LAG + below)
    await base.settle()
    assert await base.is_halted()
    new = await base.pay(50)
    await base.mine(LAG + 2)
    await base.settle()
    assert (await base.statuses(), await base.micro()) == ({paid: "final"}, 9_000_000)
    accepted = await accept(base, untouched)
    assert [key.partition(":")[0] for key in accepted.taken_back] == [paid]
    assert (await base.statuses(), await base.micro()) == ({paid: "orphaned", new: "final"}, 50_000_000)
    await base.books_hold()
    await base.settle()
    assert not await base.is_halted()


# ── Solana ────────────────────────────────────────────────────────────────────────────────────────────


SOLANA_LAG = 8


@dataclass
class SolanaTown(Town):
    rpc: SolanaRpc
    wallet: SolanaWallet

    async def tick(self, slots: int) -> None:
        await self.rpc.call("dev_tick", [slots], int)

    async def passing(self, work: Awaitable[T]) -> T:
        """Let slots pass until `work` is done."""
        doing = asyncio.ensure_future(work)
        while not doing.done():
            await asyncio.sleep(0.01)
            await self.tick(1)
        return await doing

    async def pay(self, usdc: int) -> str:
        return await self.passing(self.wallet.pay(self.address, Micro(usdc * 1_000_000)))

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


async def test_a_person_accepts_a_history_by_command(
    base: EvmTown,
    anvil: tuple[Anvil, EvmDeployment],
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chains = chains_file(tmp_path, anvil[0].url, anvil[1])
    settings = {"database_url": database_url, "secret": "s" * 40, "chains_file": str(chains)}
    for name, value in (settings_environment(settings) | {"COLUMNS": "300"}).items():
        monkeypatch.setenv(name, value)

    async def command(height: int) -> Result:
        said = [
            "accept-history",
            "--chain",
            "base",
            "--from",
            str(height),
            "--as",
            "ann",
            "--reason",
            "looked",
        ]
        return await asyncio.to_thread(CliRunner().invoke, deposits_app, said)

    untouched = (await base.reader.head()).height
    paid = await base.pay(9)
    await base.mine(LAG)
    await base.settle()
    early = await command(untouched)
    assert (early.exit_code, "not halted" in early.stderr) == (1, True)
    await base.reorg(LAG + 1)
    await base.mine(LAG + 2)
    await base.settle()
    wrong = await command(untouched + 10_000)
    assert (wrong.exit_code, "choose a block" in wrong.stderr) == (1, True)
    done = await command(untouched)
    assert done.exit_code == 0, done.output
    assert f"taken back  {paid}" in done.stdout
    await base.settle()
    assert (await base.statuses(), await base.is_halted()) == ({paid: "orphaned"}, False)


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
async def test_a15_a_solana_fork_below_finality_halts_the_chain_until_it_is_accepted(
    solana: SolanaTown, reuse: bool
) -> None:
    untouched = (await solana.reader.final()).height
    paid = await solana.pay(9)
    await solana.tick(2 * SOLANA_LAG)
    await solana.settle()
    assert (await solana.statuses(), await solana.micro()) == ({paid: "final"}, 9_000_000)
    slots = (await solana.reader.head()).height - untouched - 1
    await solana.fork(slots, reuse=reuse)
    await solana.tick(slots + 2 * SOLANA_LAG)
    await solana.settle()
    assert await solana.is_halted()
    assert (await solana.statuses(), await solana.micro()) == ({paid: "final"}, 9_000_000)
    await accept(solana, untouched)
    assert (await solana.statuses(), await solana.micro()) == ({paid: "orphaned"}, 0)
    await solana.settle()
    assert not await solana.is_halted()


async def test_a_pool_address_whose_blockhash_expired_is_made_at_the_next_try(
    solana: SolanaTown, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is paid with a blockhash, so trying again is harmless; what pays rides on a durable nonce."""
    gas_key, multisig = from_seed(bytes([4]) * 32), str(from_seed(bytes([1]) * 32).pubkey())
    await solana.passing(fund(solana.rpc, str(gas_key.pubkey()), lamports=10**10))
    stale = await solana.rpc.latest_blockhash()
    await solana.tick(700)  # a blockhash lives for 150 blocks; of idle slots every fourth has one

    def prepare() -> Awaitable[PoolAddress]:
        return solana.passing(
            prepare_pool_address(solana.rpc, gas_key, bytes(range(32)), 7, multisig=multisig)
        )

    async def old() -> LatestBlockhash:
        return stale

    with monkeypatch.context() as patched:
        patched.setattr(solana.rpc, "latest_blockhash", old)
        with pytest.raises(Reverted, match="Blockhash not found"):
            await prepare()
    made = await prepare()
    assert await solana.rpc.account(made.token_account, "confirmed") is not None
    before = await solana.rpc.call("getTransactionCount", [], int)
    assert await prepare() == made
    assert await solana.rpc.call("getTransactionCount", [], int) == before
