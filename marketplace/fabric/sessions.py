"""One live connection per node, and none for a revoked one.

The row of a node names its connection as NATS does: (server id, client number).  A newer connection
replaces the older in one statement and cuts it; a sweep every second cuts what was revoked, and repeats
until the server has confirmed, so that a lost message or a dead gateway cannot keep a revoked node alive.
A node that floods (`floods`) is cut too, and stays out for a minute.
Cutting goes through the system account: `$SYS.REQ.SERVER.<id>.KICK` (nats-server 2.15.1).
Client numbers are never reused by a server, so cutting twice is harmless.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from typing import Final

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.fabric.connection import Connection
from marketplace.fabric.errors import FabricUnavailable
from marketplace.platform.database import transaction
from node_agent.protocol import NodeId

_log = logging.getLogger(__name__)

SWEEP_EVERY_S: Final = 1.0
KICK_DEADLINE_S: Final = 2.0
SWEEP_ROWS_MAX: Final = 500
NOT_FOUND: Final = 404
BARRED_S: Final = 60
"""How long a node that floods stays out; each new flood begins it anew."""

_ADMIT: Final = text("""
    WITH before AS (
        SELECT id, session_server, session_client FROM nodes
        WHERE public_key = :public_key AND revoked_at IS NULL
            AND (barred_until IS NULL OR barred_until <= now())
        FOR UPDATE
    )
    UPDATE nodes SET session_server = :server, session_client = :client
    FROM before WHERE nodes.id = before.id
    RETURNING nodes.id, before.session_server, before.session_client
""")
_TO_CUT: Final = text("""
    SELECT id, session_server, session_client FROM nodes
    WHERE revoked_at IS NOT NULL AND session_server IS NOT NULL
    ORDER BY id LIMIT :rows
""")
_BAR: Final = text("""
    UPDATE nodes SET barred_until = now() + make_interval(secs => :seconds)
    WHERE id = :id
    RETURNING session_server, session_client
""")
_OFFENCE: Final = text("INSERT INTO node_offences (node_id, kind) VALUES (:id, 'flood')")
_FORGET: Final = text("""
    UPDATE nodes SET session_server = NULL, session_client = NULL
    WHERE id = :id AND session_server = :server AND session_client = :client
""")


@dataclass(frozen=True, slots=True)
class Session:
    """A connection as NATS names it."""

    server: str
    client: int


class Sessions:
    """Keeps the law above; every gateway runs one."""

    def __init__(self, engine: AsyncEngine, system: Connection) -> None:
        """`system`: a connection of the system account's user."""
        self._engine = engine
        self._system = system
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._sweeping = asyncio.create_task(self._sweep_forever(), name="fabric-sessions")

    async def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
            self._sweeping = None

    async def admit(self, public_key: str, session: Session) -> NodeId | None:
        """Make `session` the node's only one; None if the key is unknown or revoked."""
        async with transaction(self._engine) as connection:
            row = (
                await connection.execute(
                    _ADMIT, {"public_key": public_key, "server": session.server, "client": session.client}
                )
            ).first()
        if row is None:
            return None
        if row.session_server is not None:
            await self.cut(Session(row.session_server, row.session_client))
        return NodeId(row.id)

    async def cut(self, session: Session) -> bool:
        """Disconnect `session`; True once it is known to be gone."""
        try:
            answer = await self._system.ask(
                f"$SYS.REQ.SERVER.{session.server}.KICK",
                json.dumps({"cid": session.client}).encode(),
                deadline_s=KICK_DEADLINE_S,
            )
        except (FabricUnavailable, TimeoutError) as error:
            _log.warning("could not cut a node's session: %s", error)
            return False
        if answer is None:  # no such server any more: it took its connections with it
            return True
        failure = json.loads(answer).get("error")
        return failure is None or failure.get("code") == NOT_FOUND or "not found" in str(failure).lower()

    async def expel(self, node_id: NodeId) -> bool:
        """Cut a node that floods and bar it for `BARRED_S`, on record; False if there is no such node."""
        async with transaction(self._engine) as connection:
            row = (await connection.execute(_BAR, {"id": node_id, "seconds": BARRED_S})).first()
            if row is None:
                return False
            await connection.execute(_OFFENCE, {"id": node_id})
        _log.warning("node %s floods us and is cut off", node_id)
        if row.session_server is not None:
            await self.cut(Session(row.session_server, row.session_client))
        return True

    async def sweep(self) -> int:
        """Cut the connections of revoked nodes; give back how many are gone for certain."""
        async with transaction(self._engine) as connection:
            rows = (await connection.execute(_TO_CUT, {"rows": SWEEP_ROWS_MAX})).all()
        gone = 0
        for row in rows:
            if not await self.cut(Session(row.session_server, row.session_client)):
                continue
            async with transaction(self._engine) as connection:
                await connection.execute(
                    _FORGET, {"id": row.id, "server": row.session_server, "client": row.session_client}
                )
            gone += 1
        return gone

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            try:
                await self.sweep()
            except (OSError, SQLAlchemyError, TimeoutError):
                _log.warning("the sweep of revoked nodes failed, trying again", exc_info=True)
