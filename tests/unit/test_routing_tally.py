"""Why requests went to others, as operators are told: one outcome for every node of every decision."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketplace.fabric.reports import Loss
from marketplace.routing import tally as tally_module
from marketplace.routing.choice import Exclusion, NodeView, Preferences, Question, choose
from marketplace.routing.tally import CHOSEN, NOBODY, Key, Tally, outcomes
from node_agent.protocol import NodeId


def view(name: str, **fields: object) -> NodeView:
    told: dict[str, object] = {
        "price_in": 100, "price_out": 100, "price_version": 1, "context": 4096, "running": 0, "waiting": 0,
        "capacity": 8, "last_seen_ms": 0, "latency_ms": 100, **fields,
    }  # fmt: skip
    return NodeView(node_id=NodeId(name), operator_id=f"o-{name}", model="m", **told)  # type: ignore[arg-type]


views = st.builds(
    view,
    st.sampled_from("abcdefgh"),
    price_in=st.integers(0, 1000),
    running=st.integers(0, 8),
    latency_ms=st.none() | st.integers(0, 1000),
    penalty_permille=st.integers(0, 1000),
    is_draining=st.booleans(),
    context=st.sampled_from([10, 4096]),
)
wishes = st.sampled_from(
    [Preferences(), Preferences(order=("a", "o-b")), Preferences(only={"c"}), Preferences(price_in_max=0)]
)


@given(st.lists(views, unique_by=lambda v: v.node_id, max_size=8), st.floats(0, 1, exclude_max=True), wishes)
def test_every_node_of_a_decision_has_one_outcome_and_at_most_one_is_chosen(
    offered: list[NodeView], random: float, wish: Preferences
) -> None:
    decision = choose(Question(offered, 0, random, context_min=100, preferences=wish))
    found = list(outcomes(decision))
    assert Counter(o.key.node_id for o in found) == Counter(v.node_id for v in offered)
    chosen = [o.key.node_id for o in found if o.key.outcome == CHOSEN]
    assert chosen == [v.node_id for v in decision.candidates[:1]]
    assert all(o.own >= 0 and o.winner >= 0 for o in found)
    assert not any(o.key.outcome == NOBODY for o in found) or not decision.candidates


@pytest.mark.parametrize(
    ("loser", "outcome", "own", "winner"),
    [
        (view("z", price_in=900, price_out=900), "price", 900, 100),
        (view("z", latency_ms=900), "latency", 900, 100),
        (view("z", running=7), "load", 875, 0),
        (view("z", penalty_permille=900), "recent_failure", 0, 0),
        (view("z"), "drawn_lower", 0, 0),
        (view("z", is_draining=True), Exclusion.DRAINING.value, 0, 0),
    ],
)
def test_the_reason_is_what_the_node_trailed_in_most(
    loser: NodeView, outcome: str, own: int, winner: int
) -> None:
    decision = choose(Question([view("a"), loser], 0, 0.0))
    assert decision.candidates[0].node_id == "a"
    assert [o for o in outcomes(decision) if o.key.node_id == "z"] == [
        (Key(loser.node_id, "m", outcome), own, winner)
    ]


def test_sums_are_taken_once_and_can_be_given_back() -> None:
    tally = Tally(lambda: 0)
    decision = choose(Question([view("a"), view("z", latency_ms=900)], 0, 0.0))
    for _ in range(3):
        tally.note(decision)
    taken = tally.take()
    assert taken[Key(NodeId("z"), "m", "latency")].own == 2700
    assert tally.take() == {}
    tally.give_back(taken)
    tally.note(decision)
    assert tally.take()[Key(NodeId("a"), "m", CHOSEN)].requests == 4


def test_a_crowd_or_a_flood_of_decisions_costs_no_more_than_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_ms = 0
    tally = Tally(lambda: now_ms)
    crowd = [view(f"n{at}", latency_ms=at) for at in range(10_000)]
    decision = choose(Question(crowd, 0, 0.5))
    for _ in range(1_000):
        tally.note(decision)
    counted = sum(sums.requests for sums in tally.take().values())
    assert counted <= tally_module.VERDICTS_PER_S + tally_module.VIEWS_MAX + 3
    tally.note(decision)
    assert tally.take() == {}
    now_ms = 1_000
    monkeypatch.setattr(tally_module, "KEYS_MAX", 1)
    tally.note(decision)
    assert len(tally.take()) == 1


def test_an_operator_reads_sentences() -> None:
    told = Loss("price", 10, own=100_000_000, winner=80_000_000).message
    assert told == "others were cheaper: they asked $0.08 per million tokens on average, you $0.10"
    assert "{" not in Loss("draining", 1, None, None).message
    assert Loss("something_new", 1, None, None).message == "something_new"
