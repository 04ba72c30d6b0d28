"""The ledger on a PostgreSQL that is not ours: over TCP, as somebody who is no superuser."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from marketplace.platform.embedded_postgres import EmbeddedPostgres
from marketplace.platform.processes import free_port

ROOT = Path(__file__).parents[2]
CHOSEN = (
    "rollups.py::test_a_month_is_detached_in_order_and_the_book_still_proves_itself",
    "posting.py::test_the_same_deposit_posted_by_two_watchers_at_once_counts_once",
    "posting.py::test_the_application_cannot_rewrite_what_is_posted[DELETE FROM {}-charges]",
    "posting.py::test_the_tables_in_python_are_the_tables_in_the_database",
    "poster.py::test_many_charges_share_few_commits_and_the_book_proves_itself",
    "poster.py::test_a_charge_whose_lease_was_reaped_is_posted_and_its_shortfall_carried[copy]",
    "poster.py::test_a_connection_lost_in_the_commit_posts_exactly_once[10-True]",
)
"""Rights, partitions, locks, COPY, the functions, a lost connection: where servers differ."""


@contextmanager
def a_server(binaries: Path) -> Iterator[str]:
    """Somebody's server: its programs from `binaries`, its own defaults; the URL of a plain user of it."""
    user: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="tollway-external-") as name:
        folder, port, password = Path(name), free_port(), secrets.token_hex(16)
        folder.chmod(0o755)
        (folder / "password").write_text(password)
        place = folder / "place"
        place.mkdir(mode=0o700)
        if user:
            shutil.chown(place, "nobody")
        initdb = [
            binaries / "initdb", "-D", place / "data", "-U", "admin", "-A", "scram-sha-256", "-E", "UTF8",
            "--locale", "C", "--pwfile", folder / "password",
        ]  # fmt: skip
        subprocess.run(initdb, check=True, cwd="/", capture_output=True, **user)
        server = subprocess.Popen(
            [binaries / "postgres", "-D", place / "data", "-p", str(port), "-k", place,
             "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"],
            cwd="/", stderr=subprocess.DEVNULL, **user,
        )  # fmt: skip
        try:
            asyncio.run(_make_owner(port, password))
            yield f"postgresql+asyncpg://plain:{password}@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()
            server.wait(30)


async def _make_owner(port: int, password: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                admin = await asyncpg.connect(
                    host="127.0.0.1", port=port, user="admin", password=password, database="postgres"
                )
                break
            except (OSError, asyncpg.CannotConnectNowError):
                await asyncio.sleep(0.05)
    await admin.execute(f"CREATE ROLE plain LOGIN CREATEDB CREATEROLE PASSWORD '{password}'")
    await admin.close()


def passed(url: str, *wanted: str) -> None:
    """Run these tests there, in a run of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *wanted],
        cwd=ROOT, env={**os.environ, "TOLLWAY_TEST_DATABASE_URL": url}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4_000:]


@pytest.mark.timeout(300)
def test_chosen_ledger_tests_pass_on_somebody_elses_server(tmp_path):
    with a_server(EmbeddedPostgres(tmp_path).binaries) as url:
        passed(url, *(f"tests/integration/test_ledger_{name}" for name in CHOSEN))


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_every_ledger_test_passes_on_the_machines_own_postgresql():
    found = shutil.which("postgres")
    if found is None:
        pytest.skip("this machine has no PostgreSQL of its own")
    with a_server(Path(found).resolve().parent) as url:
        passed(url, "tests/integration", "-k", "ledger and not external")
