from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import accounts, holds, templates
from marketplace.ledger.accounts import STRIPE_PENDING, Account, Kind, TransferKind, ensure_account, read_balance
from marketplace.ledger.errors import InsufficientFunds, KeyReused, ReversalRefused
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import find_transfer, post_transfer

DOLLAR = 1_000_000_000


@pytest.fixture
def ledger_engine(engine: AsyncEngine) -> AsyncEngine:
    return engine


async def posted(engine: AsyncEngine, account: Account) -> int | None:
    async with engine.connect() as conn:
        balance = await read_balance(conn, account)
    return None if balance is None else balance.posted.n


async def test_a_deposit_is_posted_once_and_a_changed_replay_is_refused(ledger_engine):
    deposit = templates.deposit(chain="base", person="ann", amount=Nano(5 * DOLLAR), ref="base:0xabc:1")
    altered = templates.deposit(chain="base", person="ann", amount=Nano(6 * DOLLAR), ref="base:0xabc:1")
    other_owner = templates.deposit(chain="base", person="bob", amount=Nano(5 * DOLLAR), ref="base:0xabc:1")
    async with ledger_engine.begin() as conn:
        assert await post_transfer(conn, deposit) is True
    async with ledger_engine.begin() as conn:
        assert await post_transfer(conn, deposit) is False
        for wrong in (altered, other_owner):
            with pytest.raises(KeyReused):
                await post_transfer(conn, wrong)
    assert await posted(ledger_engine, accounts.buyer("ann")) == 5 * DOLLAR
    assert await posted(ledger_engine, accounts.unswept("base")) == -5 * DOLLAR
    assert await posted(ledger_engine, accounts.buyer("bob")) == 0
