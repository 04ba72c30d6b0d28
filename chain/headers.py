"""Following one chain's headers.

A `Window` is the last final block and, linked above it by parent hash, the blocks we have read that may
still change.  New headers extend it, replace a part of it (a reorg), or do not reach it (fetch more);
the node's finality moves blocks from above to final.  The law: **nothing contradicts `final`**.  A header
that does is `FinalityViolated`, and nobody here recovers from that.

A node that is merely behind (its head is a block we hold) is `Lagging`, not a reorg; a `finalized` tag
that went back is reported and waited out.  On Solana slots may be skipped, so links go by the
parent's hash and the parent's height, never by "height − 1".  No I/O, no time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from chain.errors import FinalityViolated, Malformed
from chain.ports import Header

WINDOW_HEADERS_MAX: Final = 1_400
"""Base keeps about 600 blocks above its final one; beyond this we wait for finality and see no further.
A whole window and one step on top of it fit into one read of 2,000 blocks."""
WALK_HEADERS_MIN: Final = 16
"""How far below a fork the first look for the common ancestor goes; doubled each time."""


@dataclass(frozen=True, slots=True)
class Window:
    """The last final header and the linked headers above it, ascending."""

    final: Header
    above: tuple[Header, ...] = ()

    def __post_init__(self) -> None:
        require_linked((self.final, *self.above))

    @property
    def tip(self) -> Header:
        return self.above[-1] if self.above else self.final

    def index_at(self, height: int) -> int | None:
        """Give the position in `above` of the block at `height`; -1 stands for `final` itself."""
        if height == self.final.height:
            return -1
        found = bisect_left(self.above, height, key=lambda header: header.height)
        is_there = found < len(self.above) and self.above[found].height == height
        return found if is_there else None

    def holds(self, height: int, block_hash: str) -> bool:
        index = self.index_at(height)
        if index is None:
            return False
        return (self.final if index == -1 else self.above[index]).hash == block_hash


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing new."""


@dataclass(frozen=True, slots=True)
class Lagging:
    """The node's head is `behind` blocks below our tip on the same branch: slow, not reorganised."""

    behind: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read start..end inclusive and come back with the headers."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Extended:
    """`added` are new on top of the old tip."""

    window: Window
    added: tuple[Header, ...]


@dataclass(frozen=True, slots=True)
class Reorged:
    """`orphaned` left the chain above `ancestor`; `added` took their place."""

    window: Window
    ancestor: Header
    orphaned: tuple[Header, ...]
    added: tuple[Header, ...]


@dataclass(frozen=True, slots=True)
class Finalized:
    """`final` are final now; `orphaned` were read before and lost to them."""

    window: Window
    final: tuple[Header, ...]
    orphaned: tuple[Header, ...]


@dataclass(frozen=True, slots=True)
class FinalRegressed:
    """The node's final block is `by` below ours: tolerated, reported, waited out."""

    by: int


def require_linked(headers: Sequence[Header]) -> None:
    """Raise Malformed unless each header is the next one's parent."""
    for parent, child in pairwise(headers):
        if child.height <= parent.height or (child.parent_height, child.parent_hash) != (
            parent.height,
            parent.hash,
        ):
            raise Malformed(
                f"block {child.height} {child.hash} does not follow {parent.height} {parent.hash}"
            )


def plan_head(window: Window, head: Header, *, limit: int) -> Idle | Lagging | Fetch:
    """Say what to read, given the node's head; at most about `limit` blocks of it."""
    if window.holds(head.height, head.hash):
        behind = window.tip.height - head.height
        return Lagging(behind) if behind else Idle()
    if head.height < window.final.height:
        return Lagging(window.tip.height - head.height)
    if head.height == window.final.height:
        raise _violated(window, head)
    if head.height > window.tip.height:
        room = min(limit, WINDOW_HEADERS_MAX - len(window.above))
        if room <= 0:
            return Idle()
        return Fetch(window.tip.height + 1, min(head.height, window.tip.height + room))
    return Fetch(max(window.final.height + 1, head.height - WALK_HEADERS_MIN + 1), head.height)


def plan_final(window: Window, final: Header, *, limit: int) -> Idle | FinalRegressed | Fetch:
    """Say what to read to move finality forward to the node's `final`, `limit` blocks at a time."""
    if final.height < window.final.height:
        return FinalRegressed(window.final.height - final.height)
    if final.height == window.final.height:
        if final.hash != window.final.hash:
            raise _violated(window, final)
        return Idle()
    return Fetch(window.final.height + 1, min(final.height, window.final.height + limit))


def follow(window: Window, fresh: Sequence[Header]) -> Idle | Fetch | Extended | Reorged:
    """Take in headers above final, as one linked answer of the node.

    Gives `Fetch` when they do not reach the window: above it (a gap) or inside it (the common ancestor
    lies deeper).  Raises FinalityViolated if they leave the chain at or below `final`, Malformed if they
    are not linked.
    """
    require_linked(fresh)
    fresh = _above_final(window, fresh)
    if not fresh:
        return Idle()
    first, last = fresh[0], fresh[-1]
    if first.parent_height > window.tip.height:
        return Fetch(window.tip.height + 1, last.height)
    if not window.holds(first.parent_height, first.parent_hash):
        if first.parent_height <= window.final.height:
            raise _violated(window, first)
        reach = max(WALK_HEADERS_MIN, 2 * (last.height - first.height + 1))
        return Fetch(max(window.final.height + 1, first.height - reach), last.height)
    return _graft(window, fresh)


def finalize(window: Window, fresh: Sequence[Header]) -> Finalized | Fetch:
    """Make `fresh`, which the node calls final, final.

    They must start at the child of our final block: another parent is FinalityViolated; a hole below
    them is `Fetch`.
    """
    if not fresh:
        raise ValueError("finality moves by at least one block")
    require_linked(fresh)
    first, last = fresh[0], fresh[-1]
    if first.parent_height > window.final.height:
        return Fetch(window.final.height + 1, last.height)
    if (first.parent_height, first.parent_hash) != (window.final.height, window.final.hash):
        raise _violated(window, first)
    above = tuple(header for header in window.above if header.height > last.height)
    if above and above[0].parent_hash != last.hash:
        above = ()
    kept = {header.hash for header in (*fresh, *above)}
    orphaned = tuple(header for header in window.above if header.hash not in kept)
    return Finalized(Window(last, above), tuple(fresh), orphaned)


def _above_final(window: Window, fresh: Sequence[Header]) -> Sequence[Header]:
    for header in fresh:
        if header.height == window.final.height and header.hash != window.final.hash:
            raise _violated(window, header)
    return [header for header in fresh if header.height > window.final.height]


def _graft(window: Window, fresh: Sequence[Header]) -> Idle | Extended | Reorged:
    """`fresh` starts on a block of the window: skip what is known, replace the rest."""
    found = window.index_at(fresh[0].parent_height)
    assert found is not None
    position = found + 1
    added = list(fresh)
    while added and position < len(window.above) and window.above[position].hash == added[0].hash:
        position += 1
        added.pop(0)
    if not added:
        return Idle()
    grown = Window(window.final, (*window.above[:position], *added))
    orphaned = window.above[position:]
    if not orphaned:
        return Extended(grown, tuple(added))
    ancestor = window.above[position - 1] if position else window.final
    return Reorged(grown, ancestor, orphaned, tuple(added))


def _violated(window: Window, header: Header) -> FinalityViolated:
    return FinalityViolated(
        f"block {header.height} {header.hash} (parent {header.parent_height} {header.parent_hash}) "
        f"contradicts our final block {window.final.height} {window.final.hash}"
    )
