"""A small Stripe over HTTP: verification sessions, idempotency keys, and webhooks with real signatures."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from aiohttp import web

WEBHOOK_SECRET = "whsec_" + "w" * 32
KEY = "sk_test_" + "k" * 24


@dataclass
class FakeStripe:
    """Stateful: sessions by id, and what each idempotency key has made."""

    url: str = ""
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_key: dict[str, str] = field(default_factory=dict)
    is_down: bool = False
    asked: list[str] = field(default_factory=list)

    async def create(self, request: web.Request) -> web.Response:
        form, key = await request.post(), request.headers["Idempotency-Key"]
        if refused := self._refused(request):
            return refused
        if key not in self.by_key:
            session = f"vs_{len(self.sessions) + 1}"
            self.by_key[key] = session
            self.sessions[session] = {
                "id": session,
                "object": "identity.verification_session",
                "type": form["type"],
                "client_reference_id": form["client_reference_id"],
                "metadata": {"person_id": form["metadata[person_id]"]},
                "status": "requires_input",
                "last_error": None,
                "livemode": False,
                "url": f"https://verify.stripe.example/{session}",
            }
        return web.json_response(self.sessions[self.by_key[key]])

    async def retrieve(self, request: web.Request) -> web.Response:
        if refused := self._refused(request):
            return refused
        found = self.sessions.get(request.match_info["session"])
        if found is None:
            error = {
                "type": "invalid_request_error",
                "code": "resource_missing",
                "message": "No such session",
            }
            return web.json_response({"error": error}, status=404)
        return web.json_response(found)

    def _refused(self, request: web.Request) -> web.Response | None:
        self.asked.append(f"{request.method} {request.path}")
        if self.is_down:
            return web.json_response({"error": {"type": "api_error", "message": "down"}}, status=500)
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response(
                {"error": {"type": "invalid_request_error", "message": "key"}}, status=401
            )
        return None

    def event(self, session: str, kind: str, *, number: int = 1, livemode: bool = False) -> bytes:
        """An event as Stripe sends it; its object is as it was when it happened."""
        body = {
            "id": f"evt_{number}",
            "object": "event",
            "type": f"identity.verification_session.{kind}",
            "livemode": livemode,
            "data": {"object": {**self.sessions.get(session, {"id": session}), "status": kind}},
        }
        return json.dumps(body).encode()


def signature(raw: bytes, *, secret: str = WEBHOOK_SECRET, age_s: int = 0) -> str:
    """The header Stripe-Signature over these bytes."""
    at = int(time.time()) - age_s
    mac = hmac.new(secret.encode(), f"{at}.".encode() + raw, sha256).hexdigest()
    return f"t={at},v1={mac}"


@asynccontextmanager
async def fake_stripe() -> AsyncIterator[FakeStripe]:
    made = FakeStripe()
    app = web.Application()
    app.router.add_post("/v1/identity/verification_sessions", made.create)
    app.router.add_get("/v1/identity/verification_sessions/{session}", made.retrieve)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield made
    finally:
        await runner.cleanup()
