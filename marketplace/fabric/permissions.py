"""All a node may do on the fabric.

It hears its own subjects, tells its own status, and answers where it was asked to answer: NATS remembers
per connection which reply subjects it delivered, and for how long and how often they may be used.  So no
node can answer for another, nor speak to a gateway that did not ask it.  What NATS keeps of it costs
some 130 bytes for every request of the last ten minutes, and its time does not grow (README).
"""

from __future__ import annotations

from typing import Any, Final

from node_agent.protocol import REPLY_BYTES_MAX, WALL_MS_MAX, NodeId, node_subjects, status_subject

FRAMES_PER_REPLY_MAX: Final = REPLY_BYTES_MAX // 16
"""No answer within `REPLY_BYTES_MAX` has more: the shortest `Delta` with content takes 18 bytes."""
REPLY_NS_MAX: Final = (WALL_MS_MAX + 30_000) * 1_000_000
UNLIMITED: Final = -1
"""nats-server 2.15.1 applies a user token's numeric limits in operator mode only (tried: a payload limit
is ignored here), so sizes are checked by their readers; the server's own `max_payload` stands above them."""


def reply_subject(gateway: str, number: int, node: NodeId) -> str:
    """Where one request of one gateway is answered, and by whom alone."""
    return f"reply.{gateway}.{number}.{node}"


def reply_subjects(gateway: str) -> str:
    """Every answer to one gateway, for its one subscription."""
    return f"reply.{gateway}.*.*"


def answering_node(subject: bytes) -> NodeId:
    """Tell which node published on this reply subject: NATS lets no other do so."""
    return NodeId(subject[subject.rfind(b".") + 1 :].decode("ascii", "replace"))


def node_permissions(node: NodeId) -> dict[str, Any]:
    """The `nats` part of a node's user token."""
    return {
        "pub": {"allow": [status_subject(node)]},
        "sub": {"allow": [node_subjects(node)]},
        "resp": {"max": FRAMES_PER_REPLY_MAX, "ttl": REPLY_NS_MAX},
        "subs": UNLIMITED,
        "data": UNLIMITED,
        "payload": UNLIMITED,
        "type": "user",
        "version": 2,
    }
