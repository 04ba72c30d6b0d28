"""Which node last answered a conversation that begins like this one: its cache may still hold the beginning.

Only a tie is broken by it (`choice`), so a warm cache never costs a buyer a better node.  What is kept is a
hash per beginning, never its text; a beginning is a buyer's own, as cached prefixes are (A74).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final
from uuid import UUID

from node_agent.protocol import NodeId

BEGINNING_BYTES: Final = 256
"""Shorter conversations have no beginning worth keeping warm."""
REMEMBERED_MAX: Final = 50_000
WARM_S: Final = 300.0


class Affinity:
    """Remembers, for one process. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._last: OrderedDict[int, tuple[NodeId, float]] = OrderedDict()

    def beginning(self, person: UUID, model: str, body: bytes) -> int | None:
        """Name a conversation's beginning; None if it is too short."""
        start = max(0, body.find(b'"messages"'))
        text = body[start : start + BEGINNING_BYTES]
        return hash((person.int, model, text)) if len(text) == BEGINNING_BYTES else None

    def warm(self, beginning: int | None, now_s: float) -> NodeId | None:
        """Give the node that last answered it, if that was lately."""
        found = None if beginning is None else self._last.get(beginning)
        return found[0] if found is not None and now_s - found[1] <= WARM_S else None

    def answered(self, beginning: int | None, node: NodeId, now_s: float) -> None:
        """This node has answered it."""
        if beginning is None:
            return
        self._last[beginning] = (node, now_s)
        self._last.move_to_end(beginning)
        if len(self._last) > REMEMBERED_MAX:
            self._last.popitem(last=False)
