"""The two C programs of the benchmark: compiled when their source is newer, run, read.

They are in C because they share one core with everything that is not measured: a generator in Python ends
at 15,000 requests a second, where nginx on the other core does 24,000.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gateway_peers.peers import PLACE, NotHadError

SOURCE: Final = Path(__file__).parent


def program(name: str) -> Path:
    """Give the compiled program."""
    binary, source = PLACE / name, SOURCE / f"{name}.c"
    newest = max(source.stat().st_mtime, (SOURCE / "net.h").stat().st_mtime)
    if not binary.exists() or binary.stat().st_mtime < newest:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise NotHadError("a C compiler is needed for the load generator (apt-get install gcc libc6-dev)")
        PLACE.mkdir(exist_ok=True)
        subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", str(binary), str(source)], check=True)
    return binary


@dataclass(frozen=True, slots=True)
class Load:
    """What the generator saw; times in milliseconds."""

    done: int
    failed: int
    torn: int
    """Answers whose text is not the expected one."""
    late: int
    unfinished: int
    seconds: float
    events: int
    open_most: int
    p50_ms: float
    p99_ms: float
    first_p50_ms: float
    first_p99_ms: float
    cpu_s: float
    """Of the watched processes."""
    own_cpu_s: float
    busy: list[float]
    """Share of each core that was not idle."""
    first_failure: str

    @property
    def per_s(self) -> float:
        return self.done / self.seconds

    @property
    def cpu_us_per_request(self) -> float:
        return 1e6 * self.cpu_s / max(1, self.done)

    @property
    def cpu_us_per_event(self) -> float:
        return 1e6 * self.cpu_s / max(1, self.events)


def run_load(
    core: int, port: int, requests: Path, expected: Path, watch: Iterable[int] = (), **options: Any
) -> Load:
    argv = ["taskset", "-c", str(core), str(program("load")), str(port), str(requests), str(expected)]
    argv += [f"{name}={value}" for name, value in options.items()]
    argv.append(f"watch={','.join(map(str, watch))}")
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return Load(**json.loads(done.stdout))
