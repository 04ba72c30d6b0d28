"""The catalogue as a gateway holds it: in memory, refreshed every few seconds, tokenizers loaded once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.catalog.aliases import list_aliases
from marketplace.catalog.models import Model, TokenizerFiles, list_models, load_tokenizer

REFRESH_S: Final = 3
_log = logging.getLogger(__name__)

Counter = TypeVar("Counter")


class Shelf(Generic[Counter]):
    """Models by name, without a database round trip; `build` turns tokenizer files into a counter.

    Building (about 0.2 s for a 49,000-word vocabulary) happens in a thread, once per digest.
    """

    def __init__(self, engine: AsyncEngine, build: Callable[[TokenizerFiles], Counter]) -> None:
        self._engine = engine
        self._build = build
        self._models: dict[str, Model] = {}
        self._aliases: dict[str, tuple[str, ...]] = {}
        self._counters: dict[str, asyncio.Task[Counter]] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.refresh()
        self._task = asyncio.create_task(self._keep_fresh(), name="catalogue")

    async def stop(self) -> None:
        tasks = [task for task in (self._task, *self._counters.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def refresh(self) -> None:
        async with self._engine.connect() as connection:
            self._models = {model.name: model for model in await list_models(connection)}
            self._aliases = await list_aliases(connection)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self.refresh()
            except (SQLAlchemyError, OSError) as e:  # the last known models stay
                _log.warning("the catalogue cannot be read: %s", type(e).__name__)

    def model(self, name: str) -> Model | None:
        return self._models.get(name)

    def resolve(self, name: str) -> list[Model]:
        """Give the model of this name, or those an alias stands for, in order; empty if there is neither."""
        model = self._models.get(name)
        if model is not None:
            return [model]
        return [self._models[one] for one in self._aliases.get(name, ()) if one in self._models]

    def models(self) -> list[Model]:
        return list(self._models.values())

    async def counter_of(self, name: str) -> Counter:
        """Give the counter of a model on the shelf, loading it at first use; KeyError if there is none."""
        model = self._models[name]
        task = self._counters.get(model.tokenizer_sha256)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._load(model.tokenizer_sha256))
            self._counters[model.tokenizer_sha256] = task
        return task.result() if task.done() else await asyncio.shield(task)

    async def _load(self, sha256: str) -> Counter:
        async with self._engine.connect() as connection:
            files = await load_tokenizer(connection, sha256)
        return await asyncio.to_thread(self._build, files)
