"""The HTTP surface: operators' earnings, addresses and withdrawals; admins' batches and decisions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.networks import BASE, ETHEREUM, SOLANA
from chain.ports import PayoutLine
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import templates
from marketplace.ledger.accounts import find_account
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.platform.database import transaction
from marketplace.platform.http import Identity, Refusal, Services, install_error_handlers
from marketplace.platform.ids import uuid7
from marketplace.platform.settings import (
    ChainsConfig,
    Environment,
    EvmChainConfig,
    Settings,
    SolanaChainConfig,
)
from marketplace.settlement.digest import is_included
from marketplace.settlement.routes import router
from tests.settlement_parts import Desk, a_person, run_out

WALLET = "0x1111111111111111111111111111111111111234"
OURS = "0x2222222222222222222222222222222222222222"


def evm(usdc: str, chain_id: int) -> EvmChainConfig:
    return EvmChainConfig(
        rpc=(),
        chain_id=chain_id,
        usdc=usdc,
        escrow=OURS,
        forwarder_factory="0x" + "3" * 40,
        multi_send="0x" + "4" * 40,
        signers=("0x" + "5" * 40, "0x" + "6" * 40, "0x" + "7" * 40),
        threshold=2,
    )


CHAINS = ChainsConfig(
    ethereum=evm(ETHEREUM.usdc, 1),
    base=evm(BASE.usdc, 8453),
    solana=SolanaChainConfig(
        rpc=(),
        usdc_mint=SOLANA.usdc_mint,
        multisig="4Nd1mBQtrMJVYVfKf2PJy9NZUZdTAsp7D4xWLs4gDB4T",
        escrow="7UX2i7SucgLMQcfZ75s3VXmZZY4YRUyJN9X1RgfMoDUi",
        nonce_account="n",
        gas_payer="g",
        signers=("a", "b", "c"),
        threshold=2,
    ),
)


@dataclass
class SignedIn:
    """Whoever the header names; admins are listed."""

    admins: set[UUID] = field(default_factory=set)

    async def authenticate(self, request: Request) -> Identity:
        given = request.headers.get("x-person")
        if given is None:
            raise Refusal(401, "missing_credential", "sign in")
        person = UUID(given)
        return Identity(
            person, None, frozenset({"account"} | ({"admin"} if person in self.admins else set()))
        )


@dataclass
class Office:
    desk: Desk
    client: httpx.AsyncClient
    admin: UUID
    second_admin: UUID
    signed_in: SignedIn

    async def call(
        self, method: str, path: str, person: UUID | None, body: Any = None, key: str | None = None
    ) -> httpx.Response:
        headers = {} if person is None else {"x-person": str(person)}
        if key is not None:
            headers["idempotency-key"] = key
        return await self.client.request(method, f"/api{path}", json=body, headers=headers)

    async def add_wallet(self, person: UUID) -> None:
        answer = await self.call("POST", "/payout-addresses", person, {"chain": "base", "address": WALLET})
        assert answer.status_code == 201
        self.desk.clock.pass_s(3600)


@pytest.fixture
async def office(engine: AsyncEngine) -> AsyncIterator[Office]:
    desk, signed_in = Desk(engine), SignedIn()
    app = FastAPI()
    app.include_router(router)
    install_error_handlers(app)
    settings = Settings(
        environment=Environment.DEVELOPMENT,
        database_url=SecretStr("postgresql://given@elsewhere/db"),
        secret=SecretStr("s" * 40),
        cooling_s=3600,
        step_up_s=0,
    )
    app.state.services = Services(engine, settings, CHAINS, desk.clock, signed_in)
    admin = await a_person(engine)
    second = await a_person(engine)
    signed_in.admins.update({admin, second})
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://tollway") as client:
        yield Office(desk, client, admin, second, signed_in)
    await desk.check()


async def test_earnings_mature_after_the_reserve(office: Office) -> None:
    ann = await office.desk.operator(50)
    async with transaction(office.desk.engine) as conn:
        account = await find_account(conn, ledger_accounts.operator_earnings(str(ann)))
        for age_s, amount in ((86_400 + 1, 7), (86_400 - 1, 10), (0, 20)):
            made_at = office.desk.clock.now() - timedelta(seconds=age_s)
            await conn.execute(
                text(
                    "INSERT INTO charges (id, buyer, operator, amount, fee, model, tok_in, tok_out,"
                    " counted_by, price_version, latency_ms, status, lane, batch, stream)"
                    " VALUES (:id, 0, :operator, :amount, :fee, 'm', 1, 1, 0, 0, 1, 200, 0, 0, false)"
                ),
                {
                    "id": uuid7(int(made_at.timestamp() * 1000)),
                    "operator": account,
                    "amount": amount * 10**9,
                    "fee": amount * 10**9 // 5,
                },
            )
    body = (await office.call("GET", "/earnings", ann)).json()
    assert (body["posted"], body["maturing"], body["matured"]) == ("50.00", "24.00", "26.00")
    assert body["matured_nano"] == "26000000000"
    await office.add_wallet(ann)  # an hour passes: the charge that was a second short matures
    new = {"chain": "base", "address": WALLET, "amount": "34.000001"}
    refused = await office.call("POST", "/withdrawals", ann, new, "k")
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "earnings")
    everything = await office.call("POST", "/withdrawals", ann, {**new, "amount": "all"}, "k")
    assert everything.json()["amount"] == "34.000000"


async def test_a_withdrawal_from_request_to_cancel(office: Office) -> None:
    ann = await office.desk.operator(50)
    await office.add_wallet(ann)
    new = {"chain": "base", "address": WALLET.lower(), "amount": "20"}
    made = await office.call("POST", "/withdrawals", ann, new, "key-1")
    assert made.status_code == 201
    again = await office.call("POST", "/withdrawals", ann, new, "key-1")
    assert (again.status_code, again.json()) == (200, made.json())
    other = await office.call("POST", "/withdrawals", ann, {**new, "amount": "21"}, "key-1")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    identity = made.json()["id"]
    assert (await office.call("GET", f"/withdrawals/{identity}", ann)).json()["status"] == "requested"
    listed = (await office.call("GET", "/withdrawals", ann)).json()
    assert [w["id"] for w in listed["data"]] == [identity]
    ben = await a_person(office.desk.engine)
    assert (await office.call("GET", f"/withdrawals/{identity}", ben)).status_code == 404
    assert (await office.call("DELETE", f"/withdrawals/{identity}", ben)).status_code == 404
    assert (await office.call("DELETE", f"/withdrawals/{identity}", ann)).json()["status"] == "cancelled"


@pytest.mark.parametrize(
    ("chain", "address"),
    [
        ("base", "0x" + "0" * 40),
        ("base", BASE.usdc),
        ("base", ETHEREUM.usdc),
        ("base", OURS),
        ("base", "0x52908400098527886E0F7030069857D2E4169Ee7"),
        ("base", "7UX2i7SucgLMQcfZ75s3VXmZZY4YRUyJN9X1RgfMoDUi"),
        ("solana", WALLET),
        ("solana", SOLANA.usdc_mint),
        ("solana", "11111111111111111111111111111111"),
        ("solana", CHAINS.solana.multisig),
        ("solana", "x" * 44),
    ],
)
async def test_unpayable_addresses_never_enter_the_book(office: Office, chain: str, address: str) -> None:
    ann = await a_person(office.desk.engine)
    refused = await office.call("POST", "/payout-addresses", ann, {"chain": chain, "address": address})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_address")
    assert (await office.call("GET", "/payout-addresses", ann)).json() == {"data": []}


@pytest.mark.parametrize(
    "amount", ["", "ten", "NaN", "-20", "1e400", "1e999999", "١٢", "20.0000001", "Infinity", "9" * 23]
)
async def test_bad_amounts(office: Office, amount: str) -> None:
    ann = await office.desk.operator(50)
    new = {"chain": "base", "address": WALLET, "amount": amount}
    assert (await office.call("POST", "/withdrawals", ann, new, "k")).status_code == 400


async def test_a_withdrawal_needs_a_key_and_a_caller(office: Office) -> None:
    ann = await office.desk.operator(50)
    new = {"chain": "base", "address": WALLET, "amount": "20"}
    assert (await office.call("POST", "/withdrawals", ann, new)).status_code == 400
    assert (await office.call("POST", "/withdrawals", None, new, "k")).status_code == 401


async def test_a_bank_withdrawal_from_account_to_reference(office: Office) -> None:
    """Over HTTP, by an operator and two admins."""
    ann, admin, second = await office.desk.operator(50), office.admin, office.second_admin
    new = {"holder": "Ann", "iban": "GB82 WEST 1234 5698 7654 32"}
    mistyped = await office.call("POST", "/bank-accounts", ann, {**new, "iban": "GB82WEST12345698765433"})
    assert (mistyped.status_code, mistyped.json()["error"]["code"]) == (400, "bad_iban")
    account = (await office.call("POST", "/bank-accounts", ann, new)).json()
    wanted = {"account_id": account["id"], "amount": "20"}
    cooling = await office.call("POST", "/bank-withdrawals", ann, wanted, "k")
    assert (cooling.status_code, cooling.json()["error"]["code"]) == (422, "address_cooling")
    office.desk.clock.pass_s(3600)
    made = await office.call("POST", "/bank-withdrawals", ann, wanted, "k")
    again = await office.call("POST", "/bank-withdrawals", ann, wanted, "k")
    assert (made.status_code, again.status_code, again.json()) == (201, 200, made.json())
    other = await office.call("POST", "/bank-withdrawals", ann, {**wanted, "amount": "21"}, "k")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    waits = f"/admin/bank-withdrawals/{made.json()['id']}"
    calls: list[tuple[UUID, str, dict[str, str], int, str | None]] = [
        (ann, "approve", {"reason": "myself"}, 403, "missing_scope"),
        (admin, "paid", {"reference": "B-1"}, 409, "wrong_state"),
        (admin, "approve", {"reason": "known"}, 200, None),
        (admin, "paid", {"reference": "B-1"}, 409, "approver_may_not_pay"),
        (second, "paid", {"reference": "B-1"}, 409, "bank_short"),
        (second, "refuse", {"reason": "the bank knows no such account"}, 200, None),
    ]
    for person, act, body, status, code in calls:
        answer = await office.call("POST", f"{waits}/{act}", person, body)
        assert (answer.status_code, answer.json().get("error", {}).get("code")) == (status, code), act
    (listed,) = (await office.call("GET", "/bank-withdrawals", ann)).json()["data"]
    assert (listed["status"], listed["reason"]) == ("refused", "the bank knows no such account")
    assert (await office.call("GET", "/admin/bank-withdrawals", admin)).json()["data"] == []
    assert (await office.call("DELETE", f"/bank-withdrawals/{listed['id']}", ann)).status_code == 409
    assert (await office.call("DELETE", f"/bank-accounts/{account['id']}", ann)).status_code == 204
    (retired,) = (await office.call("GET", "/bank-accounts", ann)).json()["data"]
    assert retired["retired_at"] is not None


async def test_admins_see_who_was_left_out_and_what_waits(office: Office) -> None:
    desk = office.desk
    ann, ben = await desk.operator(20), await desk.operator(30)
    left_out, waits = await desk.request(ann, 20), await desk.request(ben, 30)
    desk.rail.blocked.add(desk.address_of(ann))
    await office.call("POST", f"/standing/{ben}", office.admin, {"is_good": False, "reason": "canary"})
    await office.call("POST", "/batches/plan", office.admin, {"chain": "base"})
    await desk.settler().tick()
    (case,) = (await office.call("GET", "/admin/withdrawals", office.admin)).json()["data"]
    assert (case["id"], case["person_id"], case["refusal"]) == (str(left_out.id), str(ann), "blocked")
    (case,) = (await office.call("GET", "/admin/withdrawals?status=requested", office.admin)).json()["data"]
    assert (case["id"], case["refusal"]) == (str(waits.id), "this account is not in good standing: canary")
    shown = (await office.call("GET", f"/withdrawals/{waits.id}", ben)).json()
    assert shown["refusal"] == case["refusal"]
    assert (await office.call("GET", "/admin/withdrawals", ann)).status_code == 403


async def test_an_admin_books_usdc_that_was_moved_by_the_deposit_it_arrived_as(office: Office) -> None:
    """A bridge kept 2 of 100."""
    await office.desk.operator(150)  # 150 in the escrow on Base
    arrived = templates.deposit_unattributed(
        chain="ethereum", amount=Nano(98 * 10**9), ref="ethereum:opening:7"
    )
    async with transaction(office.desk.engine) as conn:
        await post_transfer(conn, arrived)
    said = {"source": "base", "target": "ethereum", "arrived": "opening:7", "ref": "0xout", "reason": "x"}
    for changed, status in (
        ({"amount_micro": 100 * 10**6}, 409),
        ({"amount_micro": 98 * 10**6, "fee_micro": -1}, 400),
        ({"amount_micro": 98 * 10**6, "fee_micro": 2 * 10**6}, 204),
        ({"amount_micro": 98 * 10**6, "fee_micro": 2 * 10**6}, 204),
        ({"amount_micro": 98 * 10**6, "ref": "0xother"}, 409),
    ):
        answer = await office.call("POST", "/treasury/rebalancings", office.admin, said | changed)
        assert answer.status_code == status, answer.text
    assert await office.desk.posted(ledger_accounts.escrow("base")) == -50 * 10**9
    assert await office.desk.posted(ledger_accounts.FEES) == -2 * 10**9


async def test_only_admins_plan_and_decide(office: Office) -> None:
    ann = await office.desk.operator(50)
    calls = [
        ("POST", "/batches/plan", {"chain": "base"}),
        ("GET", "/batches", None),
        ("POST", f"/kyc/{ann}", {"reason": "x"}),
        ("POST", f"/standing/{ann}", {"is_good": False, "reason": "x"}),
        ("POST", "/payout-halts/payouts", {"reason": "x"}),
    ]
    for method, path, body in calls:
        assert (await office.call(method, path, ann, body)).status_code == 403
        assert (await office.call(method, path, office.admin, body)).status_code in (200, 202, 204)
    nobody = await office.call("POST", f"/kyc/{uuid7()}", office.admin, {"reason": "x"})
    assert nobody.status_code == 404
    await office.call("POST", "/payout-halts/payouts/lift", office.admin, {"reason": "x"})
    assert (await office.call("POST", "/payout-halts/moon", office.admin, {"reason": "x"})).status_code == 400


@pytest.mark.parametrize("amount", ["9223372036.9", "999999999999"])
async def test_more_than_the_book_can_hold_is_a_bad_amount(office: Office, amount: str) -> None:
    ann = await office.desk.operator(50)
    body = {"chain": "base", "address": WALLET, "amount": amount}
    refused = await office.call("POST", "/withdrawals", ann, body, key="k")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_amount")


async def test_a47_no_admin_decides_about_himself(office: Office) -> None:
    ann = await office.desk.operator(50)
    office.signed_in.admins.add(ann)
    account = {"holder": "Ann", "iban": "GB82 WEST 1234 5698 7654 32"}
    account_id = (await office.call("POST", "/bank-accounts", ann, account)).json()["id"]
    office.desk.clock.pass_s(3600)
    asked = {"account_id": account_id, "amount": "20"}
    made = (await office.call("POST", "/bank-withdrawals", ann, asked, key="k")).json()["id"]
    approve = ("POST", f"/admin/bank-withdrawals/{made}/approve", {"reason": "x"})
    paid = ("POST", f"/admin/bank-withdrawals/{made}/paid", {"reference": "B-1"})
    for method, path, body in [
        ("POST", f"/kyc/{ann}", {"reason": "x"}),
        ("POST", f"/standing/{ann}", {"is_good": True, "reason": "x"}),
        approve,
        paid,
    ]:
        refused = await office.call(method, path, ann, body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "own_case")
    assert (await office.call(approve[0], approve[1], office.admin, approve[2])).status_code == 200
    assert (await office.call(paid[0], paid[1], ann, paid[2])).status_code == 403
    refuse = f"/admin/bank-withdrawals/{made}/refuse"
    assert (await office.call("POST", refuse, ann, {"reason": "a mistake"})).status_code == 200


async def test_a_batch_is_asked_for_planned_shown_and_exported(office: Office) -> None:
    desk = office.desk
    ann = await desk.operator(50)
    await desk.request(ann, 30)
    asked = (await office.call("POST", "/batches/plan", office.admin, {"chain": "base"})).json()
    assert asked["done_at"] is None
    await desk.settler().tick()
    done = (await office.call("GET", f"/batches/plans/{asked['id']}", office.admin)).json()
    assert done["code"] == "planned"
    (listed,) = (await office.call("GET", "/batches", office.admin)).json()["data"]
    assert (listed["id"], listed["status"], listed["total"]) == (done["batch_id"], "planned", "30.000000")
    assert listed["planned_by"] == f"person:{office.admin}"
    detail = (await office.call("GET", f"/batches/{listed['id']}", office.admin)).json()
    assert [p["address"] for p in detail["payouts"]] == [desk.address_of(ann)]
    export = await office.call("GET", f"/batches/{listed['id']}/export", office.admin)
    assert export.json()["digest"] == listed["digest"]
    forged = {
        "format": "tollway-batch-approval-1",
        "batch": listed["id"],
        "chain": "base",
        "digest": listed["digest"],
        "signer": CHAINS.base.signers[0],
        "signatures": {"safe_tx_hash": "00" * 65},
    }
    for person, code in (
        (office.admin, "planner_may_not_approve"),
        (office.second_admin, "approval_refused"),
    ):
        refused = await office.call("POST", f"/batches/{listed['id']}/approvals", person, forged)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
    elsewhere = await office.call("POST", f"/batches/{uuid7()}/approvals", office.admin, forged)
    assert elsewhere.status_code == 400


def test_every_route_documents_its_refusals() -> None:
    app = FastAPI()
    app.include_router(router)
    for path, methods in app.openapi()["paths"].items():
        if path.startswith("/api/transparency"):
            continue  # for anybody
        for method, operation in methods.items():
            assert {"401", "403"} <= operation["responses"].keys(), f"{method} {path}"


async def test_anybody_sees_where_the_money_is_and_an_operator_proves_his_part(office: Office) -> None:
    desk = office.desk
    made = [await desk.request(await desk.operator(20 + n), None) for n in range(3)]
    batch_id = await desk.approved()
    await run_out(desk, desk.settler())
    public = (await office.call("GET", "/transparency", None)).json()
    assert {c["chain"]: (c["usdc"], c["escrow"], c["threshold"]) for c in public["chains"]} == {
        "ethereum": (ETHEREUM.usdc, OURS, 2),
        "base": (BASE.usdc, OURS, 2),
        "solana": (SOLANA.usdc_mint, CHAINS.solana.escrow, 2),
    }
    (batch,) = public["batches"]
    assert (batch["id"], batch["status"], batch["count"]) == (str(batch_id), "final", 3)
    assert batch["tx"]
    assert (await office.call("GET", f"/transparency/batches/{batch_id}", None)).json() == batch
    assert (await office.call("GET", f"/transparency/batches/{made[0].id}", None)).status_code == 404
    mine = made[1]
    proof = (await office.call("GET", f"/withdrawals/{mine.id}/proof", mine.person_id)).json()
    line = PayoutLine(proof["payout_id"], proof["address"], Micro(proof["amount_micro"]))
    assert is_included(
        line,
        position=proof["position"],
        count=batch["count"],
        proof=[bytes.fromhex(step) for step in proof["proof"]],
        root=bytes.fromhex(batch["merkle_root"]),
    )
    assert (await office.call("GET", f"/withdrawals/{mine.id}/proof", made[0].person_id)).status_code == 404
    told = (await office.call("GET", "/earnings/statement", mine.person_id)).json()
    assert (told["data"][0]["withdrawal_id"], told["data"][0]["tx"]) == (str(mine.id), batch["tx"])
    assert (await office.call("GET", "/earnings/statement", None)).status_code == 401
    assert (await office.call("GET", "/treasury", mine.person_id)).status_code == 403
    treasury = (await office.call("GET", "/treasury", office.admin)).json()
    assert (treasury["broken"], treasury["warnings"]) == ([], [])
