"""The development node as a process: clients, kill -9, ports, lookup tables, errors."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from solana.rpc.async_api import AsyncClient
from solana.rpc.commitment import Confirmed, Finalized
from solana.rpc.models import TxOpts
from solders.address_lookup_table_account import AddressLookupTableAccount
from solders.hash import Hash
from solders.keypair import Keypair
from solders.message import Message, MessageV0
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.system_program import (
    CreateLookupTableParams,
    ExtendLookupTableParams,
    TransferParams,
    create_lookup_table,
    extend_lookup_table,
    transfer,
)
from solders.transaction import Transaction, VersionedTransaction

from chain.localnet.solana import FolderBusy, PortInUse, SolanaNode, deploy, fund
from chain.localnet.solana_vm.journal import Journal, JournalDamaged
from chain.solana import programs, sending
from chain.solana.rpc import SLOT_SKIPPED, NodeError, SolanaRpc
from chain.units import Micro

CONFIRMED_BLOCK = {"maxSupportedTransactionVersion": 0, "commitment": "confirmed"}


def a_transfer(payer: Keypair, to: Pubkey, lamports: int, blockhash: str) -> VersionedTransaction:
    move = transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=to, lamports=lamports))
    message = MessageV0.try_compile(payer.pubkey(), [move], [], Hash.from_string(blockhash))
    return sending.sign(message, [payer])


async def test_solana_py_talks_to_it_as_to_a_validator(tmp_path: Path) -> None:
    payer, to = Keypair(), Keypair()
    async with await SolanaNode.start(tmp_path, slot_ms=20) as node, AsyncClient(node.url) as client:
        assert await client.is_connected()
        drop = (await client.request_airdrop(payer.pubkey(), 10**9)).value
        await client.confirm_transaction(drop, Confirmed, sleep_seconds=0.02)
        assert (await client.get_balance(payer.pubkey(), Confirmed)).value == 10**9

        latest = (await client.get_latest_blockhash(Confirmed)).value.blockhash
        move = transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=to.pubkey(), lamports=10**8))
        legacy = Transaction([payer], Message.new_with_blockhash([move], payer.pubkey(), latest), latest)
        options = TxOpts(preflight_commitment=Confirmed)
        signature = (await client.send_raw_transaction(bytes(legacy), options)).value
        await client.confirm_transaction(signature, Finalized, sleep_seconds=0.02)

        status = (await client.get_signature_statuses([signature, Signature.default()])).value
        assert status[0] is not None
        assert status[0].err is None
        assert status[1] is None
        found = (await client.get_transaction(signature, "json", Finalized)).value
        assert found is not None
        assert found.transaction.meta is not None
        assert found.transaction.meta.fee == 5000
        listed = (await client.get_signatures_for_address(to.pubkey(), commitment=Confirmed)).value
        assert [item.signature for item in listed] == [signature]
        block = (await client.get_block(found.slot, "json", max_supported_transaction_version=0)).value
        assert block is not None
        assert block.parent_slot < found.slot
        assert found.slot in (await client.get_blocks(0, found.slot)).value
        assert (await client.get_account_info(to.pubkey(), Confirmed)).value is not None
        assert (await client.get_minimum_balance_for_rent_exemption(165)).value == 2_039_280
        assert (await client.get_slot(Finalized)).value <= (await client.get_slot(Confirmed)).value
        simulated = (await client.simulate_transaction(VersionedTransaction.from_legacy(legacy))).value
        assert simulated.err is not None


async def test_kill_9_loses_nothing(tmp_path: Path) -> None:
    gas, signers = Keypair(), [Keypair() for _ in range(3)]
    names = [str(s.pubkey()) for s in signers]
    node = await SolanaNode.start(tmp_path, slot_ms=20)
    async with SolanaRpc(node.url) as rpc:
        first = await deploy(rpc, signers=names, gas_payer=str(gas.pubkey()))
        tx = await fund(rpc, first.multisig, usdc=Micro(7_000_000))
        status = await rpc.status(tx)
        assert status is not None
        before = await rpc.call("getBlocks", [0, {"commitment": "confirmed"}], list[int])
        old = await rpc.call("getBlock", [status.slot, CONFIRMED_BLOCK], dict)
        newest_slot = await rpc.call("getSlot", [{"commitment": "processed"}], int)
        nonce = await rpc.account(first.nonce_account, "processed")
        unconfirmed = await rpc.call("requestAirdrop", [names[0], 1_234_500], str)
    os.kill(node.pid, signal.SIGKILL)
    await node.stop()

    async with await SolanaNode.start(tmp_path, slot_ms=20) as again, SolanaRpc(again.url) as rpc:
        assert await rpc.call("getSlot", [{"commitment": "processed"}], int) >= newest_slot
        assert await deploy(rpc, signers=names, gas_payer=str(gas.pubkey())) == first
        same = await rpc.call("getBlock", [status.slot, CONFIRMED_BLOCK], dict)
        assert same == old
        blocks = await rpc.call("getBlocks", [0, {"commitment": "confirmed"}], list[int])
        assert blocks[: len(before)] == before
        balance = await rpc.call("getTokenAccountBalance", [first.escrow, {"commitment": "processed"}], dict)
        assert balance["value"]["amount"] == "7000000"
        assert await rpc.account(first.nonce_account, "processed") == nonce
        assert await rpc.status(unconfirmed) is not None
        state = await rpc.account(names[0], "processed")
        assert state is not None
        assert state.lamports == 1_234_500
        await fund(rpc, first.multisig, usdc=Micro(1))


async def test_a_torn_last_record_is_cut_off_and_other_damage_refuses(tmp_path: Path) -> None:
    async with await SolanaNode.start(tmp_path, slot_ms=20) as node, SolanaRpc(node.url) as rpc:
        to = str(Keypair().pubkey())
        await fund(rpc, to, lamports=1_777_777)
        genesis = await rpc.call("getGenesisHash", [], str)
    path = tmp_path / "journal"
    with path.open("ab") as file:
        file.write(b"\xff\0\0\0torn")
    async with await SolanaNode.start(tmp_path, slot_ms=20) as node, SolanaRpc(node.url) as rpc:
        assert await rpc.call("getGenesisHash", [], str) == genesis
        state = await rpc.account(to, "processed")
        assert state is not None
        assert state.lamports == 1_777_777
    damaged = bytearray(path.read_bytes())
    damaged[12] ^= 1
    path.write_bytes(damaged)
    with Journal(path) as journal, pytest.raises(JournalDamaged):
        list(journal.records())


async def test_a_port_or_folder_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PortInUse, match=str(taken.getsockname()[1])):
            await SolanaNode.start(tmp_path, port=taken.getsockname()[1])
    async with await SolanaNode.start(tmp_path):
        with pytest.raises(FolderBusy):
            await SolanaNode.start(tmp_path)


async def test_the_node_ends_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom chain.localnet.solana import SolanaNode\n"
        "async def main():\n"
        "    node = await SolanaNode.start(Path(sys.argv[1]))\n"
        "    print(node.pid, flush=True)\n    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    parent = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    parent.kill()
    await parent.wait()
    for _ in range(200):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        await asyncio.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the node outlived its parent")


async def test_refusals_carry_the_validators_codes(tmp_path: Path) -> None:
    payer, to = Keypair(), Keypair().pubkey()
    async with await SolanaNode.start(tmp_path, slot_ms=0, empty_every=4) as node, SolanaRpc(node.url) as rpc:
        await rpc.call("requestAirdrop", [str(payer.pubkey()), 10**9], str)
        await rpc.call("dev_tick", [40], int)
        latest = (await rpc.latest_blockhash()).blockhash
        good = a_transfer(payer, to, 10**7, latest)

        async def refused(transaction: VersionedTransaction) -> NodeError:
            with pytest.raises(NodeError) as caught:
                await rpc.send(bytes(transaction))
            return caught.value

        stale = await refused(a_transfer(payer, to, 10**7, str(Hash.new_unique())))
        assert (stale.code, stale.message) == (-32002, "Transaction simulation failed: Blockhash not found")
        assert stale.data["err"] == "BlockhashNotFound"
        forged = VersionedTransaction.populate(good.message, [Signature.default()])
        assert (await refused(forged)).code == -32003
        poor = await refused(a_transfer(payer, to, 10**12, latest))
        assert poor.data["err"] == {"InstructionError": [0, {"Custom": 1}]}
        assert poor.message.endswith("Error processing Instruction 0: custom program error: 0x1")
        await rpc.send(bytes(good))
        twice = await refused(good)
        assert twice.message.endswith("This transaction has already been processed")
        stranger = await refused(a_transfer(Keypair(), to, 1, latest))
        assert stranger.data["err"] == "AccountNotFound"

        await rpc.call("dev_tick", [1], int)
        with pytest.raises(NodeError) as skipped:
            await rpc.call("getBlock", [2, {"maxSupportedTransactionVersion": 0}], dict)
        assert skipped.value.code == SLOT_SKIPPED
        with pytest.raises(NodeError) as unknown:
            await rpc.call("getNothing", [], str)
        assert unknown.value.code == -32601
        for method, params in (
            ("getBalance", ["x"]),
            ("getSlot", [3]),
            ("getBlock", ["1"]),
            ("dev_fork", [10**9]),
        ):
            with pytest.raises(NodeError) as bad:
                await rpc.call(method, params, int)
            assert bad.value.code == -32602


async def test_state_is_answered_by_commitment(tmp_path: Path) -> None:
    async with (
        await SolanaNode.start(tmp_path, slot_ms=0, finalized_after=5) as node,
        SolanaRpc(node.url) as rpc,
    ):
        await rpc.call("dev_tick", [20], int)
        key = str(Keypair().pubkey())
        tx = await rpc.call("requestAirdrop", [key, 10**9], str)

        async def levels() -> list[bool]:
            return [await rpc.account(key, c) is not None for c in ("processed", "confirmed", "finalized")]

        assert await levels() == [True, False, False]
        await rpc.call("dev_tick", [1], int)
        assert await levels() == [True, True, False]
        await rpc.call("dev_tick", [3], int)
        assert await levels() == [True, True, False]
        assert (await rpc.status(tx)).confirmation_status == "confirmed"  # type: ignore[union-attr]
        await rpc.call("dev_tick", [1], int)
        assert await levels() == [True, True, True]
        assert (await rpc.status(tx)).confirmation_status == "finalized"  # type: ignore[union-attr]


async def test_addresses_from_a_lookup_table_are_resolved(tmp_path: Path) -> None:
    payer, to = Keypair(), Keypair().pubkey()
    async with await SolanaNode.start(tmp_path, slot_ms=20) as node, SolanaRpc(node.url) as rpc:
        await fund(rpc, str(payer.pubkey()), lamports=10**9)
        slot = await rpc.call("getSlot", [{"commitment": "confirmed"}], int)
        make, table = create_lookup_table(
            CreateLookupTableParams(
                authority_address=payer.pubkey(), payer_address=payer.pubkey(), recent_slot=slot
            )
        )
        extend = extend_lookup_table(
            ExtendLookupTableParams(
                lookup_table_address=table,
                authority_address=payer.pubkey(),
                payer_address=payer.pubkey(),
                new_addresses=[to],
            )
        )
        await sending.send_and_confirm(rpc, [make, extend], [payer])
        latest = await rpc.latest_blockhash()
        move = transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=to, lamports=10**7))
        tables = [AddressLookupTableAccount(table, [to])]
        message = MessageV0.try_compile(payer.pubkey(), [move], tables, Hash.from_string(latest.blockhash))
        assert to not in message.account_keys
        signature = await rpc.send(bytes(sending.sign(message, [payer])))
        await sending.confirm(rpc, signature)
        options = {"maxSupportedTransactionVersion": 0, "commitment": "confirmed"}
        found = await rpc.call("getTransaction", [signature, options], dict)
        assert found["version"] == 0
        assert found["meta"]["loadedAddresses"] == {"writable": [str(to)], "readonly": []}
        assert 10**7 in found["meta"]["postBalances"]
        accounts = {**options, "transactionDetails": "accounts"}
        block = await rpc.call("getBlock", [found["slot"], accounts], dict)
        keys = [k for t in block["transactions"] for k in t["transaction"]["accountKeys"]]
        assert {"pubkey": str(to), "signer": False, "writable": True, "source": "lookupTable"} in keys
        with pytest.raises(NodeError) as refused:
            await rpc.call("getTransaction", [signature, {"commitment": "confirmed"}], dict)
        assert refused.value.code == -32015


async def test_a_failing_transaction_on_a_nonce_spends_it(tmp_path: Path) -> None:
    """As on the real network, and unlike the bare SVM: else old bytes would be good again."""
    gas, signers = Keypair(), [Keypair() for _ in range(3)]
    async with await SolanaNode.start(tmp_path, slot_ms=20) as node, SolanaRpc(node.url) as rpc:
        d = await deploy(rpc, signers=[str(s.pubkey()) for s in signers], gas_payer=str(gas.pubkey()))
        state = await rpc.account(d.nonce_account, "confirmed")
        assert state is not None
        _, before = programs.nonce_account(state.owner, state.bytes())
        advance = programs.advance_nonce(Pubkey.from_string(d.nonce_account), gas.pubkey())
        too_much = TransferParams(from_pubkey=gas.pubkey(), to_pubkey=signers[0].pubkey(), lamports=10**15)
        message = MessageV0.try_compile(
            gas.pubkey(), [advance, transfer(too_much)], [], Hash.from_string(before)
        )
        raw = base64.b64encode(bytes(sending.sign(message, [gas]))).decode()
        options = {"encoding": "base64", "skipPreflight": True}
        signature = await rpc.call("sendTransaction", [raw, options], str)
        state = await rpc.account(d.nonce_account, "processed")
        assert state is not None
        _, after = programs.nonce_account(state.owner, state.bytes())
        assert after != before
        status = await rpc.status(signature)
        assert status is not None
        assert status.err == {"InstructionError": [1, {"Custom": 1}]}


async def test_empty_slots_cost_little(tmp_path: Path) -> None:
    async with await SolanaNode.start(tmp_path, slot_ms=0) as node, SolanaRpc(node.url) as rpc:
        started = time.monotonic()
        await rpc.call("dev_tick", [10_000], int)
        assert time.monotonic() - started < 10
        assert (tmp_path / "journal").stat().st_size < 10_000 * 30
