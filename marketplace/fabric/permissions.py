"""All a node may do on the fabric.

It hears its own subjects, tells its own status, and answers on its own reply subjects, which carry its
id: no node can answer for another.  NATS' "allow responses" would do the same with a list the server
keeps per connection, pruned by walking all of it at every request once it holds 4,096; with answers
allowed for ten minutes that is a walk over 60,000 entries at 100 requests/s (measured: see README).
"""

from __future__ import annotations

from typing import Any, Final

from node_agent.protocol import NodeId, node_subjects, status_subject

UNLIMITED: Final = -1
"""nats-server 2.15.1 applies a user token's numeric limits in operator mode only (tried: a payload limit
is ignored here), so sizes are checked by their readers; the server's own `max_payload` stands above them."""


def reply_subject(node: NodeId, gateway: str, request: str) -> str:
    """Where `node` answers one request of one gateway."""
    return f"reply.{node}.{gateway}.{request}"


def reply_subjects(gateway: str) -> str:
    """Every answer to one gateway, for its one subscription."""
    return f"reply.*.{gateway}.*"


def node_permissions(node: NodeId) -> dict[str, Any]:
    """The `nats` part of a node's user token."""
    return {
        "pub": {"allow": [status_subject(node), f"reply.{node}.*.*"]},
        "sub": {"allow": [node_subjects(node)]},
        "subs": UNLIMITED,
        "data": UNLIMITED,
        "payload": UNLIMITED,
        "type": "user",
        "version": 2,
    }
