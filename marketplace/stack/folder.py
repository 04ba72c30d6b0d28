"""The stack's data folder: who owns it, its secrets, and what other commands need to reach it.

postgres/ nats/ chains/     the servers' own data
secrets/                    passwords, HMAC key, API keys (mode 0600)
signers/<name>/             each signer's keystores; in production each lies on its signer's own machine
settler/                    gas keys and the Solana pool's seed; in production only the settler has it
node/                       the demo operator's agent
logs/                       one file a process
environment.json            TOLLWAY_ variables of the running stack, for other commands
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from marketplace.platform.errors import AlreadyRunning, SetupFault

LOCK_PATIENCE_S: Final = 40
"""How long a start waits for a stack that is shutting down in the same folder."""
NOTICE_PATIENCE_S: Final = 3
"""How long a stack whose starter was killed may take to notice and begin to shut down."""
STOP_PATIENCE_S: Final = 60


def write_private(path: Path, text: str) -> None:
    """Write a file only its owner can read, whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
        f.write(text)
    fresh.replace(path)


class StackFolder:
    """Paths and secrets of one stack."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.secrets = self.root / "secrets"
        self.signers = self.root / "signers"
        self.settler = self.root / "settler"
        self.node = self.root / "node"
        self.logs = self.root / "logs"
        self.chains = self.root / "chains"
        self.chains_file = self.root / "chains.json"
        self.environment_file = self.root / "environment.json"
        self._lock_file = self.root / "stack.lock"

    def make(self) -> None:
        """Create the folders; SetupFault where the disk or the rights do not allow it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for private in (self.secrets, self.signers, self.settler, self.node):
                private.mkdir(exist_ok=True, mode=0o700)
            for folder in (self.logs, self.chains):
                folder.mkdir(exist_ok=True)
        except OSError as e:
            raise SetupFault(f"cannot use {self.root} as data folder: {e.strerror}") from e

    def secret(self, name: str) -> str:
        """A random secret of 43 characters, kept under `name`."""
        path = self.secrets / name
        if not path.exists():
            write_private(path, secrets.token_urlsafe(32))
        return path.read_text().strip()

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the folder; AlreadyRunning if a live stack has it (one that is ending is waited for)."""
        with self._lock_file.open("a+") as file:
            began = time.monotonic()
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    patience = LOCK_PATIENCE_S if self._is_ending() else NOTICE_PATIENCE_S
                    if time.monotonic() - began < patience:
                        time.sleep(0.1)
                        continue
                    raise AlreadyRunning(
                        f"a stack already runs in {self.root} (pid {self.owner_pid()}); `make down` ends it"
                    ) from None
            (self.root / "stack.ending").unlink(missing_ok=True)
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                (self.root / "stack.ending").unlink(missing_ok=True)
                file.seek(0)
                file.truncate()

    def mark_ending(self) -> None:
        """Tell a next start that it is worth waiting."""
        (self.root / "stack.ending").touch()

    def _is_ending(self) -> bool:
        return (self.root / "stack.ending").exists()

    def owner_pid(self) -> int | None:
        """The pid of the process that holds the folder, None if nobody does."""
        try:
            with self._lock_file.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(file.read() or 0) or None
                return None
        except (FileNotFoundError, ValueError):
            return None

    def end_owner(self) -> bool:
        """Stop the stack that runs here and wait until it is gone; False if none runs."""
        pid = self.owner_pid()
        if pid is None:
            return False
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_PATIENCE_S
        while self.owner_pid() == pid:
            if time.monotonic() > deadline:
                raise SetupFault(f"the stack (pid {pid}) does not end; see {self.logs}")
            time.sleep(0.1)
        return True

    def read_environment(self) -> dict[str, str]:
        """TOLLWAY_ variables of the stack that runs here; SetupFault if none does."""
        try:
            found: dict[str, str] = json.loads(self.environment_file.read_text())
        except FileNotFoundError as e:
            raise SetupFault(f"no stack has run in {self.root}; start one with `make up`") from e
        return found
