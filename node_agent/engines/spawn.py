"""Run an engine as a child: start, warm up, watch, restart, stop, leaving no process behind.

The command and its environment are templates. `{python}`, `{model_path}`, `{model_name}`, `{port}`,
`{api_key}`, `{context}`, `{capacity}` and `{context_of_all}` (context times capacity, which llama.cpp asks
for) are filled in; other braces stay as they are. The port is a free one on the
loopback address and the key is random each time, since vLLM answers several paths without a key: such a
server must not be reachable from elsewhere. The key also goes into VLLM_API_KEY and
LLAMA_API_KEY, where no `ps` shows it.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from node_agent.engines import EngineDownError, EngineError, EngineEvent, EngineState, guard
from node_agent.engines.openai_stream import WARM_UP_SECONDS_MAX, OpenAIClient
from node_agent.load import Load

POLL_SECONDS: Final = 0.5
HEALTH_EVERY_SECONDS: Final = 5.0
HEALTH_MISSES_MAX: Final = 6  # a busy engine may miss some
BACKOFF_SECONDS_MIN: Final = 1.0
BACKOFF_SECONDS_MAX: Final = 120.0
STEADY_SECONDS: Final = 600.0  # after running this long, a crash counts as the first
GRACE_SECONDS: Final = 5.0  # requests were drained before; SIGKILL loses nothing
LOG_BYTES_MAX: Final = 16 * 1024 * 1024

_log = logging.getLogger(__name__)


class SpawnEngine:
    """One engine process group and its client."""

    def __init__(
        self,
        name: str,
        *,
        argv: Sequence[str],
        values: Mapping[str, str],
        environment: Mapping[str, str],
        models: Sequence[str],
        folder: Path,
        start_seconds_max: float = 600.0,
    ) -> None:
        self.name = name
        self.state = EngineState.STOPPED
        self.last_error = ""
        self.restarts = 0
        self.log_path = folder / f"{name}.log"
        self.pid_path = folder / f"{name}.pid"
        self._argv = tuple(argv)
        self._values = dict(values)
        self._environment = dict(environment)
        self._models = tuple(models)
        self._start_seconds_max = start_seconds_max
        self._client: OpenAIClient | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._running: asyncio.Task[None] | None = None
        self._doubt = asyncio.Event()

    # -- for the agent --------------------------------------------------------------------

    async def start(self) -> None:
        self.state = EngineState.STARTING
        self.pid_path.parent.mkdir(parents=True, exist_ok=True)
        if await asyncio.to_thread(guard.reap_leftover, self.pid_path):
            _log.warning("ended a leftover of engine %s from an earlier run", self.name)
        self._running = asyncio.create_task(self._keep_running(), name=f"engine {self.name}")

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running
        self.state = EngineState.STOPPED

    async def chat(self, body: dict[str, Any], model: str) -> AsyncGenerator[list[EngineEvent], None]:
        if self._client is None:
            raise EngineDownError("the engine is not running")
        try:
            async with contextlib.aclosing(self._client.chat(body, model)) as answer:
                async for events in answer:
                    yield events
        except EngineDownError:
            self._doubt.set()
            raise

    async def load(self, model: str) -> Load:
        return await self._client.load(model) if self._client is not None else Load()

    @property
    def endpoint(self) -> str:
        """Where the running engine listens; empty while it does not."""
        return self._client.url if self._client is not None else ""

    # -- the life of the process ----------------------------------------------------------

    async def _keep_running(self) -> None:
        backoff = BACKOFF_SECONDS_MIN
        while True:
            began = time.monotonic()
            reason = await self._run_once()
            if time.monotonic() - began > STEADY_SECONDS:
                backoff = BACKOFF_SECONDS_MIN
            self.state, self.last_error = EngineState.DOWN, reason
            _log.warning(
                "engine %s: %s; next start in %.0f s, its log is %s",
                self.name,
                reason,
                backoff,
                self.log_path,
            )
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, BACKOFF_SECONDS_MAX)
            self.restarts += 1
            self.state = EngineState.STARTING

    async def _run_once(self) -> str:
        """Run the engine until it ends or fails; give back why. Nothing of it runs when this returns."""
        port, key = _free_port(), secrets.token_urlsafe(32)
        client = OpenAIClient(f"http://127.0.0.1:{port}", key)
        try:
            self._process = await self._spawn(port, key)
            await self._wait_until_healthy(client)
            async with asyncio.timeout(WARM_UP_SECONDS_MAX):
                for model in self._models:
                    await client.warm_up(model)
            self._client = client
            self.state, self.last_error = EngineState.READY, ""
            _log.info("engine %s is ready", self.name)
            await self._watch(client)
        except EngineError as error:
            return str(error)
        except TimeoutError:
            return "the warm-up generation took too long"
        except OSError as error:
            return f"the engine cannot be started: {error}"
        else:
            return "the engine ended"
        finally:
            self._client = None
            await asyncio.shield(self._end_process())
            await client.close()

    async def _spawn(self, port: int, key: str) -> asyncio.subprocess.Process:
        values = self._values | {"port": str(port), "api_key": key}
        argv = [_fill(part, values) for part in self._argv]
        if self.log_path.exists() and self.log_path.stat().st_size > LOG_BYTES_MAX:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        # The agent's own Python path must not put its packages in front of the engine's.
        inherited = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")
        }
        own = {name: _fill(value, values) for name, value in self._environment.items()}
        self.log_path.touch(mode=0o600)
        with self.log_path.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", guard.__file__, "--pid-file", str(self.pid_path)),
                *("--grace", str(GRACE_SECONDS), "--", *argv),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=inherited | {"VLLM_API_KEY": key, "LLAMA_API_KEY": key} | own,
                start_new_session=True,
            )

    async def _wait_until_healthy(self, client: OpenAIClient) -> None:
        until = time.monotonic() + self._start_seconds_max
        while time.monotonic() < until:
            self._raise_if_ended()
            with contextlib.suppress(EngineDownError):
                await client.probe("/health")
                return
            await asyncio.sleep(POLL_SECONDS)
        raise EngineDownError(f"the engine was not ready within {self._start_seconds_max:.0f} s")

    async def _watch(self, client: OpenAIClient) -> None:
        """Return when the process ends; raise when it lives but no longer answers."""
        assert self._process is not None
        ended = asyncio.create_task(self._process.wait())
        misses = 0
        try:
            while not ended.done():
                doubt = asyncio.create_task(self._doubt.wait())
                await asyncio.wait(
                    (ended, doubt), timeout=HEALTH_EVERY_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                doubt.cancel()
                self._doubt.clear()
                try:
                    await client.probe("/health")
                    misses = 0
                except EngineDownError as error:
                    misses += 1
                    if misses >= HEALTH_MISSES_MAX:
                        raise EngineDownError(f"the engine hangs: {error}") from error
        finally:
            ended.cancel()
        self._raise_if_ended()

    def _raise_if_ended(self) -> None:
        code = self._process.returncode if self._process is not None else None
        if code is not None:
            raise EngineDownError(f"the engine ended with status {code}")

    async def _end_process(self) -> None:
        """Close the guard's pipe and wait until the whole group is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(GRACE_SECONDS + 15.0):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        # The guard removes its pid file when the group is gone; if it was killed, the file is still there.
        await asyncio.to_thread(guard.reap_leftover, self.pid_path)


def _fill(part: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        part = part.replace("{" + name + "}", value)
    return part


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
