"""Address lookup tables: how 35 payouts fit into one transaction, and why a signer may believe one.

A message on a table carries the table's address and indexes into it, so what a signature pays depends on what
stands in the table.  Three facts make that safe to sign:

- An entry never changes.  The program can append, deactivate and close, nothing else; and a closed table
  cannot come back at its address, which is derived from a slot that must be recent when the table is made,
  while closing takes longer than a slot stays recent.  What is final in a table is therefore true for good,
  or the table is gone and the transaction lands nowhere.
- A batch's table has one right content, which anybody derives from the batch's lines (`contents`).
- Whether the table on chain has it is a question to providers (`agreed`), asked by the settler before it
  freezes a batch and again before it adds its own signature, and by each signer on a machine of his own
  with a network; his offline machine reads the answer (`Witness`).

A table costs rent (about 0.011 SOL for 38 lines), which comes back when `retire` has closed it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from solders.address_lookup_table_account import derive_lookup_table_address
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM

from chain.errors import ChainRefusal, Malformed, ProvidersDisagree, Reverted, RpcUnavailable, UnknownResult
from chain.solana.rpc import AccountState, SolanaRpc
from chain.solana.sending import send_and_confirm

TABLE_PROGRAM: Final = Pubkey.from_string("AddressLookupTab1e1111111111111111111111111")
ADDRESSES_MAX: Final = 256
EXTEND_MAX: Final = 20
"""Addresses appended by one transaction; 1,232 bytes hold some 28, the first also creates the table."""
FINAL_S_MAX: Final = 60.0
POLL_S: Final = 0.1
_META_BYTES: Final = 56
"""State, deactivation slot, last extended slot and index, authority, padding (`LookupTableMeta`)."""
_ACTIVE: Final = 2**64 - 1
_RECENT_SLOTS: Final = 100


class TableMismatch(ChainRefusal):
    """The table on chain is not the one this batch's lines need."""


@dataclass(frozen=True, slots=True)
class LookupTable:
    """A table as it stands."""

    addresses: tuple[str, ...]
    is_active: bool
    authority: str | None


def lookup_table(owner_program: str, data: bytes) -> LookupTable:
    """Parse a table of the pinned program; Malformed for anything else."""
    if owner_program != str(TABLE_PROGRAM) or len(data) < _META_BYTES or data[:4] != b"\1\0\0\0":
        raise Malformed("not an address lookup table")
    body = data[_META_BYTES:]
    if len(body) % 32 or len(body) // 32 > ADDRESSES_MAX:
        raise Malformed("a lookup table of broken length")
    return LookupTable(
        addresses=tuple(str(Pubkey(body[i : i + 32])) for i in range(0, len(body), 32)),
        is_active=int.from_bytes(data[4:12], "little") == _ACTIVE,
        authority=str(Pubkey(data[22:54])) if data[21] == 1 else None,
    )


async def make(rpc: SolanaRpc, gas_key: Keypair, addresses: Sequence[str]) -> str:
    """Make a table of `addresses`, paid and owned by the gas key; gives its address once it is final.

    UnknownResult if it is not final within 60 s.
    """
    if not 0 < len(addresses) <= ADDRESSES_MAX:
        raise ValueError(f"a lookup table has 1 to {ADDRESSES_MAX} addresses")
    gas, keys = gas_key.pubkey(), [Pubkey.from_string(a) for a in addresses]
    slot = await _recent_block(rpc)
    table, bump = derive_lookup_table_address(gas, slot)
    first = [_create(table, gas, slot, bump), _extend(table, gas, keys[:EXTEND_MAX])]
    await send_and_confirm(rpc, first, [gas_key])
    for start in range(EXTEND_MAX, len(keys), EXTEND_MAX):
        await send_and_confirm(rpc, [_extend(table, gas, keys[start : start + EXTEND_MAX])], [gas_key])
    await _until_final(rpc, str(table), tuple(addresses))
    return str(table)


async def agreed(providers: Sequence[SolanaRpc], table: str, expected: Sequence[str]) -> int:
    """Require of the providers that final `table` begins with `expected`; gives how many said so.

    More than half must say so, and nobody may say otherwise: TableMismatch where none who answers does,
    ProvidersDisagree where they differ, RpcUnavailable where too few answer or have got so far.
    """
    answers = await asyncio.gather(*(_final(rpc, table) for rpc in providers), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, RpcUnavailable | Malformed):
            raise answer
    said = [a for a in answers if not isinstance(a, BaseException)]
    if len(said) < len(providers) // 2 + 1:
        raise RpcUnavailable(f"{len(said)} of {len(providers)} providers say what is in lookup table {table}")
    right = sum(_begins(state, expected) for state in said)
    behind = sum(_is_behind(state, expected) for state in said)
    if right == 0:
        raise TableMismatch(f"lookup table {table} does not hold what this batch's lines need")
    if right + behind < len(said):
        raise ProvidersDisagree(f"{right} of {len(said)} providers confirm lookup table {table}")
    if right < len(providers) // 2 + 1:
        raise RpcUnavailable(f"{right} of {len(providers)} providers have all of lookup table {table}")
    return right


async def agreed_soon(providers: Sequence[SolanaRpc], table: str, expected: Sequence[str]) -> int:
    """`agreed` of a table just made: some providers are a few slots behind."""
    deadline = time.monotonic() + FINAL_S_MAX
    while True:
        try:
            return await agreed(providers, table, expected)
        except (RpcUnavailable, TableMismatch):
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(POLL_S)


async def retire(rpc: SolanaRpc, gas_key: Keypair, table: str) -> bool:
    """Take the next step towards getting a table's rent back; True once it is gone (or never was).

    Deactivates first; closing is refused until the deactivation is some 513 slots old.
    """
    state = await rpc.account(table, "confirmed")
    if state is None:
        return True
    gas, key = gas_key.pubkey(), Pubkey.from_string(table)
    found = lookup_table(state.owner, state.bytes())
    if found.authority != str(gas):
        return True
    if found.is_active:
        await send_and_confirm(rpc, [_deactivate(key, gas)], [gas_key])
        return False
    try:
        await send_and_confirm(rpc, [_close(key, gas)], [gas_key])
    except Reverted:
        return False  # still cooling down
    return True


def _begins(state: LookupTable | None, expected: Sequence[str]) -> bool:
    return state is not None and state.is_active and state.addresses[: len(expected)] == tuple(expected)


def _is_behind(state: LookupTable | None, expected: Sequence[str]) -> bool:
    """Whether it is what the table was before its last entries came."""
    if state is None:
        return True
    return len(state.addresses) < len(expected) and state.addresses == tuple(expected[: len(state.addresses)])


async def _final(rpc: SolanaRpc, table: str) -> LookupTable | None:
    state: AccountState | None = await rpc.account(table, "finalized")
    return None if state is None else lookup_table(state.owner, state.bytes())


async def _recent_block(rpc: SolanaRpc) -> int:
    """A slot that has a block, as the program asks of a table's derivation."""
    options = {"commitment": "confirmed"}
    newest = await rpc.call("getSlot", [options], int)
    blocks = await rpc.call("getBlocks", [max(0, newest - _RECENT_SLOTS), newest, options], list[int])
    if not blocks:
        raise RpcUnavailable(f"{rpc.url}: no block in the last {_RECENT_SLOTS} slots")
    return blocks[-1]


async def _until_final(rpc: SolanaRpc, table: str, expected: Sequence[str]) -> None:
    deadline = time.monotonic() + FINAL_S_MAX
    while time.monotonic() < deadline:
        if _begins(await _final(rpc, table), expected):
            return
        await asyncio.sleep(POLL_S)
    raise UnknownResult(f"lookup table {table} is not final after {FINAL_S_MAX:.0f} s")


def _create(table: Pubkey, gas: Pubkey, slot: int, bump: int) -> Instruction:
    data = (0).to_bytes(4, "little") + slot.to_bytes(8, "little") + bytes([bump])
    metas = [
        AccountMeta(table, is_signer=False, is_writable=True),
        AccountMeta(gas, is_signer=False, is_writable=False),
        *_payer(gas),
    ]
    return Instruction(TABLE_PROGRAM, data, metas)


def _extend(table: Pubkey, gas: Pubkey, keys: Sequence[Pubkey]) -> Instruction:
    data = (2).to_bytes(4, "little") + len(keys).to_bytes(8, "little") + b"".join(bytes(k) for k in keys)
    metas = [
        AccountMeta(table, is_signer=False, is_writable=True),
        AccountMeta(gas, is_signer=True, is_writable=False),
        *_payer(gas),
    ]
    return Instruction(TABLE_PROGRAM, data, metas)


def _deactivate(table: Pubkey, gas: Pubkey) -> Instruction:
    metas = [
        AccountMeta(table, is_signer=False, is_writable=True),
        AccountMeta(gas, is_signer=True, is_writable=False),
    ]
    return Instruction(TABLE_PROGRAM, (3).to_bytes(4, "little"), metas)


def _close(table: Pubkey, gas: Pubkey) -> Instruction:
    metas = [
        AccountMeta(table, is_signer=False, is_writable=True),
        AccountMeta(gas, is_signer=True, is_writable=False),
        AccountMeta(gas, is_signer=False, is_writable=True),
    ]
    return Instruction(TABLE_PROGRAM, (4).to_bytes(4, "little"), metas)


def _payer(gas: Pubkey) -> list[AccountMeta]:
    return [
        AccountMeta(gas, is_signer=True, is_writable=True),
        AccountMeta(SYSTEM_PROGRAM, is_signer=False, is_writable=False),
    ]
