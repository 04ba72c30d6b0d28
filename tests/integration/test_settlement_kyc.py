"""Identity checks: Stripe over HTTP with real signatures, tiers in data, manual review, no splitting."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import SecretStr, ValidationError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.units import Micro
from marketplace.billing.routes import open_door
from marketplace.billing.routes import router as stripe_router
from marketplace.platform.database import transaction
from marketplace.platform.http import Identity, Services, install_error_handlers
from marketplace.platform.settings import ChainsConfig, Environment, Settings
from marketplace.settlement import kyc
from marketplace.settlement.errors import NotEligible, NotFound, WrongState
from marketplace.settlement.routes import router
from tests.fake_stripe import KEY, WEBHOOK_SECRET, FakeStripe, fake_stripe, signature
from tests.settlement_parts import Desk
from tests.settlement_rigs import UNUSED_EVM, UNUSED_SOLANA

KNOWN: dict[str, Any] = {
    "environment": Environment.DEVELOPMENT,
    "secret": SecretStr("s" * 40),
    "database_url": SecretStr("postgresql://u@h/d"),
}


@dataclass
class Office:
    desk: Desk
    stripe: FakeStripe
    client: httpx.AsyncClient
    admin: UUID
    app: FastAPI

    async def call(self, method: str, path: str, person: UUID, body: Any = None) -> httpx.Response:
        return await self.client.request(method, f"/api{path}", json=body, headers={"x-person": str(person)})

    async def hook(self, raw: bytes, signed: str) -> int:
        headers = {"stripe-signature": signed}
        answer = await self.client.post("/api/webhooks/stripe", content=raw, headers=headers)
        return answer.status_code

    async def tier(self, person: UUID) -> str:
        return str((await self.call("GET", "/kyc", person)).json()["tier"])


class SignedIn:
    """Whoever the header names, with every scope; the routes' own guards are tested elsewhere."""

    async def authenticate(self, request: Request) -> Identity:
        person = UUID(request.headers["x-person"])
        return Identity(person, None, frozenset({"account", "admin"}))


@pytest.fixture
async def office(engine: AsyncEngine) -> AsyncIterator[Office]:
    async with fake_stripe() as stripe:
        desk, app = Desk(engine), FastAPI()
        settings = Settings(
            **KNOWN,
            stripe_api_key=SecretStr(KEY),
            stripe_webhook_secret=SecretStr(WEBHOOK_SECRET),
            stripe_api_base=stripe.url,
        )
        for each in (router, stripe_router):
            app.include_router(each)
        install_error_handlers(app)
        chains = ChainsConfig(ethereum=UNUSED_EVM, base=UNUSED_EVM, solana=UNUSED_SOLANA)
        app.state.services = Services(engine, settings, chains, desk.clock, SignedIn())
        app.state.stripe = door = open_door(settings, kyc.record)
        assert door is not None
        app.state.identity_provider = door.identity
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tollway") as client:
            yield Office(desk, stripe, client, await desk.operator(10), app)
        await door.identity.close()
        await desk.check()


async def test_a_check_from_start_to_a_withdrawal_over_500(office: Office) -> None:
    ann = await office.desk.operator(2000)
    with pytest.raises(NotEligible) as refused:
        await office.desk.request(ann, 501)
    assert refused.value.code == "kyc_withdrawal"
    assert "POST /api/kyc/checks" in str(refused.value)
    first = (await office.call("POST", "/kyc/checks", ann)).json()
    again = (await office.call("POST", "/kyc/checks", ann)).json()
    assert (first["id"], first["url"]) == (again["id"], again["url"])
    assert len(office.stripe.sessions) == 1, "the check's id is Stripe's idempotency key"
    office.stripe.sessions["vs_1"]["status"] = "verified"
    raw = office.stripe.event("vs_1", "verified")
    assert await office.hook(raw, signature(raw)) == 204
    assert await office.tier(ann) == "identity"
    await office.desk.request(ann, 501)
    assert (await office.call("POST", "/kyc/checks", ann)).status_code == 409
    async with transaction(office.desk.engine) as conn:
        (row,) = await conn.execute(text("SELECT actor, reason FROM kyc"))
        told = await conn.scalar(text("SELECT count(*) FROM notices WHERE kind = 'kyc_decided'"))
    assert (row.actor, row.reason, told) == ("stripe_identity", "identity verified, session vs_1", 1)


async def test_a49_a_forged_old_or_live_event_changes_nothing(office: Office) -> None:
    ann = await office.desk.operator(20)
    await office.call("POST", "/kyc/checks", ann)
    office.stripe.sessions["vs_1"]["status"] = "verified"
    raw = office.stripe.event("vs_1", "verified")
    live = office.stripe.event("vs_1", "verified", livemode=True)
    for body, signed in (
        (raw, ""),
        (raw, signature(raw, secret="whsec_guess")),
        (raw, signature(raw, secret="")),
        (raw, signature(raw, age_s=301)),
        (raw + b" ", signature(raw)),
        (live, signature(live)),
        (b"[]", signature(b"[]")),
        (b'{"id": 1}', signature(b'{"id": 1}')),
        (b"x" * 300_000, signature(b"x" * 300_000)),
    ):
        assert await office.hook(body, signed) == 400
    assert await office.tier(ann) == "none"
    with pytest.raises(ValidationError, match="STRIPE_WEBHOOK_SECRET"):
        Settings(**KNOWN, stripe_api_key=SecretStr(KEY))


async def test_a51_the_message_is_not_believed_and_repeats_change_nothing(office: Office) -> None:
    ann = await office.desk.operator(20)
    await office.call("POST", "/kyc/checks", ann)
    lie = office.stripe.event("vs_1", "verified")  # Stripe itself still says: requires_input
    assert await office.hook(lie, signature(lie)) == 204
    assert await office.tier(ann) == "none"
    office.stripe.sessions["vs_1"] |= {"status": "verified"}
    late = office.stripe.event("vs_1", "requires_input", number=2)  # says the older state, Stripe the newer
    assert await office.hook(late, signature(late)) == 204
    assert await office.tier(ann) == "identity"
    await office.call("POST", f"/kyc/{ann}", office.admin, {"tier": "none", "reason": "forged passport"})
    for number in (2, 3):
        raw = office.stripe.event("vs_1", "verified", number=number)
        assert await office.hook(raw, signature(raw)) == 204
    assert await office.tier(ann) == "none", "a repeat does not undo a person's decision"
    async with transaction(office.desk.engine) as conn:
        stored = list(await conn.scalars(text("SELECT id FROM stripe_events ORDER BY id")))
    assert stored == ["evt_1", "evt_2", "evt_3"], "each once, with what it changed"
    strange = office.stripe.event("vs_9", "verified", number=4)
    office.stripe.sessions["vs_9"] = {**office.stripe.sessions["vs_1"], "id": "vs_9"}
    assert await office.hook(strange, signature(strange)) == 204, "another installation's session"


async def test_a_provider_that_is_down_is_asked_again_and_starts_nothing_twice(office: Office) -> None:
    ann = await office.desk.operator(20)
    office.stripe.is_down = True
    refused = await office.call("POST", "/kyc/checks", ann)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "provider_unavailable")
    office.stripe.is_down = False
    assert (await office.call("POST", "/kyc/checks", ann)).json()["url"].endswith("/vs_1")
    office.stripe.is_down = True
    raw = office.stripe.event("vs_1", "verified")
    assert await office.hook(raw, signature(raw)) == 503
    office.stripe.is_down = False
    office.stripe.sessions["vs_1"]["status"] = "verified"
    assert await office.hook(raw, signature(raw)) == 204, "Stripe sends it again, and then it counts"
    assert await office.tier(ann) == "identity"


async def test_without_a_provider_a_person_reviews(office: Office) -> None:
    office.app.state.identity_provider = office.app.state.stripe = None
    ann = await office.desk.operator(2000)
    refused = await office.call("POST", "/kyc/checks", ann)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "no_provider")
    assert await office.hook(b"{}", "") == 404
    told = await office.call("POST", f"/kyc/{ann}", office.admin, {"reason": "passport seen on 2 May"})
    assert told.status_code == 204
    await office.desk.request(ann, 600)
    unknown = await office.call("POST", f"/kyc/{ann}", office.admin, {"tier": "gold", "reason": "friend"})
    assert unknown.status_code == 404
    async with transaction(office.desk.engine) as conn:
        (row,) = await conn.execute(text("SELECT tier, actor, reason FROM kyc"))
    assert tuple(row) == ("identity", f"person:{office.admin}", "passport seen on 2 May")


async def test_tiers_are_data_and_splitting_evades_none(office: Office) -> None:
    ann, now = await office.desk.operator(3000), office.desk.clock.now()
    await office.desk.request(ann, 500, "exactly 500.00")
    with pytest.raises(NotEligible) as refused:
        await office.desk.request(ann, 10, "one more")
    assert refused.value.code == "kyc_cumulative"
    async with transaction(office.desk.engine) as conn:
        await kyc.change_tier(
            conn, "address", withdrawal_max=Micro(700 * 10**6), total_max=Micro(1200 * 10**6), actor="ada",
            reason="a tier between", now=now,
        )  # fmt: skip
        await kyc.decide(conn, person=ann, tier="address", reason="bill seen", actor="bo", now=now)
        with pytest.raises(WrongState, match=r"at once is more than 1\.000000 USDC in all"):
            await kyc.change_tier(
                conn, "odd", withdrawal_max=Micro(2 * 10**6), total_max=Micro(10**6), actor="ada",
                reason="a slip", now=now,
            )  # fmt: skip
        with pytest.raises(NotFound):
            await kyc.decide(conn, person=ann, tier="king", reason="x", actor="bo", now=now)
    await office.desk.request(ann, 700, "at the tier's limit")
    with pytest.raises(NotEligible) as refused:
        await office.desk.request(ann, 10, "over it in all")
    assert refused.value.code == "kyc_cumulative"
    shown = (await office.call("GET", "/kyc", ann)).json()
    assert (shown["tier"], shown["withdrawal_max"], shown["total_nano_max"]) == (
        "address", "700.00", str(1200 * 10**9),
    )  # fmt: skip
    started = await office.call("POST", "/kyc/checks", ann)
    assert started.status_code == 201, "whoever has a limit may have his identity checked"
