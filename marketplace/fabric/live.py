"""What is known of a node right now, as the API shows it; implemented by `marketplace.routing.registry`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class LiveModel:
    """One model a node offers, by its latest status. Prices: nano-dollars per million tokens."""

    name: str
    context: int
    price_in: int
    price_out: int
    running: int
    waiting: int
    capacity: int
    is_ready: bool
    success_permille: int | None
    """Of the last five minutes on this gateway; None without requests."""
    latency_ms: int | None
    """To the first token, smoothed; None without requests."""


@dataclass(frozen=True, slots=True)
class LiveNode:
    """A node that was heard within the last minute."""

    silent_ms: int
    is_draining: bool
    version: str
    models: tuple[LiveModel, ...]


class LiveNodes(Protocol):
    """Where the API finds live nodes: `app.state.live_nodes`, absent in processes without a fabric."""

    def live(self, node_id: str) -> LiveNode | None:
        """Give what is known of the node, None if it is silent."""
        ...
