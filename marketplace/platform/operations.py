"""What whoever operates Tollway asks a process that serves no API: /metrics, /healthz, /readyz.

The gateway answers the same three itself.  Plain HTTP, GET only, on an address that only the operator's own
network should reach.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.platform.errors import SetupFault

READY_S_MAX: Final = 2


@asynccontextmanager
async def answering_operations(engine: AsyncEngine, *, host: str, port: int | None) -> AsyncIterator[int]:
    """Answer while the block runs; gives the port.  None answers nowhere (0 is given), 0 chooses a free port.

    Ready means that the database answers: everything else is retried by the process itself and is told by
    its metrics.  SetupFault if the port is taken.
    """
    if port is None:
        yield 0
        return

    async def ready(request: web.Request) -> web.Response:
        del request
        return await _ready(engine)

    app = web.Application()
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/healthz", _healthy)
    app.router.add_get("/readyz", ready)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as e:
            raise SetupFault(f"TOLLWAY_METRICS_PORT: {host}:{port}: {e.strerror}") from e
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def _metrics(request: web.Request) -> web.Response:
    del request
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _healthy(request: web.Request) -> web.Response:
    del request
    return web.json_response({"status": "ok"})


async def _ready(engine: AsyncEngine) -> web.Response:
    reasons: list[str] = []
    try:
        async with asyncio.timeout(READY_S_MAX), engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
    except Exception:  # whatever it is, we are not ready
        reasons.append("the database does not answer")
    return web.json_response({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)
