"""Servers and measures that benchmarks share."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import make_url

from marketplace.platform import embedded_postgres
from marketplace.platform.embedded_postgres import EmbeddedPostgres

HOME: Final = Path(__file__).parent.parent / "var" / "bench"
"""Prepared data folders stay here from run to run."""


def say(text: str) -> None:
    """A line for people; the last line of a benchmark is for machines."""
    print(f"  {text}", flush=True)


@contextmanager
def postgres(name: str) -> Iterator[EmbeddedPostgres]:
    """The wheel's server with a bench's memory; durability as in production, never less."""
    embedded_postgres._SETTINGS.update(shared_buffers="1GB", max_wal_size="8GB")  # noqa: SLF001 - ours, for a bench
    folder = HOME / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    server = EmbeddedPostgres(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def redis() -> Iterator[tuple[Path, int] | None]:
    """A Redis of Debian's on a local socket, AOF every second: (socket, pid); None if not installed."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="bench-redis-") as name:
        folder = Path(name)
        path = folder / "redis.sock"
        options = {
            "--port": "0", "--unixsocket": str(path), "--dir": name, "--appendonly": "yes",
            "--appendfsync": "everysec", "--save": "", "--daemonize": "no",
        }  # fmt: skip
        argv = [program, *(word for pair in options.items() for word in pair)]
        child = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 5
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            yield path, child.pid
        finally:
            child.terminate()
            child.wait()


def pgbench(server: EmbeddedPostgres, database: str, *options: str) -> float:
    """Transactions a second, as pgbench counts them."""
    url = make_url(server.url(database))
    environment = {**os.environ, "PGPASSWORD": url.password or ""}
    argv = [
        str(server.binaries / "pgbench"),
        "-h",
        str(url.query["host"]),
        "-U",
        url.username or "",
        *options,
    ]
    done = subprocess.run([*argv, database], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"pgbench failed: {done.stderr[-2000:]}")
    found = re.search(r"^tps = ([0-9.]+)", done.stdout, re.MULTILINE)
    return float(found[1]) if found else 0.0


def fdatasync_ms(folder: Path, *, seconds: float = 1.0) -> float:
    """Median time of one 8 kB write and fdatasync in `folder`."""
    taken: list[float] = []
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.write(file.fileno(), bytes(1 << 20))
        os.fsync(file.fileno())
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            os.pwrite(file.fileno(), os.urandom(8192), 0)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append((time.perf_counter() - began) * 1e3)
    return statistics.median(taken)


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that is at least as large as `percent` of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
