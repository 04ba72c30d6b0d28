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

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Final

import msgspec

from marketplace.platform.errors import AlreadyRunning, ServerFault, SetupFault
from marketplace.platform.processes import STACK_MARK, processes_of

LOCK_PATIENCE_S: Final = 40
"""How long a start waits for a stack that is shutting down in the same folder."""
NOTICE_PATIENCE_S: Final = 3
"""How long a stack whose starter was killed may take to notice and begin to shut down."""
LEFTOVER_PATIENCE_S: Final = 45
"""How long the processes of a killed stack, which the kernel has told to stop, may take; then SIGKILL."""
STOP_PATIENCE_S: Final = 60
DISK_BYTES_MIN: Final = 500 * 10**6
"""A new database, three chains and their logs take about 60 MB; the rest is room to work."""
DISK_BYTES_RESERVE: Final = 100 * 10**6
"""Below this a running stack ends: anvil writes its chain in place, and half a file is no chain."""


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
            free = shutil.disk_usage(self.root).free
        except OSError as e:
            raise SetupFault(f"cannot use {self.root} as data folder: {e.strerror}") from e
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise SetupFault(f"cannot use {self.root} as data folder: it is not yours to write in")
        if free < DISK_BYTES_MIN:
            raise SetupFault(
                f"the disk of {self.root} is full: {free // 10**6} MB are free, "
                f"{DISK_BYTES_MIN // 10**6} MB are needed"
            )

    def require_room(self) -> None:
        """SetupFault when the disk is so full that what runs here could not write its data any more."""
        free = shutil.disk_usage(self.root).free
        if free < DISK_BYTES_RESERVE:
            raise SetupFault(
                f"the disk of {self.root} is nearly full ({free // 10**6} MB are free): "
                "the stack ends before something is lost; free some and start it again"
            )

    def secret(self, name: str) -> str:
        """A random secret of 43 characters, kept under `name`."""
        path = self.secrets / name
        if not path.exists():
            write_private(path, secrets.token_urlsafe(32))
        return path.read_text().strip()

    @asynccontextmanager
    async def owned(self) -> AsyncIterator[None]:
        """Hold the folder, once everything of an earlier stack is gone; AlreadyRunning if a live one has it.

        Marks this process, so that all that is started below it is known to belong to the folder.
        """
        with self._lock_file.open("a+") as file:
            await self._lock(file)
            (self.root / "stack.ending").unlink(missing_ok=True)
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
            try:
                await self._wait_for_leftovers()
                os.environ[STACK_MARK] = str(self.root)
                yield
            finally:
                os.environ.pop(STACK_MARK, None)
                (self.root / "stack.ending").unlink(missing_ok=True)
                file.seek(0)
                file.truncate()

    async def _lock(self, file: IO[str]) -> None:
        """Take the lock; a stack that is ending is waited for."""
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                patience = LOCK_PATIENCE_S if self._is_ending() else NOTICE_PATIENCE_S
                if time.monotonic() - began > patience:
                    raise AlreadyRunning(
                        f"a stack already runs in {self.root} (pid {self.owner_pid()}); `make down` ends it"
                    ) from None
                await asyncio.sleep(0.1)
            else:
                return

    async def _wait_for_leftovers(self) -> None:
        """Let the processes of a killed stack write their data and end: two servers on it would spoil it."""
        began = time.monotonic()
        while left := processes_of(self.root):
            waited = time.monotonic() - began
            if waited > LEFTOVER_PATIENCE_S + NOTICE_PATIENCE_S:
                raise ServerFault(f"processes of an earlier stack in {self.root} do not end: {left}")
            if waited > LEFTOVER_PATIENCE_S:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.1)

    def mark_ending(self) -> None:
        """Tell a next start that it is worth waiting."""
        with contextlib.suppress(OSError):  # a full disk must not keep us from ending
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
        """Stop the stack that runs here and wait until all of it is gone; False if nothing runs."""
        pid = self.owner_pid()
        if pid is None and not processes_of(self.root):
            return False
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_PATIENCE_S
        while (pid is not None and self.owner_pid() == pid) or processes_of(self.root):
            if time.monotonic() > deadline:
                raise SetupFault(
                    f"the stack (pids {[pid, *processes_of(self.root)]}) does not end; see {self.logs}"
                )
            time.sleep(0.1)
        return True

    def forget(self) -> None:
        """Empty the folder but for its lock, which the caller holds; SetupFault if that cannot be done."""
        try:
            for entry in self.root.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry != self._lock_file:
                    entry.unlink()
        except OSError as e:
            raise SetupFault(f"{e.filename or self.root} cannot be removed: {e.strerror}") from e

    def read_environment(self) -> dict[str, str]:
        """TOLLWAY_ variables of the stack that runs here; SetupFault if none does."""
        try:
            return msgspec.json.decode(self.environment_file.read_bytes(), type=dict[str, str])
        except FileNotFoundError as e:
            raise SetupFault(f"no stack has run in {self.root}; start one with `make up`") from e
        except msgspec.MsgspecError as e:
            raise SetupFault(f"{self.environment_file} is damaged ({e}); `make up` writes it anew") from e
