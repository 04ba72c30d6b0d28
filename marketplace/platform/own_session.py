"""A database session of one's own, for small statements on the way of every request.

Below SQLAlchemy: each statement is one round trip and its own transaction, where a pooled connection costs
five (is it alive, BEGIN, the setting, the statement, COMMIT).  Its commits do not wait for the disk
(`synchronous_commit = off`): for what may be lost with the machine, or is made durable by a later commit.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final

import asyncpg
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

FAULTS: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what a statement meets after a dying server's last word
    SQLAlchemyError,
)
"""What a statement may raise; the session is then closed, and the next statement opens another."""


class OwnSession:
    """Opened by the first statement; statements wait for one another."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._connection: AsyncConnection | None = None
        self._driver: asyncpg.Connection[asyncpg.Record] | None = None
        self._turn = asyncio.Lock()
        self.was_sent = False
        """Whether the last statement may have been run; for who alone sends statements here."""

    async def fetch(self, statement: str, *values: object) -> Sequence[asyncpg.Record]:
        """Run a statement and give its rows; raises FAULTS."""
        self.was_sent = False
        async with self._turn:
            try:
                driver = self._driver or await self._connect()
                self.was_sent = True
                return await driver.fetch(statement, *values)
            except BaseException:  # cancelled, too: nobody reads the rest of the answer
                await self._disconnect()
                raise

    async def close(self) -> None:
        async with self._turn:
            await self._disconnect()

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        self._connection = await self._engine.connect()
        driver = (await self._connection.get_raw_connection()).driver_connection
        assert isinstance(driver, asyncpg.Connection)
        await driver.execute("SET synchronous_commit = off")
        self._driver = driver
        return driver

    async def _disconnect(self) -> None:
        connection, self._connection, self._driver = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(*FAULTS):
                await connection.invalidate()  # back in the pool, the session would keep its setting
            with contextlib.suppress(*FAULTS):
                await connection.close()
