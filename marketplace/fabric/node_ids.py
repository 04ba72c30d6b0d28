"""A node's id is a UUID (version 7) written so that it is one NATS subject token.

The ledger's charges carry the UUID, subjects and JSON the text; the two convert without a look-up.
"""

from __future__ import annotations

import base64
import binascii
from functools import lru_cache
from typing import Final
from uuid import UUID

from node_agent.protocol import NodeId

PREFIX: Final = "n-"
_CHARACTERS: Final = 26


def node_id_of(uuid: UUID) -> NodeId:
    """Write `uuid` as a node id.

    >>> node_id_of(UUID("017f22e2-79b0-7cc3-98c4-dc0c0c07398f"))
    'n-af7sfytzwb6mhgge3qgaybzzr4'
    """
    return NodeId(PREFIX + base64.b32encode(uuid.bytes).decode().rstrip("=").lower())


@lru_cache(maxsize=16_384)
def node_uuid(node_id: str) -> UUID:
    """Read the UUID out of a node id; raises ValueError."""
    text = node_id.removeprefix(PREFIX)
    if text == node_id or len(text) != _CHARACTERS or text != text.lower():
        raise ValueError(f"not a node id: {node_id[:80]!r}")
    try:
        return UUID(bytes=base64.b32decode(text.upper() + "======"))
    except binascii.Error as error:
        raise ValueError(f"not a node id: {node_id!r}") from error
