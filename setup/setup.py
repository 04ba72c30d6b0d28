"""Set the project up: `python3 setup/setup.py [--without-engine]`.

Needs Python 3.11+, Node.js and npm, and nothing else.  Idempotent: each step carries a stamp made of its
inputs (lock files) and is skipped while they are unchanged, so a second run takes a moment.
Everything lands in the checkout: `.venv/`, `node_modules/`, `.engine/`.  Output of the tools goes to
`var/setup.log`, whose tail is shown when a step fails.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
VENV: Final = ROOT / ".venv"
PYTHON: Final = VENV / "bin" / "python"
LOG: Final = ROOT / "var" / "setup.log"
LOCK: Final = ROOT / "var" / "setup.lock"
PYTHON_MIN: Final = (3, 11)
DISK_BYTES_MIN: Final = 2 * 10**9
"""The environment and node_modules take about 1.2 GB; the engine checks its own 6 GB."""
TICK_S: Final = 10
TAIL_LINES: Final = 25


class SetupError(Exception):
    """This machine lacks something; the text says what to do."""


def check_machine() -> None:
    """Refuse early, in a sentence, what would fail late in a stack trace."""
    if sys.version_info < PYTHON_MIN:
        raise SetupError(
            f"Python {PYTHON_MIN[0]}.{PYTHON_MIN[1]}+ is needed, this is {platform.python_version()}"
        )
    if platform.system() != "Linux":
        raise SetupError(
            f"the development stack runs on Linux, this is {platform.system()}; "
            "an operator's agent alone installs anywhere: pip install 'tollway[node]'"
        )
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments: install its venv package (python3-venv)"
        )
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            raise SetupError(
                f"{tool} is missing: install Node.js 20+ with npm (it brings the development chains)"
            )


def check_disk() -> None:
    """Asked only before something is installed: what stands already needs no more room."""
    free = shutil.disk_usage(ROOT).free
    if free < DISK_BYTES_MIN:
        raise SetupError(f"{free // 10**6} MB of disk are free, {DISK_BYTES_MIN // 10**6} MB are needed")


@contextmanager
def alone() -> Iterator[None]:
    """Wait for another set-up of this checkout: `make demo` beside `make test` must not build twice."""
    import fcntl  # not on every platform that gets a sentence from check_machine

    LOCK.parent.mkdir(exist_ok=True)
    with LOCK.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another set-up of this checkout is at work; waiting for it …", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def interrupt(*_: object) -> None:
    """End the tool that runs, too, when we are told to end."""
    raise KeyboardInterrupt


def run(argv: Sequence[str | os.PathLike[str]], what: str) -> None:
    """Run a tool, telling every TICK_S seconds that it still works.

    SetupError with the log's tail if it fails.
    """
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("ab") as log:
        log.write(f"\n$ {' '.join(map(str, argv))}\n".encode())
        log.flush()
        child = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # noqa: S603
        started = time.monotonic()
        try:
            while True:
                try:
                    code = child.wait(TICK_S)
                    break
                except subprocess.TimeoutExpired:
                    print(f"    … {what}, {time.monotonic() - started:.0f} s", flush=True)
        except BaseException:
            child.kill()
            child.wait()
            raise
    if code:
        tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise SetupError(f"{what} failed (exit code {code}); the end of {LOG.relative_to(ROOT)}:\n{tail}")


def make_environment() -> None:
    """Make `.venv` anew from the lock files; every file is checked against its hash."""
    shutil.rmtree(VENV, ignore_errors=True)
    run([sys.executable, "-m", "venv", VENV], "creating .venv")
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--require-hashes", "-r", "requirements/bootstrap.lock"], "installing uv")
    uv = [VENV / "bin" / "uv", "pip"]
    run(
        [*uv, "install", "--python", PYTHON, "--require-hashes", "-r", "requirements/dev.lock"],
        "installing packages",
    )
    # Else every command of the stack compiles what it imports again wherever Python may not write
    # bytecode (PYTHONDONTWRITEBYTECODE): 2.5 s a start instead of 0.8 s.
    with suppress(SetupError):  # some packages carry templates that are no Python
        run([PYTHON, "-m", "compileall", "-q", "-j", "0", VENV / "lib"], "compiling packages")
    run(
        [*uv, "install", "--python", PYTHON, "--no-deps", "--no-build-isolation", "-e", "."],
        "installing tollway",
    )


def install_chain_parts() -> None:
    """Install anvil, other people's contracts and the Solidity compiler from package-lock.json."""
    run(["npm", "ci", "--ignore-scripts"], "npm ci")
    anvils = list((ROOT / "node_modules" / "@foundry-rs").glob("anvil-*/bin/anvil"))
    if not anvils:
        raise SetupError(f"npm brought no anvil binary for {platform.system()} {platform.machine()}")


def build_engine() -> None:
    """Build the CPU engine; it prints its own progress and has its own stamps."""
    build = subprocess.Popen([sys.executable, ROOT / "engine" / "build.py"])  # noqa: S603 - argv is ours
    try:
        code = build.wait()
    except BaseException:
        build.send_signal(signal.SIGINT)  # it ends what it runs
        build.wait()
        raise
    if code:
        raise SetupError("the engine could not be built (see above); `make setup` tries again")


def fingerprint(*names: str) -> str:
    digest = hashlib.sha256(sys.version.encode())
    for name in names:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def step(what: str, stamp: Path, wanted: str, work: Callable[[], None]) -> None:
    """Do `work` unless its stamp says that it was done with the same inputs."""
    if stamp.exists() and stamp.read_text() == wanted:
        print(f"  {what}: up to date", flush=True)
        return
    check_disk()
    started = time.monotonic()
    print(f"  {what} …", flush=True)
    stamp.unlink(missing_ok=True)
    work()
    stamp.write_text(wanted)
    print(f"  {what}: done in {time.monotonic() - started:.0f} s", flush=True)


def set_up(*, has_engine: bool) -> None:
    """Do every step that is not done yet."""
    print("Setting up Tollway", flush=True)
    step(
        "Python environment",
        VENV / "tollway.stamp",
        fingerprint("requirements/bootstrap.lock", "requirements/dev.lock", "pyproject.toml"),
        make_environment,
    )
    step(
        "chain parts (npm)",
        ROOT / "node_modules" / ".tollway.stamp",
        fingerprint("package.json", "package-lock.json"),
        install_chain_parts,
    )
    if has_engine:
        build_engine()


def main() -> int:
    parser = argparse.ArgumentParser(description="Set the project up; safe to repeat.")
    parser.add_argument(
        "--without-engine", action="store_true", help="skip vLLM and its models (3-4 minutes)"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        check_machine()
        with alone():
            set_up(has_engine=not arguments.without_engine)
    except SetupError as e:
        print(f"\nsetup: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"\nsetup: {e.strerror}: {e.filename or ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
