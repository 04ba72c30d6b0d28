"""A session of one's own outlives whatever becomes of its server's side."""

from __future__ import annotations

import asyncio
import time

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.platform.allotments import MINUTE_MS, Allotments, AllotmentsUnavailable, Ceiling, Grant
from marketplace.platform.database import connect
from marketplace.platform.own_session import FAULTS, OwnSession


async def test_a_lost_session_is_a_fault_and_the_next_statement_opens_another(
    engine: AsyncEngine, database_url: str
) -> None:
    session = OwnSession(engine)
    owner = connect(database_url, role=None, pool_size=1)
    try:
        (row,) = await session.fetch(
            "SELECT pg_backend_pid() AS pid, current_setting($1) AS s", "synchronous_commit"
        )
        assert row["s"] == "off"
        async with owner.connect() as connection:
            await connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": row["pid"]})
        with pytest.raises(FAULTS):
            await session.fetch("SELECT 1")
        (again,) = await session.fetch("SELECT pg_backend_pid() AS pid")
        assert again["pid"] != row["pid"]
    finally:
        await session.close()
        await owner.dispose()


async def test_a_dying_server_s_last_word_ends_nobody_s_asking(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncpg raises InternalClientError then, which is neither its InterfaceError nor PostgresError."""
    shares = Allotments(engine, time.monotonic)
    await shares.start()
    fetch = asyncpg.Connection.fetch

    async def dying(self: object, *_: object, **__: object) -> None:
        raise asyncpg.InternalClientError("got result for unknown protocol state")

    try:
        monkeypatch.setattr(asyncpg.Connection, "fetch", dying)
        with pytest.raises(AllotmentsUnavailable):
            async with asyncio.timeout(5):
                await shares.take("ann", Ceiling("requests", 60, MINUTE_MS))
        monkeypatch.setattr(asyncpg.Connection, "fetch", fetch)
        assert isinstance(await shares.take("ann", Ceiling("requests", 60, MINUTE_MS)), Grant)
    finally:
        await shares.stop()
