"""One reader out of several providers, of whom `agreement` must say the same.

What is final is believed only when `agreement` providers give the identical answer.  One provider that
lies, lags, truncates, serves another chain or does not answer changes nothing but a report to `on_fault`;
too few agreeing is `ProvidersDisagree` (they contradict one another about what is final) or
`RpcUnavailable` (too few answers, or the chain is moving): both mean no progress, never a wrong credit.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeVar

from chain.errors import ProvidersDisagree, RpcUnavailable, WrongChain
from chain.ports import BlockFacts, ChainReader, Header, WatchSet
from chain.units import Micro

T = TypeVar("T")

ANSWER_S_MAX: Final = 20
"""A provider that takes longer than this for one call has failed it."""
GRACE_S: Final = 0.5
"""How long the others may take once enough providers have answered."""
IDENTITY_GRACE_S: Final = 5
"""The same for the hourly check of who they are: the slow ones are barred until the next."""


class FaultKind(StrEnum):
    """What a provider did wrong."""

    FAILED = "failed"
    SLOW = "slow"
    LAGGING = "lagging"
    CONTRADICTS = "contradicts"
    WRONG_CHAIN = "wrong_chain"


@dataclass(frozen=True, slots=True)
class ProviderFault:
    """One provider's fault; for metrics and alerts."""

    provider: str
    kind: FaultKind
    detail: str


OnFault = Callable[[ProviderFault], None]


@dataclass(frozen=True, slots=True, eq=False)
class Provider:
    """A reader and the name it is reported by."""

    name: str
    reader: ChainReader


def default_agreement(providers: int) -> int:
    """More than half: 1 of 1, 2 of 2, 2 of 3, 3 of 4."""
    return providers // 2 + 1


def agreed(providers: Sequence[Provider], agreement: int, on_fault: OnFault) -> ChainReader:
    """Give one reader for these providers; a single one is passed through."""
    if len(providers) == 1 and agreement == 1:
        return providers[0].reader
    return QuorumReader(providers, agreement, on_fault)


class QuorumReader:
    """`chain.ports.ChainReader` over several."""

    def __init__(self, providers: Sequence[Provider], agreement: int, on_fault: OnFault) -> None:
        if not 1 <= agreement <= len(providers) or 2 * agreement <= len(providers):
            raise ValueError(f"{agreement} of {len(providers)} is not a majority")
        if len({p.reader.chain for p in providers}) != 1:
            raise ValueError("providers of different chains")
        self.chain = providers[0].reader.chain
        self._providers = tuple(providers)
        self._agreement = agreement
        self._on_fault = on_fault
        self._barred: frozenset[str] = frozenset()
        self._final_height = -1

    async def check_identity(self) -> None:
        """Bar every provider that is not (provably) on the right chain until the next check.

        WrongChain if too few are left and one of them is on another chain, RpcUnavailable otherwise.
        """
        self._barred = frozenset()
        answers = await self._ask_all(lambda reader: reader.check_identity(), grace_s=IDENTITY_GRACE_S)
        wrong = {p.name for p, answer in answers.items() if isinstance(answer, WrongChain)}
        good = [p.name for p, answer in answers.items() if not isinstance(answer, Exception)]
        self._barred = frozenset(p.name for p in self._providers) - set(good)
        if len(good) < self._agreement:
            self._barred = frozenset()
            text = f"{self.chain}: {len(good)} of {len(self._providers)} providers are known to be right"
            raise WrongChain(f"{text}; wrong: {sorted(wrong)}") if wrong else RpcUnavailable(text)

    async def head(self) -> Header:
        """The newest block that enough providers have reached: the `agreement`-th best."""
        heads = await self._answers(lambda reader: reader.head())
        ranked = sorted(heads.values(), key=lambda header: header.height, reverse=True)
        return ranked[self._agreement - 1]

    async def final(self) -> Header:
        """The highest block that enough providers call final, by the same hash."""
        finals = await self._answers(lambda reader: reader.final())
        for candidate in sorted(set(finals.values()), key=lambda header: header.height, reverse=True):
            voters = [p for p, header in finals.items() if header.height >= candidate.height]
            if len(voters) < self._agreement:
                continue
            if await self._confirms(candidate, voters, finals):
                self._final_height = max(self._final_height, candidate.height)
                self._report_lag(candidate, finals)
                return candidate
        raise ProvidersDisagree(f"{self.chain}: no final block is common to {self._agreement} providers")

    async def header_at(self, height: int) -> Header | None:
        """The block at `height`, or None, as enough providers say."""
        return await self._agree(
            lambda reader: reader.header_at(height), is_final=height <= self._final_height
        )

    async def blocks(self, start: int, end: int, watch: WatchSet) -> list[BlockFacts]:
        """The blocks of start..end, identical at enough providers, transfers included."""

        async def read(reader: ChainReader) -> tuple[BlockFacts, ...]:
            return tuple(await reader.blocks(start, end, watch))

        return list(await self._agree(read, is_final=end <= self._final_height))

    async def token_code(self, height: int) -> str:
        """What runs behind USDC, identical at enough providers."""
        return await self._agree(
            lambda reader: reader.token_code(height), is_final=height <= self._final_height
        )

    async def usdc_balance(self, address: str, *, height: int | None = None) -> Micro:
        """The balance, identical at enough providers."""
        return await self._agree(
            lambda reader: reader.usdc_balance(address, height=height),
            is_final=height is not None and height <= self._final_height,
        )

    async def _confirms(
        self, candidate: Header, voters: Sequence[Provider], finals: dict[Provider, Header]
    ) -> bool:
        """Ask every voter that is already further for its block at the candidate's height."""
        further = [p for p in voters if finals[p].height > candidate.height]
        asked = await self._ask_all(lambda reader: reader.header_at(candidate.height), among=further)
        hashes = {p: finals[p].hash for p in voters if p not in further}
        hashes |= {p: h.hash for p, h in asked.items() if isinstance(h, Header)}
        for provider, found in hashes.items():
            if found != candidate.hash:
                self._tell(provider, FaultKind.CONTRADICTS, f"{candidate.height}: {found}, {candidate.hash}")
        return sum(found == candidate.hash for found in hashes.values()) >= self._agreement

    def _report_lag(self, agreed_on: Header, finals: dict[Provider, Header]) -> None:
        for provider, header in finals.items():
            if header.height < agreed_on.height:
                self._tell(provider, FaultKind.LAGGING, f"{agreed_on.height - header.height} blocks")

    async def _answers(self, ask: Callable[[ChainReader], Awaitable[Header]]) -> dict[Provider, Header]:
        answers = await self._ask_all(ask)
        good = {p: answer for p, answer in answers.items() if isinstance(answer, Header)}
        if len(good) < self._agreement:
            raise RpcUnavailable(f"{self.chain}: {len(good)} of {self._agreement} needed providers answered")
        return good

    async def _agree(self, ask: Callable[[ChainReader], Awaitable[T]], *, is_final: bool) -> T:
        """Give the answer as soon as enough providers have given it."""

        def is_enough(answers: Mapping[Provider, object]) -> bool:
            return _most_common(answers)[1] >= self._agreement

        answers = await self._collect(ask, self._active(), is_enough, grace_s=0)
        common, votes = _most_common(answers)
        for provider, answer in answers.items():
            if not isinstance(answer, Exception) and answer != common:
                self._tell(provider, FaultKind.CONTRADICTS, f"{answer!r:.200}")
        if votes >= self._agreement:
            return common  # type: ignore[return-value]  # an answer of `ask`, not an exception
        said = sum(not isinstance(answer, Exception) for answer in answers.values())
        text = f"{self.chain}: {votes} of {self._agreement} needed providers agree"
        if is_final and said >= self._agreement:
            raise ProvidersDisagree(text)
        raise RpcUnavailable(text)

    async def _ask_all(
        self,
        ask: Callable[[ChainReader], Awaitable[T]],
        *,
        among: Sequence[Provider] | None = None,
        grace_s: float = GRACE_S,
    ) -> dict[Provider, T | Exception]:
        """Give what every provider says; those that keep the others waiting are reported and left out."""

        def is_enough(answers: Mapping[Provider, object]) -> bool:
            return sum(not isinstance(a, Exception) for a in answers.values()) >= self._agreement

        asked = self._active() if among is None else among
        answers = await self._collect(ask, asked, is_enough, grace_s=grace_s)
        for provider in asked:
            if provider not in answers:
                self._tell(provider, FaultKind.SLOW, f"{grace_s} s after the others")
        return answers

    async def _collect(
        self,
        ask: Callable[[ChainReader], Awaitable[T]],
        among: Sequence[Provider],
        is_enough: Callable[[Mapping[Provider, object]], bool],
        *,
        grace_s: float,
    ) -> dict[Provider, T | Exception]:
        tasks = {asyncio.create_task(_in_time(ask, p.reader)): p for p in among}
        answers: dict[Provider, T | Exception] = {}
        waiting = set(tasks)
        try:
            while waiting and not is_enough(answers):
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                answers |= {tasks[task]: task.result() for task in done}
            if waiting and grace_s:
                done, waiting = await asyncio.wait(waiting, timeout=grace_s)
                answers |= {tasks[task]: task.result() for task in done}
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        for provider, answer in answers.items():
            if isinstance(answer, Exception):
                is_wrong = isinstance(answer, WrongChain)
                kind = FaultKind.WRONG_CHAIN if is_wrong else FaultKind.FAILED
                self._tell(provider, kind, f"{type(answer).__name__}: {answer}"[:300])
        return answers

    def _active(self) -> list[Provider]:
        return [p for p in self._providers if p.name not in self._barred]

    def _tell(self, provider: Provider, kind: FaultKind, detail: str) -> None:
        self._on_fault(ProviderFault(provider.name, kind, detail))


async def _in_time(ask: Callable[[ChainReader], Awaitable[T]], reader: ChainReader) -> T | Exception:
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            return await ask(reader)
    except Exception as e:
        return e


def _most_common(answers: Mapping[Provider, object]) -> tuple[object, int]:
    votes = Counter(a for a in answers.values() if not isinstance(a, Exception))
    return votes.most_common(1)[0] if votes else (None, 0)
