"""A chain in memory, for tests and simulations: it forks, skips, lags and forgets on demand.

`SimulatedChain` implements `ChainReader`.  Nothing in the product uses it; the machines that follow real
chains are driven through it by property tests, which compare them with a fresh index (`canonical`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from chain.errors import RpcUnavailable
from chain.networks import Chain
from chain.ports import BlockFacts, Departure, ForeignTransfer, Header, TransferSeen, WatchSet
from chain.units import Micro


@dataclass(frozen=True, slots=True)
class Movement:
    """USDC that moves in a block; `tx` stays the same when the transaction is mined again."""

    tx: str
    to: str
    sender: str
    amount_micro: int
    references: tuple[str, ...] = ()
    token: str = ""
    """A look-alike's address; empty for USDC."""


@dataclass(slots=True)
class SimulatedChain:
    """A canonical chain of blocks with movements; heights may be skipped, as slots are."""

    chain: Chain = Chain.BASE
    first_height: int = 0
    head_lag: int = 0
    """How many blocks the node hides at the top."""
    headers: list[Header] = field(default_factory=list)
    movements: list[tuple[Movement, ...]] = field(default_factory=list)
    final_height: int = 0
    made: int = 0
    code: str = "0xc0de"
    """What `token_code` answers."""
    reads: int = 0

    def __post_init__(self) -> None:
        if not self.headers:
            self.headers.append(Header(self.first_height, "genesis", "", self.first_height - 1, 0))
            self.movements.append(())
            self.final_height = self.first_height

    def mine(self, *movements: Movement, skip: int = 0) -> Header:
        """Append a block, `skip` heights above the next one."""
        tip = self.headers[-1]
        self.made += 1
        height = tip.height + 1 + skip
        header = Header(height, f"block-{height}-{self.made}", tip.hash, tip.height, self.made)
        self.headers.append(header)
        self.movements.append(movements)
        return header

    def drop(self, count: int) -> list[Movement]:
        """Forget the newest `count` blocks (even final ones: a broken promise); gives their movements."""
        count = min(count, len(self.headers) - 1)
        lost = [m for block in self.movements[len(self.movements) - count :] for m in block]
        if count:
            del self.headers[-count:]
            del self.movements[-count:]
        return lost

    def finalize(self, behind: int = 0) -> Header:
        """Move `finalized` to the block `behind` blocks below the newest; it may go back."""
        header = self.headers[max(0, len(self.headers) - 1 - behind)]
        self.final_height = header.height
        return header

    async def check_identity(self) -> None:
        return

    async def head(self) -> Header:
        return self._visible()[-1]

    async def final(self) -> Header:
        return [h for h in self._visible() if h.height <= self.final_height][-1]

    async def header_at(self, height: int) -> Header | None:
        return next((header for header in self._visible() if header.height == height), None)

    async def blocks(self, start: int, end: int, watch: WatchSet) -> list[BlockFacts]:
        self.reads += 1
        if self._visible()[-1].height < end:
            raise RpcUnavailable(f"{end} is above the head")
        return self.facts(start, end, watch)

    async def token_code(self, height: int) -> str:
        del height
        return self.code

    async def usdc_balance(self, address: str, *, height: int | None = None) -> Micro:
        limit = self.final_height if height is None else height
        total = 0
        for header, movements in zip(self.headers, self.movements, strict=True):
            if header.height <= limit:
                total += sum(m.amount_micro for m in movements if m.to == address and not m.token)
                total -= sum(m.amount_micro for m in movements if m.sender == address and not m.token)
        return Micro(total)

    def facts(self, start: int, end: int, watch: WatchSet) -> list[BlockFacts]:
        """Give what a fresh index of start..end says."""
        return [
            BlockFacts(
                header,
                self._inbound(header, movements, watch),
                self._outbound(header, movements, watch),
                self._foreign(header, movements, watch),
            )
            for header, movements in zip(self.headers, self.movements, strict=True)
            if start <= header.height <= end
        ]

    def _inbound(
        self, header: Header, movements: Sequence[Movement], watch: WatchSet
    ) -> tuple[TransferSeen, ...]:
        return tuple(
            self._seen(header, index, m, watch)
            for index, m in enumerate(movements)
            if watch.is_watched(m.to) and not m.token
        )

    def _foreign(
        self, header: Header, movements: Sequence[Movement], watch: WatchSet
    ) -> tuple[ForeignTransfer, ...]:
        return tuple(
            ForeignTransfer(m.token, "look-alike", self._seen(header, index, m, watch))
            for index, m in enumerate(movements)
            if watch.is_watched(m.to) and m.token
        )

    def _outbound(
        self, header: Header, movements: Sequence[Movement], watch: WatchSet
    ) -> tuple[Departure, ...]:
        """On Solana, what left watched accounts; on EVM the inbound side says it."""
        if self.chain.is_evm:
            return ()
        return tuple(
            Departure(m.tx, f"{m.tx}:{m.sender}", header.height, header.hash, m.sender, Micro(m.amount_micro))
            for m in movements
            if watch.is_watched(m.sender) and not m.token
        )

    def _seen(self, header: Header, index: int, m: Movement, watch: WatchSet) -> TransferSeen:
        return TransferSeen(
            chain=self.chain,
            key=f"{m.tx}:{index}",
            tx=m.tx,
            height=header.height,
            block_hash=header.hash,
            to=m.to,
            sender=m.sender,
            amount=Micro(m.amount_micro),
            references=tuple(key for key in m.references if watch.is_reference(key)),
        )

    def _visible(self) -> list[Header]:
        return self.headers[: max(1, len(self.headers) - self.head_lag)]

    def copy(self) -> SimulatedChain:
        """Give another provider of the same chain."""
        return replace(self, headers=list(self.headers), movements=list(self.movements))
