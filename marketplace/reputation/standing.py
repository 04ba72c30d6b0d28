"""From facts to standing.  Pure.

A *strike* says that a node does not deliver what it is paid for: it serves another model (A59), overstates
its counts again and again (A57), writes far longer answers than everybody else (A60), or floods us.  As many
strikes as the policy says hold the operator's earnings.  A *warning* says that something is worse than usual;
it costs nothing but routing's own score, and a slow or failing node is never more than that.

The law:

- more suspicious facts never make a standing better, more good ones never make it worse;
- fewer samples than the policy asks for say nothing;
- a reference that doubts most of what everybody else serves is itself in doubt, and strikes nobody.

Integers and fractions only: what is held is money.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Annotated, Final

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Permille = Annotated[int, msgspec.Meta(ge=0, le=100_000)]


class State(StrEnum):
    """An operator's standing."""

    GOOD = "good"
    WARNED = "warned"
    HELD = "held"


class Severity(StrEnum):
    WARNING = "warning"
    STRIKE = "strike"


class Kind(StrEnum):
    """What a finding is about."""

    MODEL = "model"
    DRIFT = "drift"
    LENGTH = "length"
    FAILURES = "failures"
    LATENCY = "latency"
    OFFENCES = "offences"


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every threshold; the newest row of `reputation_policies` overrides these defaults."""

    window_hours: Annotated[int, msgspec.Meta(ge=1, le=168)] = 168
    strikes_to_hold: Count = 1

    suspicious_min: Count = 3
    """Checks that must doubt a node before it is a strike …"""
    suspicious_permille: Permille = 300
    """… and how many of its checks those must be."""
    doubtful_checks_min: Count = 6
    """From so many checks of other operators' nodes on …"""
    doubtful_permille: Permille = 500
    """… a reference that doubts this share of them is not believed."""

    drift_min: Count = 10
    drift_permille: Permille = 50
    drift_warning_min: Count = 3

    length_samples_min: Count = 100
    """Of the node, and of others with the same model."""
    length_z_warning: Count = 4
    length_ratio_warning_permille: Permille = 1_500
    length_z_strike: Count = 8
    length_ratio_strike_permille: Permille = 2_500

    requests_min: Count = 100
    success_permille_min: Permille = 900
    latency_ratio_permille: Permille = 3_000
    latency_ms_min: Count = 2_000
    offences_strike: Count = 3

    # -- one check (`likelihood`)
    tokens_min: Count = 16
    surprise_milli_min: Annotated[int, msgspec.Meta(ge=-100_000, le=0)] = -1_600
    """More surprising than this (thousandths of a nat a token) is not the model's own text."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sums over completions: how many, their tokens, their squared tokens."""

    completions: int = 0
    tokens: int = 0
    tokens_squared: int = 0

    @property
    def mean(self) -> Fraction:
        return Fraction(self.tokens, self.completions) if self.completions else Fraction(0)

    @property
    def variance_of_mean(self) -> Fraction:
        """The variance of the completions' mean; zero without any."""
        if not self.completions:
            return Fraction(0)
        variance = Fraction(self.tokens_squared, self.completions) - self.mean**2
        return variance / self.completions


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What is known of one node's offer of one model within the window; `others_…`: other operators'."""

    node_id: str
    model: str
    answered: int = 0
    failed: int = 0
    first_token_ms: int | None = None
    """Mean."""
    others_first_token_ms: int | None = None
    lengths: Lengths = Lengths()
    others_lengths: Lengths = Lengths()
    drifts: int = 0
    """Requests whose counts were overstated."""
    checks: int = 0
    suspicious: int = 0
    others_checks: int = 0
    others_suspicious: int = 0
    offences: int = 0

    @property
    def requests(self) -> int:
        return self.answered + self.failed

    @property
    def success_permille(self) -> int | None:
        return None if self.requests == 0 else 1000 * self.answered // self.requests


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be, in words the operator can use."""

    kind: Kind
    severity: Severity
    node_id: str
    model: str
    message: str


@dataclass(frozen=True, slots=True)
class Standing:
    """The outcome, with every reason."""

    state: State
    findings: tuple[Finding, ...]

    @property
    def reason(self) -> str:
        """The strikes in one text; empty without."""
        strikes = (f for f in self.findings if f.severity is Severity.STRIKE)
        return "; ".join(f"{f.node_id}, {f.model}: {f.message}" for f in strikes)


GOOD: Final = Standing(State.GOOD, ())


def judge(facts: Iterable[NodeFacts], policy: Policy) -> Standing:
    """Give an operator's standing by the facts about all his nodes."""
    findings = tuple(finding for node in facts for finding in _findings(node, policy))
    strikes = sum(finding.severity is Severity.STRIKE for finding in findings)
    if strikes >= policy.strikes_to_hold:
        return Standing(State.HELD, findings)
    return Standing(State.WARNED, findings) if findings else GOOD


def z_milli(own: Lengths, others: Lengths) -> int | None:
    """Give Welch's z of the two means in thousandths (at most a million); None without completions.

    >>> z_milli(Lengths(100, 2_000, 60_000), Lengths(100, 1_000, 20_000))
    7071
    """
    if not own.completions or not others.completions:
        return None
    difference = own.mean - others.mean
    spread = own.variance_of_mean + others.variance_of_mean
    if spread <= 0:
        return 0 if difference == 0 else (1_000_000 if difference > 0 else -1_000_000)
    size = min(math.isqrt(int(difference**2 / spread * 1_000_000)), 1_000_000)
    return size if difference >= 0 else -size


def _findings(node: NodeFacts, policy: Policy) -> Iterable[Finding]:
    for kind, check in (
        (Kind.MODEL, _model),
        (Kind.DRIFT, _drift),
        (Kind.LENGTH, _length),
        (Kind.FAILURES, _failures),
        (Kind.LATENCY, _latency),
        (Kind.OFFENCES, _offences),
    ):
        found = check(node, policy)
        if found is not None:
            yield Finding(kind, found[0], node.node_id, node.model, found[1])


Found = tuple[Severity, str] | None


def _model(node: NodeFacts, policy: Policy) -> Found:
    if node.suspicious == 0:
        return None
    message = (
        f"{node.suspicious} of {node.checks} checked answers are not what this model writes: "
        "is it the model, the precision and the chat template you sell?"
    )
    is_reference_doubtful = (
        node.others_checks >= policy.doubtful_checks_min
        and 1000 * node.others_suspicious >= policy.doubtful_permille * node.others_checks
    )
    is_strike = (
        not is_reference_doubtful
        and node.suspicious >= policy.suspicious_min
        and 1000 * node.suspicious >= policy.suspicious_permille * node.checks
    )
    return (Severity.STRIKE if is_strike else Severity.WARNING), message


def _drift(node: NodeFacts, policy: Policy) -> Found:
    if node.drifts < policy.drift_warning_min:
        return None
    told = max(node.answered, node.drifts)  # not the failed ones: nobody fails his way out of a strike
    message = (
        f"{node.drifts} of {told} answered requests reported more tokens than were delivered: "
        "is the engine's tokenizer the model's own?"
    )
    is_strike = node.drifts >= policy.drift_min and (1000 * node.drifts >= policy.drift_permille * told)
    return (Severity.STRIKE if is_strike else Severity.WARNING), message


def _length(node: NodeFacts, policy: Policy) -> Found:
    own, others = node.lengths, node.others_lengths
    if min(own.completions, others.completions) < policy.length_samples_min:
        return None
    score = z_milli(own, others)
    assert score is not None, "both have completions"
    ratio = own.mean * 1000 / others.mean if others.mean else Fraction(0)
    message = (
        f"answers have {int(own.mean)} tokens on average, those of others with this model "
        f"{int(others.mean)} (z = {score // 1000})"
    )
    if score >= 1000 * policy.length_z_strike and ratio >= policy.length_ratio_strike_permille:
        return Severity.STRIKE, message
    if score >= 1000 * policy.length_z_warning and ratio >= policy.length_ratio_warning_permille:
        return Severity.WARNING, message
    return None


def _failures(node: NodeFacts, policy: Policy) -> Found:
    if node.requests < policy.requests_min or node.success_permille is None:
        return None
    if node.success_permille >= policy.success_permille_min:
        return None
    return Severity.WARNING, f"{node.failed} of {node.requests} requests failed"


def _latency(node: NodeFacts, policy: Policy) -> Found:
    own, others = node.first_token_ms, node.others_first_token_ms
    if own is None or others is None or node.answered < policy.requests_min:
        return None
    if own < policy.latency_ms_min or 1000 * own < policy.latency_ratio_permille * others:
        return None
    return Severity.WARNING, f"the first token takes {own} ms on average, that of others {others} ms"


def _offences(node: NodeFacts, policy: Policy) -> Found:
    if node.offences == 0:
        return None
    message = f"the node sent what nobody waited for, as fast as it could, {node.offences} times"
    return (Severity.STRIKE if node.offences >= policy.offences_strike else Severity.WARNING), message
