"""The default nervous system: a real nats-server with JetStream, on loopback, owned by one process.

What it is told, and how a production server's text differs: `nats_configuration`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Final

import nkeys

from marketplace.platform import nats_configuration
from marketplace.platform.errors import ServerFault
from marketplace.platform.nats_configuration import Cluster, NatsCredentials, Server, Tls
from marketplace.platform.processes import require_free_port, require_linux, start_child, stop_child, tail

__all__ = ["EmbeddedNats", "NatsCredentials", "load_or_make_credentials"]

START_DEADLINE_S: Final = 15


def load_or_make_credentials(folder: Path) -> NatsCredentials:
    """Read the credentials in `folder`, making them at first use (files of mode 0600)."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    password, seed = folder / "password", folder / "issuer.seed"
    if not password.exists():
        _write_secret(password, secrets.token_urlsafe(24))
    if not seed.exists():
        raw = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_ACCOUNT)
        _write_secret(seed, raw.decode())
    return NatsCredentials(password.read_text().strip(), seed.read_text().strip())


def _write_secret(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
        f.write(text)
    fresh.replace(path)


def _binary() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = (
        str(beside) if beside.exists() else shutil.which("nats-server", path=str(Path(sys.executable).parent))
    )
    if not found:
        raise ServerFault("nats-server is missing; run `make setup`")
    return found


class EmbeddedNats:
    """One nats-server, alive as long as this process; alone, or one of a cluster."""

    def __init__(
        self,
        home: Path,
        port: int,
        credentials: NatsCredentials,
        *,
        tls: Tls | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        require_linux("the embedded NATS server")
        self._home = home.resolve()
        self._server = Server(
            f"tollway-{port}", f"127.0.0.1:{port}", self._home / "jetstream", tls=tls, cluster=cluster
        )
        self.port = port
        self.credentials = credentials
        self._log = self._home.parent / f"{home.name}.log"
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{'nats' if self._server.tls is None else 'tls'}://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None else None

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        require_free_port(self.port, "NATS")
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        configuration = self._home / "nats.conf"
        _write_secret(configuration, nats_configuration.configuration(self._server, self.credentials))
        self._child = start_child([_binary(), "-c", str(configuration)], log=self._log)
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            if self._child.poll() is not None:
                raise ServerFault(f"NATS did not start:\n{tail(self._log)}")
            with socket.socket() as probe:
                probe.settimeout(0.5)
                if probe.connect_ex(("127.0.0.1", self.port)) == 0 and probe.recv(4) == b"INFO":
                    return
            time.sleep(0.05)
        self.stop()
        raise ServerFault(f"NATS gave no answer within {START_DEADLINE_S} s:\n{tail(self._log)}")

    def is_alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def stop(self) -> None:
        if self._child is not None:
            stop_child(self._child, stop_signal=signal.SIGTERM, patience_s=10)
            self._child = None
