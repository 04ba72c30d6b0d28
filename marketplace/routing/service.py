"""The fabric and the registry of one gateway process, wired and running.

    service = FabricService(settings, engine, price_book)
    await service.start()
    decision = choose(Question(service.registry.views(model), …))
    service.nodes.request(decision.candidates[0].node_id, request)
    await service.stop()

Three connections, as NATS sees three users: `marketplace` (requests, replies, statuses), `auth` (who may
connect) and `system` (cutting connections).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.fabric import reports
from marketplace.fabric.callout import Callout
from marketplace.fabric.connection import Connection
from marketplace.fabric.floods import Floods
from marketplace.fabric.nkey_jwt import Signer
from marketplace.fabric.node_client import Limits, NodeClient
from marketplace.fabric.sessions import Sessions
from marketplace.platform.clock import Clock, SystemClock
from marketplace.platform.database import transaction
from marketplace.platform.settings import Settings
from marketplace.routing.registry import PriceBook, Registry
from node_agent.protocol import STATUS_SUBJECTS, NodeId

_log = logging.getLogger(__name__)

CHANGES_EVERY_S: Final = 1.0
RELOAD_EVERY_S: Final = 60.0
CHANGES_OVERLAP: Final = timedelta(seconds=60)
"""Longer than a transaction that enrols or revokes, and than the clocks of two gateways differ."""
PRICES_EVERY_S: Final = 0.1
SEEN_EVERY_S: Final = 30.0
TALLY_EVERY_S: Final = 15.0

_KNOWN: Final = text("""
    SELECT nodes.id, nodes.operator_id FROM nodes JOIN people ON people.id = nodes.operator_id
    WHERE nodes.revoked_at IS NULL AND people.frozen_at IS NULL
""")
_CHANGED: Final = text("""
    SELECT id, operator_id, revoked_at IS NULL AS is_known FROM nodes
    WHERE created_at > :since OR revoked_at > :since
""")
_SEEN: Final = text("""
    UPDATE nodes SET last_seen_at = :now
    WHERE id = ANY(:ids) AND (last_seen_at IS NULL OR last_seen_at < :before)
""")
_FAULTS: Final = (OSError, SQLAlchemyError, TimeoutError)


class FabricService:
    """Owns the process's fabric from `start` to `stop`."""

    def __init__(
        self,
        settings: Settings,
        engine: AsyncEngine,
        price_book: PriceBook,
        *,
        clock: Clock | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._engine = engine
        self._price_book = price_book
        self._clock = clock or SystemClock()
        self._connections = {
            user: Connection(
                settings.nats_url,
                user=user,
                password=settings.nats_password.get_secret_value(),
                name=f"tollway-{user}",
                ca_file=settings.nats_ca_file,
            )
            for user in ("marketplace", "auth", "system")
        }
        self._floods = Floods(self._monotonic_ms, self._expel)
        self.registry = Registry(self._monotonic_ms, on_unwanted=self._floods.unwanted)
        self.nodes = NodeClient(
            self._connections["marketplace"],
            limits=limits,
            on_unwanted=self._floods.unwanted,
            on_absent=self.registry.absent,
        )
        self._sessions = Sessions(engine, self._connections["system"])
        self._callout = Callout(
            self._connections["auth"],
            self._sessions,
            Signer(settings.nats_issuer_seed.get_secret_value()),
            self._clock,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._expelling: set[asyncio.Task[bool]] = set()

    def _monotonic_ms(self) -> int:
        return int(self._clock.monotonic() * 1000)

    @property
    def is_connected(self) -> bool:
        """All three connections stand."""
        return all(connection.is_connected for connection in self._connections.values())

    async def start(self, *, deadline_s: float = 10) -> None:
        """Connect and begin; raises FabricUnavailable, or what the database raises."""
        try:
            await self._reload()
            for connection in self._connections.values():
                await connection.start(deadline_s=deadline_s)
            self.nodes.start()
            self._connections["marketplace"].subscribe(
                STATUS_SUBJECTS, lambda subject, _reply, payload: self.registry.hear(subject, payload)
            )
            self._sessions.start()
            self._callout.start()
            for connection in self._connections.values():
                await connection.flush()
        except BaseException:
            await self.stop()
            raise
        self._tasks = [
            asyncio.create_task(self._every(pause_s, work, name), name=f"fabric-{name}")
            for pause_s, work, name in (
                (CHANGES_EVERY_S, self._follow_changes, "changes"),
                (RELOAD_EVERY_S, self._reload, "reload"),
                (PRICES_EVERY_S, self._price, "prices"),
                (SEEN_EVERY_S, self._store_seen, "seen"),
                (TALLY_EVERY_S, self._store_tally, "tally"),
            )
        ]

    async def stop(self) -> None:
        """Cancel what runs and close the connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await asyncio.gather(*self._expelling, return_exceptions=True)
        await self._callout.close()
        await self._sessions.close()
        await self.nodes.close()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                await connection.close()

    async def _every(self, pause_s: float, work: Callable[[], Awaitable[None]], name: str) -> None:
        while True:
            await asyncio.sleep(pause_s)
            try:
                await work()
            except _FAULTS as error:
                _log.warning("fabric %s failed, trying again: %s", name, error)

    # -- floods

    def _expel(self, node_id: NodeId) -> None:
        task = asyncio.create_task(self._sessions.expel(node_id), name=f"expel {node_id}")
        self._expelling.add(task)
        task.add_done_callback(self._expelled)

    def _expelled(self, task: asyncio.Task[bool]) -> None:
        self._expelling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("a flooding node is not cut yet: %s", error)

    # -- who is a node

    async def _reload(self) -> None:
        async with transaction(self._engine) as connection:
            rows = (await connection.execute(_KNOWN)).all()
        self.registry.set_known({NodeId(row.id): str(row.operator_id) for row in rows})

    async def _follow_changes(self) -> None:
        self.registry.expire()
        self._floods.forget_quiet()
        since: datetime = self._clock.now() - CHANGES_OVERLAP
        async with transaction(self._engine) as connection:
            rows = (await connection.execute(_CHANGED, {"since": since})).all()
        for row in rows:
            if row.is_known:
                self.registry.add(NodeId(row.id), str(row.operator_id))
            else:
                self.registry.remove(NodeId(row.id))

    # -- prices and presence

    async def _price(self) -> None:
        for (node_id, model), (price_in, price_out) in self.registry.unpriced():
            version = await self._price_book.version_of(node_id, model, price_in, price_out)
            self.registry.set_price(node_id, model, price_in, price_out, version)

    async def _store_seen(self) -> None:
        ids = self.registry.heard_within(int(SEEN_EVERY_S * 1000))
        if ids:
            now = self._clock.now()
            before = now - timedelta(seconds=SEEN_EVERY_S / 2)
            async with transaction(self._engine) as connection:
                await connection.execute(_SEEN, {"ids": ids, "now": now, "before": before})

    async def _store_tally(self) -> None:
        sums = self.registry.tally.take()
        rows = [(*key, added.requests, added.own, added.winner) for key, added in sums.items()]
        try:
            async with transaction(self._engine) as connection:
                await reports.add(connection, rows, now=self._clock.now())
        except _FAULTS:
            self.registry.tally.give_back(sums)
            raise
