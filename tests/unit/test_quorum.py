"""Two of three: one provider may do anything at all."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from chain.errors import ProvidersDisagree, RpcUnavailable, WrongChain
from chain.networks import Chain
from chain.ports import BlockFacts, Header, WatchSet
from chain.quorum import FaultKind, Provider, ProviderFault, QuorumReader, agreed, default_agreement
from chain.simulated import Movement, SimulatedChain
from chain.units import Micro


class Everything:
    def is_watched(self, address: str) -> bool:
        return True

    def is_reference(self, key: str) -> bool:
        return False


@dataclass
class Rig:
    """Three providers of one chain, of which the last may be replaced."""

    honest: SimulatedChain
    faults: list[ProviderFault] = field(default_factory=list)

    def reader(self, third: SimulatedChain) -> QuorumReader:
        nodes = [Provider("third", third), Provider("one", self.honest), Provider("two", self.honest.copy())]
        return QuorumReader(nodes, 2, self.faults.append)

    def kinds(self) -> set[tuple[str, FaultKind]]:
        return {(fault.provider, fault.kind) for fault in self.faults}


@pytest.fixture
def rig() -> Rig:
    honest = SimulatedChain(chain=Chain.BASE)
    for i in range(10):
        honest.mine(Movement(f"tx{i}", "us", "them", 5_000_000))
    honest.finalize(behind=2)
    return Rig(honest)


class Failing(SimulatedChain):
    async def final(self) -> Header:
        raise RpcUnavailable("no")

    head = final

    async def blocks(self, start: int, end: int, watch: WatchSet) -> list[BlockFacts]:
        raise KeyError("a bug in an adapter is one provider's fault too")

    async def check_identity(self) -> None:
        raise WrongChain("another chain")


class Hanging(SimulatedChain):
    async def final(self) -> Header:
        await asyncio.sleep(3600)
        raise AssertionError

    head = final

    async def blocks(self, start: int, end: int, watch: WatchSet) -> list[BlockFacts]:
        await asyncio.sleep(3600)
        raise AssertionError

    async def check_identity(self) -> None:
        raise RpcUnavailable("no")


class Inventing(SimulatedChain):
    """A11: says that a deposit was made which was not."""

    async def blocks(self, start: int, end: int, watch: WatchSet) -> list[BlockFacts]:
        facts = self.facts(start, end, watch)
        return [BlockFacts(b.header, (*b.inbound, *(b.inbound[:1] or ()))) for b in facts]

    async def usdc_balance(self, address: str, *, height: int | None = None) -> Micro:
        return Micro(999_000_000)


class Hiding(SimulatedChain):
    """A12: leaves transfers out."""

    async def blocks(self, start: int, end: int, watch: WatchSet) -> list[BlockFacts]:
        return [BlockFacts(b.header, ()) for b in self.facts(start, end, watch)]


def forked(honest: SimulatedChain) -> SimulatedChain:
    """Another history from height 5 on, longer and 'final' further up."""
    node = honest.copy()
    node.made = 1_000
    node.drop(5)
    for _ in range(20):
        node.mine(Movement("lie", "us", "them", 1_000_000_000))
    node.finalize()
    return node


def as_kind(kind: type[SimulatedChain], honest: SimulatedChain) -> SimulatedChain:
    made = kind(honest.chain, headers=list(honest.headers), movements=list(honest.movements))
    made.final_height = honest.final_height
    return made


def lagging(honest: SimulatedChain) -> SimulatedChain:
    node = honest.copy()
    node.drop(6)
    node.finalize(behind=1)
    return node


@pytest.mark.parametrize("kind", [Failing, Hanging, Inventing, Hiding, "forked", "lagging"])
async def test_one_bad_provider_changes_nothing_but_a_report(
    rig: Rig, kind: type[SimulatedChain] | str
) -> None:
    honest = rig.honest
    third = (
        {"forked": forked, "lagging": lagging}[kind](honest)
        if isinstance(kind, str)
        else as_kind(kind, honest)
    )
    reader = rig.reader(third)
    assert await reader.final() == await honest.final()
    assert await reader.head() in honest.headers
    assert await reader.blocks(1, 8, Everything()) == honest.facts(1, 8, Everything())
    assert await reader.header_at(7) == await honest.header_at(7)
    assert await reader.usdc_balance("us", height=8) == await honest.usdc_balance("us", height=8)
    assert {provider for provider, _ in rig.kinds()} == {"third"}


async def test_faults_are_told_apart(rig: Rig) -> None:
    await rig.reader(lagging(rig.honest)).final()
    assert rig.kinds() == {("third", FaultKind.LAGGING)}
    rig.faults.clear()
    await rig.reader(forked(rig.honest)).final()
    assert rig.kinds() == {("third", FaultKind.CONTRADICTS)}
    rig.faults.clear()
    await rig.reader(as_kind(Hanging, rig.honest)).final()
    assert rig.kinds() == {("third", FaultKind.SLOW)}


async def test_a13_a_provider_on_another_chain_is_not_asked(rig: Rig) -> None:
    reader = rig.reader(as_kind(Failing, rig.honest))
    await reader.check_identity()
    assert rig.kinds() == {("third", FaultKind.WRONG_CHAIN)}
    rig.faults.clear()
    await reader.final()
    assert rig.faults == []


async def test_two_on_another_chain_is_no_chain(rig: Rig) -> None:
    wrong = as_kind(Failing, rig.honest)
    nodes = [Provider("a", wrong), Provider("b", rig.honest), Provider("c", wrong)]
    with pytest.raises(WrongChain):
        await QuorumReader(nodes, 2, rig.faults.append).check_identity()


async def test_too_few_answers_is_unavailable(rig: Rig) -> None:
    nodes = [Provider("a", as_kind(Failing, rig.honest)), Provider("b", rig.honest)]
    reader = QuorumReader(nodes, 2, rig.faults.append)
    for question in (reader.final(), reader.head(), reader.blocks(1, 2, Everything())):
        with pytest.raises(RpcUnavailable):
            await question


async def test_two_histories_at_final_is_a_disagreement(rig: Rig) -> None:
    nodes = [Provider("a", forked(rig.honest)), Provider("b", rig.honest)]
    other = forked(rig.honest)
    for node in (other, rig.honest):
        node.final_height = 8
    reader = QuorumReader([Provider("a", other), Provider("b", rig.honest)], 2, rig.faults.append)
    with pytest.raises(ProvidersDisagree):
        await reader.final()
    reader = QuorumReader(nodes, 2, rig.faults.append)
    reader._final_height = 8
    with pytest.raises(ProvidersDisagree):
        await reader.blocks(1, 8, Everything())
    reader._final_height = 4
    with pytest.raises(RpcUnavailable):  # above final they may differ for a while
        await reader.blocks(1, 8, Everything())


async def test_one_of_one_is_the_provider_itself(rig: Rig) -> None:
    assert agreed([Provider("a", rig.honest)], 1, rig.faults.append) is rig.honest


@pytest.mark.parametrize(("providers", "agreement"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_more_than_half_by_default(providers: int, agreement: int) -> None:
    assert default_agreement(providers) == agreement


def test_a_minority_is_refused(rig: Rig) -> None:
    nodes = [Provider(name, rig.honest) for name in "abcd"]
    with pytest.raises(ValueError, match="majority"):
        QuorumReader(nodes, 2, rig.faults.append)
