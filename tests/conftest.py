"""Real servers, each started once per run; every test gets a database of its own.

`--part early` is what runs while the engine is being installed, `--part late` everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import hypothesis
import pytest
from pytest_socket import socket_allow_hosts
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine
from xdist.scheduler import LoadScopeScheduling

import chain.evm  # noqa: F401  # before a test imports eth-account itself: it puts the recursion limit back
from marketplace.platform import database
from marketplace.platform.embedded_nats import EmbeddedNats, load_or_make_credentials
from marketplace.platform.embedded_postgres import EmbeddedPostgres
from marketplace.platform.processes import free_port

# CI repeats the same examples, so that a change is judged by what it changed; people's runs explore.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_runtest_setup() -> None:
    """Close every socket but loopback's."""
    socket_allow_hosts(["127.0.0.1", "::1"], allow_unix_socket=True)


ROOT: Final = Path(__file__).resolve().parents[1]
EARLY: Final = re.compile(r"tests/(unit|property)/|tests/attacks/test_a[0-4]")
"""As many as run while the engine is being installed; those of them that need it are late all the same."""


def part_of(module: str) -> str:
    """Each module (path from the root) is in one part, so no test is in both or in none."""
    return "early" if EARLY.match(module) and not _needs_the_engine(module) else "late"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=("early", "late"), help="one part of the modules; default: all")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the modules of the other part."""
    wanted = config.getoption("part")
    if wanted is None or not collection_path.match("test_*.py"):
        return None
    return True if part_of(collection_path.relative_to(ROOT).as_posix()) != wanted else None


class EngineOnOneWorker(LoadScopeScheduling):
    """Keep the modules with a real engine on one worker: two engines on two cores starve.

    xdist's own `loadgroup` writes the group into a field that pytest 9.2 no longer has.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "engine" if _needs_the_engine(nodeid.partition("::")[0]) else nodeid


@functools.cache
def _needs_the_engine(module: str) -> bool:
    return "pytest.mark.engine" in (ROOT / module).read_text()


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    return EngineOnOneWorker(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)


MEMORY: Final = Path("/dev/shm")
MEMORY_BYTES_MIN: Final = 2 * 10**9
"""Two workers' servers took 0.23 GB in a whole run."""


def _quick_folder() -> Path | None:
    """Memory, where there is room: a database is a thousand small files, copied for each test.

    Measured: 0.02 s there, 0.5 s on a disk. None is the folder for temporary files.
    """
    is_usable = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= MEMORY_BYTES_MIN
    return MEMORY if is_usable else None


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A server for the whole run: TOLLWAY_TEST_DATABASE_URL or the embedded one; gives its URL."""
    given = os.environ.get("TOLLWAY_TEST_DATABASE_URL")
    if given:
        yield given
        return
    # Not under pytest's own folder: as root, the server runs as somebody else, whom pytest keeps out.
    with tempfile.TemporaryDirectory(prefix="tollway-tests-", dir=_quick_folder()) as name:
        folder = Path(name)
        folder.chmod(0o755)
        # Hundreds of databases are made and dropped; without fsync a killed server still loses nothing,
        # only a machine without power would.  Tests of durability start servers of their own.
        server = EmbeddedPostgres(folder / "postgres", {"fsync": "off", "full_page_writes": "off"})
        server.start()
        try:
            yield server.url("tollway")
        finally:
            server.stop()


@pytest.fixture(scope="session")
def template_url(postgres_url: str) -> str:
    """A migrated database that every test's own is copied from."""
    url = make_url(postgres_url).set(database=f"template_{uuid.uuid4().hex[:8]}")
    rendered = url.render_as_string(hide_password=False)
    asyncio.run(database.create_database(rendered))
    database.migrate(rendered)
    return rendered


@pytest.fixture
async def database_url(template_url: str) -> AsyncIterator[str]:
    """A fresh, migrated database; SQLAlchemy URL of its owner."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    url = make_url(template_url).set(database=name).render_as_string(hide_password=False)
    await database.create_database(url, template=make_url(template_url).database)
    try:
        yield url
    finally:
        await database.drop_database(url)


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """The book as the application sees it: role tollway_app."""
    engine = database.connect(database_url)
    try:
        yield engine
    finally:
        await engine.dispose()


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    """A nats-server with our configuration, for the whole run."""
    with _running_nats(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def own_nats_server(tmp_path: Path) -> Iterator[EmbeddedNats]:
    """A nats-server of the test's own, to be stopped or killed."""
    with _running_nats(tmp_path) as server:
        yield server


@contextlib.contextmanager
def _running_nats(folder: Path) -> Iterator[EmbeddedNats]:
    server = EmbeddedNats(folder / "nats", free_port(), load_or_make_credentials(folder / "secrets"))
    server.start()
    try:
        yield server
    finally:
        server.stop()
