"""The nodes that are there right now, what they offer, and how they have been doing.

Fed by status messages, by the database (who is a node and not revoked) and by the gateway's own
experience; read on the hot path, so everything here is synchronous and in memory.

The law:

- Only a node the database knows and has not revoked counts; a status must come on its node's own subject.
- A node is out 60 s after its last status, and at once when it says it drains.
- A price holds from the moment its version is stored, never before (V7): until then the old one is
  in force, and a new offer is not made.  A node changes a price at most every `PRICE_CHANGE_MS_MIN`.
- A gateway counts the requests it has sent since a node's last status on top of what the status says, so
  that a quiet node is not flooded for three seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from marketplace.fabric.floods import UnwantedCallback
from marketplace.fabric.live import LiveModel, LiveNode
from marketplace.routing.choice import NodeView
from marketplace.routing.health import Health
from marketplace.routing.shortlist import SIZE, ShortList
from marketplace.routing.tally import Tally
from node_agent.protocol import (
    NODE_SILENT_MS_MAX,
    VERSION,
    ModelStatus,
    NodeId,
    ProtocolError,
    Status,
    decode_status,
)

_log = logging.getLogger(__name__)

STATUS_BURST: Final = 5
"""A node may say something new five times at once, then once a second; the rest is not even decoded."""
STATUS_PAUSE_MS: Final = 1_000
PRICE_CHANGE_MS_MIN: Final = 10_000
_SUBJECT_PREFIX: Final = b"status."

OfferKey = tuple[NodeId, str]
"""Node and model."""


class PriceBook(Protocol):
    """Stores price versions; implemented by `marketplace.catalog`."""

    async def version_of(self, node_id: str, model: str, price_in: int, price_out: int) -> int:
        """Give the number of this price's version, storing a new one if it changed.

        Prices are nano-dollars per million tokens.
        """
        ...


class Outcome(Enum):
    """How a request to a node ended, as its score sees it."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    NEUTRAL = "neutral"
    """The buyer left, our own fault, or the request's."""


@dataclass(frozen=True, slots=True)
class _Price:
    price_in: int
    price_out: int
    version: int
    since_ms: int


@dataclass(slots=True)
class _Offer:
    """One node's offer of one model."""

    status: ModelStatus
    health: Health = field(default_factory=Health)
    price: _Price | None = None
    in_flight: int = 0
    """This gateway's own requests there."""
    in_flight_at_status: int = 0
    view: NodeView | None = None
    """As of the last change; None when it must be made again."""


@dataclass(slots=True)
class _Node:
    operator_id: str
    last_seen_ms: int = 0
    status: Status | None = None
    offers: dict[str, _Offer] = field(default_factory=dict)
    statuses_left: int = STATUS_BURST
    refilled_ms: int = 0


class Registry:
    """See the module's text. `clock_ms`: monotonic milliseconds."""

    def __init__(self, clock_ms: Callable[[], int], *, on_unwanted: UnwantedCallback | None = None) -> None:
        """`on_unwanted`: told of every status that came too soon."""
        self._clock_ms = clock_ms
        self._on_unwanted = on_unwanted
        self._suspended: frozenset[str] = frozenset()
        self.tally = Tally(clock_ms)
        """Why nodes were chosen or not; every decision is offered to it."""
        self._nodes: dict[NodeId, _Node] = {}
        self._by_model: dict[str, dict[NodeId, _Offer]] = {}
        self._short: dict[str, ShortList] = {}
        self._unpriced: dict[OfferKey, tuple[int, int]] = {}

    @property
    def now_ms(self) -> int:
        return self._clock_ms()

    # -- reading (hot path)

    def views(self, model: str) -> list[NodeView]:
        """Give every priced offer of `model`, eligible or not."""
        offers = self._by_model.get(model)
        if not offers:
            return []
        found = []
        for node_id, offer in offers.items():
            view = offer.view or self._view(node_id, offer)
            if view is not None:
                found.append(view)
        if self._suspended:
            found = [view for view in found if view.operator_id not in self._suspended]
        return found

    def best_views(self, model: str) -> list[NodeView]:
        """Give the offers worth looking at for a buyer without wishes: all, or of very many the best."""
        offers, short = self._by_model.get(model), self._short.get(model)
        if offers is None or short is None or len(offers) <= SIZE:
            return self.views(model)
        found = []
        for node_id in short:
            offer = offers[node_id]
            view = offer.view or self._view(node_id, offer)
            if view is not None and view.operator_id not in self._suspended:
                found.append(view)
        return found

    def models(self) -> list[str]:
        """Give the models some live node offers, by name."""
        return sorted(model for model in self._by_model if self.views(model))

    def live(self, node_id: str) -> LiveNode | None:
        """Give what is known of a node, None if it is silent."""
        node = self._nodes.get(NodeId(node_id))
        if node is None or node.status is None:
            return None
        now_ms = self._clock_ms()
        if now_ms - node.last_seen_ms > NODE_SILENT_MS_MAX:
            return None
        models = tuple(
            LiveModel(
                name=name,
                context=offer.status.context,
                price_in=offer.status.price_in,
                price_out=offer.status.price_out,
                running=offer.status.running,
                waiting=offer.status.waiting,
                capacity=offer.status.capacity,
                is_ready=offer.status.is_ready,
                success_permille=offer.health.success_permille(now_ms),
                latency_ms=offer.health.latency_ms,
            )
            for name, offer in node.offers.items()
        )
        return LiveNode(now_ms - node.last_seen_ms, node.status.is_draining, node.status.version, models)

    # -- experience (hot path)

    def begin(self, node_id: NodeId, model: str) -> None:
        """A request has left for the node; pair it with `finish`."""
        offer = self._offer(node_id, model)
        if offer is not None:
            offer.in_flight += 1
            offer.view = None

    def finish(
        self,
        node_id: NodeId,
        model: str,
        outcome: Outcome,
        *,
        first_token_ms: int | None = None,
        tokens_per_s: int | None = None,
    ) -> None:
        """It has ended. `first_token_ms`: from sending to the first part of a streamed answer."""
        offer = self._offer(node_id, model)
        if offer is None:
            return
        offer.in_flight = max(0, offer.in_flight - 1)
        offer.in_flight_at_status = min(offer.in_flight_at_status, offer.in_flight)
        offer.view = None
        if outcome is Outcome.SUCCEEDED:
            offer.health.succeeded(self._clock_ms(), first_token_ms, tokens_per_s)
            self.tally.answered(node_id, model, first_token_ms)
        elif outcome is Outcome.FAILED:
            offer.health.failed(self._clock_ms())
            self.tally.failed(node_id, model)

    # -- what the nodes say

    def hear(self, subject: bytes, payload: bytes) -> None:
        """Take in one status message; anything but a known node's own is ignored."""
        node_id = NodeId(subject.removeprefix(_SUBJECT_PREFIX).decode("ascii", "replace"))
        node = self._nodes.get(node_id)
        if node is None:
            return
        if not self._may_speak(node):
            if self._on_unwanted is not None:
                self._on_unwanted(node_id, len(payload))
            return
        try:
            status = decode_status(payload)
        except ProtocolError as error:
            _log.warning("node %s sent a bad status: %s", node_id, error)
            return
        if status.node_id != node_id or status.v != VERSION:
            _log.warning("node %s sent a status of another node or version", node_id)
            return
        self._take(node_id, node, status)

    def _may_speak(self, node: _Node) -> bool:
        now_ms = self._clock_ms()
        earned = (now_ms - node.refilled_ms) // STATUS_PAUSE_MS
        if earned > 0:
            node.statuses_left = min(STATUS_BURST, node.statuses_left + earned)
            node.refilled_ms = now_ms
        if node.statuses_left <= 0:
            return False
        node.statuses_left -= 1
        return True

    def _take(self, node_id: NodeId, node: _Node, status: Status) -> None:
        node.last_seen_ms = self._clock_ms()
        node.status = status
        offered = {model.name: model for model in status.models}
        for gone in node.offers.keys() - offered.keys():
            self._withdraw(node_id, node, gone)
        for name, model in offered.items():
            offer = node.offers.get(name)
            if offer is None:
                offer = node.offers[name] = _Offer(model)
                self._by_model.setdefault(name, {})[node_id] = offer
            offer.status = model
            offer.in_flight_at_status = offer.in_flight
            offer.view = None
            self._want_price(node_id, offer)
            self._list(node_id, offer)

    def _withdraw(self, node_id: NodeId, node: _Node, model: str) -> None:
        node.offers.pop(model, None)
        self._unpriced.pop((node_id, model), None)
        offers = self._by_model.get(model)
        if offers is not None:
            offers.pop(node_id, None)
            if model in self._short:
                self._short[model].drop(node_id)
            if not offers:
                del self._by_model[model]
                self._short.pop(model, None)

    def _list(self, node_id: NodeId, offer: _Offer) -> None:
        """Where a model has very many nodes, see whether this one is among the best."""
        model = offer.status.name
        if len(self._by_model[model]) <= SIZE:
            return
        view = self._view(node_id, offer)
        if view is not None:
            self._short.setdefault(model, ShortList()).take(view)

    def absent(self, node_id: NodeId) -> None:
        """The fabric says that nobody listens there: silent until its next status."""
        node = self._nodes.get(node_id)
        if node is None:
            return
        node.last_seen_ms = self._clock_ms() - NODE_SILENT_MS_MAX - 1
        for model, offer in node.offers.items():
            offer.view = None
            if model in self._short:
                self._short[model].drop(node_id)

    # -- prices

    def _want_price(self, node_id: NodeId, offer: _Offer) -> None:
        status, price = offer.status, offer.price
        key = (node_id, status.name)
        if price is not None:
            if (price.price_in, price.price_out) == (status.price_in, status.price_out):
                self._unpriced.pop(key, None)
                return
            if self._clock_ms() - price.since_ms < PRICE_CHANGE_MS_MIN:
                return
        self._unpriced[key] = (status.price_in, status.price_out)

    def unpriced(self) -> list[tuple[OfferKey, tuple[int, int]]]:
        """Give the offers whose (price_in, price_out) has no stored version yet."""
        return list(self._unpriced.items())

    def set_price(self, node_id: NodeId, model: str, price_in: int, price_out: int, version: int) -> None:
        """This price's version is stored: it is in force from now on."""
        if self._unpriced.get((node_id, model)) == (price_in, price_out):
            del self._unpriced[(node_id, model)]
        offer = self._offer(node_id, model)
        if offer is not None:
            offer.price = _Price(price_in, price_out, version, self._clock_ms())
            offer.view = None
            self._list(node_id, offer)

    # -- who counts

    def set_known(self, known: Mapping[NodeId, str]) -> None:
        """These nodes (id → operator id) exist and are not revoked; all others are forgotten at once."""
        for node_id in self._nodes.keys() - known.keys():
            self.remove(node_id)
        for node_id, operator_id in known.items():
            self.add(node_id, operator_id)

    def add(self, node_id: NodeId, operator_id: str) -> None:
        if node_id not in self._nodes:
            self._nodes[node_id] = _Node(operator_id, refilled_ms=self._clock_ms())

    def suspend(self, operator_ids: Collection[str]) -> None:
        """Offer nothing of these operators, and of everybody else again."""
        self._suspended = frozenset(operator_ids)

    def remove(self, node_id: NodeId) -> None:
        node = self._nodes.pop(node_id, None)
        if node is not None:
            for model in list(node.offers):
                self._withdraw(node_id, node, model)

    def expire(self) -> None:
        """Forget what silent nodes offered; what is known of their health goes with it."""
        now_ms = self._clock_ms()
        for node_id, node in self._nodes.items():
            if node.offers and now_ms - node.last_seen_ms > NODE_SILENT_MS_MAX:
                for model in list(node.offers):
                    self._withdraw(node_id, node, model)

    def heard_within(self, milliseconds: int) -> list[NodeId]:
        """Give the nodes that sent a status in the last so many milliseconds."""
        since_ms = self._clock_ms() - milliseconds
        return [
            node_id
            for node_id, node in self._nodes.items()
            if node.status is not None and node.last_seen_ms >= since_ms
        ]

    # -- inside

    def _offer(self, node_id: NodeId, model: str) -> _Offer | None:
        offers = self._by_model.get(model)
        return None if offers is None else offers.get(node_id)

    def _view(self, node_id: NodeId, offer: _Offer) -> NodeView | None:
        node, status, price = self._nodes[node_id], offer.status, offer.price
        if price is None or node.status is None:
            return None
        now_ms = self._clock_ms()
        offer.view = NodeView(
            node_id=node_id,
            operator_id=node.operator_id,
            model=status.name,
            price_in=price.price_in,
            price_out=price.price_out,
            price_version=price.version,
            context=status.context,
            running=status.running + offer.in_flight - offer.in_flight_at_status,
            waiting=status.waiting,
            capacity=status.capacity,
            last_seen_ms=node.last_seen_ms,
            latency_ms=offer.health.latency_ms,
            success_permille=offer.health.success_permille(now_ms),
            penalty_permille=offer.health.penalty_permille(now_ms),
            tokens_per_s=offer.health.tokens_per_s,
            is_probe_due=not offer.in_flight and offer.health.is_probe_due(now_ms),
            is_draining=node.status.is_draining,
            is_ready=status.is_ready,
            tokenizer_sha256=status.tokenizer_sha256,
        )
        return offer.view
