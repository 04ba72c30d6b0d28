"""Re-hashing the lanes' chains at the speed of a copy.

A batch's hash covers its rows as binary COPY carries them.  So the server sends them back in that very
format, sorted by batch and id, and they go into SHA-256 without being looked at; where one batch ends and
the next begins is known from its rows' lengths.  A wrong length could only make a hash differ.

A lane is read in parts of about 250,000 rows, found by the BRIN index on (lane, batch), so that each is
sorted in memory.  Batches reaching into a detached month have lost rows: of those, only the links are
checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger.charges import COLUMNS, COPY_HEADER, COPY_TRAILER, GENESIS

PART_ROWS: Final = 250_000
_SORT_MEMORY: Final = "SET LOCAL work_mem = '192MB'"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far re-hashing is: charges of all lanes."""

    lane: int
    done: int
    total: int


Tell = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A lane's chain; `trouble` None means that it is whole."""

    lane: int
    trouble: str | None
    rows: int
    batches: int
    head: bytes

    @property
    def detail(self) -> str:
        if self.trouble is not None:
            return self.trouble
        return f"{self.rows} charges in {self.batches} batches, head {self.head.hex()[:16]}"


_LANES: Final = text(
    """
    SELECT lane, sum(rows)::bigint AS rows FROM (
        SELECT lane, rows FROM batches UNION ALL SELECT DISTINCT lane, 0 FROM charges
    ) AS l GROUP BY lane ORDER BY lane""",
)
_ORPHANS: Final = text(
    """
    SELECT DISTINCT ON (c.lane) c.lane, c.id FROM charges c
    LEFT JOIN batches b ON b.lane = c.lane AND b.n = c.batch WHERE b.n IS NULL""",
)
_ARCHIVED_BELOW: Final = text("SELECT upper_id FROM archived_months ORDER BY month DESC LIMIT 1")
_LINKS: Final = """
    SELECT n, first_id, rows, sum, prev_hash, hash FROM batches WHERE lane = $1 ORDER BY n"""
# 2 bytes of column count, 4 of length per column, and the columns: 153 + what varies.
_MEASURES: Final = """
    SELECT batch, count(*) AS rows, sum(amount)::bigint AS sum,
           sum(153 + octet_length(model) + coalesce(octet_length(finish), 0)
               + CASE WHEN operator IS NULL THEN 0 ELSE 8 END + CASE WHEN node IS NULL THEN 0 ELSE 16 END
               + CASE WHEN key_id IS NULL THEN 0 ELSE 16 END + CASE WHEN ttft_ms IS NULL THEN 0 ELSE 4 END
           )::bigint AS bytes
    FROM charges WHERE lane = $1 AND batch BETWEEN $2 AND $3 GROUP BY batch"""
_ROWS: Final = f"""
    SELECT {", ".join(COLUMNS)} FROM charges
    WHERE lane = $1 AND batch BETWEEN $2 AND $3 ORDER BY batch, id"""  # noqa: S608 - constants only

_Link = asyncpg.Record


async def broken_chains(conn: AsyncConnection, *, tell: Tell | None = None) -> AsyncIterator[Verdict]:
    """Walk every lane; `conn` is in a transaction on one snapshot."""
    await conn.execute(text(_SORT_MEMORY))
    lanes = (await conn.execute(_LANES)).all()
    orphans = {row.lane: row.id for row in await conn.execute(_ORPHANS)}
    archived_below: UUID | None = await conn.scalar(_ARCHIVED_BELOW)
    driver = (await conn.get_raw_connection()).driver_connection
    assert isinstance(driver, asyncpg.Connection)
    total, done = sum(lane.rows for lane in lanes), 0
    for lane in lanes:
        walk = _Walk(driver, lane.lane, archived_below)

        def report(rows: int, lane: Any = lane, done: int = done) -> None:
            if tell is not None:
                tell(Progress(lane.lane, done + rows, total))

        trouble = await walk.run(report)
        if trouble is None and lane.lane in orphans:
            trouble = f"charge {orphans[lane.lane]} belongs to no batch"
        done += lane.rows
        yield Verdict(lane.lane, trouble, walk.rows, walk.n, walk.head)


class _Walk:
    """One lane, from its first batch to its head."""

    def __init__(
        self, driver: asyncpg.Connection[asyncpg.Record], lane: int, archived_below: UUID | None
    ) -> None:
        self._driver = driver
        self._lane = lane
        self._archived_below = archived_below
        self.n = 0
        self.rows = 0
        self.head = GENESIS

    async def run(self, report: Callable[[int], None]) -> str | None:
        """The first thing that is wrong, or None."""
        part: list[_Link] = []
        part_rows = 0
        links = await self._driver.fetch(_LINKS, self._lane)
        for link in links:
            if (link["n"], link["prev_hash"]) != (self.n + 1, self.head):
                trouble = await self._hash(part)  # what comes first is told first
                return trouble or f"batch {link['n']} is not what was posted after batch {self.n}"
            self.n, self.head = link["n"], link["hash"]
            if self._archived_below is not None and link["first_id"] < self._archived_below:
                continue
            part.append(link)
            part_rows += link["rows"]
            if part_rows >= PART_ROWS or link is links[-1]:
                if trouble := await self._hash(part):
                    return trouble
                report(self.rows)
                part, part_rows = [], 0
        return await self._hash(part)

    async def _hash(self, part: Sequence[_Link]) -> str | None:
        if not part:
            return None
        between = (self._lane, part[0]["n"], part[-1]["n"])
        measured = {row["batch"]: row for row in await self._driver.fetch(_MEASURES, *between)}
        for link in part:
            found = measured.get(link["n"])
            if found is None or (found["rows"], found["sum"]) != (link["rows"], link["sum"]):
                return f"batch {link['n']} is not what was posted"
        hashes = _Hashes([(link["prev_hash"], measured[link["n"]]["bytes"]) for link in part])
        await self._driver.copy_from_query(_ROWS, *between, output=hashes.feed, format="binary")
        for link, hashed in zip(part, hashes.results(), strict=True):
            if hashed != link["hash"]:
                return f"batch {link['n']} is not what was posted"
            self.rows += link["rows"]
        return None


class _Hashes:
    """Cuts a binary COPY stream at the batches' ends and hashes each."""

    def __init__(self, batches: Sequence[tuple[bytes, int]]) -> None:
        self._batches = iter(batches)
        self._left = len(COPY_HEADER)  # skipped as if it were a batch of nobody's
        self._digest = hashlib.sha256()
        self._results: list[bytes] = []

    async def feed(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view) > self._left or self._left == 0:
            self._digest.update(view[: self._left])
            view = view[self._left :]
            self._results.append(self._digest.digest())
            batch = next(self._batches, None)
            if batch is None:  # the trailer, and what should not be there
                self._digest, self._left = hashlib.sha256(), len(COPY_TRAILER) + len(view) + 1
                break
            self._digest, self._left = hashlib.sha256(batch[0]), batch[1]
        self._digest.update(view)
        self._left -= len(view)

    def results(self) -> Iterator[bytes]:
        """The batches' hashes; what the header made comes first and is left out."""
        return iter(self._results[1:])
