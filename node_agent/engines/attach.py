"""Use an OpenAI-compatible server that somebody else keeps running.

Ready means: it lists every model we offer and has generated tokens for us. After that it is probed
now and then; a failure takes it out until a probe succeeds again.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

from node_agent.engines import EngineDownError, EngineError, EngineEvent, EngineState
from node_agent.engines.openai_stream import WARM_UP_SECONDS_MAX, OpenAIClient
from node_agent.load import Load

PROBE_EVERY_SECONDS: Final = 5.0
_log = logging.getLogger(__name__)


class AttachEngine:
    """A running server, by URL and key."""

    def __init__(self, name: str, *, url: str, api_key: str, models: Sequence[str]) -> None:
        self.name = name
        self.state = EngineState.STOPPED
        self.last_error = ""
        self.restarts = 0
        self._models = tuple(models)
        self._client = OpenAIClient(url, api_key)
        self._watching: asyncio.Task[None] | None = None
        self._doubt = asyncio.Event()

    async def start(self) -> None:
        self.state = EngineState.STARTING
        self._watching = asyncio.create_task(self._watch(), name=f"watch {self.name}")

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        self.state = EngineState.STOPPED
        await self._client.close()

    async def chat(self, body: dict[str, Any], model: str) -> AsyncGenerator[list[EngineEvent], None]:
        try:
            async with contextlib.aclosing(self._client.chat(body, model)) as answer:
                async for events in answer:
                    yield events
        except EngineDownError:
            self._doubt.set()  # ask the engine at once; one broken answer alone proves nothing
            raise

    async def load(self, model: str) -> Load:
        return await self._client.load(model)

    async def _watch(self) -> None:
        while True:
            try:
                await self._check()
            except EngineError as error:
                self._set_down(str(error))
            except TimeoutError:
                self._set_down("the warm-up generation took too long")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_EVERY_SECONDS):
                    await self._doubt.wait()

    async def _check(self) -> None:
        for model in self._models:
            await self._client.context(model)
        if self.state is EngineState.READY and not self._doubt.is_set():
            return
        self._doubt.clear()
        async with asyncio.timeout(WARM_UP_SECONDS_MAX):
            for model in self._models:
                await self._client.warm_up(model)
        if self.state is not EngineState.READY:
            _log.info("engine %s is ready", self.name)
        self.state, self.last_error = EngineState.READY, ""

    def _set_down(self, reason: str) -> None:
        if self.state is not EngineState.DOWN:
            _log.warning("engine %s is down: %s", self.name, reason)
        self._doubt.clear()
        self.state, self.last_error = EngineState.DOWN, reason
