"""Proof, on the operator's own machine, that a payout is in a batch (RFC 6962 audit path).

The batch's Merkle root is public. A leaf is SHA-256 of byte 0 and the encoded line; a node is SHA-256 of
byte 1 and its two children. A line is payout id, address and micro-USDC: texts as their length (4 bytes,
big endian) and UTF-8, the amount as 8 bytes, big endian, behind its length.
"""

import hashlib
from collections.abc import Sequence
from typing import Final

_LEAF: Final = b"\0"
_NODE: Final = b"\1"
STEPS_MAX: Final = 64


def line_hash(*, payout_id: str, address: str, amount_micro: int) -> bytes:
    """Give the leaf of one payout."""
    line = _field(payout_id.encode()) + _field(address.encode()) + _field(amount_micro.to_bytes(8))
    return hashlib.sha256(_LEAF + line).digest()


def root_of(leaf: bytes, *, position: int, count: int, proof: Sequence[bytes]) -> bytes | None:
    """Give the root that `proof` leads to, None if it fits no tree of `count` leaves (RFC 9162, 2.1.3.2)."""
    if not 0 <= position < count or len(proof) > STEPS_MAX:
        return None
    index, last, found = position, count - 1, leaf
    for sibling in proof:
        if last == 0:
            return None
        if index % 2 or index == last:
            found = hashlib.sha256(_NODE + sibling + found).digest()
            while index % 2 == 0 and index:
                index, last = index // 2, last // 2
        else:
            found = hashlib.sha256(_NODE + found + sibling).digest()
        index, last = index // 2, last // 2
    return found if last == 0 else None


def _field(raw: bytes) -> bytes:
    return len(raw).to_bytes(4) + raw
