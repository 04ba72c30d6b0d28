"""Attack rows A1, A3, A4, A7, A11, A12, A21: what a token, a node or a setting can claim and not get."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import WrongChain
from chain.evm.reader import TRANSFER_TOPIC, EvmReader
from chain.evm.rpc import JsonRpc, quantity
from chain.localnet import evm as localnet
from chain.localnet import settings as localnet_settings
from chain.localnet.evm import Anvil
from chain.networks import BASE, ETHEREUM, SOLANA, Chain
from chain.ports import BlockFacts, ChainReader
from chain.quorum import FaultKind, Provider, ProviderFault, agreed
from chain.simulated import Movement, SimulatedChain
from chain.units import Micro
from marketplace.deposits import service
from marketplace.deposits.booking import Rules
from marketplace.deposits.cursor import load_cursor
from marketplace.deposits.watcher import Watcher
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction
from marketplace.platform.settings import ChainsConfig, EvmChainConfig

pytestmark = [pytest.mark.chains, pytest.mark.timeout(120)]

VICTIM = "0x" + "00" * 18 + "bEEF"
ELSEWHERE = "0x" + "77" * 20
TOPIC, FIVE_USDC = TRANSFER_TOPIC[2:], "624c4b40"
# Transfer(0x55 → 0xbeef, 5 USDC), then what follows.
EMIT = bytes.fromhex(f"{FIVE_USDC}60005261beef60557f{TOPIC}60206000a3")
STOP, REVERT = b"\x00", bytes.fromhex("60006000fd")
RETURN_FALSE = bytes.fromhex("600060005260206000f3")


@dataclass
class Watch:
    addresses: set[str] = field(default_factory=lambda: {VICTIM})

    def is_watched(self, address: str) -> bool:
        return address.lower() in {known.lower() for known in self.addresses}

    def is_reference(self, _key: str) -> bool:
        return False


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[JsonRpc]:
    settings = localnet_settings.read().evm(BASE)
    async with await Anvil.start(BASE, settings, tmp_path) as anvil, JsonRpc(anvil.url) as rpc:
        await rpc.call("evm_setAutomine", True, shape=msgspec.Raw)
        yield rpc


async def send(rpc: JsonRpc, contract: str, code: bytes) -> int:
    """Put `code` at `contract`, call it in a block of its own; gives the receipt's status."""
    await rpc.call("anvil_setCode", contract, "0x" + code.hex(), shape=msgspec.Raw)
    call = {"from": localnet.FAUCET, "to": contract, "gas": hex(200_000), "data": "0x"}
    tx = await rpc.call("eth_sendTransaction", call, shape=str)
    async with asyncio.timeout(20):
        while True:
            receipt = await rpc.call("eth_getTransactionReceipt", tx, shape=object)
            if isinstance(receipt, dict):
                return quantity(receipt["status"])
            await asyncio.sleep(0.02)


async def facts(reader: ChainReader) -> list[BlockFacts]:
    head = await reader.head()
    return await reader.blocks(1, head.height, Watch())


async def amounts(reader: ChainReader) -> list[int]:
    return [t.amount.n for block in await facts(reader) for t in block.inbound]


async def test_a01_a_fake_token_of_the_same_name_is_not_even_a_row(node: JsonRpc) -> None:
    reader = EvmReader(BASE, node)
    assert await send(node, ELSEWHERE, EMIT + STOP) == 1
    assert await amounts(reader) == []
    assert not any(block.foreign for block in await facts(reader))
    assert await send(node, BASE.usdc, EMIT + STOP) == 1  # the same log, from the pinned contract
    assert await amounts(reader) == [5_000_000]


async def test_a02_a_listed_look_alike_is_told_apart(node: JsonRpc) -> None:
    bridged, name = BASE.unsupported[0]
    await send(node, bridged, EMIT + STOP)
    (found,) = [foreign for block in await facts(EvmReader(BASE, node)) for foreign in block.foreign]
    assert (found.token, found.name, found.transfer.amount) == (bridged, name, Micro(5_000_000))
    assert await amounts(EvmReader(BASE, node)) == []


async def test_a03_a_transfer_inside_a_reverted_transaction_is_none(node: JsonRpc) -> None:
    assert await send(node, BASE.usdc, EMIT + REVERT) == 0
    assert await amounts(EvmReader(BASE, node)) == []
    assert await send(node, BASE.usdc, EMIT + STOP) == 1
    assert await amounts(EvmReader(BASE, node)) == [5_000_000]


async def test_a04_success_that_returns_false_and_moves_nothing_is_none(node: JsonRpc) -> None:
    assert await send(node, BASE.usdc, RETURN_FALSE) == 1
    assert await amounts(EvmReader(BASE, node)) == []


class TakesAFee(SimulatedChain):
    """Logs say more than arrives."""

    async def usdc_balance(self, address: str, *, height: int | None = None) -> Micro:
        told = await super().usdc_balance(address, height=height)
        return Micro(told.n * 99 // 100)


@pytest.mark.parametrize(("kind", "is_halted"), [(SimulatedChain, False), (TakesAFee, True)])
async def test_a07_a_balance_that_is_not_what_the_logs_say_halts(
    engine: AsyncEngine, kind: type[SimulatedChain], is_halted: bool
) -> None:
    chain = kind(chain=Chain.BASE)
    watcher = Watcher(Rules(Chain.BASE, ELSEWHERE, 5_000_000), chain, engine, SystemClock())
    await watcher.tick()
    chain.mine(Movement("0x1", ELSEWHERE, "0x" + "5" * 40, 9_000_000))
    chain.finalize()
    while await watcher.tick():
        pass
    await service.audit(engine, SystemClock(), chain, ELSEWHERE, patience_s=0)
    async with transaction(engine) as conn:
        cursor = await load_cursor(conn, Chain.BASE)
    assert cursor is not None
    assert (cursor.halt is not None) == is_halted


Lie = Callable[[dict[str, Any], Any], Any]


@contextlib.asynccontextmanager
async def lying(node: JsonRpc, lie: Lie, *, pause_s: float = 0) -> AsyncIterator[str]:
    """An HTTP node that passes everything on and gives `lie(call, result)` instead of each result."""

    async def one(call: dict[str, Any]) -> dict[str, Any]:
        answer = await node.call(call["method"], *call["params"], shape=object)
        return {"jsonrpc": "2.0", "id": call["id"], "result": lie(call, answer)}

    async def handle(request: web.Request) -> web.Response:
        body = await request.json()
        await asyncio.sleep(pause_s)
        given = [await one(call) for call in body] if isinstance(body, list) else await one(body)
        return web.json_response(given)

    app = web.Application()
    app.router.add_post("/", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def invents(call: dict[str, Any], result: Any) -> Any:
    """One more deposit, like the real ones but for its place."""
    if call["method"] == "eth_getLogs" and result:
        return [*result, {**result[-1], "logIndex": "0x7", "transactionHash": "0x" + "ab" * 32}]
    return result


def tells_the_truth(_call: dict[str, Any], result: Any) -> Any:
    return result


def truncates(call: dict[str, Any], result: Any) -> Any:
    return [] if call["method"] == "eth_getLogs" else result


def lags(call: dict[str, Any], result: Any) -> Any:
    is_head = call["method"] == "eth_getBlockByNumber" and call["params"][0] == "latest"
    return None if is_head else result


def is_elsewhere(call: dict[str, Any], result: Any) -> Any:
    return "0x1" if call["method"] == "eth_chainId" else result


@pytest.mark.parametrize(
    ("lie", "alone"),
    [
        pytest.param(invents, [5_000_000, 5_000_000], id="a11_invents_a_deposit"),
        pytest.param(truncates, [], id="a12_hides_logs"),
        pytest.param(lags, None, id="lags"),
        pytest.param(is_elsewhere, [5_000_000], id="a13_another_chain"),
    ],
)
async def test_a11_a12_a13_one_bad_provider_of_three_changes_nothing_but_a_report(
    node: JsonRpc, lie: Lie, alone: list[int] | None
) -> None:
    """The bad one answers first: who believes a single answer believes it."""
    await send(node, BASE.usdc, EMIT + STOP)
    faults: list[ProviderFault] = []
    async with (
        lying(node, lie) as url,
        lying(node, tells_the_truth, pause_s=0.2) as honest,
        JsonRpc(url) as bad,
        JsonRpc(honest) as good,
    ):
        liar = EvmReader(BASE, bad)
        if alone is not None:
            assert await amounts(liar) == alone, "the lie is not told: nothing is tested"
        providers = [Provider("one", EvmReader(BASE, good)), Provider("two", EvmReader(BASE, good))]
        reader = agreed([Provider("bad", liar), *providers], 2, faults.append)
        await reader.check_identity()
        assert await amounts(reader) == [5_000_000]
    assert {fault.provider for fault in faults} == {"bad"}
    expected = {
        invents: FaultKind.CONTRADICTS,
        truncates: FaultKind.CONTRADICTS,
        lags: FaultKind.FAILED,
        is_elsewhere: FaultKind.WRONG_CHAIN,
    }
    assert {fault.kind for fault in faults} == {expected[lie]}


def forgets_in_ranges(call: dict[str, Any], result: Any) -> Any:
    is_range = call["method"] == "eth_getLogs" and "fromBlock" in call["params"][0]
    return [] if is_range else result


async def test_a12_a_log_left_out_of_a_range_is_missed_by_its_blocks_bloom(node: JsonRpc) -> None:
    """One provider alone, so that nobody else could tell."""
    await send(node, BASE.usdc, EMIT + STOP)
    async with lying(node, forgets_in_ranges) as url, JsonRpc(url) as forgetful:
        asked = {"fromBlock": "0x1", "toBlock": "latest", "address": BASE.usdc}
        assert await forgetful.call("eth_getLogs", asked, shape=list) == []
        assert await amounts(EvmReader(BASE, forgetful)) == [5_000_000]


def chains_of(node: JsonRpc) -> ChainsConfig:
    evm = {
        "rpc": (node.url,),
        "usdc": BASE.usdc,
        "escrow": ELSEWHERE,
        "forwarder_factory": ELSEWHERE,
        "multi_send": ELSEWHERE,
        "signers": (ELSEWHERE,),
        "threshold": 1,
    }
    named = ("multisig", "escrow", "nonce_account", "gas_payer")
    solana = {"rpc": (), "usdc_mint": SOLANA.usdc_mint, "signers": (), "threshold": 1}
    return ChainsConfig.model_validate(
        {
            "ethereum": evm | {"chain_id": 1, "usdc": ETHEREUM.usdc},
            "base": evm | {"chain_id": 8453},
            "solana": solana | dict.fromkeys(named, ""),
        }
    )


async def test_a13_a_provider_elsewhere_serves_the_public_chain_or_none(
    node: JsonRpc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's own chain with Base's chain id: taken from this machine, and from nowhere else."""
    async with service.open_reader(Chain.BASE, chains_of(node)) as reader:
        await reader.check_identity()
    monkeypatch.setattr(service, "is_on_this_machine", lambda _url: False)
    async with service.open_reader(Chain.BASE, chains_of(node)) as reader:
        with pytest.raises(WrongChain, match="another block 0"):
            await reader.check_identity()
    block = await node.call("eth_getBlockByNumber", "0x0", False, shape=dict)
    public = replace(BASE, genesis_hash=block["hash"])
    monkeypatch.setitem(service.EVM_NETWORKS, Chain.BASE, public)
    async with service.open_reader(Chain.BASE, chains_of(node)) as reader:
        await reader.check_identity()


@pytest.mark.parametrize(
    ("url", "is_here"),
    [
        ("http://127.0.0.1:8545", True),
        ("http://[::1]:8545/", True),
        ("http://localhost:8545", True),
        ("https://localhost.example.org", False),
        ("https://127.0.0.1.example.org/key", False),
        ("http://10.0.0.1:8545", False),
        ("http://me@203.0.113.7#@127.0.0.1", False),
        ("", False),
    ],
)
def test_a13_what_is_on_this_machine(url: str, is_here: bool) -> None:
    assert service.is_on_this_machine(url) is is_here


def test_a21_there_is_no_setting_that_credits_before_finality() -> None:
    good = {
        "rpc": ("http://127.0.0.1:1",),
        "chain_id": 8453,
        "usdc": BASE.usdc,
        "escrow": ELSEWHERE,
        "forwarder_factory": ELSEWHERE,
        "multi_send": ELSEWHERE,
        "signers": (ELSEWHERE,),
        "threshold": 1,
    }
    EvmChainConfig(**good)
    for name in ("confirmations", "finality", "credit_at", "tag"):
        with pytest.raises(ValidationError):
            EvmChainConfig(**good, **{name: "latest"})
    rules = Rules(Chain.BASE, ELSEWHERE, 1)
    assert rules.early is None
    with pytest.raises(TypeError):
        replace(rules, confirmations=1)
