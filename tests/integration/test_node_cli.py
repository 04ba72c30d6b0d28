"""`tollway-node` as an operator types it, against a small marketplace that checks enrolments."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from node_agent import protocol
from node_agent.cli import app

ROOT = Path(__file__).parents[2]


class Marketplace:
    def __init__(self) -> None:
        self.requests: list[protocol.EnrollRequest] = []
        self.answer: tuple[int, bytes] | None = None
        self.url = ""


@pytest.fixture
def marketplace() -> Iterator[Marketplace]:
    market = Marketplace()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, answer = market.answer or (200, self.enrol(body))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

        def enrol(self, body: bytes) -> bytes:
            assert self.path == "/api/nodes/enroll"
            request = msgspec.json.decode(body, type=protocol.EnrollRequest)
            protocol.verify_enroll_request(request, time.time_ns() // 1_000_000)
            market.requests.append(request)
            return msgspec.json.encode(protocol.EnrollReply("node-7", "nats://127.0.0.1:9", "Ann"))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    market.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield market
    server.shutdown()
    thread.join()
    server.server_close()


def call(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--data-dir", str(folder)], env={"COLUMNS": "200"})


def test_from_enrolment_to_prices(tmp_path: Path, marketplace: Marketplace) -> None:
    folder = tmp_path / "node"
    enrolled = call(folder, "enroll", "tok", "--api", marketplace.url, "--name", "box", "--json")
    assert enrolled.exit_code == 0, enrolled.output
    assert json.loads(enrolled.stdout)["node_id"] == "node-7"
    assert (marketplace.requests[0].token, marketplace.requests[0].name) == ("tok", "box")
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "config.toml": 0o600,
        "key.seed": 0o600,
    }
    added = call(
        *(folder, "models", "add", "a/b", "--attach", "http://127.0.0.1:8000", "--api-key", "k"),
        *("--input", "0.0001", "--output", "0.0002", "--per", "1k", "--context", "4096", "--json"),
    )
    assert added.exit_code == 0, added.output
    (model,) = json.loads(added.stdout)["models"]
    assert (model["input_nano_per_million"], model["output_nano_per_million"]) == (100_000_000, 200_000_000)
    changed = call(folder, "prices", "set", "a/b", "--output", "0.5", "--json")
    (model,) = json.loads(changed.stdout)["models"]
    assert (model["input"], model["output"]) == ("0.10", "0.50")
    shown = call(folder, "prices", "show", "--per", "1k")
    assert "0.0001" in shown.stdout
    assert "0.0005" in shown.stdout


def test_token_from_standard_input(tmp_path: Path, marketplace: Marketplace) -> None:
    command = ["enroll", "-", "--api", marketplace.url, "--data-dir", str(tmp_path)]
    assert CliRunner().invoke(app, command, input="tok-2\n").exit_code == 0
    assert marketplace.requests[0].token == "tok-2"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, b'{"error": {"message": "this token was used"}}'), "answers 401: this token was used"),
        ((200, b"<html>"), "is the address right?"),
        ((302, b""), "answers 302"),
    ],
)
def test_refused_enrolment_is_one_sentence(
    tmp_path: Path, marketplace: Marketplace, answer: tuple[int, bytes], words: str
) -> None:
    marketplace.answer = answer
    refused = call(tmp_path, "enroll", "tok", "--api", marketplace.url)
    assert refused.exit_code == 1
    assert words in refused.stderr
    assert not (tmp_path / "config.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run",), "tollway-node enroll"),
        (("prices", "show"), "tollway-node enroll"),
        (("enroll", "t", "--api", "http://127.0.0.1:1"), "cannot be reached"),
        (("models", "add", "m", "--input", "x", "--output", "1"), "not a price"),
        (("models", "add", "m", "--input", "1", "--output", "1", "--per", "1b"), "1k or 1m"),
        (("models", "add", "m", "--input", "1", "--output", "1"), "either --attach"),
        (("prices", "set", "m"), "give --input"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    result = call(tmp_path, *arguments)
    assert result.exit_code == 1
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_status_without_an_agent(tmp_path: Path) -> None:
    assert call(tmp_path, "status").exit_code == 1
    told = json.loads(call(tmp_path, "status", "--json").stdout)
    assert told == {"is_running": False, "status": None, "account": None}


def test_agent_runs_alone_shows_its_status_and_stops_on_sigterm(
    tmp_path: Path, marketplace: Marketplace
) -> None:
    call(tmp_path, "enroll", "tok", "--api", marketplace.url)
    call(tmp_path, "models", "add", "m", "--attach", "http://127.0.0.1:1", "--input", "1", "--output", "2")
    command = [sys.executable, "-m", "node_agent.cli", "run", "--json", "--data-dir", tmp_path]
    with (tmp_path / "log").open("wb") as log:
        agent = subprocess.Popen(command, cwd=ROOT, stderr=log)
    until = time.monotonic() + 20
    while call(tmp_path, "status").exit_code != 0:
        assert time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.1)
    shown = json.loads(call(tmp_path, "status", "--json").stdout)["status"]
    assert (shown["pid"], shown["is_connected"]) == (agent.pid, False)
    assert shown["models"][0]["name"] == "m"
    second = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=30)
    assert second.returncode == 1
    assert b"already runs" in second.stderr
    os.kill(agent.pid, signal.SIGTERM)
    assert agent.wait(15) == 0
    assert call(tmp_path, "status").exit_code == 1
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert any("fabric nats://127.0.0.1:9" in line["message"] for line in lines)


def test_settings_explain_themselves_and_are_checked(tmp_path: Path) -> None:
    assert call(tmp_path, "config", "init").exit_code == 0
    path = tmp_path / "config.toml"
    assert path.stat().st_mode & 0o777 == 0o600
    assert sum(line.startswith("#") for line in path.read_text().splitlines()) > 20
    assert "--force" in call(tmp_path, "config", "init").stderr
    assert json.loads(call(tmp_path, "config", "check", "--json").stdout)["is_valid"] is True
    path.write_text(path.read_text().replace("drain_seconds = 120", "drain_seconds = -1"))
    broken = call(tmp_path, "config", "check")
    assert (broken.exit_code, "drain_seconds" in broken.stderr) == (1, True)


def test_service_file_is_shown_without_touching_anything(tmp_path: Path, marketplace: Marketplace) -> None:
    call(tmp_path, "enroll", "tok", "--api", marketplace.url)
    before = sorted(path.name for path in tmp_path.iterdir())
    for kind, mark in (("systemd", "ExecStart="), ("launchd", "<plist"), ("windows", "<Task ")):
        told = json.loads(call(tmp_path, "service", "show", "--kind", kind, "--json").stdout)
        assert mark in told["content"]
        assert str(tmp_path) in told["content"]
        assert told["install"]
    assert "systemd, launchd or windows" in call(tmp_path, "service", "show", "--kind", "rc").stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="systemd's way")
def test_service_is_installed_asked_and_removed(
    tmp_path: Path, marketplace: Marketplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for systemctl: there is no running systemd here to talk to."""
    tools, said = tmp_path / "bin", tmp_path / "said"
    tools.mkdir()
    for name in ("systemctl", "loginctl"):
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {said}\ntest ! -e {tmp_path}/broken\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "node"
    call(folder, "enroll", "tok", "--api", marketplace.url)
    assert call(folder, "service", "status").exit_code == 1
    installed = json.loads(call(folder, "service", "install", "--json").stdout)
    unit = tmp_path / "home/.config/systemd/user/tollway-node.service"
    assert installed["path"] == str(unit)
    assert str(folder) in unit.read_text()
    assert "enable --now tollway-node" in said.read_text()
    assert json.loads(call(folder, "service", "status", "--json").stdout)["is_running"] is True
    (tmp_path / "broken").touch()
    refused = call(folder, "service", "install")
    assert (refused.exit_code, "Try by hand: systemctl --user daemon-reload" in refused.stderr) == (1, True)
    assert call(folder, "service", "uninstall").exit_code == 0
    assert not unit.exists()


def test_engine_install_points_to_vllm_where_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = json.loads(call(tmp_path, "engine", "install", "--json").stdout)
    assert (told["kind"], told["is_installed"]) == ("gpu", False)
    assert any("pip install vllm" in line for line in told["commands"])


def test_every_command_speaks_json() -> None:
    """Walk the whole tree of commands."""
    group = typer.main.get_command(app)
    without = []
    waiting = [(name, command) for name, command in group.commands.items()]
    while waiting:
        name, command = waiting.pop()
        children = getattr(command, "commands", {})
        waiting += [(f"{name} {child}", entry) for child, entry in children.items()]
        is_runnable = not children or getattr(command, "invoke_without_command", False)
        if is_runnable and not any("--json" in parameter.opts for parameter in command.params):
            without.append(name)
    assert without == []
