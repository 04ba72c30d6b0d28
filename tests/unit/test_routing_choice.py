"""The pure choice: golden decisions, and laws that hold for any nodes and any buyer."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from marketplace.routing import choice
from marketplace.routing.choice import (
    BEST,
    RETRIES_MAX,
    Exclusion,
    NodeView,
    Preferences,
    Question,
    Sort,
    Weights,
    choose,
    exclusion,
    explain,
    summary,
)
from node_agent.protocol import NodeId

NOW = 1_000_000


def a_node(name: str, **changes: object) -> NodeView:
    view = NodeView(
        node_id=NodeId(name),
        operator_id=f"operator-{name}",
        model="m",
        price_in=100,
        price_out=100,
        price_version=1,
        context=4096,
        running=0,
        waiting=0,
        capacity=10,
        last_seen_ms=NOW,
        latency_ms=99,
    )
    return msgspec.structs.replace(view, **changes)


def ask(*views: NodeView, random: float = 0.0, **changes: object) -> Question:
    return replace(Question(views, NOW, random), **changes)  # type: ignore[arg-type]


def chosen(question: Question) -> list[str]:
    return [view.node_id for view in choose(question).candidates]


# -- golden decisions


def test_the_score_is_40_latency_35_load_25_price_relative_to_the_best() -> None:
    fast, slow = a_node("fast", latency_ms=99), a_node("slow", latency_ms=199, running=5, price_out=300)
    verdicts = {v.node_id: v for v in explain(choose(ask(fast, slow))).verdicts}
    assert verdicts[NodeId("fast")].parts.score == pytest.approx(1.0)
    parts = verdicts[NodeId("slow")].parts
    assert (parts.latency, parts.load) == pytest.approx((0.5, 0.5))
    assert parts.price == pytest.approx(201 / 401)
    assert parts.score == pytest.approx(0.4 * 0.5 + 0.35 * 0.5 + 0.25 * 201 / 401)


def test_the_draw_walks_the_best_three_by_weight() -> None:
    views = [
        a_node("a"),
        a_node("b", penalty_permille=500),
        a_node("c", penalty_permille=750),
        a_node("d", penalty_permille=900),
    ]
    total = 1 + 0.5 + 0.25
    assert chosen(ask(*views, random=0.0))[0] == "a"
    assert chosen(ask(*views, random=0.99 / total))[0] == "a"
    assert chosen(ask(*views, random=1.01 / total))[0] == "b"
    assert chosen(ask(*views, random=1.51 / total))[0] == "c"
    assert chosen(ask(*views, random=0.999999))[0] == "c"


def test_a_retry_goes_to_another_operator_first() -> None:
    views = [
        a_node("a1", operator_id="a"),
        a_node("a2", operator_id="a", penalty_permille=10),
        a_node("b1", operator_id="b", penalty_permille=800),
    ]
    assert chosen(ask(*views)) == ["a1", "b1", "a2"]


def test_the_preferred_operator_is_honoured_while_eligible() -> None:
    views = [a_node("good"), a_node("mine", penalty_permille=900)]
    wish = Preferences(operator="operator-mine")
    for random in (0.0, 0.5, 0.99):
        assert chosen(ask(*views, random=random, preferences=wish)) == ["mine", "good"]
    draining = [views[0], msgspec.structs.replace(views[1], is_draining=True)]
    assert chosen(ask(*draining, preferences=wish)) == ["good"]
    strict = Preferences(operator="operator-mine", allow_fallbacks=False)
    assert chosen(ask(*draining, preferences=strict)) == []
    assert chosen(ask(*views, preferences=strict)) == ["mine"]


def test_the_buyers_order_comes_before_the_score() -> None:
    views = [a_node("a"), a_node("b"), a_node("c"), a_node("d", penalty_permille=999)]
    wish = Preferences(order=("d", "operator-b"))
    assert chosen(ask(*views, random=0.9, preferences=wish)) == ["d", "b", "a"]


@pytest.mark.parametrize(
    ("sort", "best"), [(Sort.PRICE, "cheap"), (Sort.LATENCY, "fast"), (Sort.LOAD, "idle")]
)
def test_a_sort_takes_the_best_without_chance(sort: Sort, best: str) -> None:
    views = [
        a_node("cheap", price_in=1, price_out=1, latency_ms=500, running=5),
        a_node("fast", latency_ms=1, running=5),
        a_node("idle", latency_ms=500),
        a_node("new", latency_ms=None, running=5),
    ]
    for random in (0.0, 0.5, 0.99):
        assert chosen(ask(*views, random=random, preferences=Preferences(sort=sort)))[0] == best


def test_the_expected_shape_decides_which_price_matters() -> None:
    views = [a_node("in", price_in=1, price_out=1000), a_node("out", price_in=1000, price_out=1)]
    cheapest = Preferences(sort=Sort.PRICE)
    assert chosen(ask(*views, preferences=cheapest, prompt_tokens=900, completion_tokens=10))[0] == "in"
    assert chosen(ask(*views, preferences=cheapest, prompt_tokens=10, completion_tokens=900))[0] == "out"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"last_seen_ms": NOW - 60_001}, Exclusion.SILENT),
        ({"is_draining": True}, Exclusion.DRAINING),
        ({"is_ready": False}, Exclusion.NOT_READY),
        ({"success_permille": 899}, Exclusion.FAILING),
        ({"running": 7, "waiting": 3}, Exclusion.FULL),
        ({"capacity": 0}, Exclusion.FULL),
        ({"context": 4095}, Exclusion.CONTEXT),
        ({"price_in": 101}, Exclusion.PRICE),
        ({"price_out": 101}, Exclusion.PRICE),
        ({"operator_id": "shunned"}, Exclusion.NOT_CHOSEN_BY_BUYER),
    ],
)
def test_each_reason_excludes_and_its_boundary_does_not(
    changes: dict[str, object], reason: Exclusion
) -> None:
    wish = Preferences(price_in_max=100, price_out_max=100, ignore={"shunned"})
    kept = a_node("kept", last_seen_ms=NOW - 60_000, success_permille=900, running=7, waiting=2)
    question = ask(a_node("left", **changes), kept, context_min=4096, preferences=wish)
    assert chosen(question) == ["kept"]
    verdicts = {v.node_id: v.excluded for v in explain(choose(question)).verdicts}
    assert verdicts == {"left": reason, "kept": None}


def test_only_names_operators_or_nodes() -> None:
    views = [a_node("a"), a_node("b"), a_node("c")]
    assert set(chosen(ask(*views, preferences=Preferences(only={"a", "operator-b"})))) == {"a", "b"}


def test_nobody_is_an_answer() -> None:
    decision = choose(ask())
    assert (decision.candidates, decision.eligible) == ((), 0)
    assert explain(decision).verdicts == []
    assert summary(decision, NodeId("x")) == ""


def test_the_summary_fits_a_header() -> None:
    decision = choose(ask(a_node("a"), a_node("b", is_draining=True)))
    line = summary(decision, NodeId("a"))
    assert line == (
        "score=1.000; latency=1.000; load=1.000; price=1.000; sort=balanced; attempt=1; eligible=1; known=2"
    )


def test_weights_must_weigh_something() -> None:
    with pytest.raises(ValueError):
        Weights(0, 0, 0)
    with pytest.raises(ValueError):
        Weights(-1, 2, 2)


# -- laws

counts = st.integers(0, 12)
prices = st.integers(0, 1000)
nodes = st.builds(
    NodeView,
    node_id=st.integers(0, 10**6).map(lambda n: NodeId(f"n{n}")),
    operator_id=st.sampled_from(["a", "b", "c"]),
    model=st.just("m"),
    price_in=prices,
    price_out=prices,
    price_version=st.just(1),
    context=st.sampled_from([1024, 4096]),
    running=counts,
    waiting=counts,
    capacity=counts,
    last_seen_ms=st.integers(NOW - 70_000, NOW),
    latency_ms=st.none() | st.integers(0, 5000),
    success_permille=st.none() | st.integers(800, 1000),
    penalty_permille=st.integers(0, 1000),
    is_draining=st.booleans(),
    is_ready=st.booleans(),
)
names = st.sampled_from(["a", "b", "c", "n1"])
wishes = st.builds(
    Preferences,
    operator=st.none() | names,
    price_in_max=st.none() | prices,
    price_out_max=st.none() | prices,
    only=st.frozensets(names),
    ignore=st.frozensets(names, max_size=1),
    order=st.lists(names, max_size=2, unique=True).map(tuple),
    sort=st.sampled_from(Sort),
    allow_fallbacks=st.booleans(),
)
questions = st.builds(
    Question,
    views=st.lists(nodes, max_size=8, unique_by=lambda v: v.node_id),
    now_ms=st.just(NOW),
    random=st.floats(0, 1, exclude_max=True),
    prompt_tokens=st.integers(0, 10_000),
    completion_tokens=st.integers(0, 10_000),
    context_min=st.sampled_from([0, 2048]),
    preferences=wishes,
)


@given(questions)
def test_only_eligible_nodes_are_asked_each_once_and_no_more_than_three(question: Question) -> None:
    decision = choose(question)
    assert len(decision.candidates) <= 1 + RETRIES_MAX
    assert len({view.node_id for view in decision.candidates}) == len(decision.candidates)
    for view in decision.candidates:
        assert exclusion(view, question) is None
        wish = question.preferences
        assert wish.price_in_max is None or view.price_in <= wish.price_in_max
        assert wish.price_out_max is None or view.price_out <= wish.price_out_max
        assert view.running + view.waiting < view.capacity


@given(questions)
def test_somebody_is_asked_if_anybody_may_be(question: Question) -> None:
    eligible = [view for view in question.views if exclusion(view, question) is None]
    if question.preferences.allow_fallbacks:
        assert bool(choose(question).candidates) == bool(eligible)


@given(questions)
def test_a_decision_is_replayable_and_its_explanation_agrees(question: Question) -> None:
    decision = choose(question)
    assert choose(question) == decision
    explanation = msgspec.json.decode(msgspec.json.encode(explain(decision)))
    ranked = sorted((v for v in explanation["verdicts"] if v["rank"] is not None), key=lambda v: v["rank"])
    assert [v["node_id"] for v in ranked] == [view.node_id for view in decision.candidates]
    for verdict in explanation["verdicts"]:
        assert (verdict["excluded"] is None) == (verdict["parts"] is not None)
        if verdict["parts"] is not None:
            assert 0 <= verdict["parts"]["score"] <= 1.0001


@given(st.lists(st.integers(0, 990), min_size=2, max_size=6))
def test_the_draw_follows_the_scores(penalties: list[int]) -> None:
    views = [a_node(f"n{i}", penalty_permille=penalty) for i, penalty in enumerate(penalties)]
    steps = 200
    draws = Counter(chosen(ask(*views, random=(i + 0.5) / steps))[0] for i in range(steps))
    best = sorted(views, key=lambda v: (v.penalty_permille, v.node_id))[:BEST]
    total = sum(1000 - view.penalty_permille for view in best)
    assert set(draws) <= {view.node_id for view in best}
    for view in best:
        expected = (1000 - view.penalty_permille) / total
        assert draws[view.node_id] / steps == pytest.approx(expected, abs=2 / steps)


@given(questions)
def test_the_fast_score_is_the_explained_one(question: Question) -> None:
    eligible = [view for view in question.views if exclusion(view, question) is None]
    if eligible:
        parts = zip(eligible, choice._all_parts(eligible, question), strict=True)
        explained = {view.node_id: part.score for view, part in parts}
        ranked = choice._ranked(eligible, question, choice._bests(eligible, question))
        assert {view.node_id: score for score, view in ranked} == pytest.approx(explained)
        assert [score for score, _ in ranked] == sorted((score for score, _ in ranked), reverse=True)


@given(questions, st.booleans())
def test_the_fast_look_at_who_is_eligible_is_the_slow_one(question: Question, is_probe_due: bool) -> None:
    views = [msgspec.structs.replace(view, is_probe_due=is_probe_due) for view in question.views]
    question = replace(question, views=views, preferences=choice.NO_PREFERENCES)
    assert choice._eligible(question) == [view for view in views if exclusion(view, question) is None]
