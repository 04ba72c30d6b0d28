"""The background work of the gateway's tables, as `tollway work` does it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.fabric.connection import Connection
from marketplace.fabric.errors import FabricUnavailable
from marketplace.gateway.idempotency import drop_expired
from marketplace.gateway.receipts import signer_of
from marketplace.gateway.receipts_sealer import (
    OFFER_S_MAX,
    Sealer,
    drop_old_attempts,
    drop_old_drift,
    forget_old_hashes,
)
from marketplace.gateway.usage_rollup import roll_up_keys
from marketplace.platform.settings import Settings

_log = logging.getLogger(__name__)

CONNECT_S_MAX: Final = 5
ROLL_UP_S: Final = 15.0
FORGET_S: Final = 60.0


async def keep_receipts(settings: Settings, engine: AsyncEngine, stop: asyncio.Event) -> None:
    """Seal receipts and tidy until stopped; without NATS receipts are sealed and offered later."""
    fabric = Connection(
        settings.nats_url,
        user="marketplace",
        password=settings.nats_password.get_secret_value(),
        name="tollway-receipts",
        ca_file=settings.nats_ca_file,
    )

    connecting, has_started = asyncio.Lock(), False

    async def ask(subject: str, payload: bytes) -> bytes | None:
        nonlocal has_started
        async with connecting:
            if not has_started:
                await fabric.start(deadline_s=CONNECT_S_MAX)
                has_started = True
        return await fabric.ask(subject, payload, deadline_s=OFFER_S_MAX)

    sealer = Sealer(engine, signer_of(settings), ask)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(sealer.run(stop))
            group.create_task(_every(ROLL_UP_S, lambda: roll_up_keys(engine), stop))
            group.create_task(_every(FORGET_S, lambda: drop_expired(engine), stop))
            group.create_task(_every(FORGET_S, lambda: drop_old_drift(engine), stop))
            group.create_task(_every(FORGET_S, lambda: drop_old_attempts(engine), stop))
            group.create_task(_every(FORGET_S, lambda: forget_old_hashes(engine), stop))
    finally:
        with contextlib.suppress(OSError, FabricUnavailable):
            await fabric.close()


async def _every(seconds: float, work: Callable[[], Awaitable[int]], stop: asyncio.Event) -> None:
    """Repeat work, at once while there is more of it."""
    while not stop.is_set():
        try:
            while await work() and not stop.is_set():
                continue
        except (SQLAlchemyError, OSError, TimeoutError) as e:
            _log.warning("background work waits: %s", type(e).__name__)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)
