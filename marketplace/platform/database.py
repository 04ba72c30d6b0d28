"""The connection to the book.

One dialect, PostgreSQL; SQLAlchemy 2 async Core over asyncpg.  Processes work as the role
`tollway_app`, which the migrations create: it cannot change or delete what has been posted.
Only the edge commits: `transaction` is the one place that does.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from sqlalchemy import ARRAY, ColumnElement, MetaData, any_, literal, make_url, text
from sqlalchemy.exc import ArgumentError, ProgrammingError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

_log = logging.getLogger(__name__)

APPLICATION_ROLE: Final = "tollway_app"
MIGRATIONS: Final = Path(__file__).parent.parent / "migrations"

metadata: Final = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)
"""Tables of every package but the ledger, which has its own (it imports nothing of ours)."""


def with_driver(given: str) -> str:
    """Give a PostgreSQL URL as people write it (`postgres://`, `postgresql://`) with our driver named.

    ValueError: it is no URL, or of another database.
    """
    try:
        url = make_url(given)
    except ArgumentError as e:
        raise ValueError("is not a URL such as postgresql://user:password@host/name") from e
    if url.get_backend_name() not in {"postgresql", "postgres"}:
        raise ValueError(f"names {url.get_backend_name()}; the book needs PostgreSQL")
    query = dict(url.query)
    if "sslmode" in query:  # libpq's word; asyncpg's is `ssl`, with the same values
        query["ssl"] = query.pop("sslmode")
    return url.set(drivername="postgresql+asyncpg", query=query).render_as_string(hide_password=False)


STATEMENT_SECONDS_MAX: Final = 60
CONNECT_SECONDS_MAX: Final = 10
REPLICA_SECONDS_MAX: Final = 2
"""A replica that is slower to connect is not waited for: the book answers."""


def connect(
    url: str,
    *,
    pool_size: int = 10,
    role: str | None = APPLICATION_ROLE,
    statement_seconds_max: int | None = STATEMENT_SECONDS_MAX,
    connect_seconds_max: int = CONNECT_SECONDS_MAX,
) -> AsyncEngine:
    """Open a pool on the book, each connection working as `role` (None: as the URL's own user).

    A statement that takes longer than `statement_seconds_max` fails (None: never), as does a connection that
    is not there within `connect_seconds_max`, so that nobody waits for ever on a database that is gone.
    """
    server_settings = {"timezone": "UTC", "application_name": "tollway"}
    if role is not None:
        server_settings["role"] = role
    return create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=connect_seconds_max,
        pool_pre_ping=True,
        connect_args={
            "server_settings": server_settings,
            "timeout": connect_seconds_max,
            "command_timeout": statement_seconds_max,
        },
    )


@asynccontextmanager
async def transaction(engine: AsyncEngine, *, isolation: str | None = None) -> AsyncIterator[AsyncConnection]:
    """One unit of work: commits when the block ends, rolls back when it raises."""
    async with engine.connect() as connection:
        if isolation is not None:
            await connection.execution_options(isolation_level=isolation)
        async with connection.begin():
            yield connection


_AS_OF: Final = text("SELECT pg_is_in_recovery() AS is_replica, pg_last_xact_replay_timestamp() AS as_of")


def is_among(column: ColumnElement[Any], values: Collection[Any]) -> ColumnElement[bool]:
    """`column IN (values)` with the values as one array: a statement takes 32,767 arguments and no more."""
    return column == any_(literal(list(values), ARRAY(column.type)))


@asynccontextmanager
async def read(
    engine: AsyncEngine, replica: AsyncEngine | None
) -> AsyncIterator[tuple[AsyncConnection, datetime | None]]:
    """A fresh connection to read by, from the replica if it answers, and when its newest commit was made.

    None: the connection is `engine`'s, to every commit there is.
    """
    async with AsyncExitStack() as stack:
        found = None if replica is None else await _of_replica(stack, replica)
        if found is None:
            yield await stack.enter_async_context(engine.connect()), None
        else:
            yield found


async def _of_replica(stack: AsyncExitStack, replica: AsyncEngine) -> tuple[AsyncConnection, datetime] | None:
    try:
        connection = await stack.enter_async_context(replica.connect())
        found = (await connection.execute(_AS_OF)).one()
        await connection.rollback()
    except (OSError, SQLAlchemyError, TimeoutError):
        _log.warning("the replica does not answer; the book is read instead", exc_info=True)
        return None
    # One that was made a server of its own follows nobody any more.
    return (connection, found.as_of) if found.is_replica and found.as_of is not None else None


def migrate(url: str) -> None:
    """Bring the schema to its newest revision; safe to repeat and to run from two processes at once."""
    from alembic import command  # a quarter of a command's start-up time, needed by few
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = url
    command.upgrade(config, "heads")


async def create_database(url: str, *, template: str | None = None) -> None:
    """Create the URL's database if it does not exist (development and tests)."""
    parsed = make_url(url)
    engine = create_async_engine(parsed.set(database="postgres"), isolation_level="AUTOCOMMIT", pool_size=1)
    try:
        async with engine.connect() as connection:
            found = await connection.exec_driver_sql(
                "SELECT 1 FROM pg_database WHERE datname = $1", (parsed.database,)
            )
            if found.first() is None:
                # Copying files takes 0.05 s, PostgreSQL's default of logging each page 0.27 s
                suffix = f' TEMPLATE "{template}" STRATEGY FILE_COPY' if template else ""
                await connection.exec_driver_sql(f'CREATE DATABASE "{parsed.database}"{suffix}')
    finally:
        await engine.dispose()


async def drop_database(url: str) -> None:
    """Drop the URL's database, ending its sessions (tests)."""
    parsed = make_url(url)
    engine = create_async_engine(parsed.set(database="postgres"), isolation_level="AUTOCOMMIT", pool_size=1)
    drop = f'DROP DATABASE IF EXISTS "{parsed.database}"'
    try:
        async with engine.connect() as connection:
            try:
                await connection.exec_driver_sql(f"{drop} WITH (FORCE)")
            except ProgrammingError:  # autovacuum's session is a superuser's; without FORCE, it makes way
                await connection.exec_driver_sql(drop)
    finally:
        await engine.dispose()
