"""Parts for tests of reputation: a reference engine that knows one language, and facts by the hundred."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from aiohttp import web
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.fabric import reports
from marketplace.platform.database import transaction
from marketplace.platform.settings import ReferenceEngine

FOREIGN = "@"
"""What this reference's model would hardly ever write."""


@dataclass
class FakeReference:
    """Speaks vLLM's routes; a token is a character, and `FOREIGN` is one in ten thousand."""

    url: str = ""
    key: str = "reference-key"
    seen: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200

    @property
    def settings(self) -> ReferenceEngine:
        return ReferenceEngine(url=self.url, key=SecretStr(self.key), model="there")

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.seen.append(body)
        words = body.get("prompt") or "".join(message["content"] for message in body["messages"])
        return web.json_response({"tokens": [ord(c) for c in words]}, status=self.status)

    async def complete(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == f"Bearer {self.key}"
        body = await request.json()
        assert body["model"] == "there"
        assert body["max_tokens"] == 1
        entries: list[dict[str, Any] | None] = [None, *map(_entry, body["prompt"][1:])]
        return web.json_response({"choices": [{"prompt_logprobs": entries}]}, status=self.status)


def _entry(token: int) -> dict[str, Any]:
    """The token's own chance beside the likeliest ones': two, equally likely."""
    likely = {"1": {"logprob": math.log(0.5)}, "2": {"logprob": math.log(0.5)}}
    own = math.log(0.0001 if token == ord(FOREIGN) else 0.5)
    return {**likely, str(token): {"logprob": own}}


@asynccontextmanager
async def fake_reference() -> AsyncIterator[FakeReference]:
    reference = FakeReference()
    app = web.Application()
    app.router.add_post("/tokenize", reference.tokenize)
    app.router.add_post("/v1/completions", reference.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    reference.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield reference
    finally:
        await runner.cleanup()


async def a_person(engine: AsyncEngine, identity: UUID) -> None:
    async with transaction(engine) as connection:
        await connection.execute(
            text("INSERT INTO people (id, display_name, is_operator) VALUES (:id, 'P', true)"),
            {"id": identity},
        )


async def checked(
    engine: AsyncEngine, node: str, *, honest: int = 0, suspicious: int = 0, at: datetime, model: str = "m"
) -> None:
    """Have answers of a node been read again, with these outcomes."""
    async with transaction(engine) as connection:
        for is_suspicious, times in ((False, honest), (True, suspicious)):
            await connection.execute(
                text(
                    "INSERT INTO reputation_checks (at, node_id, model, kind, tokens, mean_milli, "
                    "surprise_milli, is_suspicious) SELECT :at, :node, :model, 'spot', 64, -900, 0, :s "
                    "FROM generate_series(1, :times)"
                ),
                {"at": at, "node": node, "model": model, "s": is_suspicious, "times": times},
            )


async def answered(engine: AsyncEngine, node: str, times: int, *, at: datetime, model: str = "m") -> None:
    async with transaction(engine) as connection:
        await reports.add(connection, [(node, model, "answered", times, 0, 0)], now=at)
