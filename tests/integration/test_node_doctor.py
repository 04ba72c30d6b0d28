"""What `tollway-node doctor` finds, each trouble made for real, and what it says to do."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from marketplace.catalog.models import read_model_folder
from node_agent import config
from node_agent.config import EngineSettings, Model
from node_agent.doctor import Finding, examine, is_healthy
from node_agent.identity import KEY_FILE, create_identity, load_identity
from node_agent.service import EngineView, LocalStatus
from node_agent.tokenizer_digest import NoTokenizerError, digest_of

ROOT = Path(__file__).parents[2]


class World:
    """A marketplace and an engine behind one port, each as healthy as told."""

    def __init__(self) -> None:
        self.url = ""
        self.clock_off_s = 0
        self.context = 4096
        self.tells_ids = True
        self.tokenizer: str | None = None
        self.models = ["m"]

    def answer(self, path: str) -> tuple[int, bytes]:
        match path.partition("?")[0]:
            case "/healthz":
                return 200, b"{}"
            case "/api/nodes/requirements":
                if self.tokenizer is None:
                    return 404, b"{}"
                return 200, json.dumps({"tokenizer_sha256": self.tokenizer}).encode()
            case "/v1/models":
                entries = [{"id": name, "max_model_len": self.context} for name in self.models]
                return 200, json.dumps({"data": entries}).encode()
            case "/v1/chat/completions":
                choice = {"index": 0, "delta": {"content": "hi"}}
                chunk = {"choices": [choice | ({"token_ids": [5]} if self.tells_ids else {})]}
                return 200, b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n"
        return 404, b""


@pytest.fixture
def world() -> Iterator[World]:
    made = World()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def date_time_string(self, timestamp: float | None = None) -> str:
            del timestamp
            return formatdate(time.time() + made.clock_off_s, usegmt=True)

        def do_GET(self) -> None:
            self.speak()

        def do_POST(self) -> None:
            self.speak()

        def speak(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = made.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose key the fabric lets in."""
    folder = tmp_path_factory.mktemp("known")
    create_identity(folder)
    return folder


@pytest.fixture(scope="module")
def fabric(known: Path) -> Iterator[str]:
    """A nats-server that lets in one nkey."""
    settings, port = known / "nats.conf", free_port()
    key = load_identity(known).public_key
    settings.write_text(f"authorization {{ users = [ {{ nkey: {key} }} ] }}")
    binary = Path(sys.executable).with_name("nats-server")
    command = [binary, "-a", "127.0.0.1", "-p", str(port), "-c", settings, "-l", known / "log"]
    server = subprocess.Popen(command)
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            break
        time.sleep(0.05)
    yield f"nats://127.0.0.1:{port}"
    server.terminate()
    server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path, world: World, fabric: str, known: Path) -> Path:
    shutil.copy2(known / KEY_FILE, tmp_path / KEY_FILE)
    config.write_settings(tmp_path, node_id="n1", api=world.url, nats_url=fabric)
    model = Model(name="m", input="0.1", output="0.2", context=4096, tokenizer_sha256="a" * 64)
    world.tokenizer = "a" * 64
    config.add_engine(tmp_path, EngineSettings(name="e", kind="attach", url=world.url, models=[model]))
    return tmp_path


async def found(folder: Path, running: LocalStatus | None = None) -> dict[str, Finding]:
    return {finding.check: finding for finding in await examine(folder, running)}


async def test_all_is_well(folder: Path) -> None:
    findings = await examine(folder, None)
    assert {f.check: f.detail for f in findings if f.state == "failed"} == {}
    assert is_healthy(findings)
    checks = {finding.check for finding in findings}
    assert checks >= {"disk", "settings", "key", "clock", "marketplace", "fabric", "engine e", "gpu"}
    assert checks >= {"tokenizer of m", "open files", "python"}


@pytest.mark.parametrize(("off_s", "state"), [(0, "ok"), (-12, "warning"), (45, "failed"), (-45, "failed")])
async def test_a_skewed_clock_is_told(folder: Path, world: World, off_s: int, state: str) -> None:
    world.clock_off_s = off_s
    clock = (await found(folder))["clock"]
    assert clock.state == state
    assert (clock.advice == "") is (state == "ok")


async def test_troubles_with_engine_and_tokenizer(folder: Path, world: World) -> None:
    world.context = 2048
    told = await examine(folder, None)
    assert any("context = 2048" in f.advice for f in told if f.state == "failed")
    world.context, world.tells_ids = 4096, False
    assert any("token ids" in f.detail for f in await examine(folder, None) if f.state == "warning")
    world.tokenizer = "b" * 64
    tokenizer = (await found(folder))["tokenizer of m"]
    assert (tokenizer.state, "b" * 64 in tokenizer.advice) == ("failed", True)
    world.tokenizer = None
    assert "does not sell" in (await found(folder))["tokenizer of m"].detail
    world.models = ["other"]
    engine = (await found(folder))["engine e"]
    assert (engine.state, "does not offer" in engine.detail) == ("failed", True)


async def test_nothing_answers(folder: Path) -> None:
    port = free_port()
    config.write_settings(
        folder, node_id="n1", api=f"http://127.0.0.1:{port}", nats_url=f"nats://127.0.0.1:{port}"
    )
    told = await found(folder)
    for check in ("marketplace", "fabric", "models"):
        assert told[check].state == "failed"
        assert told[check].advice


async def test_a_node_the_fabric_does_not_know_is_told_to_enrol(folder: Path) -> None:
    (folder / KEY_FILE).unlink()
    create_identity(folder)
    fabric = (await found(folder))["fabric"]
    assert (fabric.state, "was revoked" in fabric.advice, "enroll" in fabric.advice) == ("failed", True, True)


async def test_a_full_disk_and_a_key_open_to_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    (folder / "key.seed").chmod(0o644)
    told = await found(folder)
    assert told["disk"].state == "failed"
    assert "chmod 600" in told["key"].detail


async def test_a_running_agent_is_asked_instead_of_cut_off(folder: Path) -> None:
    def says(*, is_connected: bool) -> LocalStatus:
        fields: dict[str, Any] = dict.fromkeys(
            ("running", "served", "failed", "prompt_tokens", "completion_tokens", "time_ms"), 0
        )
        return LocalStatus(
            pid=1,
            node_id="n1",
            version="0",
            is_connected=is_connected,
            is_draining=False,
            engines=[EngineView("e", "ready", 0, "")],
            models=[],
            **fields,
        )

    config.write_settings(folder, node_id="n1", api="http://127.0.0.1:1", nats_url="nats://127.0.0.1:1")
    assert (await found(folder, says(is_connected=True)))["fabric"].state == "ok"
    assert (await found(folder, says(is_connected=False)))["fabric"].state == "failed"


def test_the_digest_is_the_marketplaces_own(tmp_path: Path) -> None:
    described = {"chat_template": "{{ x }}", "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer.json").write_bytes(b'{"model": 1}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    (tmp_path / "config.json").write_text("{}")
    assert digest_of(tmp_path) == read_model_folder(tmp_path)[0].sha256
    (tmp_path / "chat_template.jinja").write_text("{{ other }}")
    assert digest_of(tmp_path) == read_model_folder(tmp_path)[0].sha256
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(NoTokenizerError):
        digest_of(tmp_path)
