"""D3, D6: whatever a chain does above its final block, the deposits on record end as a fresh index says.

The two pure machines together, without a database: `headers` says which blocks came, went and are final,
`deposits.advance` what that makes of each transfer.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from chain.deposits import Appeared, Confirmed, Deposit, Known, Reorged, advance
from chain.headers import Extended, Fetch, Finalized, Window, finalize, follow, plan_final, plan_head
from chain.headers import Reorged as Forked
from chain.ports import BlockFacts, Header, TransferSeen
from chain.simulated import Movement, SimulatedChain

OURS, STRANGER = "0x" + "a" * 40, "0x" + "5" * 40


class Everything:
    def is_watched(self, address: str) -> bool:
        return address == OURS

    def is_reference(self, _key: str) -> bool:
        return False


class Depositing(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.node = SimulatedChain()
        self.window = Window(self.node.headers[0])
        self.records: dict[str, Known] = {}
        self.serial = 0
        self.lost: list[Movement] = []
        self.credited: set[str] = set()

    # ---- what a chain does

    @rule(paid=st.lists(st.integers(1, 9), max_size=3), again=st.integers(0, 2), skip=st.integers(0, 2))
    def mine(self, paid: list[int], again: int, skip: int) -> None:
        movements = [self.lost.pop() for _ in range(min(again, len(self.lost)))]
        for amount in paid:
            self.serial += 1
            to = OURS if amount % 3 else STRANGER
            movements.append(Movement(f"0x{self.serial}", to, STRANGER, amount))
        self.node.mine(*movements, skip=skip)

    @rule(depth=st.integers(1, 12), grown=st.integers(0, 14), again=st.integers(0, 2))
    def fork_above_final(self, depth: int, grown: int, again: int) -> None:
        unfinal = sum(header.height > self.node.final_height for header in self.node.headers)
        self.lost += self.node.drop(min(depth, unfinal))
        for i in range(grown):
            self.mine(paid=[1] if i % 4 == 0 else [], again=again if i == grown - 1 else 0, skip=0)

    @rule(behind=st.integers(0, 8))
    def finalize_node(self, behind: int) -> None:
        held = max(self.window.final.height, self.node.final_height)
        if self.node.finalize(behind).height < held:
            self.node.final_height = held

    # ---- what the watcher does with it

    def facts(self, start: int, end: int) -> list[BlockFacts]:
        return self.node.facts(start, end, Everything())

    @rule(limit=st.integers(1, 6))
    def read_head(self, limit: int) -> None:
        read: list[BlockFacts] = []
        step: object = plan_head(self.window, self.node.headers[-1], limit=limit)
        while isinstance(step, Fetch):
            read = self.facts(step.start, step.end)
            step = follow(self.window, [block.header for block in read])
        if not isinstance(step, Extended | Forked):
            return
        self.window = step.window
        if isinstance(step, Forked):
            self.orphan(step.orphaned)
        added = {header.hash for header in step.added}
        for block in read:
            if block.header.hash in added:
                self.show(block)

    @rule(limit=st.integers(1, 6), regressed=st.integers(0, 4))
    def read_final(self, limit: int, regressed: int = 0) -> None:
        """As a node says it whose `finalized` may have gone back."""
        finals = [header for header in self.node.headers if header.height <= self.node.final_height]
        final = finals[max(0, len(finals) - 1 - regressed)]
        step = plan_final(self.window, final, limit=limit)
        if not isinstance(step, Fetch) or not (read := self.facts(step.start, step.end)):
            return
        moved = finalize(self.window, [block.header for block in read])
        assert isinstance(moved, Finalized)
        self.window = moved.window
        self.orphan(moved.orphaned)
        transfers = [transfer for block in read for transfer in block.inbound]
        self.confirm(transfers, self.window.final.height)

    @rule(depth=st.integers(1, 4), limit=st.integers(1, 9))
    def seen_lost_and_final_elsewhere_at_once(self, depth: int, limit: int) -> None:
        """Two reads with a fork between them, the second of what is final by then."""
        self.mine(paid=[1], again=0, skip=0)
        self.read_head(limit=9)
        self.fork_above_final(depth=depth, grown=0, again=0)
        for _ in range(depth + 1):
            self.mine(paid=[], again=1, skip=0)
        self.finalize_node(behind=0)
        self.read_final(limit=limit)

    @rule(start=st.integers(0, 30), length=st.integers(0, 9))
    def read_any_range_again(self, start: int, length: int) -> None:
        """A repetition: what is on record of those blocks does not change."""
        held = {h.hash for h in self.node.headers if h.height <= self.window.final.height}
        held |= {header.hash for header in self.window.above}
        for block in self.facts(start, start + length):
            if block.header.hash in held:
                before = dict(self.records)
                self.show(block)
                assert self.records == before

    @rule()
    def come_to_rest(self) -> None:
        while self.node.headers[-1].height <= self.window.tip.height:
            self.node.mine()
        for _ in range(200):
            before = self.window
            self.read_final(limit=5)
            self.read_head(limit=7)
            if self.window == before:
                break
        there = [t for block in self.facts(0, self.node.headers[-1].height) for t in block.inbound]
        fresh = {
            t.key: Known(
                Deposit.FINAL if t.height <= self.node.final_height else Deposit.SEEN, t.block_hash, t.amount
            )
            for t in there
        }
        assert {k: r for k, r in self.records.items() if r.status is not Deposit.ORPHANED} == fresh

    def teardown(self) -> None:
        self.come_to_rest()

    # ---- its table

    def show(self, block: BlockFacts) -> None:
        for transfer in block.inbound:
            fact = Appeared(transfer.block_hash, transfer.amount)
            self.records[transfer.key] = advance(self.records.get(transfer.key), fact)

    def orphan(self, headers: tuple[Header, ...]) -> None:
        gone = {header.hash for header in headers}
        for key, known in self.records.items():
            if known.block_hash in gone and known.status is not Deposit.ORPHANED:
                self.records[key] = advance(known, Reorged())

    def confirm(self, transfers: list[TransferSeen], through_height: int) -> None:
        for transfer in transfers:
            before = self.records.get(transfer.key)
            self.records[transfer.key] = advance(before, Confirmed(transfer.block_hash, transfer.amount))
            if before is None or before.status is not Deposit.FINAL:
                assert transfer.key not in self.credited, "credited twice"
                self.credited.add(transfer.key)
        assert all(t.height <= through_height for t in transfers)

    @invariant()
    def credited_is_final_and_final_is_canonical(self) -> None:
        final = {key for key, known in self.records.items() if known.status is Deposit.FINAL}
        assert final == self.credited
        canonical = {header.hash for header in self.node.headers}
        assert all(self.records[key].block_hash in canonical for key in final)


Depositing.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestDepositing = Depositing.TestCase
