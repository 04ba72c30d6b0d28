"""From facts to standing: what strikes, what only warns, and the laws that hold for all facts."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from marketplace.reputation.likelihood import Likelihood, likelihood
from marketplace.reputation.standing import (
    GOOD,
    Kind,
    Lengths,
    NodeFacts,
    Policy,
    Severity,
    State,
    judge,
    z_milli,
)

POLICY = Policy()
ORDER = [State.GOOD, State.WARNED, State.HELD]


def lengths(mean: int, spread: int, completions: int = 200) -> Lengths:
    """Half of the completions are `spread` below the mean, half above."""
    squares = (mean - spread) ** 2 + (mean + spread) ** 2
    return Lengths(completions, completions * mean, completions // 2 * squares)


HONEST = NodeFacts(
    "n-1", "m", answered=990, failed=10, first_token_ms=400, others_first_token_ms=300,
    lengths=lengths(210, 150), others_lengths=lengths(200, 150, 2_000), drifts=1,
    checks=40, suspicious=0, others_checks=400, others_suspicious=3,
)  # fmt: skip

counts = st.integers(0, 3_000)


@st.composite
def some_lengths(draw: st.DrawFn) -> Lengths:
    found = draw(st.lists(st.integers(1, 500), max_size=6))
    times = draw(st.integers(1, 100))
    return Lengths(len(found) * times, sum(found) * times, sum(n * n for n in found) * times)


@st.composite
def some_facts(draw: st.DrawFn) -> NodeFacts:
    checks, others = draw(counts), draw(counts)
    return NodeFacts(
        "n-1", "m", draw(counts), draw(counts), draw(st.none() | counts), draw(st.none() | counts),
        draw(some_lengths()), draw(some_lengths()), draw(counts),
        checks, draw(st.integers(0, checks)), others, draw(st.integers(0, others)), draw(st.integers(0, 5)),
    )  # fmt: skip


def test_nothing_known_and_honest_serving_are_good() -> None:
    assert judge([], POLICY) == GOOD
    assert judge([NodeFacts("n-1", "m")], POLICY) == GOOD
    assert judge([HONEST], POLICY) == GOOD


@pytest.mark.parametrize(
    ("facts", "kind", "severity"),
    [
        (replace(HONEST, suspicious=1), Kind.MODEL, Severity.WARNING),
        (replace(HONEST, suspicious=20), Kind.MODEL, Severity.STRIKE),
        (replace(HONEST, checks=2, suspicious=2), Kind.MODEL, Severity.WARNING),
        (replace(HONEST, suspicious=20, others_suspicious=200), Kind.MODEL, Severity.WARNING),
        (replace(HONEST, drifts=5), Kind.DRIFT, Severity.WARNING),
        (replace(HONEST, drifts=60), Kind.DRIFT, Severity.STRIKE),
        (replace(HONEST, lengths=lengths(320, 150)), Kind.LENGTH, Severity.WARNING),
        (replace(HONEST, lengths=lengths(800, 150)), Kind.LENGTH, Severity.STRIKE),
        (replace(HONEST, answered=400, failed=600), Kind.FAILURES, Severity.WARNING),
        (replace(HONEST, first_token_ms=9_000), Kind.LATENCY, Severity.WARNING),
        (replace(HONEST, offences=1), Kind.OFFENCES, Severity.WARNING),
        (replace(HONEST, offences=3), Kind.OFFENCES, Severity.STRIKE),
    ],
)
def test_each_finding_is_named_and_weighed(facts: NodeFacts, kind: Kind, severity: Severity) -> None:
    standing = judge([HONEST, facts], POLICY)
    assert [(f.kind, f.severity) for f in standing.findings] == [(kind, severity)]
    assert standing.state is (State.HELD if severity is Severity.STRIKE else State.WARNED)
    assert ("n-1" in standing.reason) is (severity is Severity.STRIKE)


def test_a_slow_or_failing_node_is_never_held() -> None:
    worst = NodeFacts(
        "n-1", "m", answered=1_000, failed=999_000, first_token_ms=10**6, others_first_token_ms=1
    )
    assert judge([worst] * 50, POLICY).state is State.WARNED


@given(some_facts(), st.sampled_from(["failed", "drifts", "offences"]), st.integers(1, 1_000))
@example(NodeFacts("n-1", "m", failed=81, drifts=10), "failed", 120)
def test_more_misdeeds_never_make_a_standing_better(facts: NodeFacts, field: str, more: int) -> None:
    worse = replace(facts, **{field: getattr(facts, field) + more})
    assert ORDER.index(judge([worse], POLICY).state) >= ORDER.index(judge([facts], POLICY).state)


@given(some_facts(), st.integers(1, 100))
def test_one_more_suspicious_check_never_makes_a_standing_better(facts: NodeFacts, more: int) -> None:
    worse = replace(facts, checks=facts.checks + more, suspicious=facts.suspicious + more)
    assert ORDER.index(judge([worse], POLICY).state) >= ORDER.index(judge([facts], POLICY).state)


@given(some_facts(), st.integers(1, 100))
def test_one_more_honest_check_never_makes_a_standing_worse(facts: NodeFacts, more: int) -> None:
    better = replace(facts, checks=facts.checks + more)
    assert ORDER.index(judge([better], POLICY).state) <= ORDER.index(judge([facts], POLICY).state)


@given(st.lists(some_facts(), max_size=4), some_facts())
def test_another_node_never_makes_a_standing_better_and_order_is_nothing(
    facts: list[NodeFacts], more: NodeFacts
) -> None:
    assert ORDER.index(judge([*facts, more], POLICY).state) >= ORDER.index(judge(facts, POLICY).state)
    assert judge(facts[::-1], POLICY).state is judge(facts, POLICY).state


@given(some_facts())
def test_few_samples_strike_nobody(facts: NodeFacts) -> None:
    few = replace(facts, checks=2, suspicious=2, drifts=2, offences=0, lengths=Lengths(3, 3_000, 3_000_000))
    assert judge([few], POLICY).state is not State.HELD


@given(some_lengths(), some_lengths())
def test_z_is_welchs_to_a_thousandth(own: Lengths, others: Lengths) -> None:
    found = z_milli(own, others)
    if not own.completions or not others.completions:
        assert found is None
        return
    spread = own.variance_of_mean + others.variance_of_mean
    if spread == 0:
        assert (found == 0) is (own.mean == others.mean)
        return
    exact = float(own.mean - others.mean) / math.sqrt(spread)
    assert found == pytest.approx(max(-1_000_000, min(1_000_000, exact * 1000)), abs=1.01, rel=1e-6)
    mirrored = z_milli(others, own)
    assert mirrored == -found


def test_a_policy_is_data_and_its_ranges_are_kept() -> None:
    strict = msgspec.json.decode(b'{"suspicious_min": 1, "suspicious_permille": 1}', type=Policy)
    assert judge([replace(HONEST, suspicious=1)], strict).state is State.HELD
    for bad in (b'{"window_hours": 0}', b'{"window_hour": 1}', b'{"surprise_milli_min": 5}'):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(bad, type=Policy)


# -- one answer


def test_what_a_model_expects_of_itself_is_no_surprise() -> None:
    sure = [(math.log(0.999), [math.log(0.999)])] * 30
    unsure = [(math.log(0.01), [math.log(0.01)] * 20)] * 30
    for read in (sure, unsure):
        assert not likelihood(read).is_suspicious(POLICY)
        assert abs(likelihood(read).surprise_milli) < 50
    foreign = [(math.log(1e-5), [math.log(0.9), math.log(0.05)])] * 30
    assert likelihood(foreign).is_suspicious(POLICY)
    assert not likelihood(foreign[:15]).is_suspicious(POLICY), "too short to tell"
    assert likelihood([]) == Likelihood(0, 0, 0)


@given(
    st.lists(st.tuples(st.floats(), st.lists(st.floats(max_value=0), max_size=20)), min_size=1, max_size=30)
)
def test_no_number_of_the_engine_breaks_the_sum(read: list[tuple[float, list[float]]]) -> None:
    found = likelihood(read)
    assert found.tokens == len(read)
    assert -100_000 <= found.mean_milli <= 0
    assert found.entropy_milli >= -1


@given(st.lists(st.fractions(Fraction(1, 10**6), 1), min_size=2, max_size=12))
def test_the_entropy_is_the_models_own_when_everything_is_listed(weights: list[Fraction]) -> None:
    chances = sorted((float(w / sum(weights)) for w in weights), reverse=True)
    exact = -sum(p * math.log(p) for p in chances)
    found = likelihood([(math.log(chances[0]), [math.log(p) for p in chances])])
    assert found.entropy_milli == pytest.approx(1000 * exact, abs=1)
