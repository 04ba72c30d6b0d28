from __future__ import annotations

import asyncio
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import accounts, templates
from marketplace.ledger.accounts import Account, TransferKind, ensure_account, read_balance
from marketplace.ledger.charges import Charge
from marketplace.ledger.errors import InsufficientFunds, KeyReused, LedgerRefusal, ReversalRefused
from marketplace.ledger.ids import uuid7
from marketplace.ledger.money import Nano
from marketplace.ledger.poster import Poster
from marketplace.ledger.posting import find_transfer, post_transfer, post_transfers
from marketplace.ledger.reconcile import prove
from marketplace.ledger.refunds import refund_charge

DOLLAR = 1_000_000_000
ANN, BOB, OLGA = accounts.buyer("ann"), accounts.buyer("bob"), accounts.operator_earnings("olga")


@pytest.fixture
async def charge(engine: AsyncEngine) -> UUID:
    """Ann paid 101: 80 for Olga, 21 for us, on lane 0."""
    async with engine.begin() as conn:
        await post_transfer(conn, templates.top_up(person="ann", amount=Nano(DOLLAR), ref="t"))
        buyer, operator = [await ensure_account(conn, account) for account in (ANN, OLGA)]
        await ensure_account(conn, BOB)
    made = Charge(
        id=uuid7(), buyer=buyer, operator=operator, amount=Nano(101), fee=Nano(21), model="m"
    )  # fmt: skip
    free = Charge(id=uuid7(), buyer=buyer, operator=operator, model="free")
    async with Poster(engine, settle=lambda hold, cost: None, lane=0) as poster:
        await asyncio.gather(poster.post(made), poster.post(free))
    return made.id


async def posted(engine: AsyncEngine, *names: Account) -> list[int]:
    async with engine.connect() as conn:
        balances = [await read_balance(conn, name) for name in names]
    return [0 if balance is None else balance.posted.n for balance in balances]


async def broken(engine: AsyncEngine) -> list[str]:
    async with engine.connect() as conn:
        return [check.name async for check in prove(conn) if not check.ok]


async def test_a_charge_is_taken_back_once_from_both_who_shared_it(engine, charge):
    async with engine.begin() as conn:
        assert await refund_charge(conn, charge, note="wrong model") is True
        assert await refund_charge(conn, charge, note="wrong model") is False
        with pytest.raises(KeyReused):
            await refund_charge(conn, charge, amount=Nano(5), note="more")
    assert await posted(engine, ANN, OLGA, accounts.platform_revenue(0)) == [DOLLAR, 0, 0]
    assert await broken(engine) == []


async def test_a_part_is_taken_from_both_in_proportion(engine, charge):
    async with engine.begin() as conn:
        assert await refund_charge(conn, charge, amount=Nano(50), note="half an answer") is True
    assert await posted(engine, ANN, OLGA, accounts.platform_revenue(0)) == [DOLLAR - 51, 41, 10]
    assert await broken(engine) == []


async def test_parallel_refunds_of_one_charge_move_it_once(engine, charge):
    async def refund(amount: int) -> bool | str:
        try:
            async with engine.begin() as conn:
                return await refund_charge(conn, charge, amount=Nano(amount), note="n")
        except KeyReused:
            return "reused"

    outcomes = await asyncio.gather(*(refund(90 + n % 2) for n in range(8)))
    assert outcomes.count(True) == 1
    (paid,) = await posted(engine, ANN)
    assert paid in {DOLLAR - 101 + 90, DOLLAR - 101 + 91}
    assert await broken(engine) == []


async def test_no_refund_exceeds_what_each_had_of_a_stored_charge(engine, charge):
    async with engine.begin() as conn:
        free = UUID(str(await conn.scalar(text("SELECT id FROM charges WHERE amount = 0"))))
        for wrong, amount in ((free, None), (uuid7(), None), (charge, Nano(102)), (charge, Nano(0))):
            with pytest.raises(ReversalRefused):
                await refund_charge(conn, wrong, amount=amount, note="n")

        def shares(
            person: str = "ann", lane: int = 0, earned: int = 80, fee: int = 21, ref: str = str(charge)
        ) -> tuple[templates.Transfer, ...]:
            return templates.charge_refund(
                person=person, operator="olga", lane=lane, earned=Nano(earned), fee=Nano(fee), ref=ref
            )

        for forged in (
            shares(person="bob"), shares(lane=1), shares(earned=81), shares(fee=22),
            shares(ref="case-7"), shares(ref=str(uuid7())),
        ):  # fmt: skip
            with pytest.raises(LedgerRefusal):
                await post_transfers(conn, forged)
    assert await posted(engine, ANN, OLGA) == [DOLLAR - 101, 80]
    async with engine.begin() as conn:
        assert await post_transfers(conn, shares()) == [True, True]


async def test_a_refund_is_not_reversed_and_prove_knows(engine, charge):
    async with engine.begin() as conn:
        await refund_charge(conn, charge, note="n")
        found = await find_transfer(conn, TransferKind.CHARGE_REFUND_OPERATOR, str(charge))
        assert found is not None
        original = templates.charge_refund(
            person="ann", operator="olga", lane=0, earned=Nano(80), fee=Nano(21), ref=str(charge), note="n"
        )[0]
        undo = templates.reversal(of=found.id, original=original, amount=Nano(1), ref="undo")
        with pytest.raises(ReversalRefused):
            await post_transfer(conn, undo)
    async with engine.begin() as conn:
        sql = """INSERT INTO charges SELECT gen_random_uuid(), buyer, operator, 1, 0, node, model, key_id,
                 tok_in, tok_out, counted_by, price_version, latency_ms, ttft_ms, status, finish, lane, batch,
                 stream FROM charges WHERE amount > 0 RETURNING id"""
        other = await conn.scalar(text(sql))
        more = """INSERT INTO transfers (id, kind, debit, credit, amount, ref, input_hash)
                  SELECT gen_random_uuid(), kind, debit, credit, 2, :ref, input_hash FROM transfers
                  WHERE kind = 'charge_refund_operator'"""
        await conn.execute(text(more), {"ref": str(other)})
    assert "L9 refunds" in await broken(engine)


async def test_earnings_that_are_gone_are_not_refunded(engine, charge):
    async with engine.begin() as conn:
        gone = templates.withdrawal_planned(chain="base", person="olga", amount=Nano(1_000), ref="p")
        with pytest.raises(InsufficientFunds):
            await post_transfer(conn, gone)
        drain = templates.correction(debit=OLGA, credit=accounts.LOSS, amount=Nano(30), ref="x", note="test")
        await post_transfer(conn, drain)
        with pytest.raises(InsufficientFunds):
            await refund_charge(conn, charge, note="n")
    assert await posted(engine, ANN, OLGA) == [DOLLAR - 101, 50]
