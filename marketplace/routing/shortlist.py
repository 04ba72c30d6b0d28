"""Which of very many nodes are looked at for a request.

Looking at ten thousand nodes takes ten milliseconds of every request, so a model with more than `SIZE` nodes
has a short list: the best of them, by the score every node had when it last spoke (every three seconds).
The choice itself is then made as ever, on what the listed nodes are at that moment.

The law: a node that scores better than the worst on the list is on it at its next status; a node that is
withdrawn leaves it at once.  What a buyer wishes (names, prices, an order) is looked for among all nodes,
and so is everybody when nobody on the list can serve.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from marketplace.routing.choice import R21, NodeView
from marketplace.routing.health import SUCCESS_PERMILLE_MIN
from node_agent.protocol import NodeId

SIZE: Final = 32
TOKENS_IN, TOKENS_OUT = 1, 1
"""The shape of request the list is kept for."""


class ShortList:
    """The best nodes of one model, kept as statuses come."""

    __slots__ = ("_cost_best", "_latency_best", "_scores")

    def __init__(self) -> None:
        self._scores: dict[NodeId, float] = {}
        self._cost_best: int | None = None
        self._latency_best: int | None = None

    def __iter__(self) -> Iterator[NodeId]:
        return iter(self._scores)

    def take(self, view: NodeView) -> None:
        """See a node as it is now: it enters, leaves or moves on the list."""
        is_failing = view.success_permille is not None and view.success_permille < SUCCESS_PERMILLE_MIN
        is_full = view.running + view.waiting >= view.capacity
        if view.is_draining or not view.is_ready or is_full or (is_failing and not view.is_probe_due):
            self._scores.pop(view.node_id, None)
            return
        self._scores[view.node_id] = self._score(view)
        if len(self._scores) > SIZE:
            del self._scores[min(self._scores, key=self._scores.__getitem__)]

    def drop(self, node_id: NodeId) -> None:
        """The node is gone."""
        self._scores.pop(node_id, None)

    def _score(self, view: NodeView) -> float:
        """R21's score against the best ever seen here; relative, not money."""
        cost = TOKENS_IN * view.price_in + TOKENS_OUT * view.price_out + 1
        self._cost_best = cost if self._cost_best is None else min(self._cost_best, cost)
        latency = 1.0
        if view.latency_ms is not None:
            best = view.latency_ms if self._latency_best is None else min(self._latency_best, view.latency_ms)
            self._latency_best = best
            latency = (best + 1) / (view.latency_ms + 1)
        load = 1.0 - (view.running + view.waiting) / view.capacity
        whole = R21.latency * latency + R21.load * load + R21.price * self._cost_best / cost
        return whole * (1000 - view.penalty_permille) / 1000
