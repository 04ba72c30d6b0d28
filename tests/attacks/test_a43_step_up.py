"""A43: a stolen session or key does not change where money goes; over HTTP, real passwords and wallets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from eth_account import Account
from eth_account.messages import encode_defunct
from fastapi import FastAPI
from pydantic import SecretStr, ValidationError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.accounts import routes as accounts_routes
from marketplace.accounts.authenticate import AccountAuthenticator
from marketplace.accounts.key_ring import KeyRing
from marketplace.platform.database import transaction
from marketplace.platform.http import Services, install_error_handlers
from marketplace.platform.settings import ChainsConfig, Environment, Settings
from marketplace.settlement import routes as settlement_routes
from tests.settlement_rigs import UNUSED_EVM, UNUSED_SOLANA

PASSWORD = "correct horse battery"
ADDRESS = "0x" + "1" * 40
CHAINS = ChainsConfig(ethereum=UNUSED_EVM, base=UNUSED_EVM, solana=UNUSED_SOLANA)


@dataclass
class MovableClock:
    ahead: timedelta = timedelta()

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def monotonic(self) -> float:
        return self.ahead.total_seconds()


@dataclass
class Site:
    client: httpx.AsyncClient
    clock: MovableClock
    engine: AsyncEngine

    async def post(self, path: str, body: Any, token: str | None = None) -> httpx.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return await self.client.post(f"/api{path}", json=body, headers=headers)

    async def add(self, token: str, address: str = ADDRESS) -> tuple[int, str | None]:
        answer = await self.post("/payout-addresses", {"chain": "base", "address": address}, token)
        return answer.status_code, answer.json().get("error", {}).get("code")

    async def add_bank(self, token: str, iban: str) -> int:
        account = {"holder": "Ada", "iban": iban}
        return (await self.post("/bank-accounts", account, token)).status_code

    async def signed(self, wallet: Any, path: str, token: str | None = None) -> dict[str, str]:
        asked = {"chain": "base", "address": wallet.address}
        message = (await self.post(path, asked, token)).json()["message"]
        signature = wallet.sign_message(encode_defunct(text=message)).signature
        return {"message": message, "signature": "0x" + bytes(signature).hex()}


@asynccontextmanager
async def a_site(engine: AsyncEngine, database_url: str) -> AsyncIterator[Site]:
    settings = Settings(
        environment=Environment.DEVELOPMENT, secret=SecretStr("s" * 40), database_url=SecretStr(database_url)
    )
    clock = MovableClock()
    ring = KeyRing(engine, settings.secret, clock)
    await ring.start()
    app = FastAPI()
    app.include_router(accounts_routes.router)
    app.include_router(settlement_routes.router)
    install_error_handlers(app)
    authenticator = AccountAuthenticator(engine, settings, clock, ring)
    app.state.services = Services(engine, settings, CHAINS, clock, authenticator)
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="https://tollway.example") as client:
            yield Site(client, clock, engine)
    finally:
        await ring.stop()


@pytest.fixture
async def site(engine: AsyncEngine, database_url: str) -> AsyncIterator[Site]:
    async with a_site(engine, database_url) as made:
        yield made


async def registered(site: Site) -> str:
    body = {"email": "ada@example.org", "password": PASSWORD}
    return str((await site.post("/auth/register", body)).json()["token"])


async def test_a43_an_old_session_proves_itself_before_it_adds_an_address(site: Site) -> None:
    token = await registered(site)
    assert await site.add(token) == (201, None), "signing in is a proof"
    assert await site.add_bank(token, "GB82WEST12345698765432") == 201
    site.clock.ahead = timedelta(seconds=301)
    assert await site.add(token, "0x" + "6" * 40) == (403, "step_up_required")
    assert await site.add_bank(token, "DE89370400440532013000") == 403
    wrong = await site.post("/auth/step-up", {"password": "wrong password!"}, token)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "wrong_credentials")
    assert await site.add(token, "0x" + "6" * 40) == (403, "step_up_required")
    assert (await site.post("/auth/step-up", {"password": PASSWORD}, token)).status_code == 200
    assert await site.add(token, "0x" + "6" * 40) == (201, None)
    async with transaction(site.engine) as conn:
        told = await conn.execute(
            text("SELECT d.target FROM notices n JOIN notice_deliveries d ON d.notice_id = n.id"
                 " WHERE n.kind = 'payout_address_added'")
        )  # fmt: skip
        assert list(told.scalars()) == ["ada@example.org"] * 3, "the contact of before"


async def test_a43_a_key_adds_no_address_and_cannot_step_up(site: Site) -> None:
    token = await registered(site)
    made = await site.post("/keys", {"name": "stolen", "scopes": ["account"]}, token)
    key = str(made.json()["key"])
    assert await site.add(key) == (403, "step_up_required")
    refused = await site.post("/auth/step-up", {"password": PASSWORD}, key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_a_session")


async def test_a43_a_wallet_steps_up_its_own_person_only(site: Site) -> None:
    mine, thiefs = Account.create(), Account.create()
    proof = await site.signed(mine, "/auth/wallet/challenge")
    token = str((await site.post("/auth/wallet/verify", proof)).json()["token"])
    site.clock.ahead = timedelta(seconds=301)

    async def stepped_up(wallet: Any) -> int:
        answer = await site.signed(wallet, "/auth/wallet/challenge")
        return (await site.post("/auth/step-up", {"wallet": answer}, token)).status_code

    assert await stepped_up(thiefs) == 401
    linking = await site.signed(thiefs, "/me/wallets/challenge", token)
    refused = await site.post("/me/wallets", linking, token)
    assert refused.json()["error"]["code"] == "step_up_required", "else his wallet would prove him next"
    assert await site.add(token) == (403, "step_up_required")
    assert await stepped_up(mine) == 200
    assert await site.add(token) == (201, None)


def test_a43_only_development_asks_no_proof() -> None:
    known: dict[str, Any] = {
        "secret": SecretStr("s" * 40), "database_url": SecretStr("postgresql://u@h/d"),
    }  # fmt: skip
    assert Settings(environment=Environment.PRODUCTION, **known).step_up_s == 300
    for loose in (0, 301):
        with pytest.raises(ValidationError, match="step-up"):
            Settings(environment=Environment.PRODUCTION, step_up_s=loose, **known)
