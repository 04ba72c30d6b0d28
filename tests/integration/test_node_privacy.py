"""Nothing that was said reaches a disk: not by a crash either, of the agent or of an engine."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from node_agent import config, core_files
from node_agent.engines import EngineState
from node_agent.engines.spawn import SpawnEngine
from node_agent.identity import create_identity

ROOT = Path(__file__).parents[2]
CANARY = "canary-core-91c2"

CRASH = """
import os, resource, signal, sys
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
said = sys.argv[1] * 1000
if sys.argv[2] == "forbid":
    from node_agent.core_files import forbid_core_files
    forbid_core_files()
    os.execv(sys.executable, [sys.executable, "-c", "import os; said = '%s'; os.abort()" % sys.argv[1]])
os.abort()
"""


def crash(folder: Path, mode: str) -> bool:
    """Crash a process with the canary in memory; True if the kernel made a core of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", CRASH, CANARY, mode], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    _, status = os.waitpid(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert os.WTERMSIG(status) == signal.SIGABRT
    return os.WCOREDUMP(status)


def test_a_crash_leaves_no_core_even_of_a_child(tmp_path: Path) -> None:
    """The limit survives exec, so engines have it too; without it this kernel would write one."""
    assert not crash(tmp_path, "forbid")
    assert not any(CANARY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == resource.RLIM_INFINITY and _writes_cores_here():
        assert crash(tmp_path, "allow"), "this test cannot tell: the kernel writes no cores at all"


def _writes_cores_here() -> bool:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    return bool(pattern) and not pattern.startswith(("|", "/"))


ENGINE = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def do_POST(self):
        said = self.rfile.read(int(self.headers["Content-Length"]))
        if b"crash" in said:
            os.abort()
        self.send_response(200); self.end_headers()
        self.wfile.write(b'data: {"choices": [{"delta": {"content": "x"}}]}\\n\\ndata: [DONE]\\n\\n')
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


async def test_a_spawned_engine_has_the_limit_and_its_crash_leaves_nothing(
    tmp_path: Path,
) -> None:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (core_files.CORE_BYTES, before[1]))  # soft: can be undone
    try:
        engine = SpawnEngine(
            "fake",
            argv=["{python}", "-c", ENGINE, "{port}"],
            values={"python": sys.executable},
            environment={},
            models=["m"],
            folder=tmp_path,
        )
        await engine.start()
        async with asyncio.timeout(20):
            while engine.state is not EngineState.READY:
                await asyncio.sleep(0.05)
        children = psutil.Process().children(recursive=True)
        limits = [child.rlimit(psutil.RLIMIT_CORE)[0] for child in children if ENGINE in child.cmdline()]
        assert limits
        assert set(limits) == {core_files.CORE_BYTES}
        with pytest.raises(Exception, match="connection failed"):
            async for _ in engine.chat({"messages": [{"role": "user", "content": f"crash {CANARY}"}]}, "m"):
                pass
        await engine.stop()
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert CANARY.encode() not in written


def test_the_agent_forbids_core_files_before_it_serves(tmp_path: Path) -> None:
    """The command itself: its process has the limit by the time it answers `status`."""
    create_identity(tmp_path)
    config.write_settings(tmp_path, node_id="n", api="http://127.0.0.1:1", nats_url="nats://127.0.0.1:1")
    command = [sys.executable, "-m", "node_agent.cli", "run", "--data-dir", str(tmp_path)]
    agent = psutil.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if (tmp_path / "status.json").exists():
                break
            agent.poll()
            assert agent.is_running()
            time.sleep(0.05)
        assert agent.rlimit(psutil.RLIMIT_CORE) == (core_files.CORE_BYTES, core_files.CORE_BYTES)
    finally:
        agent.terminate()
        agent.wait(15)
