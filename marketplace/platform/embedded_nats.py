"""The default nervous system: a real nats-server with JetStream, on loopback, owned by one process.

Two users may connect with a password, both ours: `auth`, which answers the server's auth callout, and
`marketplace`.  Everybody else (the nodes) is decided by the callout (`marketplace.fabric.callout`).
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
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import nkeys

from marketplace.platform.errors import ServerFault
from marketplace.platform.processes import require_free_port, require_linux, start_child, stop_child, tail

START_DEADLINE_S: Final = 15
PAYLOAD_BYTES_MAX: Final = 2 * 1024 * 1024
"""Above the largest request (1 MiB body) and frame (256 KiB) with room for their envelopes."""


@dataclass(frozen=True, slots=True)
class NatsCredentials:
    """What the marketplace's processes need to speak to the server; secrets."""

    password: str
    """Of both users, `auth` and `marketplace`."""
    issuer_seed: str
    """Account nkey seed that signs the callout's answers."""

    @property
    def issuer(self) -> str:
        """The account's public key, which the server is told to trust."""
        return str(nkeys.from_seed(self.issuer_seed.encode()).public_key.decode())


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


def _nobodys_key() -> str:
    """A user nkey whose seed is thrown away."""
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return str(nkeys.from_seed(seed).public_key.decode())


def _configuration(port: int, home: Path, credentials: NatsCredentials) -> str:
    return f"""\
server_name: "tollway-{port}"
listen: "127.0.0.1:{port}"
max_payload: {PAYLOAD_BYTES_MAX}
max_pending: 64MB
write_deadline: "10s"
jetstream {{ store_dir: "{home / "jetstream"}", max_memory_store: 64MB, max_file_store: 4GB }}
accounts {{
  # nats-server sends nonces, which nodes sign, only where some nkey user exists; nobody has this one's seed.
  AUTH {{ users: [ {{ user: "auth", password: "{credentials.password}" }}, {{ nkey: "{_nobodys_key()}" }} ] }}
  APP {{ jetstream: enabled, users: [ {{ user: "marketplace", password: "{credentials.password}" }} ] }}
  SYS {{ users: [ {{ user: "system", password: "{credentials.password}" }} ] }}
}}
system_account: SYS
authorization {{
  timeout: 5
  auth_callout {{ issuer: "{credentials.issuer}", account: AUTH, auth_users: [ auth, marketplace, system ] }}
}}
"""


class EmbeddedNats:
    """One nats-server, alive as long as this process."""

    def __init__(self, home: Path, port: int, credentials: NatsCredentials) -> None:
        require_linux("the embedded NATS server")
        self._home = home.resolve()
        self.port = port
        self.credentials = credentials
        self._log = self._home.parent / f"{home.name}.log"
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None else None

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        require_free_port(self.port, "NATS")
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        configuration = self._home / "nats.conf"
        _write_secret(configuration, _configuration(self.port, self._home, self.credentials))
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
