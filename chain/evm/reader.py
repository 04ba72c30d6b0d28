"""Reading one EVM chain: blocks and the USDC transfers in them, straight from JSON-RPC.

A range is read as batches of headers and one ranged `eth_getLogs` for the pinned contract's Transfer.
The logs are believed only if each names the very block whose header was read; a block whose bloom
filter speaks of a transfer but which has no log is asked again by its hash, so neither a chain that
moves between the two questions nor a node that leaves logs out goes unnoticed.  A log that is not a
canonical Transfer is counted, reported and skipped: one poisoned log must not stop the watcher.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from eth_hash.auto import keccak

from chain.errors import Malformed, RpcUnavailable, WrongChain
from chain.evm import abi
from chain.evm.addresses import checksummed, to_bytes
from chain.evm.rpc import BATCH_MAX, Call, JsonRpc, NodeError, data, quantity
from chain.networks import EvmNetwork
from chain.ports import BlockFacts, ForeignTransfer, Header, TransferSeen, WatchSet
from chain.units import MICRO_MAX, Micro

BLOCKS_MAX: Final = 2_000
"""Blocks in one `blocks` call: a busy Ethereum block holds some 100 USDC transfers of 620 bytes."""
REQUESTS_AT_ONCE: Final = 4
TRANSFER_TOPIC: Final = abi.load("usdc").topics["Transfer"]
IMPLEMENTATION_SLOT: Final = "0x" + keccak(b"org.zeppelinos.proxy.implementation").hex()
"""Where Circle's FiatTokenProxy keeps the address of its code."""
_ADDRESS_TOPIC: Final = re.compile(r"0x0{24}[0-9a-fA-F]{40}", re.ASCII)
_WORD: Final = re.compile(r"0x[0-9a-fA-F]{64}", re.ASCII)
_log = logging.getLogger(__name__)


class _RawHeader(msgspec.Struct, gc=False):
    number: str
    hash: str
    parentHash: str  # noqa: N815  the protocol's spelling
    timestamp: str
    logsBloom: str = "0x"  # noqa: N815  the protocol's spelling

    def header(self) -> Header:
        height = quantity(self.number)
        if not (_WORD.fullmatch(self.hash) and _WORD.fullmatch(self.parentHash)):
            raise Malformed(f"block {height} has a hash that is not 32 bytes")
        return Header(
            height=height,
            hash=self.hash,
            parent_hash=self.parentHash,
            parent_height=height - 1,
            time_s=quantity(self.timestamp),
        )


class RawLog(msgspec.Struct):
    """A log as the node gives it."""

    address: str
    topics: list[str]
    data: str
    blockNumber: str  # noqa: N815  the protocol's spelling
    blockHash: str  # noqa: N815  the protocol's spelling
    transactionHash: str  # noqa: N815  the protocol's spelling
    logIndex: str  # noqa: N815  the protocol's spelling
    removed: bool = False


class _Topics(msgspec.Struct, array_like=True, gc=False):
    """At most four; None where there is none."""

    event: str | None = None
    sender: str | None = None
    to: str | None = None
    fourth: str | None = None


class _TransferLog(msgspec.Struct, gc=False):
    """A log that should be a Transfer.

    Tens of thousands are decoded at once: none of their parts is an object that the garbage collector
    walks, since each of its walks also goes through all the addresses that are watched.
    """

    address: str
    topics: _Topics
    data: str
    blockNumber: str  # noqa: N815  the protocol's spelling
    blockHash: str  # noqa: N815  the protocol's spelling
    transactionHash: str  # noqa: N815  the protocol's spelling
    logIndex: str  # noqa: N815  the protocol's spelling
    removed: bool = False


class EvmReader:
    """`chain.ports.ChainReader` of one provider."""

    def __init__(
        self, network: EvmNetwork, rpc: JsonRpc, *, pinned_blocks: Sequence[tuple[int, str]] = ()
    ) -> None:
        """`pinned_blocks` are (height, hash) of this network's history; a node without them is on a fork."""
        self.network = network
        self.chain = network.chain
        self.malformed: Counter[str] = Counter()
        """Logs skipped so far, by reason."""
        self._rpc = rpc
        self._pinned = tuple(pinned_blocks)
        self._usdc = network.usdc.lower()
        self._foreign = {address.lower(): name for address, name in network.unsupported}
        self._tokens = [self._usdc, *self._foreign]
        self._bloom_bits = _bloom_bits(to_bytes(network.usdc)), _bloom_bits(data(TRANSFER_TOPIC))

    async def check_identity(self) -> None:
        """Raise WrongChain unless the chain id and every pinned block are this network's."""
        served = quantity(await self._rpc.call("eth_chainId", shape=str))
        if served != self.network.chain_id:
            raise WrongChain(f"{self._rpc.url} serves chain {served}, not {self.network.chain_id}")
        for height, expected in self._pinned:
            header = await self.header_at(height)
            if header is None or header.hash.lower() != expected.lower():
                raise WrongChain(f"{self._rpc.url} has another block {height} than {self.chain}")

    async def head(self) -> Header:
        """The newest block."""
        return await self._tagged("latest")

    async def final(self) -> Header:
        """The block at the node's `finalized` tag."""
        return await self._tagged("finalized")

    async def header_at(self, height: int) -> Header | None:
        """The canonical block at `height`, or None."""
        raw = await self._rpc.call("eth_getBlockByNumber", hex(height), False, shape=_RawHeader | None)  # type: ignore[arg-type]  # a union is a shape too
        return raw.header() if raw else None

    async def blocks(self, start: int, end: int, watch: WatchSet) -> list[BlockFacts]:
        """Every block in start..end with its watched transfers; RpcUnavailable if the chain moved."""
        if not 0 <= start <= end < start + BLOCKS_MAX:
            raise ValueError(f"blocks {start}..{end}: 1..{BLOCKS_MAX} ascending blocks can be read at once")
        headers, logs = await asyncio.gather(self._headers(start, end), self._logs(start, end))
        by_height = _by_height(logs)
        heard = {height for height, here in by_height.items() if any(self._is_usdc(log) for log in here)}
        await self._ask_again([raw for raw in headers if quantity(raw.number) not in heard], by_height)
        facts: list[BlockFacts] = []
        for raw in headers:
            header = raw.header()
            if header.height != start + len(facts):
                raise Malformed(f"asked for block {start + len(facts)}, got {header.height}")
            if facts and header.parent_hash != facts[-1].header.hash:
                raise RpcUnavailable(f"{self.chain} moved at block {header.height} while it was read")
            here = by_height.pop(header.height, [])
            facts.append(self._read(header, here, watch))
        if by_height:
            raise Malformed(f"logs of blocks {sorted(by_height)[:5]} outside the range {start}..{end}")
        return facts

    async def token_code(self, height: int) -> str:
        """The implementation behind the USDC proxy at `height`, 32 bytes in hex."""
        word = await self._rpc.call(
            "eth_getStorageAt", self._usdc, IMPLEMENTATION_SLOT, hex(height), shape=str
        )
        if not _WORD.fullmatch(word):
            raise Malformed("a storage slot of other than 32 bytes")
        return word.lower()

    async def usdc_balance(self, address: str, *, height: int | None = None) -> Micro:
        """USDC held by `address` after block `height`, or at the head."""
        balance_of = abi.load("usdc")["balanceOf"]
        returned = await self._rpc.call(
            "eth_call",
            {"to": self._usdc, "data": "0x" + balance_of.encode(address).hex()},
            "latest" if height is None else hex(height),
            shape=str,
        )
        (amount,) = balance_of.decode(data(returned))
        if amount > MICRO_MAX:
            raise Malformed(f"{address} holds {amount} micro-USDC, more than can exist")
        return Micro(amount)

    async def _tagged(self, tag: str) -> Header:
        raw = await self._rpc.call("eth_getBlockByNumber", tag, False, shape=_RawHeader | None)  # type: ignore[arg-type]  # a union is a shape too
        if raw is None:
            raise RpcUnavailable(f"{self._rpc.url} has no {tag} block yet")
        return raw.header()

    async def _headers(self, start: int, end: int) -> list[_RawHeader]:
        limit = asyncio.Semaphore(REQUESTS_AT_ONCE)

        async def some(first: int, last: int) -> list[_RawHeader]:
            async with limit:
                calls = [Call("eth_getBlockByNumber", (hex(h), False)) for h in range(first, last + 1)]
                answers = await self._rpc.batch(calls)
            found = [answer.value(_RawHeader | None) for answer in answers]  # type: ignore[arg-type]  # a union is a shape too
            present = [raw for raw in found if raw]
            if len(present) != len(calls):
                raise RpcUnavailable(f"{self._rpc.url} does not have all of blocks {first}..{last}")
            return present

        firsts = range(start, end + 1, BATCH_MAX)
        parts = await asyncio.gather(*(some(f, min(f + BATCH_MAX - 1, end)) for f in firsts))
        return [raw for part in parts for raw in part]

    async def _logs(self, start: int, end: int) -> list[_TransferLog]:
        """The range's logs; halved when the node says that it is too much at once."""
        try:
            return await self._ask_logs({"fromBlock": hex(start), "toBlock": hex(end)})
        except NodeError:
            if start == end:
                raise
            middle = (start + end) // 2
            return [*await self._logs(start, middle), *await self._logs(middle + 1, end)]

    async def _ask_logs(self, where: dict[str, str]) -> list[_TransferLog]:
        asked = where | {"address": self._tokens, "topics": [TRANSFER_TOPIC]}
        return await self._rpc.call("eth_getLogs", asked, shape=list[_TransferLog])

    def _is_usdc(self, log: _TransferLog) -> bool:
        return log.address == self._usdc or log.address.lower() == self._usdc

    async def _ask_again(
        self, silent: Iterable[_RawHeader], by_height: dict[int, list[_TransferLog]]
    ) -> None:
        for raw in silent:
            bloom = int.from_bytes(data(raw.logsBloom))
            if all(bloom & bits == bits for bits in self._bloom_bits):
                logs = await self._ask_logs({"blockHash": raw.hash})
                if logs:
                    by_height[quantity(raw.number)] = logs  # of all tokens: replaces what was heard

    def _read(self, header: Header, logs: Iterable[_TransferLog], watch: WatchSet) -> BlockFacts:
        inbound: list[TransferSeen] = []
        foreign: list[ForeignTransfer] = []
        for log in logs:
            if log.removed or log.blockHash != header.hash:
                raise RpcUnavailable(f"{self.chain} moved at block {header.height} while it was read")
            try:
                transfer = self._transfer(header, log, watch)
            except Malformed as e:
                self.malformed[str(e)] += 1
                _log.warning(
                    "malformed transfer log skipped",
                    extra={"chain": self.chain, "tx": log.transactionHash[:80], "reason": str(e)},
                )
                continue
            if transfer is None:
                continue
            if self._is_usdc(log):
                inbound.append(transfer)
            else:
                token = log.address.lower()
                foreign.append(ForeignTransfer(checksummed(token[2:]), self._foreign[token], transfer))
        return BlockFacts(header, tuple(inbound), foreign=tuple(foreign))

    def _transfer(self, header: Header, log: _TransferLog, watch: WatchSet) -> TransferSeen | None:
        """Slice one log; None if it is not ours or moves nothing; Malformed if it is no Transfer of ours.

        Almost every log is a stranger's: whose it is comes first, its form and spelling after.
        """
        if not self._is_usdc(log) and log.address.lower() not in self._foreign:
            raise Malformed("log of another contract")
        topics = log.topics
        if topics.event != TRANSFER_TOPIC or topics.to is None or topics.sender is None or topics.fourth:
            raise Malformed("not the three topics of a Transfer")
        if not watch.is_watched("0x" + topics.to[-40:].lower()):
            return None
        if not (_ADDRESS_TOPIC.fullmatch(topics.sender) and _ADDRESS_TOPIC.fullmatch(topics.to)):
            raise Malformed("address not canonically padded to 32 bytes")
        if not _WORD.fullmatch(log.data):
            raise Malformed("amount not 32 bytes")
        if not _WORD.fullmatch(log.transactionHash):
            raise Malformed("transaction hash not 32 bytes")
        amount = quantity(log.data)
        if amount > MICRO_MAX:
            raise Malformed("amount beyond any supply")
        if amount == 0:
            return None  # spam that only wants to be seen in a history
        return TransferSeen(
            chain=self.chain,
            key=f"{log.transactionHash}:{quantity(log.logIndex)}",
            tx=log.transactionHash,
            height=header.height,
            block_hash=header.hash,
            to=checksummed(topics.to[26:].lower()),
            sender=checksummed(topics.sender[26:].lower()),
            amount=Micro(amount),
        )


def _by_height(logs: Iterable[_TransferLog]) -> dict[int, list[_TransferLog]]:
    """Group by block; each spelling of a number is parsed once, not once a log."""
    by_spelling: dict[str, list[_TransferLog]] = {}
    for log in logs:
        by_spelling.setdefault(log.blockNumber, []).append(log)
    by_height: dict[int, list[_TransferLog]] = {}
    for spelling, here in by_spelling.items():
        by_height.setdefault(quantity(spelling), []).extend(here)
    return by_height


def _bloom_bits(item: bytes) -> int:
    """The three bits that `item` sets in a 2,048-bit log bloom (Yellow Paper, 4.3.1)."""
    digest = keccak(item)
    bits = 0
    for i in (0, 2, 4):
        bits |= 1 << (int.from_bytes(digest[i : i + 2]) & 2047)
    return bits
