"""Child processes that cannot outlive us.

Each child gets its own session (Ctrl-C in a terminal reaches only the owner, which then stops its
children in order) and, on Linux, PR_SET_PDEATHSIG: when the owner dies, even by SIGKILL, the kernel
sends the child its stop signal.  The signal is tied to the *thread* that started the child, so children
are started from the main thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from marketplace.platform.errors import PortInUse, SetupFault

_PR_SET_PDEATHSIG: Final = 1
STACK_MARK: Final = "TOLLWAY_STACK"
"""Set by a stack's owner to its data folder; every process below it inherits it and is known by it."""
UNPRIVILEGED_USER: Final = "nobody"
EXEC_MS_MAX: Final = 20
"""How long a process without any environment may be one that is just being started."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The user a server runs as when we are root (PostgreSQL refuses to run as root)."""

    uid: int
    gid: int


def unprivileged_owner() -> Owner | None:
    """Give the user to drop to, or None when we are not root."""
    if os.geteuid() != 0:
        return None
    import pwd

    entry = pwd.getpwnam(UNPRIVILEGED_USER)
    return Owner(entry.pw_uid, entry.pw_gid)


def die_with_parent(stop_signal: int, owner: Owner | None = None) -> Callable[[], None]:
    """Give a `preexec_fn` that drops privileges, then asks for `stop_signal` at the owner's death."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    parent = os.getpid()

    def preexec() -> None:
        if owner is not None:
            os.setgroups([])
            os.setgid(owner.gid)
            os.setuid(owner.uid)  # before prctl: changing the user clears the death signal
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, stop_signal, 0, 0, 0)
            if os.getppid() != parent:  # the owner died in between
                os.kill(os.getpid(), signal.SIGKILL)

    return preexec


def start_child(
    argv: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stop_signal: int = signal.SIGTERM,
    owner: Owner | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child that dies with us; its output is appended to `log`."""
    with log.open("ab") as sink:
        return subprocess.Popen(  # noqa: S603 - argv is ours
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(env) if env is not None else None,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=die_with_parent(stop_signal, owner),
        )


def stop_child(child: subprocess.Popen[bytes], *, stop_signal: int, patience_s: int) -> None:
    """Stop a child in order; after `patience_s` kill its whole session."""
    if child.poll() is not None:
        return
    child.send_signal(stop_signal)
    try:
        child.wait(patience_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def end_with_make() -> None:
    """Under make, get SIGTERM when make is killed: it cannot pass SIGKILL on."""
    if "MAKELEVEL" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def processes_of(folder: Path) -> list[int]:
    """List the live processes, other than this one, that a stack in `folder` started (Linux)."""
    mark = os.fsencode(f"{STACK_MARK}={folder}")
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = _environment(entry)
        except OSError:  # ended meanwhile, or somebody else's
            continue
        if mark in environment.split(b"\0") and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return sorted(found)


def _environment(process: Path) -> bytes:
    """What a process was started with.

    The kernel shows nothing between the moment a child lets its parent go on and the end of its exec (seen
    in one of four reads right after a start), so nothing is believed only after a while.
    """
    for _ in range(EXEC_MS_MAX):
        if environment := (process / "environ").read_bytes():
            return environment
        (process / "exe").readlink()  # raises for what never has one: the kernel's threads, the ended
        time.sleep(0.001)
    return b""


def require_free_port(port: int, what: str) -> None:
    """Raise PortInUse, naming the port and its purpose, unless loopback `port` can be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise PortInUse(f"port {port} ({what}) is in use on 127.0.0.1; free it or choose another") from e


def free_port() -> int:
    """Give a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 15) -> str:
    """Give the last lines of a log, for an error message."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def require_linux(what: str) -> None:
    """Refuse clearly where children cannot be tied to their owner's life."""
    if sys.platform != "linux":
        raise SetupFault(
            f"{what} runs on Linux; on {sys.platform} give TOLLWAY_DATABASE_URL and TOLLWAY_NATS_URL "
            "of servers you run yourself"
        )
