"""What the fabric raises.

FabricError
├── FabricUnavailable       we have no connection, or it is congested; nothing was sent
└── RequestBroken           one request to one node did not end with `End`
    ├── NodeAbsent          nobody listens on the node's subject; the node never saw the request
    ├── NodeSilent          a limit of time passed: `accept`, `first_token`, `idle` or `wall`
    ├── NodeFailed          the node said so: `code`, `is_retriable`
    ├── ProtocolBroken      a gap, a duplicate, an oversized or malformed frame, too many of them
    ├── TooMuchHeld         answers under way hold more than a gateway may; this was the longest
    └── ConnectionLost      our own connection broke while the reply was under way

`RequestBroken.had_delta` tells whether any part of the answer arrived: before it, another node may be
asked; after it, what was delivered is billed and the buyer's stream ends with an error.
"""

from __future__ import annotations

from typing import Final, Literal

from node_agent.protocol import FailureCode

Limit = Literal["accept", "first_token", "idle", "wall"]

_OUR_FAULT: Final = frozenset({FailureCode.BAD_REQUEST, FailureCode.CANCELLED})


class FabricError(Exception):
    """Root of everything the fabric raises on purpose."""


class FabricUnavailable(FabricError):
    """No connection to NATS, or its send buffer is full; nothing was sent."""


class RequestBroken(FabricError):
    """One request to one node did not end with `End`."""

    had_delta: bool = False
    """A part of the answer arrived before."""

    @property
    def is_retriable(self) -> bool:
        """Another node may do better, and the buyer has seen nothing yet."""
        return not self.had_delta

    @property
    def blames_node(self) -> bool:
        """The node's score should suffer."""
        return True

    @property
    def reason(self) -> str:
        """Why, in a few words of ours, for the buyer's record."""
        return "the answer broke off"


class NodeAbsent(RequestBroken):
    """NATS answered that nobody listens on the node's subject."""


class NodeSilent(RequestBroken):
    """A limit of time passed without what was due."""

    def __init__(self, limit: Limit, after_ms: int) -> None:
        super().__init__(f"the node was silent: limit {limit!r} passed after {after_ms} ms")
        self.limit: Limit = limit
        self.after_ms = after_ms

    @property
    def reason(self) -> str:
        return f"silent: {self.limit}"


class NodeFailed(RequestBroken):
    """The node ended the answer with `Failed`."""

    def __init__(self, code: FailureCode, message: str, *, is_retriable: bool) -> None:
        super().__init__(f"the node failed: {code}: {message}")
        self.code = code
        self.message = message
        """The operator's words: not for the buyer's eyes unless checked."""
        self._is_retriable = is_retriable

    @property
    def is_retriable(self) -> bool:
        return self._is_retriable and not self.had_delta

    @property
    def blames_node(self) -> bool:
        return self.code not in _OUR_FAULT

    @property
    def reason(self) -> str:
        return f"failed: {self.code}"


class ProtocolBroken(RequestBroken):
    """The node broke the law of `node_agent.protocol`; the reply is worthless from there on."""

    @property
    def reason(self) -> str:
        return "broke the protocol"


class TooMuchHeld(RequestBroken):
    """All answers under way together hold more than this gateway may; this one, the longest, is given up."""

    @property
    def blames_node(self) -> bool:
        return False


class ConnectionLost(RequestBroken):
    """Our own connection to NATS broke while the reply was under way; frames may be lost."""

    @property
    def blames_node(self) -> bool:
        return False
