"""The one number that says what a batch is.

Canonical encoding, version 1: every field is its length (4 bytes, big endian) and its bytes; integers are
8 bytes, big endian.  The digest covers chain, escrow, fence, the lines in their order, and the total.  The
Merkle root covers the same lines, so that an operator can later be shown that his payout is in the batch
without being shown the others (RFC 6962: leaf and node are hashed under different prefixes, a tree of n is
split at the largest power of two below n).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

from chain.networks import Chain
from chain.ports import PayoutLine

VERSION: Final = b"tollway settlement batch 1"
_LEAF: Final = b"\0"
_NODE: Final = b"\1"


def batch_digest(*, chain: Chain, escrow: str, fence: str, lines: Sequence[PayoutLine]) -> bytes:
    """Give the SHA-256 of the batch's canonical encoding; the total is derived from the lines."""
    total = sum(line.amount.n for line in lines)
    parts = [_text(chain.value), _text(escrow), _text(fence), _number(len(lines))]
    parts += [encode_line(line) for line in lines]
    return hashlib.sha256(_field(VERSION) + b"".join(parts) + _number(total)).digest()


def merkle_root(lines: Sequence[PayoutLine]) -> bytes:
    """Give the RFC 6962 tree hash over the encoded lines; a batch has at least one."""
    if not lines:
        raise ValueError("a batch has at least one line")
    return _tree([hashlib.sha256(_LEAF + encode_line(line)).digest() for line in lines])


def merkle_proof(lines: Sequence[PayoutLine], position: int) -> tuple[bytes, ...]:
    """The hashes that lead from one line to the root, nearest first (RFC 6962, audit path)."""
    leaves = [hashlib.sha256(_LEAF + encode_line(line)).digest() for line in lines]
    if not 0 <= position < len(leaves):
        raise ValueError(f"position {position} of {len(leaves)} lines")
    return tuple(_path(leaves, position))


def is_included(line: PayoutLine, *, position: int, count: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Tell whether `line` stands at `position` of the `count` lines whose Merkle root is `root`.  Pure."""
    if not 0 <= position < count:
        return False
    index, last = position, count - 1
    found = hashlib.sha256(_LEAF + encode_line(line)).digest()
    for sibling in proof:
        if last == 0:
            return False
        if index % 2 or index == last:
            found = hashlib.sha256(_NODE + sibling + found).digest()
            while index % 2 == 0 and index:
                index, last = index // 2, last // 2
        else:
            found = hashlib.sha256(_NODE + found + sibling).digest()
        index, last = index // 2, last // 2
    return last == 0 and found == root


def encode_line(line: PayoutLine) -> bytes:
    """Encode one line: payout id, address, micro-USDC."""
    return _text(line.payout_id) + _text(line.to) + _number(line.amount.n)


def _tree(leaves: Sequence[bytes]) -> bytes:
    if len(leaves) == 1:
        return leaves[0]
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(_NODE + _tree(leaves[:split]) + _tree(leaves[split:])).digest()


def _path(leaves: Sequence[bytes], position: int) -> list[bytes]:
    if len(leaves) == 1:
        return []
    split = 1 << (len(leaves) - 1).bit_length() - 1
    if position < split:
        return [*_path(leaves[:split], position), _tree(leaves[split:])]
    return [*_path(leaves[split:], position - split), _tree(leaves[:split])]


def _field(raw: bytes) -> bytes:
    return len(raw).to_bytes(4) + raw


def _text(text: str) -> bytes:
    return _field(text.encode())


def _number(n: int) -> bytes:
    return _field(n.to_bytes(8))
