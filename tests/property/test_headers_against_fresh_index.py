"""Whatever a chain does above its final block, following it ends where a fresh index starts."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chain.errors import FinalityViolated
from chain.headers import (
    Extended,
    Fetch,
    Finalized,
    Lagging,
    Reorged,
    Window,
    finalize,
    follow,
    plan_final,
    plan_head,
)
from chain.ports import Header
from chain.simulated import SimulatedChain


class Following(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.node = SimulatedChain()
        self.window = Window(self.node.headers[0])
        self.is_broken = False

    def canonical(self, start: int, end: int) -> list[Header]:
        return [header for header in self.node.headers if start <= header.height <= end]

    @rule(count=st.integers(1, 8), skip=st.integers(0, 3))
    def mine(self, count: int, skip: int) -> None:
        for i in range(count):
            self.node.mine(skip=skip if i == 0 else 0)

    @rule(depth=st.integers(1, 12), grown=st.integers(0, 14), skip=st.integers(0, 2))
    def fork_above_final(self, depth: int, grown: int, skip: int) -> None:
        unfinal = [h for h in self.node.headers if h.height > self.node.final_height]
        self.node.drop(min(depth, len(unfinal)))
        for i in range(grown):
            self.node.mine(skip=skip if i == 0 else 0)

    @rule(behind=st.integers(0, 20))
    def finalize_node(self, behind: int) -> None:
        """Forward, or back: a provider whose `finalized` regressed."""
        held = self.window.final.height
        if self.node.finalize(behind).height < held:
            self.node.final_height = held  # what was final stays final; only the *report* regresses, below

    @rule(below=st.integers(1, 5))
    def report_regressed_final(self, below: int) -> None:
        index = next(i for i, h in enumerate(self.node.headers) if h.height == self.window.final.height)
        if index - below >= 0:
            step = plan_final(self.window, self.node.headers[index - below], limit=4)
            assert not isinstance(step, Fetch)

    @rule(limit=st.integers(1, 6))
    def follow_head_one_step(self, limit: int) -> None:
        step: object = plan_head(self.window, self.node.headers[-1], limit=limit)
        while isinstance(step, Fetch):
            step = follow(self.window, self.canonical(step.start, step.end))
        if isinstance(step, Extended | Reorged):
            self.window = step.window

    @rule(lag=st.integers(1, 6))
    def a_lagging_node_orphans_nothing(self, lag: int) -> None:
        if len(self.node.headers) <= lag or self.window.tip != self.node.headers[-1]:
            return
        step = plan_head(self.window, self.node.headers[-1 - lag], limit=4)
        assert isinstance(step, Lagging)

    @rule(answer=st.lists(st.integers(0, 40), min_size=2, max_size=2))
    def repeat_any_old_answer(self, answer: list[int]) -> None:
        """The same range again, or one far below: never an orphan on the canonical chain."""
        if self.window.tip not in self.node.headers:
            return
        start, end = sorted(answer)
        step = follow(self.window, self.canonical(start, end))
        assert not isinstance(step, Reorged)

    @rule(limit=st.integers(1, 6))
    def follow_final_one_step(self, limit: int) -> None:
        final = next(h for h in self.node.headers if h.height == self.node.final_height)
        step = plan_final(self.window, final, limit=limit)
        if isinstance(step, Fetch):
            headers = self.canonical(step.start, step.end)
            if headers:
                moved = finalize(self.window, headers)
                assert isinstance(moved, Finalized)
                self.window = moved.window

    @rule()
    def settle_down_equals_fresh_index(self) -> None:
        # The node must be above what it dropped, else being behind cannot be told from a reorg.
        while self.node.headers[-1].height <= self.window.tip.height:
            self.node.mine()
        for _ in range(200):
            before = self.window
            self.follow_head_one_step(limit=7)
            if self.window == before:
                break
        fresh = [h for h in self.node.headers if h.height > self.window.final.height]
        assert list(self.window.above) == fresh

    @precondition(lambda self: len(self.node.headers) > 3 and self.window.final.height > 0)
    @rule()
    def a_broken_promise_is_noticed(self) -> None:
        """Another block in place of our final one: no answer above it may be taken in."""
        index = next(i for i, h in enumerate(self.node.headers) if h.height == self.window.final.height)
        liar = SimulatedChain(
            headers=self.node.headers[:index], movements=self.node.movements[:index], made=10_000
        )
        while liar.headers[-1].height <= self.window.tip.height:  # a shorter chain only lags
            liar.mine()
        step: object
        try:
            step = plan_head(self.window, liar.headers[-1], limit=1_000)
            while isinstance(step, Fetch):
                step = follow(self.window, [h for h in liar.headers if step.start <= h.height <= step.end])
        except FinalityViolated:
            return
        raise AssertionError(f"accepted {step}")

    @invariant()
    def final_is_canonical(self) -> None:
        assert self.window.final in self.node.headers


Following.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFollowing = Following.TestCase
