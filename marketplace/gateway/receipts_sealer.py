"""Sealing: charges become pages of receipts, signed by us and shown to the nodes to be signed by them.

Off every request's path: a loop takes what the lanes have posted since, a span of batches at a time, makes
one page of each node's statements and signs its root; one signature serves up to 512 receipts.  A mark per
lane says how far it is, so a process that dies loses nothing and several share the work, lane by lane.
Pages a node has not signed are offered to it again for a day.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, Final
from uuid import UUID

from prometheus_client import Counter
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from marketplace.fabric.errors import FabricUnavailable
from marketplace.fabric.node_ids import node_id_of
from marketplace.gateway.receipts import (
    HASHES_KEPT_DAYS,
    Page,
    ReceiptSigner,
    Stated,
    sign_page,
    split_leaves,
    statements_of,
)
from marketplace.platform.database import transaction
from marketplace.platform.ids import uuid7
from node_agent import protocol

_log = logging.getLogger(__name__)

PAUSE_S: Final = 1.0
BATCHES_MAX: Final = 256
"""Batches looked at in one span; its rows are bounded too."""
ROWS_MAX: Final = 512
HASHES_S_MAX: Final = 15
"""A charge waits this long for the hashes beside it (`receipts_writer` gives up sooner)."""
OFFER_S_MAX: Final = 5.0
OFFER_AGAIN_S: Final = 60
OFFERED_HOURS: Final = 24
OFFERS_MAX: Final = 32
DRIFT_KEPT_DAYS: Final = 30
FORGOTTEN_MAX: Final = 1_000
"""Old hashes forgotten at a time, so that nobody waits for it."""

RECEIPTS: Final = Counter("tollway_receipts_total", "Receipts signed by the marketplace")
DISPUTED: Final = Counter("tollway_receipts_disputed_total", "Receipts a node did not agree with")
_FAULTS: Final = (SQLAlchemyError, OSError, TimeoutError)
_ANSWER_FAULTS: Final = (protocol.ProtocolError, FabricUnavailable, TimeoutError)

Ask = Callable[[str, bytes], Awaitable[bytes | None]]
"""Publish and wait for one answer; None if nobody listens; raises FabricUnavailable, TimeoutError."""

_BEHIND: Final = text("""
    SELECT l.lane FROM generate_series(0, 63) AS l (lane) LEFT JOIN receipt_marks m ON m.lane = l.lane
    CROSS JOIN LATERAL (SELECT n FROM batches b WHERE b.lane = l.lane ORDER BY n DESC LIMIT 1) AS h
    WHERE h.n > coalesce(m.n, 0)""")
_FIRST_MARK: Final = text("INSERT INTO receipt_marks (lane, n) VALUES (:lane, 0) ON CONFLICT DO NOTHING")
_TURN: Final = text("SELECT n FROM receipt_marks WHERE lane = :lane FOR UPDATE SKIP LOCKED")
_MARK: Final = text("UPDATE receipt_marks SET n = :n WHERE lane = :lane")
_BATCHES: Final = text("""
    SELECT n, first_id, last_id, rows, posted_at < now() - :patience_s * INTERVAL '1 second' AS is_old
    FROM batches WHERE lane = :lane AND n > :mark ORDER BY n LIMIT :batches""")
_KEY: Final = text("INSERT INTO receipt_keys (public_key) VALUES (:public_key) ON CONFLICT DO NOTHING")
_PAGE: Final = text("""
    INSERT INTO receipt_pages (id, lane, first_batch, last_batch, node, leaves, public_key, signature,
                               offered_at)
    VALUES (:id, :lane, :first_batch, :last_batch, :node, :leaves, :public_key, :signature, now())""")
_OFFER: Final = text("""
    UPDATE receipt_pages SET offered_at = now() WHERE id IN (
        SELECT id FROM receipt_pages
        WHERE countersignature IS NULL AND made_at > now() - :hours * INTERVAL '1 hour'
          AND offered_at < now() - :again_s * INTERVAL '1 second'
        ORDER BY made_at LIMIT :offers FOR UPDATE SKIP LOCKED)
    RETURNING id, lane, first_batch, last_batch, node, leaves, public_key, signature""")
_ENDS: Final = text("""
    SELECT (array_agg(first_id ORDER BY first_id))[1] AS first_id,
           (array_agg(last_id ORDER BY last_id DESC))[1] AS last_id
    FROM batches WHERE lane = :lane AND n BETWEEN :first_batch AND :last_batch""")
_NODE_KEY: Final = text("SELECT public_key FROM nodes WHERE id = :node")
_COUNTERSIGNED: Final = text("""
    UPDATE receipt_pages SET countersignature = :signature, disputed = :disputed
    WHERE id = :id AND countersignature IS NULL""")
_OLD_DRIFT: Final = text("""
    DELETE FROM metering_drift WHERE id IN (
        SELECT id FROM metering_drift WHERE at < now() - :days * INTERVAL '1 day' LIMIT 1000)""")
_OLD_ATTEMPTS: Final = text("""
    DELETE FROM failed_attempts WHERE (id, attempt, node) IN (
        SELECT id, attempt, node FROM failed_attempts
        WHERE at < now() - :days * INTERVAL '1 day' LIMIT 1000)""")
_FORGET: Final = text("SELECT forget_receipts(:most)")

Offer = tuple[Page, Sequence[bytes]]


class Sealer:
    """Signs pages and has them signed; `tick` does what there is to do."""

    def __init__(self, engine: AsyncEngine, signer: ReceiptSigner, ask: Ask) -> None:
        self._engine = engine
        self._signer = signer
        self._ask = ask

    async def run(self, stop: asyncio.Event) -> None:
        """Seal until stopped; what fails is tried again."""
        while not stop.is_set():
            try:
                while await self.tick() and not stop.is_set():
                    continue
            except _FAULTS as e:
                _log.warning("receipts wait: %s", type(e).__name__)
            except Exception:
                _log.exception("receipts wait")
            try:
                await asyncio.wait_for(stop.wait(), PAUSE_S)
            except TimeoutError:
                continue

    async def tick(self) -> bool:
        """Seal a span of every lane that is behind, and offer pages; whether anything was sealed."""
        async with self._engine.connect() as connection:
            behind = [row.lane for row in await connection.execute(_BEHIND)]
        sealed = [offer for lane in behind for offer in await self.seal(lane)]
        await self._offer_all(sealed or await self._unsigned())
        return bool(sealed)

    # ---- ours

    async def seal(self, lane: int) -> list[Offer]:
        """Sign what a lane has posted since, at most ROWS_MAX receipts or one batch; its pages."""
        async with transaction(self._engine) as connection:
            await connection.execute(_FIRST_MARK, {"lane": lane})
            mark = (await connection.execute(_TURN, {"lane": lane})).scalar_one_or_none()
            if mark is None:
                return []  # another process is at it
            found = await self._span(connection, lane, mark)
            if found is None:
                return []
            last, stated = found
            offers = list(self._pages(stated, (mark + 1, last)))
            if offers:
                await connection.execute(_KEY, {"public_key": self._signer.public_key})
                await connection.execute(_PAGE, [_row(page) for page, _ in offers])
            await connection.execute(_MARK, {"lane": lane, "n": last})
        RECEIPTS.inc(len(stated))
        return offers

    async def _span(
        self, connection: AsyncConnection, lane: int, mark: int
    ) -> tuple[int, list[Stated]] | None:
        """The next batches that can be sealed: the last one's number, and the statements in them."""
        wanted = {"lane": lane, "mark": mark, "batches": BATCHES_MAX, "patience_s": HASHES_S_MAX}
        batches = (await connection.execute(_BATCHES, wanted)).all()
        taken: list[Any] = []
        rows = 0
        for batch in batches:
            if taken and rows + batch.rows > ROWS_MAX:
                break
            taken.append(batch)
            rows += batch.rows
        if not taken:
            return None
        span = {
            "lane": lane,
            "first_batch": taken[0].n,
            "last_batch": taken[-1].n,
            "first_id": min(batch.first_id for batch in taken),
            "last_id": max(batch.last_id for batch in taken),
        }
        stated = await statements_of(connection, span)
        patient = {batch.n for batch in taken if not batch.is_old}
        waiting = min(
            (one.batch for one in stated if not one.is_hashed and one.batch in patient), default=None
        )
        if waiting is None:
            return taken[-1].n, stated
        if waiting == taken[0].n:
            return None
        return waiting - 1, [one for one in stated if one.batch < waiting]

    def _pages(self, stated: Sequence[Stated], batches: tuple[int, int]) -> Iterable[Offer]:
        for _, of_node in groupby(stated, key=lambda one: one.node):
            statements = list(of_node)
            for at in range(0, len(statements), protocol.STATEMENTS_MAX):
                part = statements[at : at + protocol.STATEMENTS_MAX]
                page = sign_page(uuid7(), self._signer, part, batches=batches)
                yield page, [one.statement for one in part]

    # ---- the nodes'

    async def _unsigned(self) -> list[Offer]:
        """Pages that were offered a while ago and came back unsigned, with their statements."""
        values = {"hours": OFFERED_HOURS, "again_s": OFFER_AGAIN_S, "offers": OFFERS_MAX}
        async with transaction(self._engine) as connection:
            pages = [_page(row) for row in await connection.execute(_OFFER, values)]
            return [(page, said) for page in pages if (said := await _said_in(connection, page)) is not None]

    async def _offer_all(self, offers: Sequence[Offer]) -> None:
        for at in range(0, len(offers), OFFERS_MAX):
            await asyncio.gather(*(self._offer(*offer) for offer in offers[at : at + OFFERS_MAX]))

    async def _offer(self, page: Page, statements: Sequence[bytes]) -> None:
        node = node_id_of(page.node)
        message = protocol.Receipts(
            protocol.VERSION, str(page.id), page.public_key, page.signature, list(statements)
        )
        try:
            answer = await self._ask(protocol.receipts_subject(node), protocol.encode(message))
            if answer is not None:
                await self._countersigned(page, node, protocol.decode_countersigned(answer))
        except _ANSWER_FAULTS as e:
            _log.info("node %s did not sign a page of receipts: %s", node, e)

    async def _countersigned(self, page: Page, node: protocol.NodeId, answer: protocol.Countersigned) -> None:
        async with transaction(self._engine) as connection:
            public_key = (await connection.execute(_NODE_KEY, {"node": node})).scalar_one()
            root = protocol.merkle_root(page.leaves)
            protocol.verify_countersignature(
                public_key, len(page.leaves), root, answer.disputed, answer.signature
            )
            values = {"id": page.id, "signature": answer.signature, "disputed": answer.disputed}
            await connection.execute(_COUNTERSIGNED, values)
        if answer.disputed:
            DISPUTED.inc(len(answer.disputed))
            _log.warning("node %s disputes %d receipts of page %s", node, len(answer.disputed), page.id)


async def _said_in(connection: AsyncConnection, page: Page) -> list[bytes] | None:
    """The statements of a page as they were signed, from the charges themselves.

    None if one is not as it was then (its hashes came after the sealing): such a page keeps our signature,
    gets no node's, and must not keep the others waiting for theirs.
    """
    where = {"lane": page.lane, "first_batch": page.first_batch, "last_batch": page.last_batch}
    ends = (await connection.execute(_ENDS, where)).one()
    span = {**where, "first_id": ends.first_id, "last_id": ends.last_id}
    by_leaf = {
        protocol.receipt_leaf(stated.statement): stated.statement
        for stated in await statements_of(connection, span)
        if stated.node == page.node
    }
    if missing := sum(leaf not in by_leaf for leaf in page.leaves):
        _log.error("page %s: %d of %d statements are not as they were signed", page.id, missing, len(by_leaf))
        return None
    return [by_leaf[leaf] for leaf in page.leaves]


async def drop_old_drift(engine: AsyncEngine) -> int:
    """Forget drifts older than a month, at most a thousand; how many there were."""
    async with transaction(engine) as connection:
        return (await connection.execute(_OLD_DRIFT, {"days": DRIFT_KEPT_DAYS})).rowcount


async def drop_old_attempts(engine: AsyncEngine) -> int:
    """Forget failed attempts as old as the oldest hashes, at most a thousand; how many there were."""
    async with transaction(engine) as connection:
        return (await connection.execute(_OLD_ATTEMPTS, {"days": HASHES_KEPT_DAYS})).rowcount


async def forget_old_hashes(engine: AsyncEngine) -> int:
    """Forget hashes older than `HASHES_KEPT_DAYS` whose pages are signed, some of them; how many."""
    async with transaction(engine) as connection:
        return int((await connection.execute(_FORGET, {"most": FORGOTTEN_MAX})).scalar_one())


def _row(page: Page) -> dict[str, Any]:
    return {
        "id": page.id, "lane": page.lane, "first_batch": page.first_batch, "last_batch": page.last_batch,
        "node": page.node, "leaves": b"".join(page.leaves), "public_key": page.public_key,
        "signature": page.signature,
    }  # fmt: skip


def _page(row: Any) -> Page:
    page_id: UUID = row.id
    return Page(
        page_id, row.lane, row.first_batch, row.last_batch, row.node, split_leaves(row.leaves),
        row.public_key, row.signature,
    )  # fmt: skip
