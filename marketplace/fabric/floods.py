"""Who sends what nobody waits for, and when that is an attack.

A node may publish a million times on a reply subject it was given, asked or not any more, and its status
as often as it likes; NATS has no rate limit for it.  Each such message costs the gateway a look-up, and
enough of them cost it its connection (the server cuts slow consumers).  So every unwanted message is
counted against its node, and a node that floods is cut off (`marketplace.fabric.sessions.expel`).

An honest node sends a few frames after a cancel: at most the credit of that request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from node_agent.protocol import NodeId

MESSAGES_BURST: Final = 20_000
MESSAGES_PER_S: Final = 1_000
BYTES_BURST: Final = 32 * 1024 * 1024
BYTES_PER_S: Final = 2 * 1024 * 1024
AGAIN_AFTER_MS: Final = 2_000
"""A flood still under way after this is told again: the cut may not have reached the server."""

UnwantedCallback = Callable[[NodeId, int], None]
"""(node, bytes)"""


@dataclass(slots=True)
class _Meter:
    """What one node may still send unasked."""

    messages: float
    octets: float
    filled_ms: int
    told_ms: int | None = None


class Floods:
    """Counts unwanted messages per node. Times are monotonic milliseconds."""

    def __init__(self, clock_ms: Callable[[], int], on_flood: Callable[[NodeId], None]) -> None:
        """`on_flood`: called when a node has sent too much, and again while it goes on."""
        self._clock_ms = clock_ms
        self._on_flood = on_flood
        self._meters: dict[NodeId, _Meter] = {}

    def unwanted(self, node: NodeId, size: int) -> None:
        """Note one message of `size` bytes that nobody waits for."""
        now_ms = self._clock_ms()
        meter = self._meters.get(node)
        if meter is None:
            meter = self._meters[node] = _Meter(MESSAGES_BURST, BYTES_BURST, now_ms)
        _refill(meter, now_ms)
        meter.messages -= 1
        meter.octets -= size
        if meter.messages >= 0 and meter.octets >= 0:
            return
        if meter.told_ms is None or now_ms - meter.told_ms >= AGAIN_AFTER_MS:
            meter.told_ms = now_ms
            self._on_flood(node)

    def forget_quiet(self) -> None:
        """Drop the meters that are full again; call it now and then."""
        now_ms = self._clock_ms()
        for node, meter in list(self._meters.items()):
            _refill(meter, now_ms)
            if meter.messages >= MESSAGES_BURST and meter.octets >= BYTES_BURST:
                del self._meters[node]


def _refill(meter: _Meter, now_ms: int) -> None:
    passed_s = (now_ms - meter.filled_ms) / 1000
    meter.filled_ms = now_ms
    meter.messages = min(MESSAGES_BURST, max(0.0, meter.messages) + passed_s * MESSAGES_PER_S)
    meter.octets = min(BYTES_BURST, max(0.0, meter.octets) + passed_s * BYTES_PER_S)
