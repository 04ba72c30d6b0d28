"""Everything `chain.evm` promises, on real anvils with the real USDC, Safe and forwarder code."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import msgspec
import psutil
import pytest

from chain.errors import ChainRefusal, Malformed, Reverted, RpcUnavailable, UnknownResult, WrongChain
from chain.evm import abi, gas
from chain.evm.forwarders import Forwarders, deposit_salt, factory_address
from chain.evm.keystore import sign_digest
from chain.evm.payouts import (
    LABEL,
    EscrowTooSmall,
    PayeesRefused,
    SafeRail,
    TokenPaused,
    WrongSafe,
    read_terms,
)
from chain.evm.reader import TRANSFER_TOPIC, EvmReader
from chain.evm.rpc import JsonRpc
from chain.evm.sweeps import Sweeper, sweeps_in
from chain.localnet import evm as localnet
from chain.localnet import settings as localnet_settings
from chain.localnet.evm import Anvil, EvmDeployment, PortInUse
from chain.networks import BASE, ETHEREUM, EvmNetwork
from chain.ports import Approval, PayoutLine, SignedTransaction, Unsigned
from chain.units import Micro

pytestmark = pytest.mark.chains

OWNERS = [bytes([i]) * 32 for i in (1, 2, 3)]
RELAYER = bytes([4]) * 32
SWEEP_PAYER = bytes([5]) * 32
STRANGER = bytes([6]) * 32
ETHER = 10**18
SETTINGS = localnet_settings.read()
USDC = abi.load("usdc")


@dataclass
class Watching:
    """A watch set over a plain set."""

    addresses: set[str]

    def is_watched(self, address: str) -> bool:
        return address in {known.lower() for known in self.addresses}

    def is_reference(self, key: str) -> bool:
        return False


@dataclass
class World:
    """One running chain and everything deployed on it."""

    network: EvmNetwork
    rpc: JsonRpc
    deployment: EvmDeployment
    rail: SafeRail
    sweeper: Sweeper
    reader: EvmReader

    @property
    def forwarders(self) -> Forwarders:
        return self.sweeper.forwarders

    async def finalize(self) -> None:
        await localnet.mine(self.rpc, SETTINGS.evm(self.network).finality_lag_blocks)

    async def fund(self, address: str, micro: int) -> None:
        await localnet.fund(self.rpc, self.network, address, usdc=Micro(micro))

    async def as_faucet(self, calldata: bytes) -> None:
        await localnet.send_as(self.rpc, localnet.FAUCET, self.network.usdc, calldata)

    async def send(self, signed: SignedTransaction) -> None:
        await self.rail.broadcast(signed)
        await localnet.wait_mined(self.rpc, [signed.tx])


async def _start(network: EvmNetwork, folder: Path) -> tuple[Anvil, EvmDeployment]:
    node = await Anvil.start(network, SETTINGS.evm(network), folder)
    async with JsonRpc(node.url) as rpc:
        owners = [localnet.address_of(key) for key in OWNERS]
        deployment = await localnet.deploy(rpc, network, SETTINGS.evm(network), owners)
        for key in (RELAYER, SWEEP_PAYER, STRANGER):
            await localnet.fund(rpc, network, localnet.address_of(key), eth_wei=10 * ETHER)
    return node, deployment


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Anvil, EvmDeployment]]]:
    started: dict[str, tuple[Anvil, EvmDeployment]] = {}
    try:
        for network in (ETHEREUM, BASE):
            started[network.chain] = asyncio.run(_start(network, tmp_path_factory.mktemp(network.chain)))
        yield started
    finally:
        for node, _ in started.values():
            asyncio.run(node.stop())


def _world(network: EvmNetwork, rpc: JsonRpc, deployment: EvmDeployment) -> World:
    return World(
        network,
        rpc,
        deployment,
        SafeRail(deployment.terms(), rpc, gas.GasPayer(rpc, network.chain_id, RELAYER)),
        Sweeper(
            Forwarders(deployment.forwarder_factory), rpc, gas.GasPayer(rpc, network.chain_id, SWEEP_PAYER)
        ),
        EvmReader(network, rpc),
    )


@pytest.fixture(params=[ETHEREUM, BASE], ids=["ethereum", "base"])
async def world(
    request: pytest.FixtureRequest, nodes: dict[str, tuple[Anvil, EvmDeployment]]
) -> AsyncIterator[World]:
    network: EvmNetwork = request.param
    node, deployment = nodes[network.chain]
    async with JsonRpc(node.url) as rpc:
        yield _world(network, rpc, deployment)


@pytest.fixture
async def base(nodes: dict[str, tuple[Anvil, EvmDeployment]]) -> AsyncIterator[World]:
    node, deployment = nodes[BASE.chain]
    async with JsonRpc(node.url) as rpc:
        yield _world(BASE, rpc, deployment)


def a_salt() -> bytes:
    return deposit_salt(secrets.token_hex(8))


def a_payee() -> str:
    return localnet.address_of(secrets.token_bytes(32))


def approve(unsigned: Unsigned, *keys: bytes) -> list[Approval]:
    return [
        Approval(localnet.address_of(key), {LABEL: sign_digest(key, unsigned.messages[LABEL])})
        for key in keys
    ]


# Deployment


async def test_addresses_are_equal_on_both_chains(nodes: dict[str, tuple[Anvil, EvmDeployment]]) -> None:
    first, second = (deployment for _, deployment in nodes.values())
    assert (first.safe, first.forwarder_factory) == (second.safe, second.forwarder_factory)
    assert first.forwarder_factory == factory_address(first.safe)
    assert first.usdc != second.usdc


async def test_deploying_again_changes_nothing(world: World) -> None:
    await world.fund(a_payee(), 5)
    owners = [localnet.address_of(key) for key in reversed(OWNERS)]
    again = await localnet.deploy(world.rpc, world.network, SETTINGS.evm(world.network), owners)
    assert again == world.deployment
    assert await read_terms(world.network, again.safe, world.rpc) == again.terms()


async def test_a_first_deployment_cut_short_is_started_over(tmp_path: Path) -> None:
    node = await Anvil.start(BASE, SETTINGS.base, tmp_path)
    async with node, JsonRpc(node.url) as rpc:
        await rpc.call("anvil_setCode", BASE.usdc, "0x6001", shape=msgspec.Raw)
        owners = [localnet.address_of(key) for key in OWNERS]
        deployment = await localnet.deploy(rpc, BASE, SETTINGS.base, owners)
        await localnet.fund(rpc, BASE, deployment.safe, usdc=Micro(7))
        assert await EvmReader(BASE, rpc).usdc_balance(deployment.safe) == Micro(7)


def test_our_solidity_compiles_to_what_is_committed() -> None:
    folder = abi.ABI_FOLDER / "forwarder"
    compiled = subprocess.run(
        ["node", folder / "compile.mjs"], capture_output=True, check=True, timeout=60, text=True
    )
    assert compiled.stdout == (folder / "TollwayForwarder.json").read_text()
    committed = json.loads(compiled.stdout)["contracts"]["ForwarderFactory"]["abi"]
    assert json.loads((abi.ABI_FOLDER / "forwarder_factory.json").read_text()) == committed


# Deposits and sweeps


async def test_offline_addresses_are_the_factorys(world: World) -> None:
    address_of = abi.load("forwarder_factory")["addressOf"]
    for _ in range(5):
        salt = a_salt()
        call = {"to": world.deployment.forwarder_factory, "data": "0x" + address_of.encode(salt).hex()}
        returned = await world.rpc.call("eth_call", call, "latest", shape=str)
        assert int(returned, 16) == int(world.forwarders.address_of(salt), 16)


async def test_a_deposit_made_before_the_forwarder_exists_is_seen_and_swept(world: World) -> None:
    salt = a_salt()
    address = world.forwarders.address_of(salt)
    start = (await world.reader.head()).height
    await world.fund(localnet.address_of(STRANGER), 5_000)
    tx = await localnet.pay_usdc(world.rpc, world.network, STRANGER, address, Micro(1_234))
    signed = await world.sweeper.assemble([salt, a_salt()])
    await world.send(signed)
    assert await world.sweeper.landed(signed) is None
    await world.finalize()
    landed = await world.sweeper.landed(signed)
    assert landed is not None
    assert landed.is_success

    final = await world.reader.final()
    watch = Watching({address, world.deployment.safe})
    blocks = await world.reader.blocks(start, final.height, watch)
    assert [block.header.height for block in blocks] == list(range(start, final.height + 1))
    seen = [transfer for block in blocks for transfer in block.inbound if transfer.to == address]
    assert [(s.tx, s.amount, s.sender) for s in seen] == [(tx, Micro(1_234), localnet.address_of(STRANGER))]
    (sweep,) = sweeps_in(blocks, world.deployment.safe, watch)
    assert (sweep.tx, sweep.moved) == (signed.tx, ((address, Micro(1_234)),))
    assert await world.reader.usdc_balance(address, height=seen[0].height) == Micro(1_234)
    assert await world.reader.usdc_balance(address, height=landed.height) == Micro(0)


async def test_an_address_is_swept_again_and_by_anyone(base: World) -> None:
    salt = a_salt()
    address = base.forwarders.address_of(salt)
    escrow_before = await base.reader.usdc_balance(base.deployment.safe)
    for amount in (10, 20):
        await base.fund(address, amount)
        await base.send(await base.sweeper.assemble([salt]))
    await base.fund(address, 30)
    start = (await base.reader.head()).height
    await localnet.send_as(base.rpc, localnet.FAUCET, address, bytes.fromhex("35faa416"))  # sweep()
    await base.finalize()
    assert await base.reader.usdc_balance(base.deployment.safe) == escrow_before + Micro(60)
    watch = Watching({address, base.deployment.safe})
    blocks = await base.reader.blocks(start, (await base.reader.final()).height, watch)
    assert [s.moved for s in sweeps_in(blocks, base.deployment.safe, watch)] == [((address, Micro(30)),)]


async def test_a_blacklisted_deposit_address_does_not_stop_the_others(base: World) -> None:
    bad, good = a_salt(), a_salt()
    for salt in (bad, good):
        await base.fund(base.forwarders.address_of(salt), 100)
    await base.as_faucet(USDC["blacklist"].encode(base.forwarders.address_of(bad)))
    signed = await base.sweeper.assemble([bad, good])
    await base.send(signed)
    assert await base.reader.usdc_balance(base.forwarders.address_of(bad)) == Micro(100)
    assert await base.reader.usdc_balance(base.forwarders.address_of(good)) == Micro(0)
    receipt = await base.rpc.call("eth_getTransactionReceipt", signed.tx, shape=dict[str, object])
    logs = receipt["logs"]
    assert isinstance(logs, list)
    topics = abi.load("forwarder_factory").topics
    assert [topics["SweepFailed"], "0x" + bad.hex()] in [log["topics"] for log in logs]
    assert [topics["Swept"], "0x" + good.hex()] in [log["topics"] for log in logs]


@pytest.mark.parametrize(
    "calldata",
    [
        USDC["transfer"].encode("0x" + "11" * 20, 1),
        bytes.fromhex("35faa416") + b"\0" * 32 + bytes.fromhex("01"),
        abi.load("safe")["nonce"].encode(),
        b"",
    ],
    ids=["transfer", "sweep with arguments", "another function", "plain ether"],
)
async def test_a_forwarder_sends_to_the_escrow_or_nowhere(base: World, calldata: bytes) -> None:
    salt, payee = a_salt(), "0x" + "11" * 20
    address = base.forwarders.address_of(salt)
    await base.fund(address, 1)
    await base.send(await base.sweeper.assemble([salt]))
    await base.fund(address, 50)
    call = {"from": localnet.FAUCET, "to": address, "data": "0x" + calldata.hex()}
    value = {"value": "0x1"}  # with ether, every call is refused: there is no way in for it
    with pytest.raises(Reverted):
        await base.rpc.call("eth_call", call | value, "latest", shape=str)
    if calldata[:4] == bytes.fromhex("35faa416"):
        await localnet.send_as(base.rpc, localnet.FAUCET, address, calldata)
        assert await base.reader.usdc_balance(address) == Micro(0)
    else:
        with pytest.raises(Reverted):
            await base.rpc.call("eth_call", call, "latest", shape=str)
        assert await base.reader.usdc_balance(address) == Micro(50)
    assert await base.reader.usdc_balance(payee) == Micro(0)


# Payouts


async def test_two_of_three_pay_a_batch_once(world: World) -> None:
    await world.fund(world.deployment.safe, 1_000)
    lines = [PayoutLine("p1", a_payee(), Micro(300)), PayoutLine("p2", a_payee(), Micro(200))]
    unsigned = await world.rail.prepare(lines)
    transaction = world.rail.terms.transaction(lines, unsigned.fence)
    zero = "0x" + "00" * 20
    asked = abi.load("safe")["getTransactionHash"].encode(
        transaction.multi_send, 0, transaction.data, 1, 0, 0, 0, zero, zero, transaction.nonce
    )
    call = {"to": world.deployment.safe, "data": "0x" + asked.hex()}
    on_chain = await world.rpc.call("eth_call", call, "latest", shape=str)
    assert bytes.fromhex(on_chain[2:]) == unsigned.messages[LABEL]

    signed = await world.rail.assemble(unsigned, approve(unsigned, OWNERS[2], OWNERS[0]))
    await world.rail.broadcast(signed)
    await world.rail.broadcast(signed)
    await localnet.wait_mined(world.rpc, [signed.tx])
    assert await world.rail.landed(signed) is None
    assert not await world.rail.is_fence_spent(unsigned.fence)
    await world.finalize()
    await world.rail.broadcast(signed)
    landed = await world.rail.landed(signed)
    assert landed is not None
    assert (landed.tx, landed.is_success) == (signed.tx, True)
    header = await world.reader.header_at(landed.height)
    assert header is not None
    assert header.hash == landed.block_hash
    assert await world.rail.is_fence_spent(unsigned.fence)
    assert [await world.reader.usdc_balance(line.to) for line in lines] == [Micro(300), Micro(200)]
    with pytest.raises(Reverted):  # the same consent over a spent nonce
        await world.rail.assemble(unsigned, approve(unsigned, OWNERS[0], OWNERS[1]))


async def test_one_signature_is_refused_by_us_and_by_the_safe(base: World) -> None:
    await base.fund(base.deployment.safe, 10)
    unsigned = await base.rail.prepare([PayoutLine("p", a_payee(), Micro(10))])
    one = approve(unsigned, OWNERS[0])
    for approvals in (one, one * 2):
        with pytest.raises(ChainRefusal, match="1 distinct approvals of 2"):
            await base.rail.assemble(unsigned, approvals)
    calldata = base.rail.terms.transaction(unsigned.lines, unsigned.fence).exec_calldata(
        one[0].signatures[LABEL]
    )
    with pytest.raises(Reverted, match="GS020"):
        await gas.GasPayer(base.rpc, BASE.chain_id, RELAYER).wrap(base.deployment.safe, calldata)


async def test_a_blacklisted_payee_is_named_and_the_rest_can_be_paid(base: World) -> None:
    await base.fund(base.deployment.safe, 100)
    bad, good = PayoutLine("bad", a_payee(), Micro(1)), PayoutLine("good", a_payee(), Micro(2))
    await base.as_faucet(USDC["blacklist"].encode(bad.to))
    with pytest.raises(PayeesRefused) as refused:
        await base.rail.prepare([bad, good])
    assert refused.value.reasons.keys() == {"bad"}
    unsigned = await base.rail.prepare([good])
    await base.send(await base.rail.assemble(unsigned, approve(unsigned, *OWNERS)))
    assert await base.reader.usdc_balance(good.to) == Micro(2)


async def test_a_paused_token_or_a_small_escrow_stops_the_batch_before_any_gas(base: World) -> None:
    held = await base.reader.usdc_balance(base.deployment.safe)
    line = PayoutLine("p", a_payee(), held + Micro(1))
    with pytest.raises(EscrowTooSmall):
        await base.rail.prepare([line])
    await base.as_faucet(USDC["pause"].encode())
    try:
        with pytest.raises(TokenPaused):
            await base.rail.prepare([line])
    finally:
        await base.as_faucet(USDC["unpause"].encode())


async def test_a_strangers_execution_of_our_calldata_counts_as_ours(base: World) -> None:
    """Signed calldata is public; a reverted transaction of ours must not look like an unpaid batch."""
    await base.fund(base.deployment.safe, 10)
    line = PayoutLine("p", a_payee(), Micro(10))
    unsigned = await base.rail.prepare([line])
    approvals = approve(unsigned, OWNERS[0], OWNERS[1])
    ours = await base.rail.assemble(unsigned, approvals)
    stranger = SafeRail(base.rail.terms, base.rpc, gas.GasPayer(base.rpc, BASE.chain_id, STRANGER))
    theirs = await stranger.assemble(unsigned, approvals)
    await base.send(theirs)
    await base.rail.broadcast(ours)
    with pytest.raises(localnet_settings.LocalnetError, match="failed"):
        await localnet.wait_mined(base.rpc, [ours.tx])
    await base.finalize()
    landed = await base.rail.landed(ours)
    assert landed is not None
    assert (landed.tx, landed.is_success) == (theirs.tx, True)
    assert await base.reader.usdc_balance(line.to) == Micro(10)


async def test_a36_a_safe_with_other_owners_than_configured_is_not_paid_from(world: World) -> None:
    await world.fund(world.deployment.safe, 10)
    lines = [PayoutLine("p", a_payee(), Micro(10))]
    unsigned = await world.rail.prepare(lines)
    theirs = tuple(localnet.address_of(key) for key in (*OWNERS[:2], STRANGER))
    wrong = replace(world.rail.terms, signers=theirs, threshold=1)
    rail = SafeRail(wrong, world.rpc, gas.GasPayer(world.rpc, world.network.chain_id, RELAYER))
    said = f"its owners are .*, configured .*{theirs[2]}.*; its threshold is 2, configured 1"
    with pytest.raises(WrongSafe, match=said):
        await rail.prepare(lines)
    with pytest.raises(WrongSafe, match=said):
        await rail.assemble(unsigned, approve(unsigned, OWNERS[0], OWNERS[1]))
    with pytest.raises(WrongSafe, match=said):
        await rail.broadcast(await world.rail.assemble(unsigned, approve(unsigned, OWNERS[0], OWNERS[1])))
    assert await world.reader.usdc_balance(lines[0].to) == Micro(0)


async def test_of_two_batches_over_one_nonce_one_lands(base: World) -> None:
    await base.fund(base.deployment.safe, 20)
    first = await base.rail.prepare([PayoutLine("p1", a_payee(), Micro(5))])
    second = await base.rail.prepare([PayoutLine("p2", a_payee(), Micro(6))])
    assert first.fence == second.fence
    late = await base.rail.assemble(second, approve(second, OWNERS[0], OWNERS[1]))
    winner = await base.rail.assemble(first, approve(first, OWNERS[0], OWNERS[1]))
    await base.send(winner)
    with pytest.raises(gas.OuterNonceTaken):
        await base.rail.broadcast(late)
    await base.finalize()
    assert await base.rail.is_fence_spent(late.fence)
    assert await base.rail.landed(late) is None
    assert await base.reader.usdc_balance(second.lines[0].to) == Micro(0)


async def test_a_send_without_an_answer_is_an_unknown_result(base: World) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        async with JsonRpc(url, timeout_s=0.2) as deaf:
            with pytest.raises(UnknownResult):
                await gas.broadcast(deaf, b"\x02", "0x" + "00" * 32)


async def test_fees_above_the_cap_are_not_paid(base: World) -> None:
    payer = gas.GasPayer(base.rpc, BASE.chain_id, RELAYER, fee_cap_wei=0)
    with pytest.raises(gas.FeesTooHigh):
        await payer.wrap(localnet.FAUCET, b"")


# Reading


async def test_a_node_of_another_chain_is_refused(base: World) -> None:
    await base.reader.check_identity()
    with pytest.raises(WrongChain):
        await EvmReader(ETHEREUM, base.rpc).check_identity()
    with pytest.raises(WrongChain):
        await EvmReader(BASE, base.rpc, pinned_blocks=[(1, "0x" + "ab" * 32)]).check_identity()
    header = await base.reader.header_at(1)
    assert header is not None
    await EvmReader(BASE, base.rpc, pinned_blocks=[(1, header.hash)]).check_identity()
    assert await base.reader.header_at(10**9) is None


@pytest.mark.parametrize(
    ("what", "emit"),
    [
        ("four topics", lambda t: _log(t, [t, 1, 2, 3], 32)),
        ("two topics", lambda t: _log(t, [t, 1], 32)),
        ("short data", lambda t: _log(t, [t, 1, 2], 31)),
        ("long data", lambda t: _log(t, [t, 1, 2], 64)),
        ("padding", lambda t: _log(t, [t, 1, 2 | 1 << 200], 32)),
        ("amount", lambda t: _log(t, [t, 1, 2], 32, amount=1 << 255)),
    ],
)
async def test_a10_a_poisoned_log_is_counted_and_skipped(
    base: World, what: str, emit: Callable[[int], bytes]
) -> None:
    """The token's code is swapped for one that emits the bad log, then put back."""
    watched = "0x" + "00" * 19 + "02"
    code = await base.rpc.call("eth_getCode", BASE.usdc, "latest", shape=str)
    start = (await base.reader.head()).height + 1
    poison = "0x" + emit(int(TRANSFER_TOPIC, 16)).hex()
    await base.rpc.call("anvil_setCode", BASE.usdc, poison, shape=msgspec.Raw)
    try:
        await base.as_faucet(b"")
    finally:
        await base.rpc.call("anvil_setCode", BASE.usdc, code, shape=msgspec.Raw)
    await base.fund(watched, 77)
    blocks = await base.reader.blocks(start, (await base.reader.head()).height, Watching({watched}))
    assert [s.amount for b in blocks for s in b.inbound] == [Micro(77)]
    assert base.reader.malformed.total() == 1, what


def _log(topic: int, topics: list[int], size: int, *, amount: int = 5) -> bytes:
    """EVM code that emits one log of this form."""
    assert topics[0] == topic
    pushed = b"".join(b"\x7f" + t.to_bytes(32) for t in reversed(topics))
    return (
        b"\x7f" + amount.to_bytes(32) + b"\x60\x00\x52"  # mstore(0, amount)
        + pushed + b"\x60" + bytes([size]) + b"\x60\x00" + bytes([0xA0 + len(topics)]) + b"\x00"
    )  # fmt: skip


async def test_a_zero_transfer_and_another_token_are_not_deposits(base: World) -> None:
    watched = a_payee()
    start = (await base.reader.head()).height + 1
    await base.as_faucet(USDC["transfer"].encode(watched, 0))
    other = "0x" + "77" * 20
    topic = int(TRANSFER_TOPIC, 16)
    fake = "0x" + _log(topic, [topic, 1, int(watched, 16)], 32).hex()
    await base.rpc.call("anvil_setCode", other, fake, shape=msgspec.Raw)
    await localnet.send_as(base.rpc, localnet.FAUCET, other, b"")
    blocks = await base.reader.blocks(start, (await base.reader.head()).height, Watching({watched}))
    assert [s for b in blocks for s in b.inbound] == []
    assert base.reader.malformed.total() == 0


async def test_a_reorganised_block_is_read_anew(base: World) -> None:
    watched = a_payee()
    await base.fund(watched, 9)
    head = await base.reader.head()
    await base.rpc.call("anvil_reorg", 1, [], shape=msgspec.Raw)
    (facts,) = await base.reader.blocks(head.height, head.height, Watching({watched}))
    assert facts.header.hash != head.hash
    assert facts.header.parent_hash == head.parent_hash
    assert facts.inbound == ()


async def test_a_range_is_bounded_and_contiguous(base: World) -> None:
    await localnet.mine(base.rpc, 250)
    head = (await base.reader.head()).height
    blocks = await base.reader.blocks(head - 249, head, Watching(set()))
    assert [b.header.height for b in blocks] == list(range(head - 249, head + 1))
    assert all(b.header.parent_hash == a.header.hash for a, b in pairwise(blocks))
    with pytest.raises(ValueError, match="at once"):
        await base.reader.blocks(0, 5_000, Watching(set()))
    with pytest.raises((RpcUnavailable, Malformed)):
        await base.reader.blocks(head + 100, head + 101, Watching(set()))


# The development node


async def test_the_chain_survives_a_restart(tmp_path: Path) -> None:
    settings = SETTINGS.ethereum
    node, deployment = await _start(ETHEREUM, tmp_path)
    watched = a_payee()
    watch = Watching({watched})
    async with JsonRpc(node.url) as rpc:
        tx = await localnet.fund(rpc, ETHEREUM, watched, usdc=Micro(42))
        head = (await EvmReader(ETHEREUM, rpc).head()).height
        before = await EvmReader(ETHEREUM, rpc).blocks(0, head, watch)
        receipt = await rpc.call("eth_getTransactionReceipt", tx, shape=dict[str, object])
    await node.stop()
    assert not node.is_running
    async with await Anvil.start(ETHEREUM, settings, tmp_path) as again, JsonRpc(again.url) as rpc:
        reader = EvmReader(ETHEREUM, rpc)
        assert await reader.blocks(0, head, watch) == before
        assert await rpc.call("eth_getTransactionReceipt", tx, shape=dict[str, object]) == receipt
        final = await reader.final()
        assert await reader.usdc_balance(watched, height=final.height) == Micro(42)
        owners = [localnet.address_of(key) for key in OWNERS]
        assert await localnet.deploy(rpc, ETHEREUM, settings, owners) == deployment
        await localnet.fund(rpc, ETHEREUM, watched, usdc=Micro(1))
        newest = (await reader.head()).height
        blocks = await reader.blocks(head, newest, watch)
        assert blocks[0].header.hash == before[-1].header.hash
        assert newest > head


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
async def test_a_killed_owner_leaves_no_node_and_no_lost_block(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys, time\nfrom pathlib import Path\n"
        "from chain.localnet import evm, settings\nfrom chain.networks import BASE\n"
        "async def main():\n"
        "    node = await evm.Anvil.start(BASE, settings.read().base, Path(sys.argv[1]))\n"
        "    async with evm.JsonRpc(node.url) as rpc:\n        await evm.mine(rpc, 7)\n"
        "    print(node.pid, flush=True)\n    time.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=localnet_settings.PROJECT_ROOT,
    )
    assert owner.stdout is not None
    node = psutil.Process(int(owner.stdout.readline()))
    owner.stdout.close()
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 10
    while node.is_running() and node.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    assert not node.is_running() or node.status() == psutil.STATUS_ZOMBIE
    async with await Anvil.start(BASE, SETTINGS.base, tmp_path) as again, JsonRpc(again.url) as rpc:
        assert (await EvmReader(BASE, rpc).head()).height >= 7


async def test_a_port_in_use_is_said_in_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port {port}, wanted for base, is in use"):
            await Anvil.start(BASE, SETTINGS.base, tmp_path, port)
