"""Attack rows A22 to A28, A30, A31: what is, and what is not, a deposit on Solana."""

from __future__ import annotations

import base64
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
from solders.hash import Hash
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.message import MessageV0
from solders.pubkey import Pubkey

from chain.errors import Malformed, Reverted
from chain.localnet.solana import SolanaDeployment, deploy, fund
from chain.localnet.solana_vm.server import serving
from chain.localnet.solana_wallet import SolanaWallet
from chain.networks import SOLANA
from chain.ports import TransferSeen
from chain.solana import programs, sending
from chain.solana.reader import SolanaReader
from chain.solana.rpc import SolanaRpc
from chain.units import Micro
from marketplace.deposits.attribution import Directory, Owner, ToPerson, Unattributed, attribute

TOKEN_2022 = Pubkey.from_string("TokenzQdBNbLqP5VEhdkAS6EPFLC1PHnBqCXEpPxuEb")
KEY = bytes([3]) * 32


@dataclass
class Everything:
    """Watches every address: whatever is ignored is ignored for another reason than not being ours."""

    def is_watched(self, _address: str) -> bool:
        return True

    def is_reference(self, _key: str) -> bool:
        return False


@dataclass
class Only:
    address: str

    def is_watched(self, address: str) -> bool:
        return address == self.address

    def is_reference(self, _key: str) -> bool:
        return False


@dataclass
class World:
    rpc: SolanaRpc
    reader: SolanaReader
    deployment: SolanaDeployment
    buyer: SolanaWallet
    key: Keypair
    start: int

    async def seen(self, watch: Everything | Only) -> list[TransferSeen]:
        """Transfers since the world was set up."""
        head = await self.reader.head()
        return [t for b in await self.reader.blocks(self.start, head.height, watch) for t in b.inbound]

    @property
    def escrow(self) -> Only:
        return Only(self.deployment.escrow)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        node = serving(
            tmp_path, port=0, slot_ms=10, finalized_after=6, empty_every=5, clock=lambda: int(time.time())
        )
        port, _ = await stack.enter_async_context(node)
        rpc = await stack.enter_async_context(SolanaRpc(f"http://127.0.0.1:{port}"))
        names = [str(Keypair().pubkey()) for _ in range(3)]
        deployment = await deploy(rpc, signers=names, gas_payer=str(Keypair().pubkey()))
        buyer = SolanaWallet(rpc, seed=KEY)
        await fund(rpc, buyer.address, usdc=Micro(50_000_000), lamports=10**10)
        reader = SolanaReader(rpc)
        start = (await reader.head()).height + 1
        yield World(rpc, reader, deployment, buyer, Keypair.from_seed(KEY), start)


def usdc_move(world: World, amount: int, *, is_checked: bool = True) -> Instruction:
    source, to = (Pubkey.from_string(a) for a in (world.buyer.token_account, world.deployment.escrow))
    if is_checked:
        return programs.transfer_checked(
            source=source,
            mint=Pubkey.from_string(world.deployment.usdc_mint),
            to=to,
            authority=world.key.pubkey(),
            signers=(),
            amount=amount,
        )
    metas = [
        AccountMeta(source, is_signer=False, is_writable=True),
        AccountMeta(to, is_signer=False, is_writable=True),
        AccountMeta(world.key.pubkey(), is_signer=True, is_writable=False),
    ]
    return Instruction(programs.TOKEN_PROGRAM, b"\x03" + amount.to_bytes(8, "little"), metas)


async def put_fake_token(world: World, program: Pubkey, mint: Pubkey) -> tuple[Pubkey, Pubkey]:
    """A mint of the attacker's and two accounts of it, 90 of it on the attacker's, none on the multisig's."""
    some = (1).to_bytes(4, "little") + bytes(world.key.pubkey())
    states = {mint: some + (90_000_000).to_bytes(8, "little") + bytes([6, 1]) + some}
    accounts = (Keypair().pubkey(), Keypair().pubkey())
    owners = (world.key.pubkey(), Pubkey.from_string(world.deployment.multisig))
    for account, owner, amount in zip(accounts, owners, (90_000_000, 0), strict=True):
        body = bytes(mint) + bytes(owner) + amount.to_bytes(8, "little") + bytes(36) + b"\1"
        states[account] = body + bytes(165 - len(body))
    for key, data in states.items():
        state = {"lamports": 10**8, "data": base64.b64encode(data).decode(), "owner": str(program)}
        await world.rpc.call("dev_setAccount", [str(key), state], int)
    return accounts


@pytest.mark.parametrize(
    "program", [programs.TOKEN_PROGRAM, TOKEN_2022], ids=["a22_wrong_mint", "a23_token_2022"]
)
async def test_a22_a23_a_look_alike_token_is_not_even_a_row(world: World, program: Pubkey) -> None:
    mint = Keypair().pubkey()
    source, to = await put_fake_token(world, program, mint)
    move = programs.transfer_checked(
        source=source, mint=mint, to=to, authority=world.key.pubkey(), signers=(), amount=77_000_000
    )
    fake = Instruction(program, bytes(move.data), move.accounts)
    tx = await sending.send_and_confirm(world.rpc, [fake], [world.key])
    options = {"maxSupportedTransactionVersion": 0, "commitment": "confirmed"}
    found = await world.rpc.call("getTransaction", [tx, options], dict)
    amounts = [b["uiTokenAmount"]["amount"] for b in found["meta"]["postTokenBalances"]]
    assert sorted(amounts) == ["13000000", "77000000"], "the fake transfer did not happen: nothing was tested"
    assert await world.seen(Everything()) == []
    await world.buyer.pay(world.deployment.multisig, Micro(5_000_000))
    assert [t.amount for t in await world.seen(Everything())] == [Micro(5_000_000)]


@pytest.mark.parametrize("is_checked", [True, False], ids=["transferChecked", "transfer"])
async def test_a24_the_balance_difference_is_what_counts(world: World, is_checked: bool) -> None:
    moves = [usdc_move(world, amount, is_checked=is_checked) for amount in (1_000_000, 2_500_000)]
    tx = await sending.send_and_confirm(world.rpc, moves, [world.key])
    (seen,) = await world.seen(world.escrow)
    assert (seen.key, seen.amount) == (f"{tx}:{world.deployment.escrow}", Micro(3_500_000))


async def test_a24_a_mint_straight_to_the_escrow_is_seen(world: World) -> None:
    await fund(world.rpc, world.deployment.multisig, usdc=Micro(4_000_000))
    (seen,) = await world.seen(world.escrow)
    assert seen.amount == Micro(4_000_000)


async def test_a26_a_funded_account_given_to_us_is_no_deposit(world: World) -> None:
    """setAuthority hands over an account that holds money; no balance of an account we know has grown."""
    tag_set_authority, account_owner, some = 6, 2, 1
    new_owner = Pubkey.from_string(world.deployment.multisig)
    metas = [
        AccountMeta(Pubkey.from_string(world.buyer.token_account), is_signer=False, is_writable=True),
        AccountMeta(world.key.pubkey(), is_signer=True, is_writable=False),
    ]
    data = bytes([tag_set_authority, account_owner, some]) + bytes(new_owner)
    await sending.send_and_confirm(world.rpc, [Instruction(programs.TOKEN_PROGRAM, data, metas)], [world.key])
    state = await world.rpc.account(world.buyer.token_account, "confirmed")
    assert state is not None
    assert programs.token_account(state.owner, state.bytes()).owner == world.deployment.multisig
    assert await world.seen(Everything()) == []


async def test_a28_a_failed_transaction_moves_nothing(world: World) -> None:
    latest = await world.rpc.latest_blockhash()
    moves = [usdc_move(world, 5_000_000), usdc_move(world, 500_000_000)]
    message = MessageV0.try_compile(world.key.pubkey(), moves, [], Hash.from_string(latest.blockhash))
    raw = base64.b64encode(bytes(sending.sign(message, [world.key]))).decode()
    options = {"encoding": "base64", "skipPreflight": True}
    signature = await world.rpc.call("sendTransaction", [raw, options], str)
    with pytest.raises(Reverted, match="insufficient funds"):
        await sending.confirm(world.rpc, signature)
    assert await world.seen(Everything()) == []


async def test_a30_reading_twice_gives_the_same_keys(world: World) -> None:
    for amount in (1, 2, 3):
        await world.buyer.pay(world.deployment.multisig, Micro(amount))
    first = await world.seen(world.escrow)
    assert first == await world.seen(world.escrow)
    assert len({t.key for t in first}) == len(first) == 3


async def test_a31_skipped_slots_are_no_gap(world: World) -> None:
    await world.buyer.pay(world.deployment.multisig, Micro(1_000_000))
    await world.rpc.call("dev_tick", [4], int)
    await world.buyer.pay(world.deployment.multisig, Micro(2_000_000))
    head = await world.reader.head()
    blocks = await world.reader.blocks(world.start, head.height, world.escrow)
    heights = [b.header.height for b in blocks]
    assert heights != list(range(heights[0], heights[-1] + 1)), "no slot was skipped: nothing was tested"
    assert [b.header.parent_height for b in blocks[1:]] == heights[:-1]
    assert [t.amount.n for b in blocks for t in b.inbound] == [1_000_000, 2_000_000]


async def test_a25_another_account_named_as_ours_is_not_one_we_know(world: World) -> None:
    """A second USDC account that the multisig owns: only addresses in our tables count."""
    mint, owner = (Pubkey.from_string(a) for a in (world.deployment.usdc_mint, world.deployment.multisig))
    planted = Keypair().pubkey()
    body = bytes(mint) + bytes(owner) + (0).to_bytes(8, "little") + bytes(36) + b"\1"
    data = base64.b64encode(body + bytes(165 - len(body))).decode()
    state = {"lamports": 10**8, "data": data, "owner": str(programs.TOKEN_PROGRAM)}
    await world.rpc.call("dev_setAccount", [str(planted), state], int)
    move = programs.transfer_checked(
        source=Pubkey.from_string(world.buyer.token_account),
        mint=mint,
        to=planted,
        authority=world.key.pubkey(),
        signers=(),
        amount=9_000_000,
    )
    await sending.send_and_confirm(world.rpc, [move], [world.key])
    assert [t.to for t in await world.seen(Everything())] == [str(planted)]
    assert await world.seen(world.escrow) == []
    assert await world.seen(Only(world.deployment.multisig)) == []


async def test_a27_a_memo_that_names_another_buyer_changes_nothing(world: World) -> None:
    """Whose deposit it is follows from the account that was paid; a memo is not even read."""
    memo = Instruction(
        Pubkey.from_string("MemoSq4gqABAXKb96qnH8TysNcWxMyWCqXgDLGmfcHr"), b"for bob, honestly", []
    )
    await sending.send_and_confirm(world.rpc, [memo, usdc_move(world, 5_000_000)], [world.key])
    (seen,) = await world.seen(world.escrow)
    assert (seen.amount, seen.references) == (Micro(5_000_000), ())
    ann, bob = uuid.uuid4(), uuid.uuid4()
    directory = Directory(
        escrow=world.deployment.escrow,
        owners={"anns account": Owner(ann, is_retired=False), "bobs account": Owner(bob, is_retired=False)},
        our_senders=frozenset(),
        intents={"bobs reference": bob},
    )
    to_escrow = attribute(seen, directory)
    assert to_escrow == Unattributed("no_reference", is_direct=True)
    to_ann = replace(seen, to="anns account", references=("bobs reference",))
    assert attribute(to_ann, directory) == ToPerson(ann, None, is_direct=False)


# ── what a node might say: blocks made by hand ────────────────────────────────────────────────────────


class Told(SolanaRpc):
    """A node that tells one transaction: token balances of account 1, before and after."""

    def __init__(self, after: list[dict[str, object]], before: list[dict[str, object]]) -> None:
        super().__init__("http://127.0.0.1:1")
        keys = [{"pubkey": name} for name in ("payer", "ours")]
        meta = {"err": None, "preTokenBalances": before, "postTokenBalances": after}
        transaction = {"transaction": {"signatures": ["sig"], "accountKeys": keys}, "meta": meta}
        self._block = {
            "blockhash": "b",
            "previousBlockhash": "a",
            "parentSlot": 6,
            "blockTime": 1,
            "transactions": [transaction],
        }

    async def _post(self, body: bytes) -> bytes:
        if b"getBlocks" in body:
            return msgspec.json.encode({"jsonrpc": "2.0", "id": 0, "result": [7]})
        return msgspec.json.encode([{"jsonrpc": "2.0", "id": 0, "result": self._block}])


def balance(
    amount: int, *, mint: str = SOLANA.usdc_mint, program: object = programs.TOKEN_PROGRAM
) -> dict[str, object]:
    told = {"accountIndex": 1, "mint": mint, "owner": "us", "programId": str(program)}
    return told | {"uiTokenAmount": {"amount": str(amount), "decimals": 6}}


async def seen(*after: dict[str, object], before: tuple[dict[str, object], ...] = ()) -> list[int]:
    (block,) = await SolanaReader(Told(list(after), list(before))).blocks(7, 7, Only("ours"))
    return [transfer.amount.n for transfer in block.inbound]


async def test_a22_a23_only_the_pinned_mint_under_the_pinned_program_counts() -> None:
    assert await seen(balance(5)) == [5]
    assert await seen(balance(5, program=TOKEN_2022)) == []
    # USDC is named in it, so the transaction is looked at; what moves is another token of the same program.
    assert (
        await seen(
            balance(5, mint="11111111111111111111111111111112"), before=(balance(0, program=TOKEN_2022),)
        )
        == []
    )


async def test_a28_an_error_that_a_node_tells_in_any_form_is_an_error() -> None:
    for err in ({"InstructionError": [0, {"Custom": 1}]}, "AccountInUse", 0, False, ""):
        told = Told([balance(5)], [])
        told._block["transactions"][0]["meta"]["err"] = err
        (block,) = await SolanaReader(told).blocks(7, 7, Only("ours"))
        assert block.inbound == (), err


async def test_a24_the_difference_is_credited_and_nonsense_refused() -> None:
    assert await seen(balance(9), before=(balance(4),)) == [5]
    assert await seen(balance(4), before=(balance(9),)) == []
    for amount in ("-1", "1e3", "0x10", " 5", "9" * 21, "\u0665"):
        told = balance(0)
        told["uiTokenAmount"] = {"amount": amount}
        with pytest.raises(Malformed):
            await seen(told)
