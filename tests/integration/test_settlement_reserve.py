"""S3 and S4: card money matures later, is never paid out as if it were USDC, and is moved by entries only."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.networks import Chain
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import templates
from marketplace.ledger.accounts import ensure_account
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.platform.database import transaction
from marketplace.platform.ids import uuid7
from marketplace.settlement import earnings, treasury
from marketplace.settlement.errors import KeyReused, NotEligible, PlanRefused, WrongState
from tests.settlement_parts import LIMITS, Desk, a_person

DAY_S = 86_400


@pytest.fixture
async def desk(engine: AsyncEngine) -> Desk:
    return Desk(engine)


async def a_buyer(desk: Desk) -> tuple[UUID, int]:
    person = await a_person(desk.engine)
    async with transaction(desk.engine) as conn:
        return person, await ensure_account(conn, ledger_accounts.buyer(str(person)))


async def topped_up(desk: Desk, person: UUID, dollars: int, *, age_s: int) -> None:
    """A card payment of `age_s` ago; a transfer's id says when it was."""
    async with transaction(desk.engine) as conn:
        paid = templates.top_up(person=str(person), amount=Nano(dollars * 10**9), ref=f"pi_{uuid7()}")
        at = desk.clock.now() - timedelta(seconds=age_s)
        await post_transfer(conn, paid, new_id=lambda: uuid7(int(at.timestamp() * 1000)))


async def charged(desk: Desk, operator: UUID, buyer: int, dollars: int, *, age_s: int) -> None:
    async with transaction(desk.engine) as conn:
        account = await ensure_account(conn, ledger_accounts.operator_earnings(str(operator)))
        at = desk.clock.now() - timedelta(seconds=age_s)
        await conn.execute(
            text(
                "INSERT INTO charges (id, buyer, operator, amount, fee, model, tok_in, tok_out, counted_by,"
                " price_version, latency_ms, status, lane, batch, stream)"
                " VALUES (:id, :buyer, :operator, :amount, 0, 'm', 1, 1, 0, 0, 1, 200, 0, 0, false)"
            ),
            {
                "id": uuid7(int(at.timestamp() * 1000)),
                "buyer": buyer,
                "operator": account,
                "amount": dollars * 10**9,
            },
        )


async def test_s4_card_funded_earnings_mature_after_seven_days_usdc_funded_after_one(desk: Desk) -> None:
    ann = await desk.operator(100)
    card, card_account = await a_buyer(desk)
    _, usdc_account = await a_buyer(desk)
    await topped_up(desk, card, 50, age_s=5 * DAY_S)
    for buyer, dollars, age_s in (
        (usdc_account, 1, DAY_S + 1),  # mature
        (usdc_account, 2, DAY_S - 1),
        (card_account, 4, DAY_S - 1),
        (card_account, 8, 2 * DAY_S),  # a card buyer: still in reserve
        (card_account, 16, 6 * DAY_S),  # before he ever used a card: USDC, so mature
        (card_account, 32, 8 * DAY_S),
    ):
        await charged(desk, ann, buyer, dollars, age_s=age_s)
    async with transaction(desk.engine) as conn:
        found = await earnings.read_earnings(conn, ann, now=desk.clock.now(), reserve=LIMITS.reserve)
        assert found.maturing == Nano((2 + 4 + 8) * 10**9)
        paged = [
            earned
            async for page in earnings.pages(conn, now=desk.clock.now(), reserve=LIMITS.reserve)
            for owner, earned in page
            if owner == str(ann)
        ]
        assert paged == [found]
    with pytest.raises(NotEligible) as refused:
        await desk.request(ann, 87)
    assert refused.value.code == "earnings"
    await desk.request(ann, 86)


async def test_s3_s4_card_money_pays_nobody_until_it_is_usdc_in_that_escrow(desk: Desk) -> None:
    """Earned from a card buyer long ago: owed, requested, and not planned until the treasury moved USDC."""
    ann = await desk.operator(20)
    card, _ = await a_buyer(desk)
    async with transaction(desk.engine) as conn:
        await post_transfer(conn, templates.top_up(person=str(card), amount=Nano(80 * 10**9), ref="pi_1"))
        await post_transfer(conn, templates.top_up_available(amount=Nano(80 * 10**9), ref="po_1"))
        earned = templates.correction(
            debit=ledger_accounts.buyer(str(card)), credit=ledger_accounts.operator_earnings(str(ann)),
            amount=Nano(80 * 10**9), ref="earned", note="test",
        )  # fmt: skip
        await post_transfer(conn, earned)
    await desk.request(ann, 90)

    async def cover() -> treasury.Cover:
        async with transaction(desk.engine) as conn:
            return await treasury.read_cover(conn, now=desk.clock.now(), reserve=LIMITS.reserve)

    assert "move $70.00 to base" in (await cover()).warnings()
    with pytest.raises(PlanRefused) as refused:
        await desk.plan()
    assert refused.value.code == "escrow_short"

    async def rebalance(amount: int, ref: str = "out-1") -> None:
        async with transaction(desk.engine) as conn:
            await treasury.rebalance(
                conn, source="card", target=Chain.BASE, arrived="opening:1", amount=Micro(amount * 10**6),
                ref=ref, actor="ada", reason="card money bought USDC", now=desk.clock.now(),
            )  # fmt: skip

    with pytest.raises(WrongState, match="arrived"):
        await rebalance(70)
    async with transaction(desk.engine) as conn:  # the watcher sees it come into the escrow, from nobody
        arrived = templates.deposit_unattributed(chain="base", amount=Nano(70 * 10**9), ref="base:opening:1")
        await post_transfer(conn, arrived)
    await rebalance(70)
    await rebalance(70)  # the same movement again is the same entry
    assert await desk.posted(ledger_accounts.STRIPE_AVAILABLE) == -10 * 10**9
    assert await desk.posted(ledger_accounts.unattributed("base")) == 0
    assert (await cover()).warnings() == ()
    assert (await desk.plan()).total == Micro(90 * 10**6)
    with pytest.raises(KeyReused, match="already"):
        await rebalance(70, "out-2")


async def test_usdc_moves_between_escrows_by_an_entry_with_actor_and_reason(desk: Desk) -> None:
    await desk.operator(50)  # 50 in the escrow on Base
    async with transaction(desk.engine) as conn:
        arrived = templates.deposit_unattributed(
            chain="ethereum", amount=Nano(30 * 10**9), ref="ethereum:opening:2"
        )
        await post_transfer(conn, arrived)
        with pytest.raises(WrongState, match="has no"):
            await treasury.rebalance(
                conn, source=Chain.SOLANA, target=Chain.ETHEREUM, arrived="opening:2",
                amount=Micro(30 * 10**6), ref="m", actor="ada", reason="test", now=desk.clock.now(),
            )  # fmt: skip
        await treasury.rebalance(
            conn, source=Chain.BASE, target=Chain.ETHEREUM, arrived="opening:2", amount=Micro(30 * 10**6),
            ref="0xout", actor="ada", reason="Ethereum payouts", now=desk.clock.now(),
        )  # fmt: skip
        note = await conn.scalar(
            text("SELECT note FROM transfers WHERE ref = 'rebalance:ethereum:opening:2'")
        )
    assert note == "ada: 0xout: Ethereum payouts"
    assert await desk.posted(ledger_accounts.escrow("base")) == -20 * 10**9
    assert await desk.posted(ledger_accounts.escrow("ethereum")) == -30 * 10**9
    await desk.check()
