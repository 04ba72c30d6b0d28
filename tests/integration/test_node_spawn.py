"""Spawned engines: ready only after a generation, restarted, stopped, and never left behind."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from node_agent.engines import EngineState, guard, spawn
from node_agent.engines.spawn import SpawnEngine

# Listens as vLLM does, and has a worker of its own that a kill of the server alone would leave behind.
SERVER = """
import json, os, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
mark, port, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
worker = subprocess.Popen([sys.executable, "-c", "import sys, time; time.sleep(600)", mark])
if mode == "crash":
    sys.exit(3)

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def do_POST(self):
        if mode == "mute":
            os._exit(7)
        if self.headers["Authorization"] != "Bearer " + os.environ["VLLM_API_KEY"]:
            self.send_response(401); self.end_headers(); return
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200); self.send_header("Content-Type", "text/event-stream"); self.end_headers()
        chunk = {"choices": [{"index": 0, "delta": {"content": os.environ.get("PYTHONPATH", "none")}}]}
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\\n\\ndata: [DONE]\\n\\n")

ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def make(folder: Path, mark: str, mode: str = "good") -> SpawnEngine:
    return SpawnEngine(
        "fake",
        argv=["{python}", "-c", SERVER, mark, "{port}", mode],
        values={"python": sys.executable},
        environment={},
        models=["m"],
        folder=folder,
        start_seconds_max=20.0,
    )


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if mark in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


async def until(is_it: Callable[[], bool], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not is_it():
            await asyncio.sleep(0.05)


@pytest.fixture
def mark(tmp_path: Path) -> str:
    return f"mark-{tmp_path.name}-{os.getpid()}"


@pytest.fixture
async def engine(tmp_path: Path, mark: str) -> AsyncIterator[SpawnEngine]:
    made = make(tmp_path, mark)
    await made.start()
    yield made
    await made.stop()
    assert marked(mark) == []


async def test_ready_after_a_generation_and_nothing_left_after_stop(engine: SpawnEngine, mark: str) -> None:
    assert engine.state is EngineState.STARTING
    await until(lambda: engine.state is EngineState.READY)
    assert len(marked(mark)) >= 3  # guard, server, worker
    await engine.stop()
    assert marked(mark) == []
    assert not engine.pid_path.exists()


async def test_engine_does_not_get_the_agents_python_path(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    engine = make(tmp_path, mark)
    await engine.start()
    await until(lambda: engine.state is EngineState.READY)
    events = [event async for batch in engine.chat({}, "m") for event in batch]
    assert events[0].choices[0].content == "none"
    await engine.stop()


async def test_crashed_engine_is_restarted_whole(engine: SpawnEngine, mark: str) -> None:
    await until(lambda: engine.state is EngineState.READY)
    before = {process.pid for process in marked(mark)}
    server = json.loads(engine.pid_path.read_text())["pid"]
    os.kill(server, signal.SIGKILL)
    await until(lambda: engine.restarts == 1 and engine.state is EngineState.READY)
    after = {process.pid for process in marked(mark)}
    assert not before & after


async def test_killed_guard_leaves_nothing(engine: SpawnEngine, mark: str) -> None:
    await until(lambda: engine.state is EngineState.READY)
    guard_pid = engine._process.pid
    before = {process.pid for process in marked(mark)}
    os.kill(guard_pid, signal.SIGKILL)
    await until(lambda: engine.restarts == 1 and engine.state is EngineState.READY)
    assert not before & {process.pid for process in marked(mark)}


@pytest.mark.parametrize(("mode", "reason"), [("crash", "status 3"), ("mute", "")])
async def test_engine_that_cannot_generate_is_never_ready(
    tmp_path: Path, mark: str, mode: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "BACKOFF_SECONDS_MIN", 0.05)
    engine = make(tmp_path, mark, mode)
    states = set()
    await engine.start()
    async with asyncio.timeout(20):
        while engine.restarts < 2:
            states.add(engine.state)
            await asyncio.sleep(0.01)
    assert EngineState.READY not in states
    assert reason in engine.last_error
    await engine.stop()
    assert marked(mark) == []


async def test_missing_program_is_a_plain_sentence(tmp_path: Path) -> None:
    engine = SpawnEngine(
        "fake", argv=["/nowhere/vllm"], values={}, environment={}, models=["m"], folder=tmp_path
    )
    await engine.start()
    await until(lambda: engine.state is EngineState.DOWN)
    assert engine.last_error
    assert "No such file" in engine.log_path.read_text()
    await engine.stop()


AGENT = """
import asyncio, sys
from pathlib import Path
from node_agent.engines.spawn import SpawnEngine

async def main():
    engine = SpawnEngine("fake", argv=["{python}", "-c", sys.argv[1], sys.argv[2], "{port}", "good"],
                         values={"python": sys.executable}, environment={}, models=["m"],
                         folder=Path(sys.argv[3]))
    await engine.start()
    while engine.state != "ready":
        await asyncio.sleep(0.05)
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_engine_dies_with_a_killed_agent(tmp_path: Path, mark: str) -> None:
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, SERVER, mark, tmp_path],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert await asyncio.to_thread(agent.stdout.readline) == b"ready\n"
    agent.stdout.close()
    assert len(marked(mark)) >= 4
    agent.kill()
    agent.wait()
    await until(lambda: marked(mark) == [], 8.0)


async def test_leftover_of_killed_agent_is_reaped_at_next_start(tmp_path: Path, mark: str) -> None:
    leftover = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", mark], start_new_session=True
    )
    guard.write_pid_file(tmp_path / "fake.pid", leftover.pid)
    engine = make(tmp_path, mark + "-new")
    await engine.start()
    assert leftover.wait(5) == -signal.SIGKILL
    await engine.stop()


def test_a_stranger_with_the_same_process_id_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    path = tmp_path / "fake.pid"
    guard.write_pid_file(path, stranger.pid)
    noted = json.loads(path.read_text()) | {"started": "1"}
    path.write_text(json.dumps(noted))
    assert not guard.reap_leftover(path)
    assert stranger.poll() is None
    assert not path.exists()
    stranger.kill()
    stranger.wait()
