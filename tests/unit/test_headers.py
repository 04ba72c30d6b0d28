from __future__ import annotations

import pytest

from chain.errors import FinalityViolated, Malformed
from chain.headers import (
    Extended,
    Fetch,
    Finalized,
    FinalRegressed,
    Idle,
    Lagging,
    Reorged,
    Window,
    finalize,
    follow,
    plan_final,
    plan_head,
)
from chain.ports import Header


def a_branch(parent: Header, *names: str) -> list[Header]:
    headers = []
    for name in names:
        header = Header(parent.height + 1, name, parent.hash, parent.height, 0)
        headers.append(header)
        parent = header
    return headers


FINAL = Header(10, "final", "before", 9, 0)
A, B, C = a_branch(FINAL, "a", "b", "c")
HELD = Window(FINAL, (A, B, C))


def test_an_unlinked_window_cannot_exist() -> None:
    with pytest.raises(Malformed):
        Window(FINAL, (A, C))


def test_new_blocks_extend_and_known_ones_are_passed_over() -> None:
    (d,) = a_branch(C, "d")
    assert follow(HELD, [d]) == Extended(Window(FINAL, (A, B, C, d)), (d,))
    assert follow(HELD, [B, C, d]) == Extended(Window(FINAL, (A, B, C, d)), (d,))
    assert follow(HELD, [A, B]) == Idle()
    assert follow(HELD, []) == Idle()


def test_a_fork_replaces_what_came_after_the_ancestor() -> None:
    c2, d2 = a_branch(B, "c2", "d2")
    assert follow(HELD, [c2, d2]) == Reorged(Window(FINAL, (A, B, c2, d2)), B, (C,), (c2, d2))
    a2, b2 = a_branch(FINAL, "a2", "b2")
    assert follow(HELD, [a2, b2]) == Reorged(Window(FINAL, (a2, b2)), FINAL, (A, B, C), (a2, b2))


def test_a_gap_and_a_deeper_fork_ask_for_more() -> None:
    d, e = a_branch(C, "d", "e")
    assert follow(HELD, [e]) == Fetch(14, 15)
    *_, d2 = a_branch(B, "c2", "d2")
    assert follow(HELD, [d2]) == Fetch(11, 14)
    assert follow(HELD, [d]) != Fetch(11, 14)


def test_a_block_that_leaves_the_chain_below_final_is_a_violation() -> None:
    with pytest.raises(FinalityViolated):
        follow(HELD, [Header(10, "other", "before", 9, 0)])
    with pytest.raises(FinalityViolated):
        follow(HELD, [Header(11, "x", "other", 10, 0)])
    with pytest.raises(FinalityViolated):  # a slot chain that skipped our final slot
        follow(HELD, [Header(12, "x", "nine", 9, 0)])
    with pytest.raises(FinalityViolated):
        finalize(HELD, [Header(11, "x", "other", 10, 0)])
    with pytest.raises(FinalityViolated):
        plan_final(HELD, Header(10, "other", "before", 9, 0), limit=5)
    with pytest.raises(FinalityViolated):
        plan_head(HELD, Header(10, "other", "before", 9, 0), limit=5)


def test_a_slow_node_is_not_a_reorg() -> None:
    assert plan_head(HELD, B, limit=5) == Lagging(1)
    assert plan_head(HELD, Header(5, "old", "older", 4, 0), limit=5) == Lagging(8)
    assert plan_head(HELD, C, limit=5) == Idle()


def test_a_lower_head_on_another_branch_is_one() -> None:
    (b2,) = a_branch(A, "b2")
    assert plan_head(HELD, b2, limit=5) == Fetch(11, 12)
    assert follow(HELD, [A, b2]) == Reorged(Window(FINAL, (A, b2)), A, (B, C), (b2,))


def test_finality_moves_prunes_and_orphans() -> None:
    assert finalize(HELD, [A, B]) == Finalized(Window(B, (C,)), (A, B), ())
    a2, b2 = a_branch(FINAL, "a2", "b2")
    assert finalize(HELD, [a2, b2]) == Finalized(Window(b2), (a2, b2), (A, B, C))
    d, e = a_branch(C, "d", "e")
    assert finalize(HELD, [A, B, C, d, e]) == Finalized(Window(e), (A, B, C, d, e), ())


def test_finality_that_goes_back_is_waited_out() -> None:
    assert plan_final(HELD, Header(7, "seven", "six", 6, 0), limit=5) == FinalRegressed(3)
    assert plan_final(HELD, FINAL, limit=5) == Idle()
    assert plan_final(HELD, C, limit=2) == Fetch(11, 12)


def test_a_hole_below_final_blocks_is_fetched() -> None:
    assert finalize(HELD, [B]) == Fetch(11, 12)
