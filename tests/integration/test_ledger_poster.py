from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import accounts, templates
from marketplace.ledger.accounts import Account, Balance, ensure_account, read_balance
from marketplace.ledger.charges import Charge
from marketplace.ledger.errors import (
    ChargeRefused,
    InsufficientFunds,
    KeyReused,
    LedgerUnavailable,
    UnknownAccount,
    UnknownResult,
)
from marketplace.ledger.ids import uuid7
from marketplace.ledger.lease_keeper import LeaseKeeper
from marketplace.ledger.money import Nano, split
from marketplace.ledger.poster import Poster
from marketplace.ledger.posting import post_transfer

DOLLAR = 1_000_000_000
NODE, KEY = uuid4(), uuid4()


@pytest.fixture
def ledger_engine(engine: AsyncEngine) -> AsyncEngine:
    return engine


async def a_buyer(engine: AsyncEngine, *, balance: int, person: str = "ann") -> int:
    async with engine.begin() as conn:
        account = await ensure_account(conn, accounts.buyer(person))
        if balance:
            deposit = templates.top_up(person=person, amount=Nano(balance), ref=f"top-up-{person}")
            await post_transfer(conn, deposit)
    return account


async def an_operator(engine: AsyncEngine, person: str = "olga") -> int:
    async with engine.begin() as conn:
        return await ensure_account(conn, accounts.operator_earnings(person))


async def balance_of(engine: AsyncEngine, account: Account) -> Balance:
    async with engine.connect() as conn:
        balance = await read_balance(conn, account)
    assert balance is not None
    return balance


def a_charge(buyer: int, operator: int | None, amount: int, *, charge_id: UUID | None = None, model: str = "m") -> Charge:
    return Charge(
        id=charge_id or uuid7(), buyer=buyer, operator=operator, amount=Nano(amount), fee=split(Nano(amount))[1],
        node=NODE, model=model, key_id=KEY, tok_in=10, tok_out=20, price_version=1, latency_ms=5, ttft_ms=2,
        finish="stop",
    )  # fmt: skip


@asynccontextmanager
async def serving(engine: AsyncEngine, **options: object) -> AsyncIterator[tuple[LeaseKeeper, Poster]]:
    async with (
        LeaseKeeper(engine, worker=f"w-{uuid4()}") as keeper,
        Poster(engine, settle=keeper.settle, **options) as poster,
    ):
        yield keeper, poster


async def test_a_served_request_moves_money_three_ways_and_gives_the_rest_of_its_hold_back(ledger_engine):
    buyer, operator = await a_buyer(ledger_engine, balance=DOLLAR), await an_operator(ledger_engine)
    async with serving(ledger_engine) as (keeper, poster):
        hold = await keeper.authorise(buyer, Nano(1_000_000))
        assert (await balance_of(ledger_engine, accounts.buyer("ann"))).held.n >= 1_000_000
        assert await poster.post(a_charge(buyer, operator, 101), hold) is True
        keeper.release(hold)
        held = (await balance_of(ledger_engine, accounts.buyer("ann"))).held.n
        assert keeper.book.free(buyer) == held
    after = await balance_of(ledger_engine, accounts.buyer("ann"))
    assert (after.posted.n, after.held.n) == (DOLLAR - 101, 0)
    assert (await balance_of(ledger_engine, accounts.operator_earnings("olga"))).posted.n == 80
    assert (await balance_of(ledger_engine, accounts.platform_revenue(0))).posted.n == 21
