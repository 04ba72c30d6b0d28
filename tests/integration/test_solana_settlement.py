"""Deposits, payouts and sweeps on the real SPL programs, node in this process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from solders.hash import Hash
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from chain.errors import Reverted, RpcUnavailable, UnknownResult, WrongChain
from chain.localnet.solana import SolanaDeployment, deploy, fund
from chain.localnet.solana_vm.server import serving
from chain.localnet.solana_wallet import SolanaWallet
from chain.ports import PayoutLine, TransferSeen
from chain.solana import deposits, escrow, pay, programs, sending, sweeps
from chain.solana.payouts import LineReverted, MultisigRail
from chain.solana.reader import SolanaReader
from chain.solana.rpc import SolanaRpc
from chain.units import Micro

SLOT_MS = 10
FINALIZED_AFTER = 8
SEED = bytes(range(32))


@dataclass
class Watch:
    accounts: set[str] = field(default_factory=set)
    references: set[str] = field(default_factory=set)

    def is_watched(self, address: str) -> bool:
        return address in self.accounts

    def is_reference(self, key: str) -> bool:
        return key in self.references


@dataclass
class World:
    rpc: SolanaRpc
    gas: Keypair
    signers: list[Keypair]
    deployment: SolanaDeployment
    reader: SolanaReader

    @property
    def terms(self) -> escrow.EscrowTerms:
        return self.deployment.terms

    @property
    def rail(self) -> MultisigRail:
        return MultisigRail(self.rpc, self.terms, self.gas)

    async def buyer(self, usdc: int) -> SolanaWallet:
        buyer = SolanaWallet(self.rpc)
        await fund(self.rpc, buyer.address, usdc=Micro(usdc), lamports=10**9)
        return buyer

    async def seen(self, watch: Watch) -> list[TransferSeen]:
        head = await self.reader.head()
        return [t for b in await self.reader.blocks(0, head.height, watch) for t in b.inbound]

    async def until_final(self, tx: str) -> None:
        for _ in range(400):
            status = await self.rpc.status(tx)
            if status is not None and status.confirmation_status == "finalized":
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{tx} did not become final")

    async def usdc_of(self, wallet: str) -> int:
        mint = Pubkey.from_string(self.deployment.usdc_mint)
        account = programs.associated_token_account(Pubkey.from_string(wallet), mint)
        return (await self.reader.usdc_balance(str(account))).n


@contextlib.asynccontextmanager
async def a_world(folder: Path) -> AsyncIterator[World]:
    options = {"slot_ms": SLOT_MS, "finalized_after": FINALIZED_AFTER, "empty_every": 3}
    async with (
        serving(folder, port=0, clock=lambda: int(time.time()), **options) as (port, _),
        SolanaRpc(f"http://127.0.0.1:{port}") as rpc,
    ):
        gas, signers = Keypair(), [Keypair() for _ in range(3)]
        deployment = await deploy(
            rpc, signers=[str(s.pubkey()) for s in signers], gas_payer=str(gas.pubkey())
        )
        yield World(rpc, gas, signers, deployment, SolanaReader(rpc))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path) as it:
        yield it


async def a_funded_escrow(world: World, usdc: int) -> None:
    await world.until_final(await fund(world.rpc, world.deployment.multisig, usdc=Micro(usdc)))


def a_line(amount: int, to: str | None = None, name: str = "p") -> PayoutLine:
    return PayoutLine(name, to or str(Keypair().pubkey()), Micro(amount))


# ── deposits ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_solana_pay_deposit_carries_its_reference(world: World) -> None:
    reference, other = pay.new_reference(), pay.new_reference()
    watch = Watch({world.deployment.escrow}, {reference, other})
    buyer = await world.buyer(9_000_000)
    link = pay.solana_pay_url(
        world.deployment.multisig, reference=reference, label="Tollway", amount=Micro(7_000_000)
    )
    tx = await buyer.pay_link(link)
    (seen,) = await world.seen(watch)
    assert (seen.tx, seen.to, seen.amount) == (tx, world.deployment.escrow, Micro(7_000_000))
    assert seen.key == f"{tx}:{world.deployment.escrow}"
    assert seen.references == (reference,)
    assert seen.sender == buyer.address


async def test_a20_everybody_who_pays_in_a_transaction_is_named(world: World) -> None:
    """A listed sender pays little beside one who pays much."""
    large, small = [SolanaWallet(world.rpc, seed=bytes([n]) * 32) for n in (7, 8)]
    for wallet in (large, small):
        await fund(world.rpc, wallet.address, usdc=Micro(9_000_000), lamports=10**9)
    moves = [
        programs.transfer_checked(
            source=Pubkey.from_string(wallet.token_account),
            mint=Pubkey.from_string(world.terms.mint),
            to=Pubkey.from_string(world.deployment.escrow),
            authority=Pubkey.from_string(wallet.address),
            signers=(),
            amount=amount,
        )
        for wallet, amount in ((large, 5_000_000), (small, 1_000_000))
    ]
    keys = [Keypair.from_seed(bytes([n]) * 32) for n in (7, 8)]
    await sending.send_and_confirm(world.rpc, moves, keys)
    (seen,) = await world.seen(Watch({world.deployment.escrow}))
    assert (seen.amount, seen.sender, seen.also_sent) == (
        Micro(6_000_000),
        large.address,
        (small.address,),
    )


async def test_a_deposit_is_seen_before_it_is_final(world: World) -> None:
    buyer = await world.buyer(9_000_000)
    await buyer.pay(world.deployment.multisig, Micro(5_000_000))
    (seen,) = await world.seen(Watch({world.deployment.escrow}))
    assert (await world.reader.final()).height < seen.height
    assert await world.reader.usdc_balance(world.deployment.escrow) == Micro(0)
    await world.until_final(seen.tx)
    assert (await world.reader.final()).height >= seen.height
    assert await world.reader.usdc_balance(world.deployment.escrow) == Micro(5_000_000)
    header = await world.reader.header_at(seen.height)
    assert header is not None
    assert header.hash == seen.block_hash


async def test_a_pool_address_takes_a_plain_transfer_and_is_swept_by_two_of_three(world: World) -> None:
    multisig = world.deployment.multisig
    one = await deposits.prepare_pool_address(world.rpc, world.gas, SEED, 1, multisig=multisig)
    two = await deposits.prepare_pool_address(world.rpc, world.gas, SEED, 2, multisig=multisig)
    assert one == await deposits.prepare_pool_address(world.rpc, world.gas, SEED, 1, multisig=multisig)
    buyer = await world.buyer(20_000_000)
    await buyer.pay(one.owner, Micro(6_000_000))
    last = await buyer.pay(two.owner, Micro(8_000_000))
    (first_seen, second_seen) = await world.seen(Watch({one.token_account, two.token_account}))
    assert (first_seen.to, second_seen.to) == (one.token_account, two.token_account)
    await world.until_final(last)

    terms = world.deployment.sweep_terms
    moves = await sweeps.due(world.rpc, terms, [one.token_account, two.token_account], minimum=Micro(1))
    assert moves == [(two.token_account, Micro(8_000_000)), (one.token_account, Micro(6_000_000))]
    rail = MultisigRail(world.rpc, terms, world.gas)
    unsigned = await rail.prepare_sweep(moves)
    assert rail.rebuild(unsigned.lines, unsigned.fence, unsigned.context) == unsigned
    signed = await rail.assemble(unsigned, [escrow.approve(unsigned, s) for s in world.signers[1:]])
    await rail.broadcast(signed)
    await world.until_final(signed.tx)
    landed = await rail.landed(signed)
    assert landed is not None
    assert (await rail.swept(unsigned, landed)).moved == tuple(moves)
    assert await world.reader.usdc_balance(world.deployment.escrow) == Micro(14_000_000)
    assert await sweeps.due(world.rpc, terms, [one.token_account], minimum=Micro(1)) == []


async def test_a_fork_takes_a_seen_deposit_away(world: World) -> None:
    buyer = await world.buyer(9_000_000)
    tx = await buyer.pay(world.deployment.multisig, Micro(5_000_000))
    (seen,) = await world.seen(Watch({world.deployment.escrow}))
    await world.rpc.call("dev_fork", [0, {"lastKept": seen.height - 1}], int)
    assert await world.seen(Watch({world.deployment.escrow})) == []
    assert await world.reader.header_at(seen.height) is None
    assert await world.rpc.status(tx) is None
    await buyer.pay(world.deployment.multisig, Micro(9_000_000))
    (again,) = await world.seen(Watch({world.deployment.escrow}))
    assert again.amount == Micro(9_000_000)


async def test_blocks_follow_one_another_and_skipped_slots_are_no_gap(world: World) -> None:
    await world.until_final(await fund(world.rpc, str(Keypair().pubkey()), lamports=10**6))
    head = await world.reader.head()
    blocks = await world.reader.blocks(0, head.height, Watch())
    heights = [b.header.height for b in blocks]
    assert heights[-1] == head.height
    assert heights != list(range(heights[0], heights[-1] + 1)), "no slot was skipped: nothing was tested"
    for parent, child in itertools.pairwise(blocks):
        assert child.header.parent_hash == parent.header.hash
        assert child.header.parent_height == parent.header.height
    skipped = next(h for h in range(head.height) if h not in heights)
    assert await world.reader.header_at(skipped) is None


async def test_the_genesis_hash_names_the_network(world: World) -> None:
    await world.reader.check_identity()
    await SolanaReader(world.rpc, genesis_hash=world.deployment.genesis_hash).check_identity()
    with pytest.raises(WrongChain):
        await SolanaReader(world.rpc, genesis_hash=str(Hash.default())).check_identity()


# ── payouts ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pair", list(itertools.combinations(range(3), 2)))
async def test_any_two_of_three_pay_a_batch(world: World, pair: tuple[int, int]) -> None:
    await a_funded_escrow(world, 50_000_000)
    rail, lines = world.rail, [a_line(10_000_000, name="a"), a_line(12_345_678, name="b")]
    unsigned = await rail.prepare(lines)
    assert unsigned.context["token_accounts_created"] == "2"
    approvals = [escrow.approve(unsigned, world.signers[i]) for i in reversed(pair)]
    signed = await rail.assemble(unsigned, approvals)
    assert await rail.landed(signed) is None
    await rail.broadcast(signed)
    await world.until_final(signed.tx)
    landed = await rail.landed(signed)
    assert landed is not None
    assert landed.is_success
    header = await world.reader.header_at(landed.height)
    assert header is not None
    assert header.hash == landed.block_hash
    assert await rail.is_fence_spent(signed.fence)
    assert [await world.usdc_of(line.to) for line in lines] == [10_000_000, 12_345_678]
    assert await world.reader.usdc_balance(rail.escrow) == Micro(50_000_000 - 22_345_678)


async def test_one_signature_pays_nothing(world: World) -> None:
    await a_funded_escrow(world, 50_000_000)
    unsigned = await world.rail.prepare([a_line(10_000_000)])
    first = escrow.approve(unsigned, world.signers[0])
    with pytest.raises(escrow.NotEnoughApprovals):
        await world.rail.assemble(unsigned, [first])
    with pytest.raises(escrow.NotEnoughApprovals):
        await world.rail.assemble(unsigned, [first, first])


async def test_the_token_program_itself_refuses_one_signature_of_two(world: World) -> None:
    await a_funded_escrow(world, 50_000_000)
    d = world.deployment
    to = await world.buyer(1)
    mint = Pubkey.from_string(d.usdc_mint)
    steal = programs.transfer_checked(
        source=Pubkey.from_string(d.escrow),
        mint=mint,
        to=Pubkey.from_string(to.token_account),
        authority=Pubkey.from_string(d.multisig),
        signers=(world.signers[0].pubkey(),),
        amount=1,
    )
    with pytest.raises(Reverted, match="signature"):
        await sending.send_and_confirm(world.rpc, [steal], [world.gas, world.signers[0]])


async def test_the_same_bytes_sent_twice_pay_once(world: World) -> None:
    await a_funded_escrow(world, 50_000_000)
    rail, line = world.rail, a_line(10_000_000)
    unsigned = await rail.prepare([line])
    signed = await rail.assemble(unsigned, [escrow.approve(unsigned, s) for s in world.signers])
    await rail.broadcast(signed)
    await rail.broadcast(signed)
    await world.until_final(signed.tx)
    await rail.broadcast(signed)
    assert await world.usdc_of(line.to) == 10_000_000
    assert await world.reader.usdc_balance(rail.escrow) == Micro(40_000_000)


async def test_two_combinations_of_one_batch_pay_once(world: World) -> None:
    await a_funded_escrow(world, 50_000_000)
    rail, line = world.rail, a_line(10_000_000)
    unsigned = await rail.prepare([line])
    a, b, c = (escrow.approve(unsigned, s) for s in world.signers)
    first, second = await rail.assemble(unsigned, [a, b]), await rail.assemble(unsigned, [b, c])
    assert first.tx != second.tx
    await rail.broadcast(first)
    with pytest.raises(UnknownResult):
        await rail.broadcast(second)
    await world.until_final(first.tx)
    assert await rail.landed(second) is None
    assert await rail.is_fence_spent(second.fence)
    assert await world.usdc_of(line.to) == 10_000_000


async def test_a_batch_waits_longer_than_a_blockhash_lives(world: World) -> None:
    await a_funded_escrow(world, 50_000_000)
    rail, line = world.rail, a_line(10_000_000)
    unsigned = await rail.prepare([line])
    before = await world.rpc.latest_blockhash()
    await world.rpc.call("dev_tick", [160 * 3], int)
    valid = await world.rpc.call("isBlockhashValid", [before.blockhash, {"commitment": "processed"}], dict)
    assert valid["value"] is False
    assert not await rail.is_fence_spent(unsigned.fence)
    signed = await rail.assemble(unsigned, [escrow.approve(unsigned, s) for s in world.signers[:2]])
    await rail.broadcast(signed)
    await world.until_final(signed.tx)
    assert await world.usdc_of(line.to) == 10_000_000


async def test_a_fence_is_spent_only_at_finality_and_blocks_the_next_batch_until_then(world: World) -> None:
    await a_funded_escrow(world, 50_000_000)
    rail = world.rail
    unsigned = await rail.prepare([a_line(10_000_000)])
    signed = await rail.assemble(unsigned, [escrow.approve(unsigned, s) for s in world.signers[:2]])
    await rail.broadcast(signed)
    await sending.confirm(world.rpc, signed.tx)
    with pytest.raises(RpcUnavailable, match="not final"):
        await rail.prepare([a_line(1_000_000)])
    assert not await rail.is_fence_spent(signed.fence)
    await world.until_final(signed.tx)
    assert await rail.is_fence_spent(signed.fence)
    assert (await rail.prepare([a_line(1_000_000)])).fence != signed.fence


async def test_a_fork_that_drops_a_payout_leaves_its_bytes_good(world: World) -> None:
    await a_funded_escrow(world, 50_000_000)
    rail, line = world.rail, a_line(10_000_000)
    unsigned = await rail.prepare([line])
    signed = await rail.assemble(unsigned, [escrow.approve(unsigned, s) for s in world.signers[:2]])
    await rail.broadcast(signed)
    await sending.confirm(world.rpc, signed.tx)
    status = await world.rpc.status(signed.tx)
    assert status is not None
    await world.rpc.call("dev_fork", [0, {"lastKept": status.slot - 1}], int)
    assert await world.rpc.status(signed.tx) is None
    await rail.broadcast(signed)
    await world.until_final(signed.tx)
    assert await world.usdc_of(line.to) == 10_000_000
    assert await world.reader.usdc_balance(rail.escrow) == Micro(40_000_000)


async def test_a_batch_is_ended_for_good_by_spending_its_fence(world: World) -> None:
    await a_funded_escrow(world, 50_000_000)
    rail, line = world.rail, a_line(10_000_000)
    unsigned = await rail.prepare([line])
    signed = await rail.assemble(unsigned, [escrow.approve(unsigned, s) for s in world.signers[:2]])
    await rail.spend_fence(unsigned.fence)
    await rail.spend_fence(unsigned.fence)
    with pytest.raises(UnknownResult, match="Blockhash not found"):
        await rail.broadcast(signed)
    for _ in range(400):
        if await rail.is_fence_spent(unsigned.fence):
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("the fence was not spent")
    assert await rail.landed(signed) is None
    assert await world.usdc_of(line.to) == 0


class Liar(SolanaRpc):
    """A provider that shows every nonce as used and hides what has landed."""

    async def status(self, tx: str) -> None:
        return None

    async def call(self, method: str, params: Any, shape: Any) -> Any:
        answer = await super().call(method, params, shape)
        if method == "getAccountInfo":
            raw = bytearray(answer.value.bytes())
            raw[40:72] = bytes(Hash.new_unique())
            state = msgspec.structs.replace(answer.value, data=(base64.b64encode(raw).decode(), "base64"))
            return msgspec.structs.replace(answer, value=state)
        return answer


async def test_a12_one_provider_cannot_call_a_paid_batch_unpaid(world: World) -> None:
    await a_funded_escrow(world, 50_000_000)
    async with Liar(world.rpc.url) as liar, SolanaRpc(world.rpc.url) as third:
        rail = MultisigRail(world.rpc, world.terms, world.gas, witnesses=[liar, third])
        alone = MultisigRail(liar, world.terms, world.gas)
        unsigned = await rail.prepare([a_line(10_000_000)])
        signed = await rail.assemble(unsigned, [escrow.approve(unsigned, s) for s in world.signers[:2]])
        assert await alone.is_fence_spent(signed.fence), "the liar does not lie: this shows nothing"
        assert not await rail.is_fence_spent(signed.fence)
        await rail.broadcast(signed)
        await world.until_final(signed.tx)
        assert await alone.landed(signed) is None
        landed = await rail.landed(signed)
        assert landed is not None
        assert landed.is_success
        assert await rail.is_fence_spent(signed.fence)


async def test_a_refused_batch_stays_good_until_its_fence_is_spent(world: World) -> None:
    """Why a node's refusal is no failure: the same bytes land once the escrow is full enough."""
    await a_funded_escrow(world, 10_000_000)
    rail, line = world.rail, a_line(10_000_000)
    unsigned = await rail.prepare([line])
    richer = escrow.rebuild([replace(line, amount=Micro(15_000_000))], unsigned.fence, unsigned.context)
    approvals = [escrow.approve(richer, s) for s in world.signers[:2]]
    signed = await rail.assemble(richer, approvals)
    with pytest.raises(UnknownResult, match="insufficient funds"):
        await rail.broadcast(signed)
    await a_funded_escrow(world, 10_000_000)
    await rail.broadcast(signed)
    await world.until_final(signed.tx)
    assert await world.usdc_of(line.to) == 15_000_000


async def test_a_batch_the_escrow_cannot_cover_names_the_line(world: World) -> None:
    await a_funded_escrow(world, 10_000_000)
    lines = [a_line(8_000_000, name="fits"), a_line(8_000_000, name="breaks")]
    with pytest.raises(LineReverted, match=r"breaks.*insufficient funds") as caught:
        await world.rail.prepare(lines)
    assert caught.value.payout_id == "breaks"


async def test_a_token_account_as_recipient_is_refused(world: World) -> None:
    await a_funded_escrow(world, 10_000_000)
    # An initialised token account with a key of its own, so that only the chain can tell.
    keyed = Keypair()
    data = bytes(Pubkey.from_string(world.deployment.usdc_mint)) + bytes(32) + bytes(44) + b"\1" + bytes(56)
    state = {"lamports": 10**7, "data": base64.b64encode(data).decode(), "owner": str(programs.TOKEN_PROGRAM)}
    await world.rpc.call("dev_setAccount", [str(keyed.pubkey()), state], int)
    await world.until_final(await fund(world.rpc, str(Keypair().pubkey()), lamports=10**6))
    with pytest.raises(LineReverted, match="token account"):
        await world.rail.prepare([a_line(1_000_000, str(keyed.pubkey()))])


async def test_a_full_batch_lands_in_one_transaction(world: World) -> None:
    await a_funded_escrow(world, 50_000_000)
    rail = world.rail
    lines = [a_line(1_000_000 + i, name=str(i)) for i in range(rail.max_lines)]
    with pytest.raises(escrow.TooManyLines) as caught:
        await rail.prepare([*lines, a_line(1, name="over")])
    assert caught.value.max_lines == len(lines)
    unsigned = await rail.prepare(lines)
    signed = await rail.assemble(unsigned, [escrow.approve(unsigned, s) for s in world.signers[:2]])
    await rail.broadcast(signed)
    await world.until_final(signed.tx)
    paid = await asyncio.gather(*(world.usdc_of(line.to) for line in lines))
    assert paid == [line.amount.n for line in lines]


async def test_a_rail_configured_with_other_signers_refuses_to_prepare(world: World) -> None:
    wrong = replace(world.terms, signers=(*world.terms.signers[:2], str(Keypair().pubkey())))
    with pytest.raises(WrongChain, match="other signers"):
        await MultisigRail(world.rpc, wrong, world.gas).prepare([a_line(1)])
