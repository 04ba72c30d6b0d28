"""Stand between the agent and an engine it spawned, so that neither outlives the other.

    python guard.py --pid-file FILE --grace SECONDS -- ENGINE ARGUMENTS…

The guard's standard input is a pipe whose other end only the agent holds. When the agent ends, be it
by kill -9, the pipe closes; the guard then ends the engine's whole process group (seen: killing only
vLLM's server leaves its workers behind, holding memory): SIGTERM, wait, SIGKILL. A SIGTERM to
the guard does the same. Its exit status is the engine's. It runs in a session of its own, so that a
Ctrl-C meant for the agent does not reach the engine before running requests are finished.

The pid file names the group, for `reap_leftover` at the agent's next start, should the guard itself
have been killed. Only the standard library: it starts in a few milliseconds and weighs little.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

POLL_SECONDS: Final = 0.2
KILL_SECONDS_MAX: Final = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Run an engine that ends when the agent does.")
    parser.add_argument("--pid-file", type=Path, required=True)
    parser.add_argument("--grace", type=float, required=True, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("argv", nargs="+", help="the engine's command line")
    arguments = parser.parse_args()
    return guard(arguments.argv, arguments.pid_file, arguments.grace)


def guard(argv: list[str], pid_file: Path, grace_seconds: float) -> int:
    """Run `argv` until it ends, the pipe closes or SIGTERM comes; give back its exit status."""
    asked_to_stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: asked_to_stop.append(received))
    engine = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - the operator's own command
    write_pid_file(pid_file, engine.pid)
    agent_gone = _watch_pipe()
    try:
        while engine.poll() is None and not asked_to_stop and not agent_gone.wait(POLL_SECONDS):
            pass
        if engine.poll() is None:
            stop_group(engine.pid, grace_seconds, leader=engine)
        return engine.wait()
    finally:
        # The leader is gone; workers it left behind go too.
        stop_group(engine.pid, 0.0)
        pid_file.unlink(missing_ok=True)


def _watch_pipe() -> threading.Event:
    """Set once the agent's end of the pipe closes; a thread, since Windows has no select for pipes."""
    closed = threading.Event()

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 64):
            pass
        closed.set()

    threading.Thread(target=wait, daemon=True).start()
    return closed


def is_group_alive(group: int) -> bool:
    """True while any process of the group runs; a zombie nobody has waited for counts as gone on Linux."""
    if sys.platform == "win32":
        return False
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    members = _linux_group_states(group)
    return members is None or any(state not in "ZX" for state in members)


def stop_group(group: int, grace_seconds: float, leader: "subprocess.Popen[bytes] | None" = None) -> None:
    """End every process of the group: SIGTERM to all, then SIGKILL after the grace; returns when gone."""
    if sys.platform == "win32":
        command = ["taskkill", "/T", "/F", "/PID", str(group)]
        subprocess.run(command, check=False, capture_output=True)  # noqa: S603 - fixed but for a number
        return
    for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, KILL_SECONDS_MAX)):
        if not is_group_alive(group):
            return
        if seconds <= 0:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
        until = time.monotonic() + seconds
        while time.monotonic() < until and is_group_alive(group):
            if leader is not None:
                leader.poll()
            time.sleep(0.05)


def write_pid_file(path: Path, pid: int) -> None:
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps({"pid": pid, "boot": _boot(), "started": _started(pid)}))
    unfinished.replace(path)


def reap_leftover(pid_file: Path) -> bool:
    """End the engine an earlier agent and guard left behind; True if there was one.

    A process id may have gone to somebody else since. The group is ours only if the machine was not
    rebooted and its leader, if still there, started at the noted moment; a group whose leader is gone
    keeps its number to itself.
    """
    try:
        noted = json.loads(pid_file.read_text())
        pid, boot, started = int(noted["pid"]), noted["boot"], noted["started"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        pid_file.unlink(missing_ok=True)
        return False
    now_started = _started(pid)
    is_ours = (
        pid > 1 and boot == _boot() and (not now_started or now_started == started) and is_group_alive(pid)
    )
    if is_ours:
        stop_group(pid, 0.0)
    pid_file.unlink(missing_ok=True)
    return is_ours


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in whatever words the system has; empty if it is gone."""
    stat = _linux_stat(pid)
    if stat is not None:
        return stat[19]
    if sys.platform == "win32" or Path("/proc/self/stat").exists():
        return ""
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    shown = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - fixed but for a number
    return shown.stdout.strip()


def _linux_stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name: state, parent, group, …"""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _linux_group_states(group: int) -> list[str] | None:
    if not Path("/proc/self/stat").exists():
        return None
    states = []
    for entry in Path("/proc").iterdir():
        stat = _linux_stat(int(entry.name)) if entry.name.isdigit() else None
        if stat is not None and int(stat[2]) == group:
            states.append(stat[0])
    return states


if __name__ == "__main__":
    sys.exit(main())
