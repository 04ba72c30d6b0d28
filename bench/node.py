"""What the fabric and the agent add to an engine, and how many nodes they bear: `make bench NAME=node`.

1. Gateway + NATS + agent against the same real vLLM asked directly for the same, request by request in turns.
2. One agent on one core beside a stub engine that answers at once: streams and tokens a second.
3. 10,000 nodes, each with its own connection and key, on one NATS server: memory of the registry, CPU of
   their presence, time to choose one of them, time until one that died is no longer chosen.

    python bench/node.py [--quick] [--parts engine,agent,swarm] [--model tiny]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import random
import resource
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import httpx
import psutil
import uvloop
from gateway_peers.agents import attached_agent
from gateway_peers.answers import MODEL, TOKENS, answer_of, body, plain_json, stream_events, write_blobs
from gateway_peers.ours import Cast, Marketplace, chains_file, marketplace, people
from gateway_peers.peers import ROOT
from gateway_peers.programs import program
from pydantic import SecretStr
from servers import percentile, postgres, say

from marketplace.catalog.models import read_model_folder
from marketplace.catalog.prices import PriceBook
from marketplace.fabric.connection import Connection
from marketplace.fabric.errors import RequestBroken
from marketplace.fabric.node_client import NodeClient
from marketplace.platform import database
from marketplace.platform.embedded_nats import EmbeddedNats, load_or_make_credentials
from marketplace.platform.embedded_postgres import EmbeddedPostgres
from marketplace.platform.processes import free_port, start_child, stop_child, tail
from marketplace.platform.settings import Environment, Settings
from marketplace.routing.choice import Question, choose, exclusion
from marketplace.routing.service import FabricService
from node_agent import protocol
from node_agent.config import VLLM_CPU_ARGV, VLLM_CPU_ENVIRONMENT

ENGINE: Final = ROOT / ".engine"
ENGINE_CORE: Final = 0
"""vLLM computes on the CPU here, in one thread: without a core of its own, as with a GPU, it would be slowed
by whatever else runs."""
AGENT_CORE, LOAD_CORE = 0, 1
PAIRS: Final = 24
"""Single requests each way, in turns."""
PAIR_TOKENS: Final = 12
METERED: Final[dict[str, object]] = {
    "return_token_ids": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
"""What the agent asks of the engine beyond what the buyer asked."""
ROUNDS: Final = 3
STREAMS: Final = 8
STREAM_TOKENS: Final = 40
AGENT_STREAMS: Final = 32
AGENT_S: Final = 8.0
SWARM: Final = 10_000
PRESENCE_S: Final = 9.0
CHOICES: Final = 2_000
TRAFFIC_PER_S: Final = 50
DEAD_S_MAX: Final = 75.0


# ---- 1. through everything, against the engine directly


@dataclass
class Target:
    """Where to ask, as a buyer would."""

    name: str
    url: str
    key: str
    model: str
    options: dict[str, object] = field(default_factory=dict)


@dataclass
class Stream:
    """One answer's times, in seconds."""

    asked: float
    events: list[float] = field(default_factory=list)

    @property
    def first_ms(self) -> float:
        return 1e3 * (self.events[0] - self.asked)

    @property
    def gaps_ms(self) -> list[float]:
        """Between the first and the last, which in our case waits for its charge's commit."""
        return [1e3 * (after - before) for before, after in itertools.pairwise(self.events)]


async def ask(http: httpx.AsyncClient, target: Target, tokens: int) -> Stream:
    """Stream one answer of exactly so many tokens to a prompt nobody has sent before."""
    content = {
        "model": target.model, "stream": True, "max_tokens": tokens, "ignore_eos": True, "temperature": 0,
        "messages": [{"role": "user", "content": f"{secrets.token_hex(4)}: what is a fair price?"}],
        **target.options,
    }  # fmt: skip
    stream = Stream(time.perf_counter())
    headers = {"authorization": f"Bearer {target.key}"}
    url = f"{target.url}/v1/chat/completions"
    async with http.stream("POST", url, json=content, headers=headers) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{target.name}: {answer.status_code} {(await answer.aread())[:300]!r}")
        async for line in answer.aiter_lines():
            if line.startswith('data: {"') and '"finish_reason":' in line:
                stream.events.append(time.perf_counter())
    return stream


async def compare(plain: Target, ours: Target, *, is_quick: bool) -> dict[str, float]:
    """What is between buyer and engine, over the engine asked for the same: ids and usage in each event.

    `plain` asks for neither; what exact metering costs in the engine is the difference of the two.
    """
    direct = replace(plain, name="direct", options=METERED)
    targets = (plain, direct, ours)
    singles: dict[str, list[Stream]] = {target.name: [] for target in targets}
    rates: dict[str, list[float]] = {target.name: [] for target in targets}
    async with httpx.AsyncClient(timeout=120, trust_env=False) as http:
        for target in targets:
            await ask(http, target, PAIR_TOKENS)
        for number in range(4 if is_quick else PAIRS):
            for target in targets if number % 2 == 0 else targets[::-1]:
                singles[target.name].append(await ask(http, target, PAIR_TOKENS))
        for number in range(1 if is_quick else ROUNDS):
            for target in targets if number % 2 == 0 else targets[::-1]:
                began = time.perf_counter()
                await asyncio.gather(*(ask(http, target, STREAM_TOKENS) for _ in range(STREAMS)))
                rates[target.name].append(STREAMS * STREAM_TOKENS / (time.perf_counter() - began))
    gaps = {name: [gap for s in streams for gap in s.gaps_ms] for name, streams in singles.items()}
    for name, streams in singles.items():
        say(
            f"{name:6} first token p50 {statistics.median(s.first_ms for s in streams):7.2f} ms, a token "
            f"{statistics.median(gaps[name]):7.2f} ms, the last "
            f"{statistics.median(s.gaps_ms[-1] for s in streams):7.2f} ms, {STREAMS} streams "
            f"{statistics.median(rates[name]):5.1f} tokens/s"
        )
    pairs = list(zip(singles[ours.name], singles[direct.name], strict=True))
    ratio = statistics.median(rates[ours.name]) / statistics.median(rates[direct.name])
    return {
        "ttft_added_p50_ms": round(statistics.median(a.first_ms - b.first_ms for a, b in pairs), 2),
        "per_token_added_p50_ms": round(
            statistics.median(gaps[ours.name]) - statistics.median(gaps[direct.name]), 3
        ),
        "throughput_ratio_8": round(ratio, 3),
    }


@contextmanager
def vllm(folder: Path, model: Path, key: str) -> Iterator[str]:
    """The real engine on loopback; gives its URL once it generates."""
    port = free_port()
    values = {
        "python": str(ENGINE / "venv" / "bin" / "python"), "model_path": str(model), "model_name": MODEL,
        "port": str(port), "context": "1024", "capacity": "16",
    }  # fmt: skip
    argv = [part.format(**values) for part in VLLM_CPU_ARGV]
    environment = {**os.environ, **VLLM_CPU_ENVIRONMENT, "VLLM_API_KEY": key}
    argv = ["taskset", "-c", str(ENGINE_CORE), *argv]
    child = start_child(argv, log=folder / "vllm.log", env=environment)
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            if child.poll() is not None or time.monotonic() - began > 240:
                raise RuntimeError(f"vLLM did not start:\n{tail(folder / 'vllm.log')}")
            try:
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        say(f"vLLM is up after {time.monotonic() - began:.0f} s")
        yield url
    finally:
        stop_child(child, stop_signal=signal.SIGTERM, patience_s=20)


@contextmanager
def everybody_on(core: int) -> Iterator[None]:
    """Keep this process, the database and what is started meanwhile to one core."""
    before = os.sched_getaffinity(0)
    pids = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    for pid in pids:
        os.sched_setaffinity(pid, {core})
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(pid, before)


def engine_part(server: EmbeddedPostgres, folder: Path, model: str, *, is_quick: bool) -> dict[str, float]:
    model_folder, key = ENGINE / "models" / model, secrets.token_hex(12)
    files, _ = read_model_folder(model_folder)
    with ExitStack() as stack:
        stack.enter_context(everybody_on(LOAD_CORE))
        url = stack.enter_context(vllm(folder, model_folder, key))
        market = stack.enter_context(marketplace(server, folder, files, gateway_core=None, buyers=1, nodes=1))
        node_id, seed = next(iter(market.cast.nodes.items()))
        stack.enter_context(
            attached_agent(
                folder / "agent", node_id=node_id, seed=seed, nats_url=market.nats.url, engine_url=url,
                api_key=key, model=MODEL, capacity=16,
            )
        )  # fmt: skip
        ours = Target("ours", f"http://127.0.0.1:{market.subject.port}", market.cast.keys[0], MODEL)
        _wait_for_node(ours)
        return asyncio.run(compare(Target("plain", url, key, MODEL), ours, is_quick=is_quick))


def _wait_for_node(target: Target) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        answer = httpx.post(
            f"{target.url}/v1/chat/completions", content=body(is_stream=False), timeout=60, trust_env=False,
            headers={"authorization": f"Bearer {target.key}"},
        )  # fmt: skip
        if answer.status_code == 200:
            return
        time.sleep(0.3)
    raise RuntimeError(f"the node does not serve: {answer.status_code} {answer.text[:300]}")


# ---- 2. one agent's core


def agent_part(server: EmbeddedPostgres, folder: Path, *, is_quick: bool) -> dict[str, float]:
    answer = answer_of(ENGINE / "models" / "SmolLM2-135M-Instruct" / "tokenizer.json")
    files, _ = read_model_folder(ENGINE / "models" / "SmolLM2-135M-Instruct")
    (folder / "answer").write_bytes(plain_json(answer))
    write_blobs(folder / "events", stream_events(answer, as_vllm=True))
    port = free_port()
    with ExitStack() as stack:
        files_of_engine = [str(folder / "answer"), str(folder / "events")]
        argv = ["taskset", "-c", str(LOAD_CORE), str(program("engine")), str(port), *files_of_engine]
        child = start_child(argv, log=folder / "engine.log")
        stack.callback(lambda: stop_child(child, stop_signal=signal.SIGTERM, patience_s=2))
        market = stack.enter_context(
            marketplace(server, folder, files, gateway_core=LOAD_CORE, buyers=1, nodes=1)
        )
        node_id, seed = next(iter(market.cast.nodes.items()))
        pid = stack.enter_context(
            attached_agent(
                folder / "agent", node_id=node_id, seed=seed, nats_url=market.nats.url, core=AGENT_CORE,
                engine_url=f"http://127.0.0.1:{port}", api_key="none", model=MODEL, capacity=1000,
            )
        )  # fmt: skip
        _wait_for_node(Target("ours", f"http://127.0.0.1:{market.subject.port}", market.cast.keys[0], MODEL))
        return uvloop.run(_drive_agent(market, node_id, pid, AGENT_S / (4 if is_quick else 1)))


async def _drive_agent(market: Marketplace, node_id: str, pid: int, seconds: float) -> dict[str, float]:
    connection = Connection(
        market.nats.url, user="marketplace", password=market.nats.credentials.password, name="bench"
    )
    await connection.start()
    nodes = NodeClient(connection)
    nodes.start()
    content, done, tokens = body(is_stream=True), 0, 0
    end = time.perf_counter() + seconds

    async def stream() -> None:
        nonlocal done, tokens
        while time.perf_counter() < end:
            request = protocol.Request(1, secrets.token_hex(16), MODEL, content, True, 60_000)
            ids = 0
            async with nodes.request(protocol.parse_node_id(node_id), request) as reply:
                while frames := await reply.batch():
                    for frame in frames:
                        if isinstance(frame, protocol.Delta):
                            ids += sum(len(choice.token_ids or ()) for choice in frame.choices)
            assert ids == TOKENS, f"{ids} token ids came of {TOKENS}"
            done, tokens = done + 1, tokens + ids

    process = psutil.Process(pid)
    before, began = process.cpu_times(), time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(AGENT_STREAMS)))
    took, after = time.perf_counter() - began, process.cpu_times()
    await nodes.close()
    await connection.close()
    cpu_s = after.user + after.system - before.user - before.system
    say(
        f"one agent's core: {done / took:,.0f} streams/s, {tokens / took:,.0f} tokens/s, "
        f"{1e6 * cpu_s / max(1, tokens):.1f} µs of CPU a token, core {cpu_s / took:.0%} busy"
    )
    return {"agent_streams_per_s": round(done / took, 1)}


# ---- 3. ten thousand nodes


def swarm_part(server: EmbeddedPostgres, folder: Path, *, is_quick: bool) -> dict[str, float]:
    files, _ = read_model_folder(ENGINE / "models" / "SmolLM2-135M-Instruct")
    count = 1_000 if is_quick else SWARM
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2 * SWARM)), hard))
    url, secret = server.url(f"swarm_{secrets.token_hex(4)}"), secrets.token_hex(24)
    cast = asyncio.run(people(url, secret, files, buyers=1, nodes=count))
    nats = EmbeddedNats(folder / "nats", free_port(), load_or_make_credentials(folder / "credentials"))
    nats.start()
    settings = Settings(
        environment=Environment.DEVELOPMENT, data_dir=folder, database_url=SecretStr(url), nats_url=nats.url,
        nats_password=SecretStr(nats.credentials.password), secret=SecretStr(secret),
        nats_issuer_seed=SecretStr(nats.credentials.issuer_seed), chains_file=chains_file(folder),
    )  # fmt: skip
    try:
        return uvloop.run(_with_swarm(settings, cast, nats, folder))
    finally:
        nats.stop()
        asyncio.run(database.drop_database(url))


@asynccontextmanager
async def _fabric(settings: Settings) -> AsyncIterator[FabricService]:
    engine = database.connect(settings.database_url.get_secret_value(), pool_size=20)
    fabric = FabricService(settings, engine, PriceBook(engine))
    await fabric.start()
    try:
        yield fabric
    finally:
        await fabric.stop()
        await engine.dispose()


async def _with_swarm(settings: Settings, cast: Cast, nats: EmbeddedNats, folder: Path) -> dict[str, float]:
    path = folder / "swarm.json"
    path.write_text(json.dumps({
        "nats_url": nats.url, "model": MODEL, "seeds": cast.nodes, "pieces": ["a", "b"], "ids": [1, 2],
        "prompt_ids": [1],
        "prices": {node: [random.randrange(90, 111) * 10**6, random.randrange(140, 161) * 10**6]
                   for node in cast.nodes},
    }))  # fmt: skip
    async with _fabric(settings) as fabric:
        gc.collect()
        before_bytes, began = _own_rss(), time.perf_counter()
        argv = [sys.executable, str(ROOT / "bench" / "gateway_peers" / "agents.py"), str(path)]
        with (folder / "swarm.log").open("wb") as log:
            swarm = await asyncio.create_subprocess_exec(
                *argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log
            )
        try:
            await _until_all_offer(fabric, len(cast.nodes), folder)
            took = time.perf_counter() - began
            say(f"{len(cast.nodes):,} nodes admitted, heard and priced after {took:.0f} s")
            gc.collect()
            grown_mb = (_own_rss() - before_bytes) / 1e6
            await _measure_presence(nats)
            choose_us = _choose_us(fabric)
            dead_s = await _dead_node_s(fabric, swarm)
        finally:
            swarm.kill()
            await swarm.wait()
    return {
        "choose_10k_us": round(choose_us, 1),
        "dead_node_s": round(dead_s, 2),
        "registry_mb_10k": round(grown_mb * SWARM / len(cast.nodes), 1),
    }


def _own_rss() -> int:
    return int(psutil.Process().memory_info().rss)


async def _until_all_offer(fabric: FabricService, count: int, folder: Path) -> None:
    deadline = time.perf_counter() + 240
    while len(fabric.registry.views(MODEL)) < count:
        if time.perf_counter() > deadline:
            raise RuntimeError(
                f"{len(fabric.registry.views(MODEL))} of {count} nodes came\n{tail(folder / 'swarm.log')}"
            )
        await asyncio.sleep(0.5)


async def _measure_presence(nats: EmbeddedNats) -> None:
    """Tell what hearing everybody's status costs."""
    server = psutil.Process(nats.pid)
    before = (time.process_time(), sum(server.cpu_times()[:2]), time.perf_counter())
    await asyncio.sleep(PRESENCE_S)
    took = time.perf_counter() - before[2]
    say(
        f"presence: {100 * (time.process_time() - before[0]) / took:.1f} % of a gateway's core, "
        f"{100 * (sum(server.cpu_times()[:2]) - before[1]) / took:.1f} % of the NATS server's"
    )


def _choose_us(fabric: FabricService) -> float:
    """Median time of a choice as the gateway makes it, the registry's part included."""
    taken = []
    for _ in range(CHOICES):
        began = time.perf_counter()
        decision = _decide(fabric)
        taken.append(1e6 * (time.perf_counter() - began))
        assert decision.candidates
    say(f"a choice among all: p50 {statistics.median(taken):.0f} µs, p99 {percentile(taken, 99):.0f} µs")
    return statistics.median(taken)


def _decide(fabric: FabricService) -> Any:
    registry = fabric.registry
    return choose(
        Question(
            registry.best_views(MODEL), registry.now_ms, random.random(), prompt_tokens=100,
            completion_tokens=256, context_min=356,
        )
    )  # fmt: skip


async def _dead_node_s(fabric: FabricService, swarm: asyncio.subprocess.Process) -> float:
    """Kill the node that is chosen now, in ordinary traffic: how long until it is not eligible."""
    asking = asyncio.create_task(_traffic(fabric))
    await asyncio.sleep(0.5)
    node_id = _decide(fabric).candidates[0].node_id
    assert swarm.stdin is not None
    swarm.stdin.write(f"{node_id}\n".encode())
    await swarm.stdin.drain()
    began = time.perf_counter()
    try:
        while (took := time.perf_counter() - began) < DEAD_S_MAX:
            if not _may_be_chosen(fabric, node_id):
                break
            await asyncio.sleep(0.01)
        return took
    finally:
        asking.cancel()


async def _traffic(fabric: FabricService) -> None:
    """Requests as a gateway sends them, each to the node chosen for it."""
    while True:
        node_id = _decide(fabric).candidates[0].node_id
        request = protocol.Request(1, secrets.token_hex(16), MODEL, body(is_stream=False), False, 60_000)
        with contextlib.suppress(RequestBroken):
            async with fabric.nodes.request(node_id, request) as reply:
                while await reply.batch():
                    pass
        await asyncio.sleep(1 / TRAFFIC_PER_S)


def _may_be_chosen(fabric: FabricService, node_id: str) -> bool:
    question = Question(fabric.registry.best_views(MODEL), fabric.registry.now_ms, 0.0)
    return any(view.node_id == node_id and exclusion(view, question) is None for view in question.views)


# ---- all of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller: a look, not a measurement")
    parser.add_argument("--parts", default="engine,agent,swarm")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="a folder in .engine/models")
    options = parser.parse_args()
    figures: dict[str, float | None] = dict.fromkeys(
        ("ttft_added_p50_ms", "per_token_added_p50_ms", "throughput_ratio_8", "agent_streams_per_s",
         "choose_10k_us", "dead_node_s", "registry_mb_10k")
    )  # fmt: skip
    began, parts = time.monotonic(), options.parts.split(",")
    with postgres("node") as server:
        for name, part in (
            ("engine", lambda folder: engine_part(server, folder, options.model, is_quick=options.quick)),
            ("agent", lambda folder: agent_part(server, folder, is_quick=options.quick)),
            ("swarm", lambda folder: swarm_part(server, folder, is_quick=options.quick)),
        ):
            if name in parts:
                with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as folder:
                    figures |= part(Path(folder))
    say(f"{time.monotonic() - began:.0f} s in all")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
