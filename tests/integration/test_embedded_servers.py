"""The embedded servers keep their promises: real, local only, no orphan, nothing acknowledged lost."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nats
import pytest
from sqlalchemy import text

from marketplace.platform import database, embedded_postgres
from marketplace.platform.embedded_nats import EmbeddedNats, load_or_make_credentials
from marketplace.platform.embedded_postgres import EmbeddedPostgres
from marketplace.platform.errors import PortInUse, SetupFault
from marketplace.platform.processes import free_port

OWNER = """
import sys, time
from pathlib import Path
from marketplace.platform.embedded_postgres import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tollway-tests-") as name:
        Path(name).chmod(0o755)
        yield Path(name) / "postgres"


async def test_a_killed_owner_leaves_no_server_and_loses_no_row(home: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(home)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    first = EmbeddedPostgres(home)
    engine = database.connect(first.url("postgres"), role=None)
    async with database.transaction(engine) as connection:
        await connection.execute(text("CREATE TABLE kept (n int)"))
        await connection.execute(text("INSERT INTO kept VALUES (7)"))
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    await engine.dispose()
    deadline = time.monotonic() + 5
    while _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(pid)

    again = EmbeddedPostgres(home)
    again.start()
    try:
        engine = database.connect(again.url("postgres"), role=None)
        async with engine.connect() as connection:
            assert (await connection.execute(text("SELECT n FROM kept"))).scalar_one() == 7
        await engine.dispose()
    finally:
        again.stop()


async def test_postgres_listens_on_its_socket_only(home: Path) -> None:
    server = EmbeddedPostgres(home)
    server.start()
    try:
        engine = database.connect(server.url("postgres"), role=None)
        async with engine.connect() as connection:
            assert (await connection.execute(text("SHOW listen_addresses"))).scalar_one() == ""
            assert (await connection.execute(text("SHOW fsync"))).scalar_one() == "on"
            assert (await connection.execute(text("SHOW server_version_num"))).scalar_one() >= "180000"
        await engine.dispose()
    finally:
        server.stop()
    assert not server.is_alive()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root drops to another user, who must reach the files")
async def test_a_closed_folder_of_root_keeps_its_data_where_the_server_can_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in /root, mode 0700; with a copy of the programs cut short before, under a strict umask."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with tempfile.TemporaryDirectory(prefix="tollway-tests-") as outside:
        Path(outside).chmod(0o755)
        monkeypatch.setattr(embedded_postgres, "OUTSIDE", Path(outside) / "lib")
        before = os.umask(0o077)
        try:
            version = importlib.metadata.version("embedded-postgres")
            torn = Path(outside) / "lib" / f"postgres-{version}.new" / "embedded_postgres" / "pginstall"
            torn.mkdir(parents=True)
            (torn / "half a program").write_text("")
            with ThreadPoolExecutor(4) as pool:
                servers = list(pool.map(EmbeddedPostgres, [closed / "postgres"] * 4))
            server = servers[0]
            server.start()
        finally:
            os.umask(before)
        try:
            assert server.binaries.is_relative_to(Path(outside) / "lib" / f"postgres-{version}")
            engine = database.connect(server.url("postgres"), role=None)
            async with engine.connect() as connection:
                assert (await connection.execute(text("SELECT 1"))).scalar_one() == 1
            await engine.dispose()
        finally:
            server.stop()
        assert closed.stat().st_mode & 0o777 == 0o700
        again = EmbeddedPostgres(closed / "postgres")
        assert again.binaries == server.binaries
        again.forget()
        assert not (again._data).exists()


def test_another_platform_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SetupFault, match="PostgreSQL runs on Linux; on win32 give TOLLWAY_DATABASE_URL"):
        EmbeddedPostgres(tmp_path / "postgres")
    with pytest.raises(SetupFault, match="NATS server runs on Linux"):
        EmbeddedNats(tmp_path / "nats", 1, load_or_make_credentials(tmp_path / "secrets"))


async def test_nats_refuses_strangers_and_serves_the_marketplace(nats_server: EmbeddedNats) -> None:
    connection = await nats.connect(
        nats_server.url, user="marketplace", password=nats_server.credentials.password
    )
    assert connection.is_connected
    await connection.close()
    with socket.create_connection(("127.0.0.1", nats_server.port), timeout=8) as stranger:
        stranger.recv(4096)
        stranger.sendall(b'CONNECT {"user":"marketplace","pass":"wrong","verbose":false}\r\nPING\r\n')
        assert b"Authorization Violation" in stranger.recv(4096)


def test_a_port_in_use_is_named(tmp_path: Path, nats_server: EmbeddedNats) -> None:
    second = EmbeddedNats(tmp_path / "nats", nats_server.port, load_or_make_credentials(tmp_path / "secrets"))
    with pytest.raises(PortInUse, match=f"port {nats_server.port} \\(NATS\\) is in use"):
        second.start()
    assert free_port() != nats_server.port
