"""Reputation at work in one gateway process: spot checks, canaries, judgement, and who gets no requests.

Any number of gateways run it: each checks what passes through it, the judgement goes on in one at a time, and
a canary is sent by each as often as the settings say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import aiohttp
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.platform.settings import Settings
from marketplace.reputation import holds
from marketplace.reputation.assess import assess
from marketplace.reputation.canaries import Canaries
from marketplace.reputation.checks import Checks
from marketplace.reputation.errors import CanaryRefused, ReferenceUnavailable, Unscorable
from marketplace.reputation.reference import Reference
from marketplace.routing.service import FabricService

_log = logging.getLogger(__name__)

ASSESS_EVERY_S: Final = 60.0
SUSPEND_EVERY_S: Final = 2.0
_FAULTS: Final = (OSError, SQLAlchemyError, TimeoutError, ReferenceUnavailable, CanaryRefused)


class ReputationService:
    """Owns the process's reputation work from `start` to `stop`."""

    def __init__(self, settings: Settings, engine: AsyncEngine, clock: Clock, fabric: FabricService) -> None:
        self._settings = settings
        self._engine = engine
        self._clock = clock
        self._fabric = fabric
        self._http: aiohttp.ClientSession | None = None
        self._canaries: Canaries | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin; after the fabric has started."""
        settings = self._settings
        await self._suspend()
        self._http = http = aiohttp.ClientSession()
        references = {
            model: Reference(http, engine, model) for model, engine in settings.reference_engines.items()
        }
        checks = Checks(self._engine, self._clock, references, permille=settings.spot_check_permille)
        work: list[tuple[float, Callable[[], Awaitable[object]], str]] = [
            (SUSPEND_EVERY_S, self._suspend, "suspensions"),
            (ASSESS_EVERY_S, lambda: assess(self._engine, self._clock), "judgement"),
        ]
        if references:
            self._fabric.nodes.witness = checks
            self._tasks.append(asyncio.create_task(checks.run(), name="reputation-checks"))
        if references and settings.canary_key.get_secret_value():
            api = f"http://{settings.api_host}:{settings.api_port}"
            key = settings.canary_key.get_secret_value()
            self._canaries = Canaries(http, checks, api=api, key=key)
            work.append((settings.canary_every_s, self._send_canary, "canaries"))
        for pause_s, each, name in work:
            repeated = self._every(pause_s, each, name)
            self._tasks.append(asyncio.create_task(repeated, name=f"reputation-{name}"))

    async def stop(self) -> None:
        self._fabric.nodes.witness = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._http is not None:
            await self._http.close()

    async def _every(self, pause_s: float, work: Callable[[], Awaitable[object]], name: str) -> None:
        while True:
            await asyncio.sleep(pause_s)
            try:
                await work()
            except Unscorable as error:
                _log.debug("reputation %s: %s", name, error)
            except _FAULTS as error:
                _log.warning("reputation %s failed, trying again: %s", name, error)

    async def _suspend(self) -> None:
        """Let nobody be asked whom we hold: his buyers are not to get another model meanwhile."""
        async with transaction(self._engine) as connection:
            decided = await holds.decided(connection)
        self._fabric.registry.suspend(
            {str(person) for person, decision in decided.items() if decision.is_ours}
        )

    async def _send_canary(self) -> None:
        assert self._canaries is not None
        registry = self._fabric.registry
        await self._canaries.send(
            [
                (view.node_id, model)
                for model in self._settings.reference_engines
                for view in registry.views(model)
            ]
        )
