"""The gateway against the gateways people use: `make bench NAME=gateway`; the last line is one JSON object.

Each gateway has one core to itself; the stub engine (or the stub nodes and PostgreSQL) and the load
generator have the other.  All are up at once, one is measured at a time, and the rounds are interleaved,
since a shared machine moves by the minute.  Ratios are of medians within this one run.

    python bench/gateway.py [--quick] [--only NAME,NAME…]

Needs two cores, a C compiler and, for each peer, its package (bench/README.md).  A peer that cannot be
had counts as null, and the table says why.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from gateway_peers import peers
from gateway_peers.answers import (
    TOKENS,
    Answer,
    answer_of,
    body,
    http_request,
    plain_json,
    stream_events,
    write_blobs,
)  # fmt: skip
from gateway_peers.ours import Marketplace, marketplace, relay, stub_nodes
from gateway_peers.peers import NotHadError, Peers, Subject
from gateway_peers.programs import Load, program, run_load
from servers import postgres, say

from marketplace.catalog.models import read_model_folder
from marketplace.platform.processes import free_port, start_child, stop_child

MODEL_FOLDER: Final = peers.ROOT / ".engine" / "models" / "SmolLM2-135M-Instruct"
GATEWAY_CORE, LOAD_CORE = 0, 1
OURS, APART, RELAY, DIRECT = "Tollway", "Tollway, NATS apart", "our relay alone", "direct"
CLIENTS: Final = 256
PACE_MS: Final = 10
SLOW_PACE_MS: Final = 100
"""Of the thousand streams: ten tokens a second each, as a busy engine gives."""
LATE_MS: Final = 250
OPEN_STREAMS: Final = 1_000
STREAM_KIB_MAX: Final = 100
WARM_MS: Final = 2_000
"""So long, since every one of our buyers has been away for longer than his lease lives."""
LIMITED_BELOW: Final = 0.9
"""A closed loop that leaves more of the gateway's core idle is limited by something else."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One way of loading a gateway."""

    name: str
    title: str
    pace_ms: int | None
    """None: plain answers."""
    options: dict[str, Any]
    subjects: Sequence[str]
    seconds: float
    rounds: int = 3
    slow_s: float = 12.0
    """For LiteLLM and Portkey, whose answers take seconds at this load; one round less."""


EVERYBODY: Final = (
    DIRECT, "nginx", "vllm-router", "sglang-router", "TensorZero", "Portkey", "LiteLLM", OURS, APART, RELAY,
)  # fmt: skip
STREAMERS: Final = (DIRECT, "nginx", "vllm-router", "sglang-router", OURS, APART, RELAY)
PHASES: Final = (
    Phase("plain", f"plain answers, {CLIENTS} clients", None,
          {"clients": CLIENTS, "warm_ms": WARM_MS}, EVERYBODY, 3),
    Phase("stream", f"streams of {TOKENS} chunks at once, {CLIENTS} clients", 0,
          {"clients": CLIENTS, "warm_ms": WARM_MS}, STREAMERS, 3),
    Phase("paced", f"streams at {PACE_MS} ms a chunk, {CLIENTS} clients", PACE_MS,
          {"clients": CLIENTS, "warm_ms": 1500}, STREAMERS, 4),
    Phase("fifty", "50 plain answers a second", None, {"clients": 64, "rate": 50},
          (DIRECT, "nginx", "vllm-router", OURS), 6),
    Phase("twenty", f"20 streams a second at {PACE_MS} ms a chunk", PACE_MS, {"clients": 64, "rate": 20},
          (DIRECT, "nginx", "vllm-router", OURS), 6),
)  # fmt: skip
SLOW: Final = ("Portkey", "LiteLLM")


@dataclass
class Bench:
    """Everything that is up, and what was measured."""

    folder: Path
    answer: Answer
    subjects: dict[str, Subject]
    missing: dict[str, str]
    ours: Marketplace | None
    is_quick: bool
    runs: dict[tuple[str, str], list[Load]] = field(default_factory=lambda: defaultdict(list))

    def load(self, name: str, *, pace_ms: int | None, **options: Any) -> Load:
        """Load one subject, with requests written for it."""
        subject = self.subjects[name]
        content = body(is_stream=pace_ms is not None, pace_ms=pace_ms or 0, model=subject.model)
        requests = self.folder / "requests"
        write_blobs(
            requests,
            (
                http_request(subject.port, subject.path, content,
                             [*subject.headers, ("authorization", f"Bearer {key}")])
                for key in subject.keys
            ),
        )  # fmt: skip
        if self.ours is not None:
            self.ours.move_nats(LOAD_CORE if name == APART else GATEWAY_CORE)
        events = 0 if pace_ms is None else TOKENS
        return run_load(
            LOAD_CORE, subject.port, requests, self.folder / "text", subject.pids,
            events=events, pace_ms=pace_ms or 0, late_ms=LATE_MS, **options,
        )  # fmt: skip

    def warm_up(self) -> None:
        """Let every client ask once: connections are opened, our buyers take slices of their balances."""
        for name in self.subjects:
            if name != APART:
                self.load(name, pace_ms=None, clients=CLIENTS, once=1, ramp_ms=500, seconds=30)

    def measure(self, phase: Phase) -> None:
        """Go round the subjects, forwards and backwards."""
        say(f"{phase.title}")
        for number in range(1 if self.is_quick else phase.rounds):
            names = [name for name in phase.subjects if name in self.subjects]
            for name in names if number % 2 == 0 else reversed(names):
                is_slow = name in SLOW
                if is_slow and number == 2:
                    continue
                seconds = phase.slow_s if is_slow else phase.seconds
                options = {"warm_ms": 700, **phase.options}
                if is_slow:
                    options["warm_ms"] = 3_000
                load = self.load(
                    name, pace_ms=phase.pace_ms, seconds=seconds / (2 if self.is_quick else 1), **options
                )
                self.runs[phase.name, name].append(load)
                if load.failed or load.torn:
                    say(f"{name}: {load.failed} failed, {load.torn} torn: {load.first_failure[:300]}")

    def median(self, phase: str, name: str, of: str) -> float | None:
        runs = self.runs.get((phase, name))
        return None if not runs else statistics.median(getattr(run, of) for run in runs)

    def ratio(self, phase: str, of: str, above: str, below: str) -> float | None:
        top, bottom = self.median(phase, above, of), self.median(phase, below, of)
        return None if top is None or not bottom else round(top / bottom, 3)

    def added(self, phase: str, of: str) -> float | None:
        ours, direct = self.median(phase, OURS, of), self.median(phase, DIRECT, of)
        return None if ours is None or direct is None else round(ours - direct, 2)


# ---- what is told


def print_table(bench: Bench, phase: Phase) -> None:
    print(f"\n  {phase.title}")
    print(
        f"    {'':22}{'per second':>11}{'p50 ms':>9}{'p99 ms':>9}{'first ms':>9}{'CPU µs':>9}{'/chunk':>8}"
        f"{'core':>7}{'other':>7}"
    )
    for name in phase.subjects:
        runs = bench.runs.get((phase.name, name))
        if not runs:
            print(f"    {name:22} not had: {' '.join(bench.missing.get(name, 'left out').split())[:150]}")
            continue

        def middle(of: str, name: str = name) -> float:
            return bench.median(phase.name, name, of) or 0.0

        busy = [statistics.median(run.busy[core] for run in runs) for core in (GATEWAY_CORE, LOAD_CORE)]
        is_limited = "rate" not in phase.options and name != DIRECT and busy[0] < LIMITED_BELOW
        is_limited = is_limited and phase.pace_ms in {None, 0}
        first, chunk = "", ""
        if phase.pace_ms is not None:
            first, chunk = f"{middle('first_p50_ms'):.2f}", f"{middle('cpu_us_per_event'):.1f}"
        print(
            f"    {name:22}{middle('per_s'):11,.1f}{middle('p50_ms'):9.2f}{middle('p99_ms'):9.2f}{first:>9}"
            f"{middle('cpu_us_per_request'):9,.0f}{chunk:>8}{busy[0]:7.0%}{busy[1]:7.0%}"
            f"{'  limited by the other core' if is_limited else ''}"
        )


def thousand_streams(bench: Bench) -> tuple[bool | None, str]:
    """1,000 open paced streams on one core: none late or torn, and little memory each."""
    if bench.ours is None:
        return None, "not had"
    streams = 100 if bench.is_quick else OPEN_STREAMS
    before = bench.ours.rss_bytes()
    load = bench.load(
        OURS, pace_ms=SLOW_PACE_MS, clients=streams, once=1, ramp_ms=2000, warm_ms=2500, seconds=30,
    )  # fmt: skip
    grown_kib = max(0, bench.ours.rss_bytes() - before) / 1024 / streams
    told = (
        f"{load.done} of {streams} whole, {load.open_most} open at once, {load.late} late, {load.torn} torn, "
        f"{load.failed} failed, {grown_kib:.0f} KiB each, first token p50 {load.first_p50_ms:.0f} ms, "
        f"gateway's core {load.busy[GATEWAY_CORE]:.0%} {load.first_failure}"
    )
    is_good = (
        load.done == streams and load.open_most == streams and not load.late and grown_kib <= STREAM_KIB_MAX
    )
    return is_good, told


def figures(bench: Bench, streams_1000: bool | None) -> dict[str, float | bool | None]:
    def plain(peer: str, ours: str = OURS) -> float | None:
        return bench.ratio("plain", "per_s", ours, peer)

    return {
        "vs_litellm": plain("LiteLLM"),
        "vs_portkey": plain("Portkey"),
        "vs_tensorzero": plain("TensorZero"),
        "vs_vllm_router": plain("vllm-router"),
        "vs_vllm_router_nats_apart": plain("vllm-router", APART),
        "vs_nginx": plain("nginx"),
        "stream_vs_vllm_router": bench.ratio("stream", "per_s", OURS, "vllm-router"),
        "stream_vs_nginx": bench.ratio("stream", "per_s", OURS, "nginx"),
        "chunk_cpu_vs_vllm_router": bench.ratio("paced", "cpu_us_per_event", OURS, "vllm-router"),
        "chunk_cpu_vs_nginx": bench.ratio("paced", "cpu_us_per_event", OURS, "nginx"),
        "added_p50_ms": bench.added("fifty", "p50_ms"),
        "added_p99_ms": bench.added("fifty", "p99_ms"),
        "ttft_added_p50_ms": bench.added("twenty", "first_p50_ms"),
        "streams_1000": streams_1000,
        "rss_mb": None if bench.ours is None else round(bench.ours.rss_bytes() / 1e6, 1),
    }


# ---- what is up


@contextmanager
def engine(folder: Path, answer: Answer) -> Iterator[int]:
    """The stub engine on the load core; gives its port."""
    (folder / "answer").write_bytes(plain_json(answer))
    (folder / "text").write_text(answer.text)
    write_blobs(folder / "events", stream_events(answer))
    port = free_port()
    files = [str(folder / "answer"), str(folder / "events")]
    argv = ["taskset", "-c", str(LOAD_CORE), str(program("engine")), str(port), *files]
    child = start_child(argv, log=folder / "engine.log")
    try:
        yield port
    finally:
        stop_child(child, stop_signal=signal.SIGTERM, patience_s=2)


@contextmanager
def everything(only: Sequence[str], *, is_quick: bool) -> Iterator[Bench]:
    answer = answer_of(MODEL_FOLDER / "tokenizer.json")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-gateway-")))
        os.sched_setaffinity(0, {LOAD_CORE})  # and so for every child that is not told otherwise
        port = stack.enter_context(engine(folder, answer))
        started = Peers(port, GATEWAY_CORE, folder)
        stack.callback(started.stop)
        started.start([name for name in peers.RECIPES if name in only])
        subjects = {DIRECT: Subject(DIRECT, port), **started.subjects}
        ours = None
        if OURS in only:
            try:
                server = stack.enter_context(postgres("gateway"))
                files, _ = read_model_folder(MODEL_FOLDER)
                ours = stack.enter_context(marketplace(server, folder, files, gateway_core=GATEWAY_CORE))
                stack.enter_context(stub_nodes(ours, folder, answer, LOAD_CORE))
                subjects |= {OURS: ours.subject, APART: ours.subject}
                subjects[RELAY] = stack.enter_context(relay(ours, folder, GATEWAY_CORE))
            except NotHadError as error:
                started.missing[OURS] = started.missing[APART] = started.missing[RELAY] = str(error)
        yield Bench(folder, answer, subjects, started.missing, ours, is_quick)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round: a look, not a measurement")
    parser.add_argument("--only", default=",".join((*peers.RECIPES, OURS)), help="these gateways, by name")
    parser.add_argument("--phases", default=",".join((*(phase.name for phase in PHASES), "streams_1000")))
    options = parser.parse_args()
    only, phases = options.only.split(","), options.phases.split(",")
    began = time.monotonic()
    peers.prepare()
    with everything(only, is_quick=options.quick) as bench:
        say(f"up after {time.monotonic() - began:.0f} s: {', '.join(bench.subjects)}")
        bench.warm_up()
        for phase in PHASES:
            if phase.name in phases:
                bench.measure(phase)
        streams_1000, told = thousand_streams(bench) if "streams_1000" in phases else (None, "left out")
        for phase in PHASES:
            if phase.name in phases:
                print_table(bench, phase)
        print(f"\n  {OPEN_STREAMS:,} open streams at {SLOW_PACE_MS} ms a chunk: {told}")
        for name, reason in bench.missing.items():
            say(f"{name} is not had: {reason}")
        if bench.ours is not None:
            say(f"{bench.ours.charges():,} charges in the ledger; {time.monotonic() - began:.0f} s in all")
        print(json.dumps(figures(bench, streams_1000)))


if __name__ == "__main__":
    main()
