"""Why requests went where they went, added up for the operators (B6).

Decisions are explained one by one (`choice.explain`); an operator wants to know what cost him most of his
requests lately.  A gateway explains a sample of its decisions, as many as `VERDICTS_PER_S` allows, and adds
up per node, model and outcome; the sums go to the database (`routing_tallies`), where gateways meet.

    chosen                            asked first
    price, latency, load              trailed the winner most in this part of the score
    recent_failure                    … because of failures a moment ago
    drawn_lower                       scored no worse than the winner; the draw fell on him
    silent, full, …                   left out (`choice.Exclusion`)
    nobody_eligible                   could have served, but the buyer's wishes left nobody

How requests ended is added up beside it, every one of them: `answered`, `failed` (by the node's fault), and
`first_token`, whose own sum is the milliseconds to the first token of those that streamed.

With `price`, `latency` and `load` the sums of both sides' numbers are kept, so that the operator is told
by how much: nano-dollars per million tokens as this request mixes them, ms, permille of capacity in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from msgspec.structs import replace

from marketplace.routing.choice import Decision, NodeView, Parts, Question, explain
from node_agent.protocol import NodeId

VERDICTS_PER_S: Final = 400
"""5 to 9 µs each: 0.2 to 0.4 % of a gateway's core (2,000 took a tenth of every request's time)."""
VIEWS_MAX: Final = 200
"""Of a decision among more, the candidates and this many others are explained."""
KEYS_MAX: Final = 50_000
"""Sums kept until they are taken; beyond it new ones are dropped."""

CHOSEN: Final = "chosen"
DRAWN_LOWER: Final = "drawn_lower"
RECENT_FAILURE: Final = "recent_failure"
NOT_CHOSEN_BY_BUYER: Final = "not_chosen_by_buyer"
NOBODY: Final = "nobody_eligible"
ANSWERED: Final = "answered"
FAILED: Final = "failed"
FIRST_TOKEN: Final = "first_token"  # noqa: S105 - a token of text


class Key(NamedTuple):
    """What is added up apart."""

    node_id: NodeId
    model: str
    outcome: str


@dataclass(slots=True)
class Sums:
    """Over `requests` decisions: the node's own number and the winner's, in the outcome's unit."""

    requests: int = 0
    own: int = 0
    winner: int = 0


class Outcome(NamedTuple):
    """What one decision meant for one node."""

    key: Key
    own: int = 0
    winner: int = 0


def outcomes(decision: Decision) -> Iterator[Outcome]:
    """Tell for every node of the decision why it was, or was not, asked first."""
    question = decision.question
    if not question.views:
        return
    model = question.views[0].model
    first = decision.candidates[0] if decision.candidates else None
    parts = {verdict.node_id: verdict for verdict in explain(decision).verdicts}
    winner = None if first is None else parts[first.node_id].parts
    by_name = bool(question.preferences.operator or question.preferences.order)
    for view in question.views:
        verdict = parts[view.node_id]
        key = Key(view.node_id, model, "")
        if verdict.excluded is not None:
            yield Outcome(key._replace(outcome=verdict.excluded.value))
        elif first is None or winner is None or verdict.parts is None:
            yield Outcome(key._replace(outcome=NOBODY))
        elif view is first:
            yield Outcome(key._replace(outcome=CHOSEN))
        elif by_name:
            yield Outcome(key._replace(outcome=NOT_CHOSEN_BY_BUYER))
        else:
            outcome, own, theirs = _trailed(view, verdict.parts, first, winner, question)
            yield Outcome(key._replace(outcome=outcome), own, theirs)


def _trailed(
    view: NodeView, own: Parts, first: NodeView, winner: Parts, question: Question
) -> tuple[str, int, int]:
    """Tell in which part of the score the node trailed the winner most, and both sides' numbers."""
    if own.score >= winner.score:
        return DRAWN_LOWER, 0, 0
    weights = question.weights
    total = weights.latency + weights.load + weights.price
    gaps = {
        "latency": weights.latency * (winner.latency - own.latency) / total,
        "load": weights.load * (winner.load - own.load) / total,
        "price": weights.price * (winner.price - own.price) / total,
        RECENT_FAILURE: (own.penalty_permille - winner.penalty_permille) / 1000,
    }
    worst = max(gaps, key=gaps.__getitem__)
    number = _NUMBERS.get(worst)
    return (worst, 0, 0) if number is None else (worst, number(view, question), number(first, question))


def _price(view: NodeView, question: Question) -> int:
    tokens = max(1, question.prompt_tokens + question.completion_tokens)
    mixed = question.prompt_tokens * view.price_in + question.completion_tokens * view.price_out
    return mixed // tokens


def _latency(view: NodeView, question: Question) -> int:
    del question
    return view.latency_ms or 0


def _load(view: NodeView, question: Question) -> int:
    del question
    return 1000 * (view.running + view.waiting) // max(1, view.capacity)


_NUMBERS: Final[dict[str, Callable[[NodeView, Question], int]]] = {
    "price": _price,
    "latency": _latency,
    "load": _load,
}


class Tally:
    """Adds up a sample of one gateway's decisions. Times are monotonic milliseconds."""

    def __init__(self, clock_ms: Callable[[], int]) -> None:
        self._clock_ms = clock_ms
        self._sums: dict[Key, Sums] = {}
        self._allowed: float = VERDICTS_PER_S
        self._filled_ms = clock_ms()

    def note(self, decision: Decision) -> None:
        """Count a decision if there is time for it just now."""
        now_ms = self._clock_ms()
        earned = (now_ms - self._filled_ms) * VERDICTS_PER_S / 1000
        self._allowed, self._filled_ms = min(VERDICTS_PER_S, self._allowed + earned), now_ms
        if self._allowed <= 0:
            return
        decision = _bounded(decision)
        self._allowed -= len(decision.question.views)
        for outcome in outcomes(decision):
            self._add(outcome)

    def answered(self, node_id: NodeId, model: str, first_token_ms: int | None) -> None:
        """Count a request that the node answered."""
        self._add(Outcome(Key(node_id, model, ANSWERED)))
        if first_token_ms is not None:
            self._add(Outcome(Key(node_id, model, FIRST_TOKEN), own=first_token_ms))

    def failed(self, node_id: NodeId, model: str) -> None:
        """Count a request that failed by the node's fault."""
        self._add(Outcome(Key(node_id, model, FAILED)))

    def _add(self, outcome: Outcome) -> None:
        sums = self._sums.get(outcome.key)
        if sums is None:
            if len(self._sums) >= KEYS_MAX:
                return
            sums = self._sums[outcome.key] = Sums()
        sums.requests += 1
        sums.own += outcome.own
        sums.winner += outcome.winner

    def take(self) -> dict[Key, Sums]:
        """Give the sums since the last time, and begin anew."""
        taken, self._sums = self._sums, {}
        return taken

    def give_back(self, sums: dict[Key, Sums]) -> None:
        """What was taken could not be stored: keep it for the next time."""
        for key, taken in sums.items():
            kept = self._sums.setdefault(key, Sums())
            kept.requests += taken.requests
            kept.own += taken.own
            kept.winner += taken.winner


def _bounded(decision: Decision) -> Decision:
    """Keep the candidates and an arbitrary part of the others, where there are many."""
    question = decision.question
    if len(question.views) <= VIEWS_MAX:
        return decision
    begin = int(question.random * (len(question.views) - VIEWS_MAX))
    asked = {view.node_id for view in decision.candidates}
    others = [v for v in question.views[begin : begin + VIEWS_MAX] if v.node_id not in asked]
    return replace(decision, question=replace(question, views=[*decision.candidates, *others]))
