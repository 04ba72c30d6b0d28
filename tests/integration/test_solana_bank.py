"""The development chain's state machine against its own journal: whatever happened, a restart agrees."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from solders.account import Account
from solders.hash import Hash
from solders.keypair import Keypair
from solders.message import MessageV0, to_bytes_versioned
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer
from solders.transaction import VersionedTransaction

from chain.localnet.solana_vm.bank import FAUCET, Bank, Commitment

SYSTEM = Pubkey.default()


def a_bank(folder: Path) -> Bank:
    return Bank(folder, finalized_after=6, empty_every=4, clock=lambda: 1_800_000_000)


def pay(bank: Bank, to: Pubkey, lamports: int) -> str:
    move = transfer(TransferParams(from_pubkey=FAUCET.pubkey(), to_pubkey=to, lamports=lamports))
    newest = Hash.from_string(bank.newest_block(Commitment.PROCESSED).hash)
    message = MessageV0.try_compile(FAUCET.pubkey(), [move], [], newest)
    signed = VersionedTransaction.populate(message, [FAUCET.sign_message(to_bytes_versioned(message))])
    return bank.send(signed, bytes(signed), preflight=True)


def lamports(bank: Bank, key: Pubkey, commitment: Commitment = Commitment.PROCESSED) -> int:
    account = bank.account(key, commitment)
    return account.lamports if account else 0


@pytest.mark.parametrize("seed", range(8))
def test_a_restart_after_any_history_agrees(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    keys = [Keypair.from_seed(bytes([i + 1]) * 32).pubkey() for i in range(4)]
    bank = a_bank(tmp_path)
    for step in range(120):
        match dice.choice(["pay", "pay", "tick", "tick", "tick", "fork", "reuse", "set", "restart"]):
            case "pay":
                pay(bank, dice.choice(keys), 2_000_000 + step)
            case "tick":
                bank.tick()
            case "fork" if bank.slot > 8:
                bank.fork(dice.randint(1, 5))
            case "reuse" if bank.slot > 8:
                bank.fork(dice.randint(1, 5), reuse=True)
            case "set":
                bank.set_accounts([(keys[0], Account(5_000_000 + step, b"x", SYSTEM))])
            case "restart" if step % 3 == 0:
                slot = bank.slot
                bank.close()
                bank = a_bank(tmp_path)
                assert bank.slot >= slot
    bank.tick()
    for _ in range(8):
        bank.tick()
    blocks = [
        (b.slot, b.hash, b.parent_hash, b.height, [t.signature for t in b.transactions]) for b in bank.blocks
    ]
    balances = [lamports(bank, k) for k in keys]
    assert balances == [lamports(bank, k, Commitment.FINALIZED) for k in keys]
    known = {t.signature: t.slot for b in bank.blocks for t in b.transactions}
    bank.close()
    again = a_bank(tmp_path)
    assert [lamports(again, k) for k in keys] == balances
    seen = [
        (b.slot, b.hash, b.parent_hash, b.height, [t.signature for t in b.transactions]) for b in again.blocks
    ]
    assert seen[: len(blocks)] == blocks
    for signature, slot in known.items():
        found = again.find(signature)
        assert found is not None
        assert found.slot == slot
    again.close()


def test_blocks_chain_by_hash_through_forks(tmp_path: Path) -> None:
    bank = a_bank(tmp_path)
    for i in range(30):
        pay(bank, Keypair().pubkey(), 2_000_000 + i)
        bank.tick()
        if i % 7 == 6:
            bank.fork(3, reuse=i % 2 == 0)
    for parent, child in zip(bank.blocks, bank.blocks[1:], strict=False):
        assert (child.parent_hash, child.parent_slot) == (parent.hash, parent.slot)
        assert child.slot > parent.slot
        assert child.height == parent.height + 1
    assert len({b.hash for b in bank.blocks}) == len(bank.blocks)
    bank.close()


def test_reusing_slots_gives_them_other_blocks(tmp_path: Path) -> None:
    bank = a_bank(tmp_path)
    to = Keypair().pubkey()
    pay(bank, to, 2_000_000)
    bank.tick()
    old = bank.blocks[-1]
    bank.fork(bank.slot - old.slot + 1, reuse=True)
    assert lamports(bank, to) == 0
    pay(bank, to, 3_000_000)
    bank.tick()
    new = bank.blocks[-1]
    assert (new.slot, lamports(bank, to)) == (old.slot, 3_000_000)
    assert new.hash != old.hash
    bank.close()


def test_a_full_disk_refuses_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = a_bank(tmp_path)
    to = Keypair().pubkey()
    faucet = lamports(bank, FAUCET.pubkey())

    def full(_record: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bank._journal, "append", full)
        with pytest.raises(OSError, match="No space"):
            pay(bank, to, 2_000_000)
    assert (lamports(bank, to), lamports(bank, FAUCET.pubkey())) == (0, faucet)
    pay(bank, to, 2_000_000)
    assert lamports(bank, to) == 2_000_000
    bank.close()


def test_a_fork_deeper_than_the_chain_is_refused(tmp_path: Path) -> None:
    bank = a_bank(tmp_path)
    for slots in (0, bank.slot + 1, 10**9):
        with pytest.raises(ValueError, match="cannot drop"):
            bank.fork(slots)
    bank.close()
