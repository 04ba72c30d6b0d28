"""Decisions kept in a log, made again, and compared with other policies."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from marketplace.cli import app
from marketplace.platform.ids import uuid7
from marketplace.routing import replay as replay_module
from marketplace.routing.affinity import BEGINNING_BYTES, REMEMBERED_MAX, WARM_S, Affinity
from marketplace.routing.choice import NodeView, Preferences, Question, Sort, choose, summary
from marketplace.routing.replay import (
    DecisionLog,
    Policy,
    parse_policy,
    question_of,
    read_log,
    recorded,
    replay,
)
from node_agent.protocol import NodeId

GOLDEN = Path(__file__).parent.parent / "golden_decisions.jsonl"
"""Sixteen questions and who was chosen; a changed line is a changed policy, to be told in the changelog."""


def a_node(name: str, **changes: object) -> NodeView:
    view = NodeView(
        node_id=NodeId(name), operator_id=f"operator-{name}", model="m", price_in=100, price_out=100,
        price_version=1, context=4096, running=0, waiting=0, capacity=10, last_seen_ms=0, latency_ms=100,
    )  # fmt: skip
    return msgspec.structs.replace(view, **changes)


def test_golden_decisions() -> None:
    lines = list(read_log(GOLDEN))
    assert len(lines) == 16
    for line in lines:
        assert [view.node_id for view in choose(question_of(line)).candidates] == line.chosen, line
    assert len({tuple(line.chosen) for line in lines}) > 8  # they differ


def test_a_warm_cache_wins_a_tie_and_nothing_else() -> None:
    views = [a_node("a"), a_node("b", latency_ms=104), a_node("c", latency_ms=300)]

    def first(warm: str | None, random: float) -> str:
        question = Question(views, 0, random, warm=None if warm is None else NodeId(warm))
        return choose(question).candidates[0].node_id

    assert {first("b", random / 10) for random in range(10)} == {"b"}
    assert {first("c", random / 10) for random in range(10)} != {"c"}  # too slow to be a tie: drawn as ever
    assert first("gone", 0.0) == first(None, 0.0) == "a"
    decision = choose(Question(views, 0, 0.9, warm=NodeId("b")))
    assert summary(decision, NodeId("b")).endswith("; warm")


def test_where_a_sort_ties_the_less_loaded_is_asked() -> None:
    busy = a_node("a", running=5, latency_ms=100)
    idle = a_node("b", running=5, capacity=100, latency_ms=100)
    question = Question([busy, idle], 0, 0.0, preferences=Preferences(sort=Sort.THROUGHPUT))
    assert choose(question).candidates[0].node_id == "b"
    prices = Question([busy, idle], 0, 0.0, preferences=Preferences(sort=Sort.PRICE))
    assert choose(prices).candidates[0].node_id == "b"


def test_throughput_and_no_fallback() -> None:
    views = [a_node("a", tokens_per_s=20), a_node("b", tokens_per_s=90), a_node("c")]
    fast = Question(views, 0, 0.0, preferences=Preferences(sort=Sort.THROUGHPUT))
    assert choose(fast).candidates[0].node_id == "b"
    alone = Question(views, 0, 0.0, preferences=Preferences(allow_fallbacks=False))
    assert len(choose(alone).candidates) == 1


@given(
    st.floats(0, 1, exclude_max=True), st.sampled_from(Sort), st.none() | st.integers(0, 200),
    st.booleans(), st.lists(st.sampled_from(["a", "b"]), max_size=2, unique=True),
)  # fmt: skip
def test_a_recorded_question_is_the_same_question(
    random: float, sort: Sort, ceiling: int | None, fallbacks: bool, names: list[str]
) -> None:
    wish = Preferences(
        price_in_max=ceiling, sort=sort, allow_fallbacks=fallbacks, order=tuple(names),
        ignore=frozenset(names[:1]),
    )  # fmt: skip
    views = [a_node("a"), a_node("b", price_in=150), a_node("c", latency_ms=None)]
    question = Question(views, 5, random, prompt_tokens=7, preferences=wish, warm=NodeId("b"))
    decision = choose(question)
    line = msgspec.json.decode(
        msgspec.json.encode(recorded(question, decision.candidates)), type=replay_module.Recorded
    )
    assert choose(question_of(line)).candidates == decision.candidates


def test_policies_are_compared_over_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log" / "decisions.jsonl"
    log = DecisionLog(path, every=2)
    views = [
        a_node("cheap", price_in=10_000_000, price_out=10_000_000, latency_ms=900),
        a_node("quick", price_in=10**9, price_out=10**9, latency_ms=100),
    ]
    for at in range(40):
        question = Question(views, 0, at / 40, prompt_tokens=1_000, completion_tokens=1_000)
        log.note(question, choose(question).candidates)
    log.close()
    with path.open("ab") as file:
        file.write(b'{"now_ms": 1, "ra')  # its writer was killed
    by = {
        found.policy: found
        for found in replay(read_log(path), map(parse_policy, ("recorded", "price", "latency", "100/0/0")))
    }
    assert by["recorded"].decisions == 20
    assert by["recorded"].agrees_permille == 1000
    assert by["price"].nodes == {"cheap": 20}
    assert (by["price"].cost_nano_mean, by["latency"].cost_nano_mean) == (20_000, 2_000_000)
    assert by["latency"].latency_ms_mean == 100
    assert by["100/0/0"].nodes["quick"] > by["recorded"].nodes["quick"]
    shown = CliRunner().invoke(app, ["route", "replay", str(path), "--policy", "price", "--json"])
    assert msgspec.json.decode(shown.output, type=list[replay_module.Outcome]) == [by["price"]]
    monkeypatch.setattr(replay_module, "LOG_BYTES_MAX", 1_000)
    full = DecisionLog(tmp_path / "small.jsonl")
    for _ in range(50):
        full.note(Question(views, 0, 0.5), views)
    full.close()
    assert (tmp_path / "small.jsonl").stat().st_size < 3_000


@pytest.mark.parametrize("wrong", ["vibes", "1/2", "1/2/x", "-1/2/3", "0/0/0"])
def test_a_policy_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"polic|weights"):
        parse_policy(wrong)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"now_ms": "x"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1"):
        replay(read_log(path), [Policy("recorded")])


def test_affinity_forgets_and_keeps_buyers_apart() -> None:
    affinity, ann, bob = Affinity(), uuid7(), uuid7()
    body = b'{"model":"m","messages":[' + b"x" * BEGINNING_BYTES
    name = affinity.beginning(ann, "m", body)
    assert affinity.beginning(ann, "m", b'{"temperature":1,"messages":[' + b"x" * BEGINNING_BYTES) == name
    assert affinity.beginning(ann, "m", body[:100]) is None
    affinity.answered(name, NodeId("n"), 0.0)
    assert affinity.warm(name, WARM_S) == "n"
    assert affinity.warm(name, WARM_S + 1) is None
    assert affinity.warm(affinity.beginning(bob, "m", body), 0.0) is None
    assert affinity.warm(affinity.beginning(ann, "other", body), 0.0) is None
    for at in range(REMEMBERED_MAX):
        affinity.answered(at, NodeId("n"), 0.0)
    assert affinity.warm(name, 0.0) is None
