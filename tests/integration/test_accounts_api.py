"""Sign-up, sign-in and keys over HTTP, on real PostgreSQL, with signatures made by wallets' libraries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
from eth_account import Account
from eth_account.messages import encode_defunct
from fastapi import FastAPI
from pydantic import SecretStr
from solders.keypair import Keypair
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.accounts import people
from marketplace.accounts.authenticate import AccountAuthenticator
from marketplace.accounts.key_ring import KeyRing
from marketplace.accounts.routes import router
from marketplace.accounts.tokens import make_key
from marketplace.platform.database import drop_database, transaction
from marketplace.platform.http import AccountIdentity, AdminIdentity, Services, install_error_handlers
from marketplace.platform.settings import ChainsConfig, Environment, Settings

SECRET = SecretStr("s" * 32)
PASSWORD = "correct horse battery"


class MovableClock:
    """The machine's clock, plus what a test has let pass."""

    def __init__(self) -> None:
        self.ahead = timedelta()
        self.monotonic_ahead = 0.0

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    def monotonic(self) -> float:
        return time.monotonic() + self.monotonic_ahead


@dataclass
class Site:
    client: httpx.AsyncClient
    engine: AsyncEngine
    clock: MovableClock
    ring: KeyRing
    app: FastAPI

    async def post(self, path: str, body: Any = None, *, as_: str | None = None) -> httpx.Response:
        return await self.client.post(path, json=body, headers=_bearer(as_))

    async def get(self, path: str, *, as_: str | None = None) -> httpx.Response:
        return await self.client.get(path, headers=_bearer(as_))

    async def delete(self, path: str, *, as_: str | None = None) -> httpx.Response:
        return await self.client.delete(path, headers=_bearer(as_))

    async def register(self, email: str = "ada@example.org") -> str:
        answer = await self.post("/api/auth/register", {"email": email, "password": PASSWORD})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["token"])

    async def challenge(self, chain: str, address: str) -> str:
        answer = await self.post("/api/auth/wallet/challenge", {"chain": chain, "address": address})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["message"])


def _bearer(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def code_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def sign_evm(wallet: Any, message: str) -> str:
    return "0x" + bytes(wallet.sign_message(encode_defunct(text=message)).signature).hex()


def sign_solana(wallet: Keypair, message: str) -> str:
    return str(wallet.sign_message(message.encode()))


@asynccontextmanager
async def site_on(engine: AsyncEngine, database_url: str) -> AsyncIterator[Site]:
    settings = Settings(
        environment=Environment.DEVELOPMENT,
        secret=SECRET,
        database_url=SecretStr(database_url),
        public_url="https://tollway.example",
    )
    clock = MovableClock()
    ring = KeyRing(engine, SECRET, clock)
    await ring.start()
    app = FastAPI()
    app.include_router(router)
    install_error_handlers(app)

    @app.get("/api/probe")
    async def probe(identity: AccountIdentity) -> str:
        return str(identity.person_id)

    @app.get("/api/admin/probe")
    async def admin_probe(identity: AdminIdentity) -> str:
        return str(identity.person_id)

    chains = ChainsConfig.model_construct()
    app.state.services = Services(
        engine, settings, chains, clock, AccountAuthenticator(engine, settings, clock, ring)
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="https://tollway.example") as client:
        try:
            yield Site(client, engine, clock, ring, app)
        finally:
            await ring.stop()


@pytest.fixture
async def site(engine: AsyncEngine, database_url: str) -> AsyncIterator[Site]:
    async with site_on(engine, database_url) as made:
        yield made


async def test_a_person_registers_signs_in_and_reads_the_account(site: Site) -> None:
    registered = await site.register(" Ada@Example.org")
    login = await site.post("/api/auth/login", {"email": "ADA@example.org", "password": PASSWORD})
    assert login.status_code == 200
    session = login.json()["token"]
    assert session.startswith("st-")
    assert session != registered
    me = (await site.get("/api/me", as_=session)).json()
    assert me["email"] == "ada@example.org"
    assert me["scopes"] == ["account", "inference"]
    assert (me["is_operator"], me["is_admin"], me["wallets"]) == (False, False, [])


async def test_nul_is_refused_before_the_database_is_asked(site: Site) -> None:
    """PostgreSQL takes it in no text: what it says of it would be our 500."""
    token = await site.register()
    made = (await site.post("/api/keys", {"name": "k", "scopes": ["inference"]}, as_=token)).json()["id"]
    models = {"allowed_models": ["a\0"]}
    for answer in (
        await site.post("/api/auth/login", {"email": "aaa\0a", "password": "a" * 12}),
        await site.post("/api/keys", {"name": "k", "scopes": ["inference"], **models}, as_=token),
        await site.client.patch(f"/api/keys/{made}", json=models, headers=_bearer(token)),
    ):
        assert (answer.status_code, code_of(answer)) == (400, "invalid_request")


async def test_an_email_address_has_one_account(site: Site) -> None:
    await site.register()
    again = await site.post("/api/auth/register", {"email": "ADA@example.org", "password": PASSWORD})
    assert (again.status_code, code_of(again)) == (409, "email_taken")


@pytest.mark.parametrize(
    ("email", "password"), [("ada@example.org", "wrong horse battery"), ("bob@example.org", PASSWORD)]
)
async def test_wrong_email_and_wrong_password_look_the_same(site: Site, email: str, password: str) -> None:
    await site.register()
    answer = await site.post("/api/auth/login", {"email": email, "password": password})
    assert answer.status_code == 401
    assert answer.json()["error"]["message"] == "the e-mail address or the password is wrong"


@pytest.mark.parametrize(
    "body",
    [
        {"email": "ada@example.org", "password": "elevenchars"},
        {"email": "ada@example.org", "password": "x" * 129},
        {"email": "not an address", "password": PASSWORD},
        {"email": "a@b", "password": PASSWORD},
        {"email": "a" * 250 + "@b.org", "password": PASSWORD},
        {"email": "ada@example.org", "password": PASSWORD, "display_name": "Ada\u0000"},
        {"email": "ada@example.org", "password": PASSWORD, "display_name": "x" * 101},
        {"email": "ada@example.org", "password": PASSWORD, "is_admin": True},
        {"email": "ada@example.org"},
        [],
    ],
)
async def test_a_bad_registration_is_refused_without_repeating_it(site: Site, body: Any) -> None:
    answer = await site.post("/api/auth/register", body)
    assert (answer.status_code, code_of(answer)) == (400, "invalid_request")
    assert PASSWORD not in answer.text
    assert "elevenchars" not in answer.text


async def test_a_lone_surrogate_is_a_bad_request(site: Site) -> None:
    token = await site.register()
    answer = await site.client.post(
        "/api/keys",
        content=b'{"name": "\\ud800"}',
        headers=_bearer(token) | {"content-type": "application/json"},
    )
    assert answer.status_code == 400


async def test_logout_ends_this_session_only(site: Site) -> None:
    first = await site.register()
    second = (await site.post("/api/auth/login", {"email": "ada@example.org", "password": PASSWORD})).json()[
        "token"
    ]
    assert (await site.post("/api/auth/logout", as_=first)).status_code == 204
    ended = await site.get("/api/me", as_=first)
    assert (ended.status_code, code_of(ended)) == (401, "invalid_session")
    assert (await site.get("/api/me", as_=second)).status_code == 200


async def test_a_session_ends_after_a_day(site: Site) -> None:
    token = await site.register()
    site.clock.ahead = timedelta(hours=23, minutes=59)
    assert (await site.get("/api/me", as_=token)).status_code == 200
    site.clock.ahead = timedelta(hours=24, minutes=1)
    assert (await site.get("/api/me", as_=token)).status_code == 401


@pytest.mark.parametrize("chain", ["ethereum", "base"])
async def test_an_evm_wallet_is_an_account_and_the_same_one_on_both_chains(site: Site, chain: str) -> None:
    wallet = Account.create()
    message = await site.challenge(chain, wallet.address.lower())
    assert message.startswith(
        f"tollway.example wants you to sign in with your Ethereum account:\n{wallet.address}\n\n"
    )
    assert f"\nChain ID: {1 if chain == 'ethereum' else 8453}\n" in message
    first = await site.post(
        "/api/auth/wallet/verify", {"message": message, "signature": sign_evm(wallet, message)}
    )
    assert first.status_code == 200, first.text
    message = await site.challenge("base", wallet.address)
    again = await site.post(
        "/api/auth/wallet/verify", {"message": message, "signature": sign_evm(wallet, message)}
    )
    assert again.json()["person_id"] == first.json()["person_id"]
    me = (await site.get("/api/me", as_=first.json()["token"])).json()
    assert [(w["kind"], w["address"]) for w in me["wallets"]] == [("evm", wallet.address)]
    assert me["email"] is None


async def test_a_solana_wallet_is_an_account(site: Site) -> None:
    wallet = Keypair()
    message = await site.challenge("solana", str(wallet.pubkey()))
    assert message.startswith("tollway.example wants you to sign in with your Solana account:\n")
    answer = await site.post(
        "/api/auth/wallet/verify", {"message": message, "signature": sign_solana(wallet, message)}
    )
    assert answer.status_code == 200, answer.text
    me = (await site.get("/api/me", as_=answer.json()["token"])).json()
    assert [(w["kind"], w["address"]) for w in me["wallets"]] == [("solana", str(wallet.pubkey()))]


async def test_a_challenge_works_once_even_if_the_answer_was_wrong(site: Site) -> None:
    wallet, other = Account.create(), Account.create()
    message = await site.challenge("ethereum", wallet.address)
    wrong = await site.post(
        "/api/auth/wallet/verify", {"message": message, "signature": sign_evm(other, message)}
    )
    assert (wrong.status_code, code_of(wrong)) == (401, "bad_challenge")
    late = await site.post(
        "/api/auth/wallet/verify", {"message": message, "signature": sign_evm(wallet, message)}
    )
    assert (late.status_code, code_of(late)) == (401, "bad_challenge")


async def test_an_answered_challenge_cannot_be_replayed(site: Site) -> None:
    wallet = Keypair()
    message = await site.challenge("solana", str(wallet.pubkey()))
    body = {"message": message, "signature": sign_solana(wallet, message)}
    assert (await site.post("/api/auth/wallet/verify", body)).status_code == 200
    assert (await site.post("/api/auth/wallet/verify", body)).status_code == 401


async def test_a_challenge_ends_after_five_minutes(site: Site) -> None:
    wallet = Account.create()
    message = await site.challenge("ethereum", wallet.address)
    site.clock.ahead = timedelta(minutes=5)
    answer = await site.post(
        "/api/auth/wallet/verify", {"message": message, "signature": sign_evm(wallet, message)}
    )
    assert answer.status_code == 401


async def test_a_text_for_another_site_is_refused(site: Site) -> None:
    wallet = Account.create()
    message = (await site.challenge("ethereum", wallet.address)).replace("tollway.example", "evil.example")
    answer = await site.post(
        "/api/auth/wallet/verify", {"message": message, "signature": sign_evm(wallet, message)}
    )
    assert (answer.status_code, code_of(answer)) == (401, "bad_challenge")


@pytest.mark.parametrize(
    ("chain", "address"),
    [
        ("ethereum", "0x0000000000000000000000000000000000000000"),
        ("ethereum", "0x8ba1f109551bD432803012645Ac136ddd64DBA73"),
        ("base", "So11111111111111111111111111111111111111112"),
        ("solana", "0x8ba1f109551bD432803012645Ac136ddd64DBA72"),
        ("solana", "11111111111111111111111111111111"),
    ],
)
async def test_an_address_nobody_signs_for_is_refused(site: Site, chain: str, address: str) -> None:
    answer = await site.post("/api/auth/wallet/challenge", {"chain": chain, "address": address})
    assert (answer.status_code, code_of(answer)) == (400, "bad_address")


async def test_two_first_sign_ins_at_once_make_one_person(site: Site) -> None:
    wallet = Account.create()
    messages = [await site.challenge("ethereum", wallet.address) for _ in range(4)]
    answers = await asyncio.gather(
        *(
            site.post("/api/auth/wallet/verify", {"message": m, "signature": sign_evm(wallet, m)})
            for m in messages
        )
    )
    assert {a.status_code for a in answers} == {200}
    assert len({a.json()["person_id"] for a in answers}) == 1
    async with site.engine.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM people")) == 1


async def test_a_wallet_is_linked_and_then_signs_the_same_person_in(site: Site) -> None:
    token, wallet = await site.register(), Keypair()
    asked = {"chain": "solana", "address": str(wallet.pubkey())}
    message = (await site.post("/api/me/wallets/challenge", asked, as_=token)).json()["message"]
    assert "Link this wallet to Tollway account" in message
    linked = await site.post(
        "/api/me/wallets", {"message": message, "signature": sign_solana(wallet, message)}, as_=token
    )
    assert linked.status_code == 200, linked.text
    message = await site.challenge("solana", str(wallet.pubkey()))
    answer = await site.post(
        "/api/auth/wallet/verify", {"message": message, "signature": sign_solana(wallet, message)}
    )
    assert answer.json()["person_id"] == linked.json()["id"]


async def test_a_linking_text_does_not_sign_in_nor_the_reverse_nor_for_another(site: Site) -> None:
    ada, bob, wallet = await site.register(), await site.register("bob@example.org"), Account.create()
    asked = {"chain": "base", "address": wallet.address}

    async def answer(path: str, message: str, as_: str | None) -> str:
        body = {"message": message, "signature": sign_evm(wallet, message)}
        return code_of(await site.post(path, body, as_=as_))

    linking = (await site.post("/api/me/wallets/challenge", asked, as_=ada)).json()["message"]
    assert await answer("/api/auth/wallet/verify", linking, None) == "bad_challenge"
    linking = (await site.post("/api/me/wallets/challenge", asked, as_=ada)).json()["message"]
    assert await answer("/api/me/wallets", linking, bob) == "bad_challenge"
    signing_in = await site.challenge("base", wallet.address)
    assert await answer("/api/me/wallets", signing_in, ada) == "bad_challenge"


async def test_a_wallet_signs_in_one_person_only(site: Site) -> None:
    ada, bob, wallet = await site.register(), await site.register("bob@example.org"), Account.create()
    statuses = []
    for token in (ada, bob, ada):
        asked = {"chain": "ethereum", "address": wallet.address}
        message = (await site.post("/api/me/wallets/challenge", asked, as_=token)).json()["message"]
        body = {"message": message, "signature": sign_evm(wallet, message)}
        statuses.append((await site.post("/api/me/wallets", body, as_=token)).status_code)
    assert statuses == [200, 409, 200]


async def test_a_key_is_shown_once_listed_by_its_start_and_revoked(site: Site) -> None:
    token = await site.register()
    made = await site.post("/api/keys", {"name": " laptop ", "scopes": ["inference", "account"]}, as_=token)
    assert made.status_code == 201, made.text
    key, body = made.json()["key"], made.json()
    assert (body["name"], body["scopes"]) == ("laptop", ["account", "inference"])
    assert (await site.get("/api/me", as_=key)).status_code == 200
    listed = await site.get("/api/keys", as_=token)
    assert key not in listed.text
    assert [k["prefix"] for k in listed.json()["data"]] == [key[:15]]
    assert (await site.delete(f"/api/keys/{body['id']}", as_=token)).status_code == 204
    refused = await site.get("/api/me", as_=key)
    assert (refused.status_code, code_of(refused)) == (401, "invalid_api_key")
    assert (await site.delete(f"/api/keys/{body['id']}", as_=token)).status_code == 204
    assert (await site.get("/api/keys", as_=token)).json()["data"][0]["revoked_at"] is not None


async def test_nobody_revokes_anothers_key(site: Site) -> None:
    ada, bob = await site.register(), await site.register("bob@example.org")
    made = (await site.post("/api/keys", {"name": "k", "scopes": ["account"]}, as_=ada)).json()
    assert code_of(await site.delete(f"/api/keys/{made['id']}", as_=bob)) == "key_not_found"
    assert (await site.get("/api/me", as_=made["key"])).status_code == 200


async def test_a_key_for_inference_cannot_manage_the_account(site: Site) -> None:
    token = await site.register()
    key = (await site.post("/api/keys", {"name": "k"}, as_=token)).json()["key"]
    for answer in (
        await site.get("/api/me", as_=key),
        await site.post("/api/keys", {"name": "more"}, as_=key),
        await site.post("/api/me/operator", as_=key),
        await site.delete(f"/api/keys/{UUID(int=0)}", as_=key),
    ):
        assert (answer.status_code, code_of(answer)) == (403, "missing_scope")


@pytest.mark.parametrize("through", ["session", "account key"])
async def test_nobody_gives_a_key_more_than_he_has(site: Site, through: str) -> None:
    credential = await site.register()
    asked = "admin"
    if through == "account key":
        body = {"name": "k", "scopes": ["account"]}
        credential = (await site.post("/api/keys", body, as_=credential)).json()["key"]
        asked = "inference"
    answer = await site.post("/api/keys", {"name": "up", "scopes": [asked]}, as_=credential)
    assert (answer.status_code, code_of(answer)) == (403, "scope_not_held")


async def test_a_key_ends_when_it_was_said_to(site: Site) -> None:
    token = await site.register()
    expires = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    body = {"name": "short", "scopes": ["account"], "expires_at": expires}
    key = (await site.post("/api/keys", body, as_=token)).json()["key"]
    assert (await site.get("/api/me", as_=key)).status_code == 200
    site.clock.ahead = timedelta(hours=1, seconds=1)
    assert (await site.get("/api/me", as_=key)).status_code == 401
    past = await site.post("/api/keys", body, as_=token)
    assert past.status_code == 400


async def test_a_person_has_at_most_a_hundred_live_keys(site: Site) -> None:
    token = await site.register()
    person_id = (await site.get("/api/me", as_=token)).json()["id"]
    async with transaction(site.engine) as connection:
        for n in range(99):
            await people.create_key(connection, SECRET, UUID(person_id), f"key {n}")
    both = await asyncio.gather(*(site.post("/api/keys", {"name": "last"}, as_=token) for _ in range(2)))
    assert sorted(a.status_code for a in both) == [201, 409]


async def test_becoming_an_operator_and_again(site: Site) -> None:
    token = await site.register()
    for _ in range(2):
        assert (await site.post("/api/me/operator", as_=token)).json()["is_operator"] is True


async def test_an_administrator_is_made_and_unmade(site: Site) -> None:
    token = await site.register()
    me = (await site.get("/api/me", as_=token)).json()
    assert (await site.get("/api/admin/probe", as_=token)).status_code == 403
    async with transaction(site.engine) as connection:
        await people.make_admin(connection, UUID(me["id"]))
        key = await people.create_key(connection, SECRET, UUID(me["id"]), "demo", ["admin"])
    assert (await site.get("/api/admin/probe", as_=token)).status_code == 200
    assert (await site.get("/api/admin/probe", as_=key)).status_code == 200
    async with transaction(site.engine) as connection:
        await people.make_admin(connection, UUID(me["id"]), is_admin=False)
    await site.ring.refresh()
    assert (await site.get("/api/admin/probe", as_=token)).status_code == 403
    assert (await site.get("/api/admin/probe", as_=key)).status_code == 403


async def an_administrator(site: Site) -> tuple[str, str]:
    """Give (id, token)."""
    token = await site.register("root@example.org")
    me = (await site.get("/api/me", as_=token)).json()
    async with transaction(site.engine) as connection:
        await people.make_admin(connection, UUID(me["id"]))
    return me["id"], token


async def test_a_frozen_person_is_stopped_everywhere_and_can_be_let_in_again(site: Site) -> None:
    token = await site.register()
    admin, root = await an_administrator(site)
    me = (await site.get("/api/me", as_=token)).json()
    key = (await site.post("/api/keys", {"name": "k", "scopes": ["account"]}, as_=token)).json()["key"]
    account = f"/api/admin/accounts/{me['id']}"
    assert (await site.post(f"{account}/freeze", {"reason": "stolen card"}, as_=token)).status_code == 403
    assert (await site.post(f"{account}/freeze", {"reason": "stolen card"}, as_=root)).status_code == 204
    assert code_of(await site.get("/api/me", as_=key)) == "invalid_api_key"
    assert code_of(await site.get("/api/me", as_=token)) == "invalid_session"
    login = await site.post("/api/auth/login", {"email": "ada@example.org", "password": PASSWORD})
    assert (login.status_code, code_of(login)) == (403, "account_frozen")
    assert (await site.post(f"{account}/unfreeze", {"reason": "it was hers"}, as_=root)).status_code == 204
    assert (await site.get("/api/me", as_=key)).status_code == 200
    told = (await site.get(f"{account}/decisions", as_=root)).json()["data"]
    assert [(row["action"], row["reason"], row["actor"]) for row in told] == [
        ("unfreeze", "it was hers", admin), ("freeze", "stolen card", admin),
    ]  # fmt: skip


async def test_an_account_s_limits_have_an_actor_a_reason_and_a_row(site: Site) -> None:
    token = await site.register()
    admin, root = await an_administrator(site)
    me = (await site.get("/api/me", as_=token)).json()
    limits = f"/api/admin/accounts/{me['id']}/limits"
    for body in ({"requests_per_minute": 5}, {"requests_per_minute": 5, "reason": " "}, {"reason": "a\0"}):
        refused = await site.client.put(limits, json=body, headers=_bearer(root))
        assert refused.status_code == 400, refused.text
    asked = {"requests_per_minute": 5, "reason": "scrapes"}
    assert (await site.client.put(limits, json=asked, headers=_bearer(root))).status_code == 204
    path = f"/api/admin/accounts/{me['id']}/decisions"
    (told,) = (await site.get(path, as_=root)).json()["data"]
    assert (told["action"], told["actor"], told["reason"]) == ("limits", admin, "scrapes")
    assert told["detail"]["requests_per_minute"] == 5
    assert (await site.get(path, as_=token)).status_code == 403
    nobody = "/api/admin/accounts/00000000-0000-7000-8000-000000000000"
    assert (await site.get(f"{nobody}/decisions", as_=root)).status_code == 404
    assert code_of(await site.post(f"{nobody}/freeze", {"reason": "r"}, as_=root)) == "person_unknown"
    for rewrite in ("UPDATE account_decisions SET reason = 'x'", "DELETE FROM account_decisions"):
        with pytest.raises(DBAPIError, match="permission denied"):
            async with transaction(site.engine) as connection:
                await connection.execute(text(rewrite))


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Basic YTpi", "sk-tollway-x"])
async def test_no_credential(site: Site, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = await site.client.get("/api/me", headers=headers)
    assert (answer.status_code, code_of(answer)) == (401, "missing_credentials")


async def test_without_a_database_credentials_get_503_not_401(site: Site, database_url: str) -> None:
    token = await site.register()
    key = (await site.post("/api/keys", {"name": "k", "scopes": ["inference"]}, as_=token)).json()["key"]
    assert (await site.get("/api/me", as_=key)).status_code == 403  # known, and lacks the scope
    await drop_database(database_url)
    site.clock.monotonic_ahead = 4.1
    for credential in (key, make_key(), token):
        answer = await site.get("/api/me", as_=credential)
        assert (answer.status_code, answer.headers.get("retry-after")) == (503, "2")
        assert code_of(answer) == "credentials_unavailable"


async def test_the_served_openapi_lists_every_route_with_its_refusals(site: Site) -> None:
    described = (await site.client.get("/openapi.json")).json()
    for path in ("/api/auth/register", "/api/auth/wallet/verify", "/api/me", "/api/keys"):
        for operation in described["paths"][path].values():
            assert "default" in operation["responses"]
            assert "422" not in operation["responses"]
