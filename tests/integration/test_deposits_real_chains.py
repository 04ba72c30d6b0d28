"""Deposits from wallet to balance on real anvils and the Solana VM, through the API and the watchers."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
import pytest
from fastapi import FastAPI, Request
from pydantic import SecretStr
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.evm.reader import EvmReader
from chain.evm.rpc import JsonRpc
from chain.localnet import evm as localnet
from chain.localnet import settings as localnet_settings
from chain.localnet.evm import Anvil, EvmDeployment
from chain.localnet.solana import SolanaDeployment, deploy, fund
from chain.localnet.solana_vm.server import serving
from chain.localnet.solana_wallet import SolanaWallet
from chain.networks import EVM_NETWORKS, Chain
from chain.solana.keystore import from_seed
from chain.solana.rpc import SolanaRpc
from chain.units import Micro
from marketplace.deposits import service
from marketplace.deposits.cursor import Cursor, load_cursor
from marketplace.deposits.pool import pool_keeper
from marketplace.deposits.qr import qr_svg
from marketplace.deposits.routes import router
from marketplace.deposits.sweeper import EvmSweeper, evm_sweeper
from marketplace.deposits.tables import deposits, sweeps
from marketplace.deposits.watcher import Pace
from marketplace.ledger import accounts
from marketplace.ledger.accounts import read_balance, total_by_kind
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction
from marketplace.platform.http import Identity, Services, install_error_handlers
from marketplace.platform.settings import ChainsConfig, EvmChainConfig, Settings, SolanaChainConfig

pytestmark = [pytest.mark.chains, pytest.mark.timeout(180)]

SETTINGS = localnet_settings.read()
OWNERS = [bytes([i]) * 32 for i in (1, 2, 3)]
SWEEP_PAYER, WALLET = bytes([5]) * 32, bytes([6]) * 32
POOL_SEED, GAS_SEED = bytes(range(32)), bytes([9]) * 32
ETHER = 10**18
QUICK = Pace(poll_s=0.1, fault_wait_s=0.2, standby_poll_s=0.2)
CLOCK = SystemClock()
FUNDED_BELOW = 20
"""Blocks above the funding, so that no reorg of a test reaches it."""


@dataclass(frozen=True)
class EvmNode:
    anvil: Anvil
    deployment: EvmDeployment


async def _start(network: Chain, folder: Path) -> EvmNode:
    settings = SETTINGS.evm(EVM_NETWORKS[network])
    node = await Anvil.start(EVM_NETWORKS[network], settings, folder)
    async with JsonRpc(node.url) as rpc:
        owners = [localnet.address_of(key) for key in OWNERS]
        deployment = await localnet.deploy(rpc, EVM_NETWORKS[network], settings, owners)
        for key in (SWEEP_PAYER, WALLET):
            await localnet.fund(rpc, EVM_NETWORKS[network], localnet.address_of(key), eth_wei=10 * ETHER)
        await localnet.fund(
            rpc, EVM_NETWORKS[network], localnet.address_of(WALLET), usdc=Micro(1_000_000_000)
        )
        await localnet.mine(rpc, FUNDED_BELOW)
    return EvmNode(node, deployment)


@pytest.fixture(scope="module")
def evm_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Chain, EvmNode]]:
    started: dict[Chain, EvmNode] = {}
    try:
        for chain in (Chain.ETHEREUM, Chain.BASE):
            started[chain] = asyncio.run(_start(chain, tmp_path_factory.mktemp(chain.value)))
        yield started
    finally:
        for node in started.values():
            asyncio.run(node.anvil.stop())


@dataclass
class Town:
    """Three running chains, the book, the API and the watchers."""

    engine: AsyncEngine
    chains: ChainsConfig
    evm: dict[Chain, JsonRpc]
    solana: SolanaRpc
    api: httpx.AsyncClient
    person: uuid.UUID
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.asynccontextmanager
    async def watching(self, *which: Chain) -> AsyncIterator[None]:
        self.stop = asyncio.Event()
        running = asyncio.create_task(
            service.watch(
                self.engine, CLOCK, self.chains, which, self.stop, deposit_micro_min=5_000_000, pace=QUICK
            )
        )
        try:
            await self.until(self._all_started(which))
            yield
        finally:
            self.stop.set()
            await running

    def _all_started(self, which: tuple[Chain, ...]) -> Callable[[], Awaitable[bool]]:
        from marketplace.deposits.tables import chain_cursors

        async def check() -> bool:
            async with transaction(self.engine) as conn:
                return await conn.scalar(select(func.count()).select_from(chain_cursors)) == len(which)

        return check

    async def until(self, condition: Callable[[], Awaitable[bool]], seconds: int = 40) -> None:
        async with asyncio.timeout(seconds):
            while not await condition():
                await asyncio.sleep(0.05)

    async def until_credited(self, micro: int) -> None:
        """Wait for this balance, with blocks on EVM as fast as they are read."""
        is_there = self.has_credit(micro)

        async def mine_until_there() -> bool:
            for rpc in self.evm.values():
                await localnet.mine(rpc, 1)
            return await is_there()

        await self.until(mine_until_there)

    async def pay(self, chain: Chain, to: str, micro: int) -> str:
        return await localnet.pay_usdc(self.evm[chain], EVM_NETWORKS[chain], WALLET, to, Micro(micro))

    async def buyer_micro(self) -> int:
        async with transaction(self.engine) as conn:
            balance = await read_balance(conn, accounts.buyer(str(self.person)))
        return balance.posted.n // 1000 if balance else 0

    def has_credit(self, micro: int) -> Callable[[], Awaitable[bool]]:
        async def check() -> bool:
            return await self.buyer_micro() == micro

        return check

    async def status(self, tx: str) -> str | None:
        async with transaction(self.engine) as conn:
            return await conn.scalar(select(deposits.c.status).where(deposits.c.tx == tx))

    def sweeper(self, chain: Chain) -> EvmSweeper:
        config = self.chains.base if chain is Chain.BASE else self.chains.ethereum
        return evm_sweeper(chain, self.engine, CLOCK, self.evm[chain], config, gas_key=SWEEP_PAYER)

    async def addresses(self) -> dict[str, str]:
        answer = await self.api.get("/api/deposit-addresses")
        assert answer.status_code == 200, answer.text
        return {entry["chain"]: entry["address"] for entry in answer.json()["data"]}

    async def books_hold(self, *which: Chain) -> None:
        for result in await service.reconcile(self.engine, self.chains, which, patience_s=15):
            assert result.is_equal, result
        async with transaction(self.engine) as conn:
            assert sum(total.n for total in (await total_by_kind(conn)).values()) == 0


class OnePerson:
    def __init__(self, person: uuid.UUID) -> None:
        self.person = person

    async def authenticate(self, request: Request) -> Identity:
        return Identity(self.person, None, frozenset({"account"}))


def _config(evm: dict[Chain, EvmNode], solana_url: str, there: SolanaDeployment) -> ChainsConfig:
    def one(chain: Chain) -> EvmChainConfig:
        node = evm[chain]
        return EvmChainConfig(
            rpc=(node.anvil.url,),
            chain_id=EVM_NETWORKS[chain].chain_id,
            usdc=EVM_NETWORKS[chain].usdc,
            escrow=node.deployment.safe,
            forwarder_factory=node.deployment.forwarder_factory,
            multi_send=node.deployment.multi_send_call_only,
            signers=node.deployment.owners,
            threshold=2,
        )

    solana = SolanaChainConfig(
        rpc=(solana_url,),
        usdc_mint=there.usdc_mint,
        multisig=there.multisig,
        escrow=there.escrow,
        nonce_account=there.nonce_account,
        gas_payer=there.gas_payer,
        signers=there.signers,
        threshold=2,
    )
    return ChainsConfig(ethereum=one(Chain.ETHEREUM), base=one(Chain.BASE), solana=solana)


@pytest.fixture
async def town(evm_nodes: dict[Chain, EvmNode], engine: AsyncEngine, tmp_path: Path) -> AsyncIterator[Town]:
    async with contextlib.AsyncExitStack() as stack:
        port, _ = await stack.enter_async_context(
            serving(
                tmp_path / "solana",
                port=0,
                clock=lambda: int(time.time()),
                slot_ms=50,
                finalized_after=8,
                empty_every=3,
            )
        )
        solana = await stack.enter_async_context(SolanaRpc(f"http://127.0.0.1:{port}"))
        signers = [str(from_seed(bytes([i]) * 32).pubkey()) for i in (1, 2, 3)]
        there = await deploy(solana, signers=signers, gas_payer=str(from_seed(GAS_SEED).pubkey()))
        chains = _config(evm_nodes, solana.url, there)
        evm = {
            chain: await stack.enter_async_context(JsonRpc(node.anvil.url))
            for chain, node in evm_nodes.items()
        }
        person = uuid.uuid4()
        app = FastAPI()
        app.include_router(router)
        install_error_handlers(app)
        settings = Settings(secret=SecretStr("s" * 32), database_url=SecretStr("postgresql://"))
        app.state.services = Services(engine, settings, chains, CLOCK, OnePerson(person))
        api = await stack.enter_async_context(
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api")
        )
        yield Town(engine, chains, evm, solana, api, person)


async def codes_are_of_links_and_addresses(town: Town) -> None:
    for entry in (await town.api.get("/api/deposit-addresses")).json()["data"]:
        assert entry["expected_finality_s"] > 0
        drawn = await town.api.get(entry["qr"])
        assert drawn.headers["content-type"] == "image/svg+xml"
        assert drawn.content == qr_svg(entry["link"])
        assert (await town.api.get(entry["qr"], params={"of": "address"})).content == qr_svg(entry["address"])
        assert entry["address"] in entry["link"]


async def test_from_wallet_to_balance_to_escrow_on_three_chains(town: Town) -> None:
    everywhere = tuple(Chain)
    keeper = pool_keeper(
        town.engine, CLOCK, town.solana, town.chains.solana, pool_seed=POOL_SEED, gas_seed=GAS_SEED, ready=2
    )
    async with town.watching(*everywhere):
        assert (await town.addresses())["solana"] is None  # the pool is empty
        while await keeper.tick():
            pass
        at = await town.addresses()
        assert at == await town.addresses()
        assert at["ethereum"] == at["base"]
        await codes_are_of_links_and_addresses(town)

        # EVM: 7 on Ethereum; 2 and 4 on Base, where the first waits for the second.
        await town.pay(Chain.ETHEREUM, at["ethereum"], 7_000_000)
        await town.pay(Chain.BASE, at["base"], 2_000_000)
        await town.until_credited(7_000_000)
        waiting = await town.pay(Chain.BASE, at["base"], 4_000_000)
        # Solana: an exchange pays the pool address, a wallet follows a payment link.
        wallet = SolanaWallet(town.solana)
        await fund(town.solana, wallet.address, usdc=Micro(100_000_000), lamports=10**9)
        await wallet.pay(at["solana"], Micro(11_000_000))
        link = (await town.api.post("/api/deposit-intents", json={"amount": "13.5"})).json()
        drawn = await town.api.get(link["qr"])
        assert drawn.content == qr_svg(link["url"])
        await wallet.pay_link(link["url"])
        await town.until_credited(7_000_000 + 6_000_000 + 11_000_000 + 13_500_000)
        assert await town.status(waiting) == "final"
        await town.books_hold(*everywhere)

        listed = (await town.api.get("/api/deposits")).json()["data"]
        assert sum(item["credited_nano"] for item in listed) == 37_500_000_000
        assert {item["status"] for item in listed} == {"final"}
        assert all(item["is_credited"] for item in listed)

        # The settler empties the addresses; the books follow the chain.
        for chain in (Chain.ETHEREUM, Chain.BASE):
            sweeper = town.sweeper(chain)
            assert await sweeper.tick() is not None
            assert await sweeper.tick() is None  # one at a time

        async def both_swept() -> bool:
            for rpc in town.evm.values():
                await localnet.mine(rpc, 1)
            async with transaction(town.engine) as conn:
                return await conn.scalar(select(func.count()).select_from(sweeps)) == 2

        await town.until(both_swept)
        assert await sweeper.tick() is None
        await town.books_hold(*everywhere)
        async with transaction(town.engine) as conn:
            for chain, micro in ((Chain.ETHEREUM, 7_000_000), (Chain.BASE, 6_000_000)):
                escrow = await read_balance(conn, accounts.escrow(chain.value))
                assert escrow is not None
                assert escrow.posted.n == -micro * 1000
        assert await town.buyer_micro() == 37_500_000


async def test_a_reorg_on_anvil_orphans_what_was_only_seen(town: Town) -> None:
    async with town.watching(Chain.ETHEREUM):
        address = (await town.addresses())["ethereum"]
        rpc = town.evm[Chain.ETHEREUM]
        tx = await town.pay(Chain.ETHEREUM, address, 9_000_000)

        async def is_seen() -> bool:
            return await town.status(tx) == "seen"

        await town.until(is_seen)
        await rpc.call("anvil_reorg", 2, [], shape=msgspec.Raw)
        await localnet.mine(rpc, 1)

        async def is_orphaned() -> bool:
            return await town.status(tx) == "orphaned"

        await town.until(is_orphaned)
        await localnet.mine(rpc, SETTINGS.ethereum.finality_lag_blocks)
        again = await town.pay(Chain.ETHEREUM, address, 6_000_000)
        await town.until_credited(6_000_000)
        assert await town.status(again) == "final"
        await town.books_hold(Chain.ETHEREUM)


async def test_a_reorg_below_finality_halts_the_chain(town: Town) -> None:
    async with town.watching(Chain.BASE):
        address = (await town.addresses())["base"]
        rpc = town.evm[Chain.BASE]
        await town.pay(Chain.BASE, address, 9_000_000)
        await town.until_credited(9_000_000)

        async def cursor() -> Cursor:
            async with transaction(town.engine) as conn:
                there = await load_cursor(conn, Chain.BASE)
            assert there is not None
            return there

        final = (await EvmReader(EVM_NETWORKS[Chain.BASE], rpc).final()).height

        async def knows_the_final_block() -> bool:
            return (await cursor()).window.final.height >= final

        async def is_halted() -> bool:
            halt = (await cursor()).halt
            return halt is not None and halt.by == "watcher"

        await town.until(knows_the_final_block)  # what it has not read, no reorg can contradict
        await rpc.call("anvil_reorg", SETTINGS.base.finality_lag_blocks + 3, [], shape=msgspec.Raw)
        await localnet.mine(rpc, 8)

        await town.until(is_halted)
        await town.pay(Chain.BASE, address, 50_000_000)
        await localnet.mine(rpc, 8)
        await asyncio.sleep(0.5)
        assert await town.buyer_micro() == 9_000_000


async def test_bad_intents_are_refused_in_openai_shape(town: Town) -> None:
    for amount in ("0", "-1", "1e9", "0.0000001", "NaN", "9" * 30):
        answer = await town.api.post("/api/deposit-intents", json={"amount": amount})
        assert answer.status_code == 400, amount
        assert answer.json()["error"]["type"] == "invalid_request_error"
    for _ in range(20):
        assert (await town.api.post("/api/deposit-intents", json={})).status_code == 201
    assert (await town.api.get(f"/api/deposit-intents/{'1' * 32}/qr.svg")).status_code == 404
    assert (await town.api.get("/api/deposit-intents/%00/qr.svg")).status_code == 400
    refused = await town.api.post("/api/deposit-intents", json={})
    assert refused.status_code == 429
    assert refused.headers["Retry-After"]
    assert refused.json()["error"]["code"] == "too_many_intents"
