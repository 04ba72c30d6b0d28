"""Reading Solana: headers and inbound USDC, by slot.

A transfer is a positive balance difference (post − pre) of a watched token account, of the pinned
mint, under the pinned Token program, in a transaction without an error.  Instructions are never
parsed: `transfer`, `transferChecked`, a call inside another program and a mint all look the same, and
what a fee took is not credited.

Slots may be skipped, so blocks are listed by the node (`getBlocks`) and never counted up.  Blocks are
fetched with `transactionDetails: accounts` (keys and balances, no instructions, no logs), which holds
everything above, lookup tables resolved, at a fraction of the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import msgspec

from chain.errors import Malformed, RpcUnavailable, WrongChain
from chain.networks import SOLANA, Chain
from chain.ports import (
    AccountChange,
    BlockFacts,
    Departure,
    ForeignTransfer,
    Header,
    TransferSeen,
    WatchSet,
)
from chain.solana import programs
from chain.solana.rpc import (
    BLOCK_NOT_AVAILABLE,
    BLOCK_STATUS_NOT_AVAILABLE_YET,
    LONG_TERM_SLOT_SKIPPED,
    SLOT_SKIPPED,
    NodeError,
    SolanaRpc,
)
from chain.units import MICRO_MAX, Micro

CONFIRMED: Final = "confirmed"
FINALIZED: Final = "finalized"
BLOCKS_PER_REQUEST: Final = 25
SLOTS_PER_REQUEST_MAX: Final = 10_000
"""Slots in one `blocks` call; about 70 minutes of the public network."""
NEWEST_BLOCK_SEARCH: Final = 256
"""How many slots below `getSlot` to look for the newest block; longer silences are an outage."""

_TOKEN_PROGRAM: Final = str(programs.TOKEN_PROGRAM)
_UNSUPPORTED: Final = dict(SOLANA.unsupported)
_NO_BLOCK: Final = frozenset(
    (BLOCK_NOT_AVAILABLE, SLOT_SKIPPED, LONG_TERM_SLOT_SKIPPED, BLOCK_STATUS_NOT_AVAILABLE_YET)
)


class _Amount(msgspec.Struct, gc=False):
    amount: str


class _TokenBalance(msgspec.Struct, rename="camel", gc=False):
    account_index: int
    mint: str
    ui_token_amount: _Amount
    owner: str = ""
    program_id: str = ""


class _Meta(msgspec.Struct, rename="camel", gc=False):
    err: Any = None
    pre_token_balances: list[_TokenBalance] | None = None
    post_token_balances: list[_TokenBalance] | None = None


class _Key(msgspec.Struct, gc=False):
    pubkey: str


class _Transaction(msgspec.Struct, rename="camel", gc=False):
    signatures: list[str]
    account_keys: list[_Key]


class _WithMeta(msgspec.Struct, gc=False):
    transaction: _Transaction
    meta: _Meta | None = None


class _BlockHeader(msgspec.Struct, rename="camel"):
    blockhash: str
    previous_blockhash: str
    parent_slot: int
    block_time: int | None = None


class _Block(_BlockHeader, rename="camel"):
    transactions: list[msgspec.Raw] = []


_WITH_META: Final = msgspec.json.Decoder(_WithMeta)


class SolanaReader:
    """`chain.ports.ChainReader` over one provider.

    `head()` and `blocks()` read at `confirmed`, so that a deposit can be shown before it is final;
    `final()` and `usdc_balance()` read at `finalized`.
    """

    chain = Chain.SOLANA

    def __init__(
        self, rpc: SolanaRpc, *, mint: str = SOLANA.usdc_mint, genesis_hash: str | None = None
    ) -> None:
        self._rpc = rpc
        self._mint = mint
        self._genesis_hash = genesis_hash
        self._mints = tuple(key.encode() for key in (mint, *_UNSUPPORTED))

    async def check_identity(self) -> None:
        """Raise WrongChain unless the node's genesis is the configured one (or the first one seen)."""
        found = await self._rpc.call("getGenesisHash", [], str)
        if self._genesis_hash is None:
            self._genesis_hash = found
        if found != self._genesis_hash:
            raise WrongChain(f"Solana node has genesis {found}, expected {self._genesis_hash}")

    async def head(self) -> Header:
        """The newest confirmed block."""
        return await self._newest(CONFIRMED)

    async def final(self) -> Header:
        """The newest finalized block."""
        return await self._newest(FINALIZED)

    async def _newest(self, commitment: str) -> Header:
        slot = await self._rpc.call("getSlot", [{"commitment": commitment}], int)
        slots = await self._slots(max(slot - NEWEST_BLOCK_SEARCH, 0), slot, commitment)
        # The very newest may be listed a moment before it can be fetched.
        for candidate in reversed(slots[-2:]):
            header = await self._header(candidate, commitment)
            if header is not None:
                return header
        raise RpcUnavailable(f"no {commitment} block in the {NEWEST_BLOCK_SEARCH} slots below {slot}")

    async def header_at(self, height: int) -> Header | None:
        """The block of slot `height`; None if the slot was skipped or is not confirmed yet."""
        return await self._header(height, CONFIRMED)

    async def _header(self, slot: int, commitment: str) -> Header | None:
        options = _block_options("none", commitment)
        try:
            block = await self._rpc.call("getBlock", [slot, options], _BlockHeader)
        except NodeError as e:
            if e.code in _NO_BLOCK:
                return None
            raise
        return _header(slot, block)

    async def _slots(self, start: int, end: int, commitment: str) -> list[int]:
        slots = await self._rpc.call("getBlocks", [start, end, {"commitment": commitment}], list[int])
        if any(not start <= s <= end for s in slots) or any(a >= b for a, b in pairwise(slots)):
            raise Malformed("getBlocks: slots outside the range or out of order")
        return slots

    async def blocks(self, start: int, end: int, watch: WatchSet) -> list[BlockFacts]:
        """Every confirmed block with a slot in start..end, ascending, with its watched transfers.

        Skipped slots have no entry.  RpcUnavailable if the chain moved while reading (ask again);
        ValueError for a range over SLOTS_PER_REQUEST_MAX.
        """
        if end - start >= SLOTS_PER_REQUEST_MAX:
            raise ValueError(f"{start}..{end} is more than {SLOTS_PER_REQUEST_MAX} slots")
        slots = await self._slots(start, end, CONFIRMED)
        facts: list[BlockFacts] = []
        for i in range(0, len(slots), BLOCKS_PER_REQUEST):
            facts += await self._fetch(slots[i : i + BLOCKS_PER_REQUEST], watch)
        for parent, child in pairwise(facts):
            if (child.header.parent_height, child.header.parent_hash) != (
                parent.header.height,
                parent.header.hash,
            ):
                raise RpcUnavailable(
                    f"slot {child.header.height} does not follow {parent.header.height}: reread"
                )
        return facts

    async def _fetch(self, slots: Sequence[int], watch: WatchSet) -> list[BlockFacts]:
        options = _block_options("accounts", CONFIRMED)
        answers = await self._rpc.batch("getBlock", [[s, options] for s in slots], _Block)
        facts: list[BlockFacts] = []
        for slot, block in zip(slots, answers, strict=True):
            if isinstance(block, NodeError):
                raise RpcUnavailable(f"slot {slot} was listed but cannot be read: {block}") from block
            header = _header(slot, block)
            facts.append(self._read(header, block.transactions, watch))
        return facts

    def _read(self, header: Header, transactions: Sequence[msgspec.Raw], watch: WatchSet) -> BlockFacts:
        """What succeeded in one block, by balance difference of the accounts we know.

        Decoded one by one, and only if a mint of interest is named at all: most transactions of a block
        are forgotten before the garbage collector has counted them.
        """
        inbound: list[TransferSeen] = []
        outbound: list[Departure] = []
        foreign: list[ForeignTransfer] = []
        changes: list[AccountChange] = []
        for raw in transactions:
            item = self._decode(header, raw)
            meta = item.meta if item is not None else None
            if item is None or meta is None or meta.err is not None:
                continue
            after = self._watched(header, item, meta.post_token_balances, watch, foreign)
            before = self._watched(header, item, meta.pre_token_balances, watch, None)
            for account, balance in after.items():
                seen = self._seen(header, item, account, balance, before.get(account), watch)
                if seen is not None:
                    inbound.append(seen)
            for account, balance in before.items():
                self._left(header, item, account, balance, after.get(account), outbound, changes)
        return BlockFacts(header, tuple(inbound), tuple(outbound), tuple(foreign), tuple(changes))

    def _decode(self, header: Header, raw: msgspec.Raw) -> _WithMeta | None:
        """The transaction, if it can be about us; None else."""
        text = bytes(raw)
        if not any(mint in text for mint in self._mints):
            return None
        try:
            return _WITH_META.decode(text)
        except msgspec.MsgspecError as e:
            raise Malformed(f"slot {header.height}: {e}") from e

    def _watched(
        self,
        header: Header,
        item: _WithMeta,
        balances: Sequence[_TokenBalance] | None,
        watch: WatchSet,
        foreign: list[ForeignTransfer] | None,
    ) -> dict[str, _TokenBalance]:
        """The USDC balances of watched accounts among `balances`, by account; look-alikes go to `foreign`."""
        found: dict[str, _TokenBalance] = {}
        if not balances:
            return found
        mint, keys = self._mint, item.transaction.account_keys
        for balance in balances:
            if balance.program_id != _TOKEN_PROGRAM:
                continue
            if balance.mint != mint:
                if foreign is not None and balance.mint in _UNSUPPORTED and watch.is_watched(balance.owner):
                    foreign += self._foreign(header, item, balance)
                continue
            if balance.account_index >= len(keys):
                raise Malformed(f"slot {header.height}: token balance of account {balance.account_index}")
            account = keys[balance.account_index].pubkey
            if watch.is_watched(account):
                found[account] = balance
        return found

    def _left(
        self,
        header: Header,
        item: _WithMeta,
        account: str,
        before: _TokenBalance,
        after: _TokenBalance | None,
        outbound: list[Departure],
        changes: list[AccountChange],
    ) -> None:
        tx = _signature(header, item)
        delta = _micros(before) - (_micros(after) if after is not None else 0)
        if delta > 0:
            outbound.append(
                Departure(tx, f"{tx}:{account}", header.height, header.hash, account, _micro(delta))
            )
        if after is None:
            changes.append(AccountChange("closed", tx, header.height, account, f"owner {before.owner}"))
        elif after.owner != before.owner:
            detail = f"owner {before.owner}, then {after.owner}"
            changes.append(AccountChange("owner", tx, header.height, account, detail))

    def _foreign(self, header: Header, item: _WithMeta, after: _TokenBalance) -> Iterator[ForeignTransfer]:
        assert item.meta is not None
        pre = item.meta.pre_token_balances or []
        before = next((b for b in pre if b.account_index == after.account_index), None)
        delta = _micros(after) - (_micros(before) if before is not None else 0)
        if delta > 0:
            tx, payer = _signature(header, item), item.transaction.account_keys[0].pubkey
            transfer = TransferSeen(
                chain=Chain.SOLANA,
                key=f"{tx}:{after.mint}:{after.owner}",
                tx=tx,
                height=header.height,
                block_hash=header.hash,
                to=after.owner,
                sender=payer,
                amount=_micro(delta),
            )
            yield ForeignTransfer(after.mint, _UNSUPPORTED[after.mint], transfer)

    def _seen(
        self,
        header: Header,
        item: _WithMeta,
        to: str,
        after: _TokenBalance,
        before: _TokenBalance | None,
        watch: WatchSet,
    ) -> TransferSeen | None:
        delta = _micros(after) - (_micros(before) if before is not None else 0)
        if delta <= 0:
            return None
        signature, (sender, *others) = _signature(header, item), self._senders(item)
        return TransferSeen(
            chain=Chain.SOLANA,
            key=f"{signature}:{to}",
            tx=signature,
            height=header.height,
            block_hash=header.hash,
            to=to,
            sender=sender,
            amount=_micro(delta),
            references=tuple(k.pubkey for k in item.transaction.account_keys if watch.is_reference(k.pubkey)),
            also_sent=tuple(others),
        )

    def _senders(self, item: _WithMeta) -> list[str]:
        """Owners of the token accounts that lost, who lost most first; the fee payer if none did (a mint)."""
        assert item.meta is not None
        after = {
            b.account_index: _micros(b) for b in item.meta.post_token_balances or [] if b.mint == self._mint
        }
        losses = [
            (_micros(b) - after.get(b.account_index, 0), b.owner)
            for b in item.meta.pre_token_balances or []
            if b.mint == self._mint
        ]
        owners = [owner for lost, owner in sorted(losses, reverse=True) if lost > 0 and owner]
        return list(dict.fromkeys(owners)) or [item.transaction.account_keys[0].pubkey]

    async def token_code(self, height: int) -> str:
        """Always "": a mint under the pinned Token program has no code of its own to change."""
        del height
        return ""

    async def usdc_balance(self, address: str, *, height: int | None = None) -> Micro:
        """Finalized USDC of token account `address`; zero if it does not exist.

        Malformed if it is not a token account of the pinned mint.  `height` must be None: a Solana
        node answers for the newest finalized slot only.
        """
        if height is not None:
            raise ValueError("a Solana node has no balances at an older slot")
        state = await self._rpc.account(address, FINALIZED)
        if state is None:
            return Micro(0)
        parsed = programs.token_account(state.owner, state.bytes())
        if parsed.mint != self._mint:
            raise Malformed(f"{address} holds {parsed.mint}, not USDC")
        return _micro(parsed.amount)


def _block_options(details: str, commitment: str) -> dict[str, Any]:
    return {
        "encoding": "json",
        "transactionDetails": details,
        "rewards": False,
        "maxSupportedTransactionVersion": 0,
        "commitment": commitment,
    }


def _header(slot: int, block: _BlockHeader) -> Header:
    return Header(
        height=slot,
        hash=block.blockhash,
        parent_hash=block.previous_blockhash,
        parent_height=block.parent_slot,
        time_s=block.block_time or 0,
    )


def _signature(header: Header, item: _WithMeta) -> str:
    if not item.transaction.signatures:
        raise Malformed(f"slot {header.height}: a transaction without a signature")
    return item.transaction.signatures[0]


def _micro(amount: int) -> Micro:
    if amount > MICRO_MAX:
        raise Malformed(f"{amount} micro-USDC is more than we can book")
    return Micro(amount)


def _micros(balance: _TokenBalance) -> int:
    """What anybody's account in the transaction holds."""
    text = balance.ui_token_amount.amount
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise Malformed(f"token amount {text[:40]!r}")
    amount = int(text)
    if amount >= 2**64:
        raise Malformed(f"token amount {amount} is above any supply")
    return amount
