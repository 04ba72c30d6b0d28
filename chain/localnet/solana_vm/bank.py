"""The state of the development chain: accounts, slots, blocks, forks.

The SVM executes; the bank gives it what a validator has and an SVM has not: slots that close by
time, blocks with hashes and parents, commitments, blockhashes that age, durable nonces that advance
even when their transaction fails, forks that put accounts back, and a journal that brings all of it
back after kill -9.

Transactions run at once in the open slot.  `tick` closes it: a slot that held transactions, or the
`empty_every`-th without, becomes a block; the others are skipped, as on the real network.
Commitments are ages in slots: processed = the open slot, confirmed = closed one slot ago, finalized =
closed `finalized_after` slots ago.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import msgspec
from solders.account import Account
from solders.hash import Hash
from solders.keypair import Keypair
from solders.litesvm import LiteSVM
from solders.message import MessageV0
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.system_program import ID as SYSTEM_PROGRAM
from solders.transaction import VersionedTransaction
from solders.transaction_metadata import FailedTransactionMetadata, TransactionMetadata

from chain.localnet.solana_vm import encoding
from chain.localnet.solana_vm.journal import (
    AccountsSet,
    BlockClosed,
    Executed,
    Forked,
    Genesis,
    Journal,
    StoredAccount,
)

BLOCKHASH_AGE_MAX: Final = 150
"""Blocks a blockhash stays usable; MAX_PROCESSING_AGE of the validator."""
UNDO_SLOTS: Final = 4096
"""How far back `fork` can go; account versions older than this are forgotten."""
TRANSACTION_BYTES_MAX: Final = 1232
"""An IPv6 packet of 1,280 bytes less headers: PACKET_DATA_SIZE of the validator."""
NONCE_BYTES: Final = 80
NONCE_VALUE: Final = slice(40, 72)
SLOT_HASHES: Final = 64
FAUCET: Final = Keypair.from_seed(hashlib.sha256(b"tollway development faucet").digest())
"""Pays airdrops and is the mint authority of development USDC.  Public on purpose, worthless elsewhere."""
_FAUCET_LAMPORTS: Final = 10**17


class Commitment(StrEnum):
    """How settled an answer must be."""

    PROCESSED = "processed"
    CONFIRMED = "confirmed"
    FINALIZED = "finalized"


class Rejected(Exception):
    """A transaction that never reaches a block; `error` is the TransactionError in JSON form."""

    def __init__(self, error: Any, logs: list[str] | None = None, units: int = 0) -> None:
        super().__init__(encoding.error_sentence(error))
        self.error = error
        self.logs = logs or []
        self.units = units


@dataclass(slots=True)
class Landed:
    """A transaction in a slot (perhaps with an error)."""

    signature: str
    slot: int
    raw: bytes
    meta: bytes
    """RPC `meta` as JSON."""
    error: Any
    keys: tuple[str, ...]


@dataclass(slots=True)
class Block:
    """A slot that holds a block."""

    slot: int
    hash: str
    parent_slot: int
    parent_hash: str
    height: int
    time_s: int
    transactions: list[Landed] = field(default_factory=list)


@dataclass(slots=True)
class Simulation:
    """Outcome of running a transaction without keeping it."""

    error: Any
    logs: list[str]
    units: int


class _Meta(msgspec.Struct):
    """The parts of a stored meta needed to index it again."""

    err: Any
    loadedAddresses: dict[str, list[str]]  # noqa: N815  # RPC's own spelling


class Bank:
    """One development chain in one data folder.  Not thread-safe; a single event loop owns it."""

    def __init__(
        self, folder: Path, *, finalized_after: int, empty_every: int, clock: Callable[[], int]
    ) -> None:
        self.finalized_after = finalized_after
        self._empty_every = empty_every
        self._clock = clock
        self._vm = LiteSVM().with_transaction_history(0).with_blockhash_check(False)
        self._by_signature: dict[str, Landed] = {}
        self._by_address: dict[str, list[Landed]] = {}
        self._heights: dict[str, int] = {}
        self._versions: dict[Pubkey, list[tuple[int, Account | None]]] = {}
        self._changes: deque[tuple[int, Pubkey]] = deque()
        self._open: list[Landed] = []
        self.blocks: list[Block] = []
        self.slot = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(folder / "journal")
        self._start()

    # ── life ──────────────────────────────────────────────────────────────────────────────────────

    def _start(self) -> None:
        faucet = Account(_FAUCET_LAMPORTS, b"", SYSTEM_PROGRAM)
        self._vm.set_account(FAUCET.pubkey(), faucet)
        replaying = False
        for record in self._journal.records():
            replaying = True
            self._replay(record)
        if not replaying:
            genesis = Genesis(str(Hash(os.urandom(32))), self._clock())
            self._journal.append(genesis)
            self._replay(genesis)
            self._open_slot(1)
            return
        # Slots up to the next heartbeat may have passed unseen by the journal: never answer a lower one.
        self._open_slot(max(self.blocks[-1].slot + self._empty_every, self.slot) + 1)
        self._close_block()
        self._open_slot(self.slot + 1)

    def _replay(self, record: Genesis | BlockClosed | Executed | AccountsSet | Forked) -> None:
        match record:
            case Genesis():
                self._add_block(Block(0, record.hash, 0, str(Hash.default()), 0, record.time_s))
            case BlockClosed():
                self._append_block(record.slot, record.hash, record.time_s)
            case Executed():
                self.slot = record.slot
                self._restore(record.accounts)
                self._remember(self._landed(record))
            case AccountsSet():
                self.slot = record.slot
                self._restore(record.accounts)
            case Forked():
                self._drop_after(record.last_kept)
                self.slot = record.slot

    def close(self) -> None:
        """Release the data folder."""
        self._journal.close()

    @property
    def genesis_hash(self) -> str:
        return self.blocks[0].hash

    # ── slots ─────────────────────────────────────────────────────────────────────────────────────

    def tick(self) -> None:
        """Close the open slot and open the next."""
        if self._open or self.slot - self.blocks[-1].slot >= self._empty_every:
            self._close_block()
        self._open_slot(self.slot + 1)

    def _close_block(self) -> None:
        parent = self.blocks[-1]
        digest = hashlib.sha256(parent.hash.encode() + self.slot.to_bytes(8) + os.urandom(8))
        for landed in self._open:
            digest.update(landed.signature.encode())
        time_s = max(parent.time_s, self._clock())
        record = BlockClosed(self.slot, str(Hash(digest.digest())), time_s)
        self._journal.append(record)
        self._append_block(record.slot, record.hash, record.time_s)

    def _append_block(self, slot: int, block_hash: str, time_s: int) -> None:
        parent = self.blocks[-1]
        block = Block(slot, block_hash, parent.slot, parent.hash, parent.height + 1, time_s, self._open)
        for landed in self._open:
            landed.slot = slot
        self._open = []
        self._add_block(block)
        self.slot = slot

    def _add_block(self, block: Block) -> None:
        self.blocks.append(block)
        self._heights[block.hash] = block.height

    def _open_slot(self, slot: int) -> None:
        self.slot = slot
        self._vm.warp_to_slot(slot)
        clock = self._vm.get_clock()
        clock.unix_timestamp = self._clock()
        self._vm.set_clock(clock)
        recent = self.blocks[-SLOT_HASHES:]
        self._vm.set_slot_hashes([(b.slot, Hash.from_string(b.hash)) for b in reversed(recent)])
        while self._changes and self._changes[0][0] < slot - UNDO_SLOTS:
            self._forget(*self._changes.popleft())

    def _forget(self, slot: int, key: Pubkey) -> None:
        versions = self._versions.get(key, [])
        while len(versions) > 1 and versions[1][0] <= slot:
            versions.pop(0)

    def last_slot(self, commitment: Commitment) -> int:
        """Newest slot (block or not) whose effects `commitment` shows."""
        if commitment is Commitment.PROCESSED:
            return self.slot
        age = 1 if commitment is Commitment.CONFIRMED else self.finalized_after
        return max(self.slot - age, 0)

    def newest_block(self, commitment: Commitment) -> Block:
        """Newest block at `commitment`; genesis when there is none else."""
        index = bisect.bisect_right(self.blocks, self.last_slot(commitment), key=lambda b: b.slot)
        return self.blocks[max(index, 1) - 1]

    def block_at(self, slot: int) -> Block | None:
        """Block of `slot`, or None if it was skipped or is not closed yet."""
        index = bisect.bisect_left(self.blocks, slot, key=lambda b: b.slot)
        return self.blocks[index] if index < len(self.blocks) and self.blocks[index].slot == slot else None

    def blocks_between(self, start: int, end: int) -> list[Block]:
        """Blocks with slots in start..end inclusive."""
        low = bisect.bisect_left(self.blocks, start, key=lambda b: b.slot)
        high = bisect.bisect_right(self.blocks, end, key=lambda b: b.slot)
        return self.blocks[low:high]

    # ── accounts ──────────────────────────────────────────────────────────────────────────────────

    def account(self, key: Pubkey, commitment: Commitment) -> Account | None:
        """Account state at `commitment`; None if it does not exist."""
        versions = self._versions.get(key)
        if commitment is Commitment.PROCESSED or not versions:
            return self._vm.get_account(key)
        index = bisect.bisect_right(versions, self.last_slot(commitment), key=lambda v: v[0])
        return versions[max(index, 1) - 1][1]

    def rent_minimum(self, data_bytes: int) -> int:
        """Lamports that make an account of `data_bytes` exempt from rent."""
        return self._vm.minimum_balance_for_rent_exemption(data_bytes)

    def set_accounts(self, accounts: Sequence[tuple[Pubkey, Account]]) -> None:
        """Write accounts from outside, durable before it returns."""
        before = [self._vm.get_account(key) for key, _ in accounts]
        for key, account in accounts:
            self._vm.set_account(key, account)
        self._keep([key for key, _ in accounts], before, lambda stored: AccountsSet(self.slot, stored))

    def _keep(
        self,
        keys: Sequence[Pubkey],
        before: Sequence[Account | None],
        record: Callable[[list[StoredAccount]], AccountsSet | Executed],
    ) -> None:
        """Journal the accounts that changed; if the disk refuses, put them back."""
        after = [self._vm.get_account(key) for key in keys]
        changed = [(k, b, a) for k, b, a in zip(keys, before, after, strict=True) if b != a]
        try:
            self._journal.append(record([_stored(k, a) for k, _, a in changed]))
        except OSError:
            for key, account, _ in changed:
                self._put(key, account)
            raise
        for key, old, new in changed:
            self._version(key, old, new)

    def _put(self, key: Pubkey, account: Account | None) -> None:
        self._vm.set_account(key, account or Account(0, b"", SYSTEM_PROGRAM))

    def _version(self, key: Pubkey, old: Account | None, new: Account | None) -> None:
        versions = self._versions.setdefault(key, [(-1, old)])
        if versions[-1][0] == self.slot:
            versions[-1] = (self.slot, new)
        else:
            versions.append((self.slot, new))
            self._changes.append((self.slot, key))

    def _restore(self, stored: Iterable[StoredAccount]) -> None:
        for item in stored:
            key = Pubkey(item.key)
            old = self._vm.get_account(key)
            new = Account(item.lamports, item.data, Pubkey(item.owner), item.executable)
            self._put(key, new)
            self._version(key, old, new if item.lamports else None)

    # ── transactions ──────────────────────────────────────────────────────────────────────────────

    def simulate(
        self, transaction: VersionedTransaction, *, verify: bool, replace_blockhash: bool
    ) -> Simulation:
        """Run a transaction on the processed state and keep nothing."""
        if not replace_blockhash:
            nonce = self._check_age(transaction)
            self._check_new(transaction, nonce)
        self._vm.with_sigverify(verify)
        try:
            result = self._vm.simulate_transaction(transaction)
        finally:
            self._vm.with_sigverify(True)
        error = encoding.error_json(result) if isinstance(result, FailedTransactionMetadata) else None
        meta = result.meta()
        return Simulation(error, meta.logs(), meta.compute_units_consumed())

    def send(self, transaction: VersionedTransaction, raw: bytes, *, preflight: bool) -> str:
        """Execute a transaction in the open slot and give its signature; Rejected if it cannot land."""
        signature = str(transaction.signatures[0]) if transaction.signatures else ""
        nonce = self._check_age(transaction)
        self._check_new(transaction, nonce)
        if preflight:
            trial = self.simulate(transaction, verify=True, replace_blockhash=True)
            if trial.error is not None:
                raise Rejected(trial.error, trial.logs, trial.units)
        writable, readonly = self._lookups(transaction)
        keys = [*transaction.message.account_keys, *writable, *readonly]
        before = [self._vm.get_account(key) for key in keys]
        result = self._vm.send_transaction(transaction)
        meta = result.meta() if isinstance(result, FailedTransactionMetadata) else result
        error = encoding.error_json(result) if isinstance(result, FailedTransactionMetadata) else None
        if meta.signature() == Signature.default():
            raise Rejected(error, meta.logs(), meta.compute_units_consumed())
        if nonce is not None:
            self._advance(nonce)
        after = [self._vm.get_account(key) for key in keys]
        described = _meta_json(
            meta,
            error,
            keys=keys,
            before=before,
            after=after,
            loaded=(writable, readonly),
            decimals=self._decimals(before, after),
        )
        executed: list[Executed] = []

        def record(stored: list[StoredAccount]) -> Executed:
            executed.append(Executed(self.slot, raw, described, stored))
            return executed[0]

        self._keep(keys, before, record)
        self._remember(self._landed(executed[0]))
        return signature

    def _check_age(self, transaction: VersionedTransaction) -> Pubkey | None:
        """Refuse a stale blockhash; give the nonce account if it is a durable nonce that is used instead."""
        blockhash = str(transaction.message.recent_blockhash)
        if self.is_blockhash_valid(blockhash):
            return None
        key = _nonce_account(transaction)
        account = self._vm.get_account(key) if key is not None else None
        if account is None or account.owner != SYSTEM_PROGRAM or len(account.data) != NONCE_BYTES:
            raise Rejected("BlockhashNotFound")
        value = bytes(account.data)[NONCE_VALUE]
        if Hash(value) != transaction.message.recent_blockhash or value == self._next_nonce():
            raise Rejected("BlockhashNotFound")
        return key

    def _check_new(self, transaction: VersionedTransaction, nonce: Pubkey | None) -> None:
        if nonce is None and transaction.signatures and str(transaction.signatures[0]) in self._by_signature:
            raise Rejected("AlreadyProcessed")

    def _next_nonce(self) -> bytes:
        """What a nonce becomes when advanced now; `DurableNonce::from_blockhash` of the validator."""
        newest = Hash.from_string(self.blocks[-1].hash)
        return hashlib.sha256(b"DURABLE_NONCE" + bytes(newest)).digest()

    def _advance(self, key: Pubkey) -> None:
        """Advance a used nonce, whether or not its transaction succeeded (the SVM leaves failures to us)."""
        account = self._vm.get_account(key)
        if account is None or len(account.data) != NONCE_BYTES:
            return
        data = bytearray(account.data)
        data[NONCE_VALUE] = self._next_nonce()
        self._vm.set_account(key, Account(account.lamports, bytes(data), account.owner))

    def _lookups(self, transaction: VersionedTransaction) -> tuple[list[Pubkey], list[Pubkey]]:
        message = transaction.message
        lookups = message.address_table_lookups if isinstance(message, MessageV0) else []
        tables = {k.account_key: self._vm.get_account(k.account_key) for k in lookups}
        return encoding.looked_up(message, tables)

    def _decimals(self, *groups: Sequence[Account | None]) -> dict[Pubkey, int]:
        mints = {parsed[0] for group in groups for a in group if (parsed := encoding.token_account(a))}
        found = {mint: self._vm.get_account(mint) for mint in mints}
        return {
            mint: bytes(a.data)[encoding.MINT_DECIMALS_OFFSET] for mint, a in found.items() if a is not None
        }

    def _landed(self, executed: Executed) -> Landed:
        transaction = VersionedTransaction.from_bytes(executed.raw)
        meta = msgspec.json.decode(executed.meta, type=_Meta)
        keys = [str(k) for k in transaction.message.account_keys]
        keys += meta.loadedAddresses["writable"] + meta.loadedAddresses["readonly"]
        signature = str(transaction.signatures[0])
        return Landed(signature, executed.slot, executed.raw, executed.meta, meta.err, tuple(keys))

    def _remember(self, landed: Landed) -> None:
        self._open.append(landed)
        self._by_signature[landed.signature] = landed
        for key in dict.fromkeys(landed.keys):
            self._by_address.setdefault(key, []).append(landed)

    # ── history ───────────────────────────────────────────────────────────────────────────────────

    def find(self, signature: str) -> Landed | None:
        """The transaction of that signature, in whatever slot."""
        return self._by_signature.get(signature)

    def touching(self, address: str) -> Sequence[Landed]:
        """Transactions that name `address`, oldest first."""
        return self._by_address.get(address, ())

    def is_blockhash_valid(self, blockhash: str) -> bool:
        """Tell whether a transaction with that recent blockhash would be accepted."""
        height = self._heights.get(blockhash)
        return height is not None and self.blocks[-1].height - height <= BLOCKHASH_AGE_MAX

    def transaction_count(self) -> int:
        return len(self._by_signature)

    def time_of(self, landed: Landed) -> int | None:
        """Block time of a transaction; None while its slot is open."""
        block = self.block_at(landed.slot)
        return block.time_s if block else None

    # ── forks ─────────────────────────────────────────────────────────────────────────────────────

    def fork(self, slots: int, *, reuse: bool = False) -> None:
        """Drop the newest `slots` slots (the open one included), as if the cluster had chosen another fork.

        Accounts and nonces go back; the dropped transactions are unknown again and may be sent again.
        With `reuse` the same slot numbers get new blocks, otherwise they count as skipped.
        """
        last_kept = self.slot - slots
        if not 0 < slots <= UNDO_SLOTS or last_kept < 0:
            raise ValueError(f"cannot drop {slots} slots at slot {self.slot}")
        record = Forked(last_kept, last_kept + 1 if reuse else self.slot)
        self._journal.append(record)
        self._drop_after(record.last_kept)
        self._open_slot(record.slot)

    def _drop_after(self, last_kept: int) -> None:
        dropped = list(self._open)
        while self.blocks[-1].slot > last_kept:
            block = self.blocks.pop()
            dropped += block.transactions
            del self._heights[block.hash]
        self._open = []
        for landed in dropped:
            del self._by_signature[landed.signature]
            for key in dict.fromkeys(landed.keys):
                self._by_address[key].remove(landed)
        for changed, versions in self._versions.items():
            if versions[-1][0] <= last_kept:
                continue
            while len(versions) > 1 and versions[-1][0] > last_kept:
                versions.pop()
            self._put(changed, versions[-1][1])
        while self._changes and self._changes[-1][0] > last_kept:
            self._changes.pop()


def _stored(key: Pubkey, account: Account | None) -> StoredAccount:
    if account is None:
        return StoredAccount(bytes(key), 0, b"", bytes(SYSTEM_PROGRAM), executable=False)
    return StoredAccount(
        bytes(key), account.lamports, bytes(account.data), bytes(account.owner), executable=account.executable
    )


def _nonce_account(transaction: VersionedTransaction) -> Pubkey | None:
    """Nonce account of a transaction whose first instruction is AdvanceNonceAccount (tag 4)."""
    message = transaction.message
    if not message.instructions:
        return None
    first = message.instructions[0]
    keys = message.account_keys
    if (
        keys[first.program_id_index] != SYSTEM_PROGRAM
        or bytes(first.data) != b"\4\0\0\0"
        or not first.accounts
    ):
        return None
    index = bytes(first.accounts)[0]
    return keys[index] if index < len(keys) else None


def _meta_json(
    meta: TransactionMetadata,
    error: Any,
    *,
    keys: Sequence[Pubkey],
    before: Sequence[Account | None],
    after: Sequence[Account | None],
    loaded: tuple[list[Pubkey], list[Pubkey]],
    decimals: dict[Pubkey, int],
) -> bytes:
    return msgspec.json.encode(
        {
            "err": error,
            "status": {"Ok": None} if error is None else {"Err": error},
            "fee": meta.fee(),
            "preBalances": [a.lamports if a else 0 for a in before],
            "postBalances": [a.lamports if a else 0 for a in after],
            "innerInstructions": encoding.inner_instructions(meta),
            "logMessages": meta.logs(),
            "preTokenBalances": encoding.token_balances(keys, before, decimals),
            "postTokenBalances": encoding.token_balances(keys, after, decimals),
            "rewards": [],
            "loadedAddresses": {
                "writable": [str(k) for k in loaded[0]],
                "readonly": [str(k) for k in loaded[1]],
            },
            "computeUnitsConsumed": meta.compute_units_consumed(),
        }
    )
