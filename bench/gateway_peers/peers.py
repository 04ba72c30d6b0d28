"""The gateways people use today, each started from its package as its own documents say.

Every one does its plain proxying of one OpenAI-compatible engine: no database, no caches, no logging of
requests.  That is kind to them: ours keeps its books meanwhile.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
from gateway_peers.answers import MODEL, body

from marketplace.platform.processes import free_port, start_child, stop_child, tail

ROOT: Final = Path(__file__).parent.parent.parent
PLACE: Final = ROOT / ".bench"
VENV: Final = PLACE / "venv"
PORTKEY: Final = PLACE / "portkey" / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
START_S_MAX: Final = 90
CHAT: Final = "/v1/chat/completions"


class NotHadError(Exception):
    """This peer cannot be had here; the text says why."""


@dataclass
class Subject:
    """A gateway that is measured: where it listens and what a request to it looks like."""

    name: str
    port: int
    path: str = CHAT
    model: str = MODEL
    headers: Sequence[tuple[str, str]] = ()
    keys: Sequence[str] = ("sk-stub",)
    """Bearer tokens; client i uses number i, from the beginning again after the last."""
    pids: list[int] = field(default_factory=list)
    """Processes whose CPU is counted as the subject's."""


@dataclass
class _Recipe:
    argv: list[str]
    subject: Subject
    environment: dict[str, str] = field(default_factory=dict)


def prepare() -> None:
    """Install the peers' packages, once: hash-pinned, in an environment of their own."""
    uv = ROOT / ".venv" / "bin" / "uv"
    stamp, lock = VENV / "installed.lock", ROOT / "requirements" / "peers.lock"
    if not stamp.exists() or stamp.read_bytes() != lock.read_bytes():
        _run([str(uv), "venv", "--quiet", "--clear", "--python", sys.executable, str(VENV)])
        _run(
            [str(uv), "pip", "sync", "--quiet", "--require-hashes", "--python", str(VENV / "bin" / "python"),
             str(lock)]
        )  # fmt: skip
        stamp.write_bytes(lock.read_bytes())
    manifest = Path(__file__).parent.parent / "portkey"
    if not PORTKEY.exists():
        folder = PLACE / "portkey"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(manifest / name, folder / name)
        npm = shutil.which("npm")
        if npm is not None:
            _run([npm, "ci", "--userconfig", str(ROOT / ".npmrc")], folder)


def _run(argv: Sequence[str], folder: Path = ROOT) -> None:
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"  {argv[0]}: {done.stderr.strip()[-300:]}", flush=True)


# ---- how each is started


def _program(path: Path) -> str:
    if not path.exists():
        raise NotHadError(f"{path.name} is not installed (see bench/README.md)")
    return str(path)


def _nginx(engine: int, folder: Path) -> _Recipe:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise NotHadError("nginx is not installed (apt-get install nginx-light)")
    port = free_port()
    (folder / "nginx.conf").write_text(f"""
daemon off; worker_processes 1; error_log {folder}/nginx.log; pid {folder}/nginx.pid;
{"user root;" if os.geteuid() == 0 else ""}
events {{ worker_connections 4096; }}
http {{
  access_log off; tcp_nodelay on; keepalive_requests 1000000000; client_body_buffer_size 64k;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream engine {{ server 127.0.0.1:{engine}; keepalive 1024; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}""")
    return _Recipe([program, "-c", str(folder / "nginx.conf"), "-p", str(folder)], Subject("nginx", port))


def _vllm_router(engine: int, folder: Path) -> _Recipe:
    del folder
    port = free_port()
    argv = [
        _program(VENV / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(port), "--worker-urls",
        f"http://127.0.0.1:{engine}", "--policy", "round_robin", "--log-level", "error",
        "--prometheus-port", str(free_port()),
    ]  # fmt: skip
    return _Recipe(argv, Subject("vllm-router", port))


def _sglang_router(engine: int, folder: Path) -> _Recipe:
    del folder
    port = free_port()
    argv = [
        _program(VENV / "bin" / "sglang-router"), "launch", "--host", "127.0.0.1", "--port", str(port),
        "--worker-urls", f"http://127.0.0.1:{engine}", "--policy", "round_robin", "--log-level", "error",
        "--prometheus-port", str(free_port()), "--api-key", "sk-stub",
    ]  # fmt: skip
    return _Recipe(argv, Subject("sglang-router", port))


_TENSORZERO: Final = """
import signal, sys
from pathlib import Path
import openai, tensorzero
client = openai.OpenAI(api_key="none")
tensorzero.patch_openai_client(client, config_file=sys.argv[1], async_setup=False)
Path(sys.argv[2]).write_text(str(client.base_url))
signal.pause()
"""


def _tensorzero(engine: int, folder: Path) -> _Recipe:
    configuration, address = folder / "tensorzero.toml", folder / "tensorzero.url"
    configuration.write_text(f"""
[gateway]
observability.enabled = false
[models.{MODEL}]
routing = ["stub"]
[models.{MODEL}.providers.stub]
type = "openai"
api_base = "http://127.0.0.1:{engine}/v1/"
model_name = "{MODEL}"
api_key_location = "none"
""")
    _program(VENV / "lib" / "python3.11" / "site-packages" / "tensorzero")
    argv = [_program(VENV / "bin" / "python"), "-c", _TENSORZERO, str(configuration), str(address)]
    subject = Subject(
        "TensorZero", 0, path="/openai/v1/chat/completions", model=f"tensorzero::model_name::{MODEL}"
    )
    return _Recipe(argv, subject)


def _portkey(engine: int, folder: Path) -> _Recipe:
    del folder
    node = shutil.which("node")
    if node is None:
        raise NotHadError("Node.js is not installed")
    port = free_port()
    headers = (
        ("x-portkey-provider", "openai"), ("x-portkey-custom-host", f"http://127.0.0.1:{engine}/v1"),
    )  # fmt: skip
    argv = [node, _program(PORTKEY), "--headless", f"--port={port}"]
    return _Recipe(
        argv, Subject("Portkey", port, headers=headers), {"TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"}
    )


def _litellm(engine: int, folder: Path) -> _Recipe:
    port, key = free_port(), f"sk-{secrets.token_hex(12)}"
    configuration = {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {
                    "model": f"openai/{MODEL}", "api_key": "none",
                    "api_base": f"http://127.0.0.1:{engine}/v1",
                    "input_cost_per_token": 1e-7, "output_cost_per_token": 2e-7,
                },
            }
        ],
        "litellm_settings": {"num_retries": 0, "telemetry": False},
        "general_settings": {"master_key": key},
    }  # fmt: skip
    path = folder / "litellm.yaml"
    path.write_text(json.dumps(configuration))  # JSON is YAML
    argv = [
        _program(VENV / "bin" / "litellm"), "--config", str(path), "--host", "127.0.0.1", "--port", str(port),
        "--num_workers", "1", "--telemetry", "False",
    ]  # fmt: skip
    environment = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
    }
    return _Recipe(argv, Subject("LiteLLM", port, keys=[key]), environment)


RECIPES: Final[dict[str, Callable[[int, Path], _Recipe]]] = {
    "nginx": _nginx,
    "vllm-router": _vllm_router,
    "sglang-router": _sglang_router,
    "TensorZero": _tensorzero,
    "Portkey": _portkey,
    "LiteLLM": _litellm,
}


# ---- starting


class Peers:
    """Started peers, all up at once; one is measured at a time."""

    def __init__(self, engine_port: int, core: int, folder: Path) -> None:
        self._engine_port, self._core, self._folder = engine_port, core, folder
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self.subjects: dict[str, Subject] = {}
        self.missing: dict[str, str] = {}

    def start(self, names: Sequence[str]) -> None:
        """Start these and wait until each answers; who does not is `missing`, with the reason."""
        recipes = {}
        for name in names:
            try:
                recipes[name] = self._spawn(name)
            except NotHadError as error:
                self.missing[name] = str(error)
        for name, recipe in recipes.items():
            try:
                self._wait(name, recipe.subject)
            except NotHadError as error:
                self.missing[name] = str(error)
            else:
                self.subjects[name] = recipe.subject

    def _spawn(self, name: str) -> _Recipe:
        recipe = RECIPES[name](self._engine_port, self._folder)
        self._children[name] = start_child(
            ["taskset", "-c", str(self._core), *recipe.argv], log=self._folder / f"{name}.log",
            env={**os.environ, **recipe.environment}, cwd=self._folder,
        )  # fmt: skip
        return recipe

    def _wait(self, name: str, subject: Subject) -> None:
        """Return when it serves the benchmark's own request."""
        child, deadline = self._children[name], time.monotonic() + START_S_MAX
        trouble = "no answer"
        while time.monotonic() < deadline:
            if child.poll() is not None:
                break
            if not subject.port:
                address = self._folder / "tensorzero.url"
                if address.exists():
                    subject.port = httpx.URL(address.read_text()).port or 0
            try:
                trouble = ask(subject)
            except httpx.TransportError as error:
                trouble = type(error).__name__
            if not trouble:
                subject.pids = family(child.pid)
                return
            time.sleep(0.2)
        raise NotHadError(f"does not serve: {trouble}; {tail(self._folder / f'{name}.log')[-300:]}")

    def stop(self) -> None:
        for child in self._children.values():
            stop_child(child, stop_signal=signal.SIGTERM, patience_s=5)


def ask(subject: Subject) -> str:
    """Give what is wrong with the answer to one request, nothing if it is right."""
    answer = httpx.post(
        f"http://127.0.0.1:{subject.port}{subject.path}", timeout=20, trust_env=False,
        content=body(is_stream=False, model=subject.model),
        headers={"content-type": "application/json", "authorization": f"Bearer {subject.keys[0]}",
                 **dict(subject.headers)},
    )  # fmt: skip
    return "" if answer.status_code == 200 and "marketplace" in answer.text else answer.text[:300]


def family(pid: int) -> list[int]:
    """Give a process and all its descendants."""
    import psutil

    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
