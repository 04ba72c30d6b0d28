"""Which node serves a request, and why.

Pure: the same `Question` always gives the same `Decision`; chance and time are part of the question, so
any decision can be replayed and explained later (`explain`), to the buyer and to the operator (B6).

R21: eligible is a node that has the model, was heard within 60 s, succeeded in at least 90 % of its
recent requests, is not draining and has free capacity.  Its score is latency 40, load 35, price 25 (each
relative to the best eligible one), lowered by a recent failure.  One of the best three is drawn, with its
score as its weight, unless the node whose cache is warm is within `TIE_PERMILLE` of the best: then it is
asked.  At most two more follow for failover, other operators first.  Equal scores go to the less loaded.

Prices: nano-dollars per million tokens. Latency: ms to the first token. Scores are relative, not money.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import msgspec

from marketplace.routing.health import SUCCESS_PERMILLE_MIN
from node_agent.protocol import NODE_SILENT_MS_MAX, NodeId

BEST: Final = 3
"""R21: the draw is among so many."""
TIE_PERMILLE: Final = 50
"""Scores this close are a tie, which a warm cache breaks."""
RETRIES_MAX: Final = 2


class Exclusion(StrEnum):
    """Why a node was not considered."""

    SILENT = "silent"
    DRAINING = "draining"
    NOT_READY = "not_ready"
    FAILING = "failing"
    FULL = "full"
    CONTEXT = "context_too_small"
    PRICE = "price_above_maximum"
    NOT_CHOSEN_BY_BUYER = "not_chosen_by_buyer"


class Sort(StrEnum):
    """What the buyer wants most; `BALANCED` draws, the others take the best."""

    BALANCED = "balanced"
    PRICE = "price"
    LATENCY = "latency"
    THROUGHPUT = "throughput"
    LOAD = "load"


class NodeView(msgspec.Struct, frozen=True):
    """One node's offer of one model, as a gateway sees it at one moment."""

    node_id: NodeId
    operator_id: str
    model: str
    price_in: int
    price_out: int
    price_version: int
    context: int
    running: int
    waiting: int
    capacity: int
    last_seen_ms: int
    """On the clock of `Question.now_ms`."""
    latency_ms: int | None = None
    """None until measured: counts as the best known, so that new nodes are tried."""
    success_permille: int | None = None
    """None with too few recent requests to tell."""
    penalty_permille: int = 0
    """By recent failures; decays."""
    tokens_per_s: int | None = None
    """How fast it writes one stream; None until measured."""
    is_probe_due: bool = False
    """It has been failing, and one request may find out whether it still does (half-open)."""
    is_draining: bool = False
    is_ready: bool = True
    tokenizer_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Preferences:
    """What the buyer asked for. Names are operator ids or node ids."""

    operator: str | None = None
    """Preferred: chosen whenever eligible."""
    price_in_max: int | None = None
    price_out_max: int | None = None
    only: Collection[str] = frozenset()
    ignore: Collection[str] = frozenset()
    order: Sequence[str] = ()
    """Tried in this order before all others."""
    sort: Sort = Sort.BALANCED
    allow_fallbacks: bool = True
    """False: nobody but the preferred operator and `order`; where neither is given, no second node."""


NO_PREFERENCES: Final = Preferences()


@dataclass(frozen=True, slots=True)
class Weights:
    """R21's; configuration."""

    latency: int = 40
    load: int = 35
    price: int = 25

    def __post_init__(self) -> None:
        if min(self.latency, self.load, self.price) < 0 or self.latency + self.load + self.price <= 0:
            raise ValueError("weights are not negative and not all zero")


R21: Final = Weights()


class Question(msgspec.Struct, frozen=True):
    """Everything a decision depends on."""

    views: Sequence[NodeView]
    now_ms: int
    random: float
    """Uniform in [0, 1)."""
    prompt_tokens: int = 1
    completion_tokens: int = 1
    """The request's expected shape: in which proportion the two prices matter."""
    context_min: int = 0
    """Tokens that must fit."""
    preferences: Preferences = NO_PREFERENCES
    weights: Weights = R21
    warm: NodeId | None = None
    """The node that last answered a conversation with this beginning: it wins a tie."""


class Decision(msgspec.Struct, frozen=True):
    """Whom to ask, in order; empty if there is nobody."""

    question: Question
    candidates: tuple[NodeView, ...]
    eligible: int
    among: Sequence[NodeView] = ()
    """The eligible ones."""
    bests: tuple[int, int] = (1, 1)
    """The lowest cost and latency among them, as scores are relative to."""


class Parts(msgspec.Struct, frozen=True):
    """A score's parts, each in [0, 1], and the whole after weights and penalty."""

    latency: float
    load: float
    price: float
    penalty_permille: int
    score: float


class Verdict(msgspec.Struct, frozen=True):
    """What became of one node: `rank` 0 is asked first, None means not asked."""

    node_id: NodeId
    operator_id: str
    rank: int | None = None
    excluded: Exclusion | None = None
    parts: Parts | None = None


class Explanation(msgspec.Struct, frozen=True):
    """A decision told as data."""

    model: str
    now_ms: int
    random: float
    weights: dict[str, int]
    verdicts: list[Verdict] = field(default_factory=list)


def choose(question: Question) -> Decision:
    """Choose the nodes to ask, best first, at most 1 + `RETRIES_MAX`."""
    eligible = _eligible(question)
    if not eligible:
        return Decision(question, (), 0)
    preferences = question.preferences
    bests = _bests(eligible, question)
    ranked = _ranked(eligible, question, bests)
    chosen_by_name = bool(preferences.operator or preferences.order)
    if chosen_by_name:
        ranked.sort(key=lambda pair: _named_rank(pair[1], preferences))  # stable: by score within
        if not preferences.allow_fallbacks:
            ranked = [
                pair for pair in ranked if _named_rank(pair[1], preferences) < len(preferences.order) + 1
            ]
            if not ranked:
                return Decision(question, (), len(eligible), eligible, bests)
    first = _first(ranked, question, chosen_by_name=chosen_by_name)
    if not preferences.allow_fallbacks and not chosen_by_name:
        return Decision(question, (first,), len(eligible), eligible, bests)
    return Decision(question, _with_failover(first, ranked, preferences), len(eligible), eligible, bests)


def _eligible(question: Question) -> list[NodeView]:
    """Give the views without an `exclusion`; for a buyer without wishes in one pass, the hot path's."""
    if question.preferences is not NO_PREFERENCES:
        return [view for view in question.views if exclusion(view, question) is None]
    heard_since_ms, context = question.now_ms - NODE_SILENT_MS_MAX, question.context_min
    return [
        view
        for view in question.views
        if view.last_seen_ms >= heard_since_ms
        and view.is_ready
        and not view.is_draining
        and view.running + view.waiting < view.capacity
        and view.context >= context
        and (
            view.success_permille is None
            or view.success_permille >= SUCCESS_PERMILLE_MIN
            or view.is_probe_due
        )
    ]


def exclusion(view: NodeView, question: Question) -> Exclusion | None:
    """Tell why this node may not serve, None if it may."""
    if question.now_ms - view.last_seen_ms > NODE_SILENT_MS_MAX:
        return Exclusion.SILENT
    if view.is_draining:
        return Exclusion.DRAINING
    if not view.is_ready:
        return Exclusion.NOT_READY
    if (
        view.success_permille is not None
        and view.success_permille < SUCCESS_PERMILLE_MIN
        and not view.is_probe_due
    ):
        return Exclusion.FAILING
    if view.running + view.waiting >= view.capacity:
        return Exclusion.FULL
    if view.context < question.context_min:
        return Exclusion.CONTEXT
    if question.preferences is not NO_PREFERENCES:
        return _excluded_by_buyer(view, question.preferences)
    return None


def _excluded_by_buyer(view: NodeView, preferences: Preferences) -> Exclusion | None:
    if preferences.price_in_max is not None and view.price_in > preferences.price_in_max:
        return Exclusion.PRICE
    if preferences.price_out_max is not None and view.price_out > preferences.price_out_max:
        return Exclusion.PRICE
    names = (view.operator_id, view.node_id)
    if preferences.only and not any(name in preferences.only for name in names):
        return Exclusion.NOT_CHOSEN_BY_BUYER
    if any(name in preferences.ignore for name in names):
        return Exclusion.NOT_CHOSEN_BY_BUYER
    return None


def _ranked(
    eligible: Sequence[NodeView], question: Question, bests: tuple[int, int]
) -> list[tuple[float, NodeView]]:
    """Order by score, load, id: `_parts` of each without the objects, since this is the hot path."""
    weights = question.weights
    total = weights.latency + weights.load + weights.price
    latency_weight, load_weight, price_weight = weights.latency, weights.load, weights.price
    tokens_in, tokens_out = question.prompt_tokens, question.completion_tokens
    cost_best, latency_best = bests
    rows = []
    for view in eligible:
        latency_ms = view.latency_ms
        latency = 1.0 if latency_ms is None else latency_best / (latency_ms + 1)
        used = (view.running + view.waiting) / view.capacity
        cost = tokens_in * view.price_in + tokens_out * view.price_out
        whole = (
            latency_weight * latency + load_weight * (1.0 - used) + price_weight * (cost_best / (cost + 1))
        ) / total
        score = whole * (1000 - view.penalty_permille) / 1000 if view.penalty_permille else whole
        rows.append((-score, used, view.node_id, view))
    rows.sort()  # ids differ, so views are never compared
    return [(-row[0], row[3]) for row in rows]


def _bests(eligible: Sequence[NodeView], question: Question) -> tuple[int, int]:
    """The lowest cost and latency there is; +1 keeps zero prices and latencies comparable."""
    tokens_in, tokens_out = question.prompt_tokens, question.completion_tokens
    costs = [tokens_in * view.price_in + tokens_out * view.price_out for view in eligible]
    return min(costs) + 1, _latency_best(eligible) + 1


def _latency_best(eligible: Sequence[NodeView]) -> int:
    return min([view.latency_ms for view in eligible if view.latency_ms is not None], default=0)


def _all_parts(eligible: Sequence[NodeView], question: Question) -> list[Parts]:
    """Score each node against the best of these."""
    bests = _bests(eligible, question)
    return [_parts(view, question, *bests) for view in eligible]


def _parts(view: NodeView, question: Question, cost_best: int, latency_best: int) -> Parts:
    weights = question.weights
    total = weights.latency + weights.load + weights.price
    cost = question.prompt_tokens * view.price_in + question.completion_tokens * view.price_out
    latency = 1.0 if view.latency_ms is None else latency_best / (view.latency_ms + 1)
    load = 1.0 - _load(view)
    price = cost_best / (cost + 1)
    whole = (weights.latency * latency + weights.load * load + weights.price * price) / total
    score = whole * (1000 - view.penalty_permille) / 1000
    return Parts(latency, load, price, view.penalty_permille, score)


def _named_rank(view: NodeView, preferences: Preferences) -> int:
    """Preferred operator, then `order`, then everybody else."""
    if preferences.operator is not None and preferences.operator in (view.operator_id, view.node_id):
        return 0
    for place, name in enumerate(preferences.order):
        if name in (view.operator_id, view.node_id):
            return place + 1
    return len(preferences.order) + 1


def _first(ranked: list[tuple[float, NodeView]], question: Question, *, chosen_by_name: bool) -> NodeView:
    preferences = question.preferences
    if chosen_by_name:
        best_rank = _named_rank(ranked[0][1], preferences)
        pool = [pair for pair in ranked if _named_rank(pair[1], preferences) == best_rank]
    else:
        pool = ranked
    match preferences.sort:
        case Sort.BALANCED:
            best = pool[:BEST]
            return _warm_tie(best, question.warm) or _draw(best, question.random)
        case Sort.PRICE:
            (tokens_in, tokens_out), warm = (
                (question.prompt_tokens, question.completion_tokens),
                question.warm,
            )
            return min(
                (view for _, view in pool),
                key=lambda view: (
                    tokens_in * view.price_in + tokens_out * view.price_out, view.node_id != warm, _load(view)
                ),
            )  # fmt: skip
        case Sort.LATENCY:
            return min((view for _, view in pool), key=_latency_or_last)
        case Sort.THROUGHPUT:
            return min((view for _, view in pool), key=lambda view: (-(view.tokens_per_s or 0), _load(view)))
        case Sort.LOAD:
            return min((view for _, view in pool), key=_load)


def _load(view: NodeView) -> float:
    """The share of a node's places that is taken."""
    return (view.running + view.waiting) / view.capacity


def _warm_tie(best: Sequence[tuple[float, NodeView]], warm: NodeId | None) -> NodeView | None:
    """Give the warm node if its score is as good as the best's."""
    if warm is None:
        return None
    enough = best[0][0] * (1000 - TIE_PERMILLE) / 1000
    return next((view for score, view in best if view.node_id == warm and score >= enough), None)


def _latency_or_last(view: NodeView) -> tuple[bool, int]:
    return (view.latency_ms is None, view.latency_ms or 0)


def _draw(best: Sequence[tuple[float, NodeView]], random: float) -> NodeView:
    """Draw one, its score being its weight; uniformly if all scores are zero."""
    total = sum(score for score, _ in best)
    if total <= 0:
        return best[int(random * len(best))][1]
    mark = random * total
    for score, view in best:
        mark -= score
        if mark < 0:
            return view
    return best[-1][1]


def _with_failover(
    first: NodeView, ranked: Sequence[tuple[float, NodeView]], preferences: Preferences
) -> tuple[NodeView, ...]:
    """Append the next to ask: the buyer's own order, then operators not yet tried, then the score."""
    if preferences.operator or preferences.order:
        return _with_named_failover(first, ranked, preferences)
    chosen, tried = [first], {first.operator_id}
    while len(chosen) <= RETRIES_MAX:
        following = None
        for _, view in ranked:  # ends early: this is the hot path
            if view.operator_id not in tried:
                following = view
                break
            if following is None and view not in chosen:
                following = view
        if following is None:
            break
        chosen.append(following)
        tried.add(following.operator_id)
    return tuple(chosen)


def _with_named_failover(
    first: NodeView, ranked: Sequence[tuple[float, NodeView]], preferences: Preferences
) -> tuple[NodeView, ...]:
    chosen = [first]
    rest = [view for _, view in ranked if view is not first]
    while rest and len(chosen) <= RETRIES_MAX:
        tried = {view.operator_id for view in chosen}
        following = min(rest, key=lambda view: (_named_rank(view, preferences), view.operator_id in tried))
        chosen.append(following)
        rest.remove(following)
    return tuple(chosen)


def explain(decision: Decision) -> Explanation:
    """Tell a decision as data: per node its score or the reason it was left out."""
    question = decision.question
    eligible = [view for view in question.views if exclusion(view, question) is None]
    parts = (
        dict(zip((v.node_id for v in eligible), _all_parts(eligible, question), strict=True))
        if eligible
        else {}
    )
    ranks = {view.node_id: rank for rank, view in enumerate(decision.candidates)}
    verdicts = [
        Verdict(
            view.node_id,
            view.operator_id,
            ranks.get(view.node_id),
            exclusion(view, question),
            parts.get(view.node_id),
        )
        for view in question.views
    ]
    weights = question.weights
    return Explanation(
        model=question.views[0].model if question.views else "",
        now_ms=question.now_ms,
        random=question.random,
        weights={"latency": weights.latency, "load": weights.load, "price": weights.price},
        verdicts=verdicts,
    )


def summary(decision: Decision, served_by: NodeId) -> str:
    """Tell in one line why `served_by` served, for a response header (ASCII, under 200 characters)."""
    question = decision.question
    view = next((view for view in decision.candidates if view.node_id == served_by), None)
    if view is None:
        return ""
    parts = _parts(view, question, *decision.bests)
    return (
        f"score={parts.score:.3f}; latency={parts.latency:.3f}; load={parts.load:.3f}; "
        f"price={parts.price:.3f}; sort={question.preferences.sort}; "
        f"attempt={decision.candidates.index(view) + 1}; "
        f"eligible={decision.eligible}; known={len(question.views)}"
        f"{'; warm' if served_by == question.warm else ''}"
    )
