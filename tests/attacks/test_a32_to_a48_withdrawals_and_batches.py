"""Attacks on withdrawals and settlement batches, on real PostgreSQL with a multisig in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.payouts import Payout
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import templates
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.platform.database import transaction
from marketplace.settlement.errors import (
    ApprovalRefused,
    KeyReused,
    NotEligible,
    PlanRefused,
)
from marketplace.settlement.withdrawals import Status, Withdrawal
from tests.settlement_parts import Desk, Stop, run_out


@pytest.fixture
async def desk(engine: AsyncEngine) -> AsyncIterator[Desk]:
    desk = Desk(engine)
    yield desk
    await desk.check()


@pytest.mark.parametrize("point", ["stored", "sent", "recorded", "booked"])
@pytest.mark.parametrize("answers_lost", [0, 1])
async def test_a34_a_crash_at_any_point_pays_once(desk: Desk, point: str, answers_lost: int) -> None:
    ann = await desk.operator(40)
    made = await desk.request(ann, 40)
    batch_id = await desk.approved()
    desk.rail.answers_lost = answers_lost

    def die(reached: str) -> None:
        if reached == point:
            raise Stop

    first = desk.settler(die)
    with pytest.raises(Stop):
        await run_out(desk, first)
    await desk.check()
    await run_out(desk, desk.settler())
    assert (await desk.batch(batch_id)).status is Payout.FINAL
    assert desk.rail.balances == {desk.address_of(ann): 40_000_000}
    assert len(set(desk.rail.sends)) == 1  # the same bytes, however often
    assert (await desk.status(ann, made)).status is Status.PAID


async def test_a37_a_fence_spent_by_something_else_expires_the_batch(desk: Desk) -> None:
    ann = await desk.operator(40)
    made = await desk.request(ann, 40)
    batch_id = await desk.approved()
    settler = desk.settler()
    await settler.tick()
    desk.rail.spend_fence()
    await run_out(desk, settler, 3)
    assert (await desk.batch(batch_id)).status is Payout.EXPIRED
    assert desk.rail.sends == []
    assert await desk.posted(ledger_accounts.operator_earnings(str(ann))) == 40 * 10**9
    await desk.check()
    assert (await desk.status(ann, made)).status is Status.REQUESTED
    again = await desk.approved()  # the request joins the next batch by itself
    await run_out(desk, desk.settler())
    assert (await desk.batch(again)).status is Payout.FINAL
    assert desk.rail.balances == {desk.address_of(ann): 40_000_000}


async def test_a41_a_revert_that_leaves_the_fence_keeps_the_money_in_flight(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = await desk.approved()
    settler = desk.settler()
    await settler.tick()
    desk.rail.blocked.add(desk.address_of(ann))
    await run_out(desk, settler, 4)
    assert (await desk.batch(batch_id)).status is Payout.BROADCAST
    assert await desk.posted(ledger_accounts.payouts_in_flight("base")) == 40 * 10**9
    desk.rail.blocked.clear()  # now anybody could execute it, so do we
    await run_out(desk, settler, 4)
    assert (await desk.batch(batch_id)).status is Payout.FINAL


@pytest.mark.parametrize("names_payees", [True, False])
async def test_a41_blacklisted_recipient_is_split_off(desk: Desk, names_payees: bool) -> None:
    desk.rail.names_payees = names_payees
    operators = [await desk.operator(20 + n) for n in range(5)]
    made = [await desk.request(person, None) for person in operators]
    desk.rail.blocked.add(desk.address_of(operators[3]))
    planned = await desk.plan()
    assert planned.count == 4
    assert [withdrawal for withdrawal, _ in planned.split_off] == [made[3].id]
    refused = await desk.status(operators[3], made[3])
    assert refused.status is Status.FAILED
    assert refused.refusal
    assert await desk.available(operators[3]) == 23 * 10**9


async def test_a42_a_paused_token_plans_nothing_and_blames_nobody(desk: Desk) -> None:
    people_paid = [await desk.operator(20), await desk.operator(30)]
    made = [await desk.request(person, None) for person in people_paid]
    desk.rail.is_paused = True
    with pytest.raises(PlanRefused) as refused:
        await desk.plan()
    assert refused.value.code == "dry_run_failed"
    for person, withdrawal in zip(people_paid, made, strict=True):
        assert (await desk.status(person, withdrawal)).status is Status.REQUESTED


async def test_a32_replayed_request_is_one_withdrawal(desk: Desk) -> None:
    ann = await desk.operator(40)
    first, again = await desk.request(ann, 15), await desk.request(ann, 15)
    assert first.id == again.id
    assert await desk.available(ann) == 25 * 10**9
    with pytest.raises(KeyReused):
        await desk.request(ann, 16)
    at_once = await asyncio.gather(*(desk.request(ann, 12, "k2") for _ in range(4)))
    assert len({made.id for made in at_once}) == 1


async def test_a33_parallel_withdrawals_of_everything_one_wins(desk: Desk) -> None:
    ann = await desk.operator(40)
    outcomes = await asyncio.gather(
        *(desk.request(ann, 40, f"key {n}") for n in range(6)), return_exceptions=True
    )
    won = [o for o in outcomes if isinstance(o, Withdrawal)]
    lost = [o for o in outcomes if isinstance(o, NotEligible)]
    assert (len(won), len(lost)) == (1, 5)
    assert {refusal.code for refusal in lost} == {"earnings"}


async def test_a48_dust_is_never_paid_out(desk: Desk) -> None:
    ann = await desk.operator(40)
    buyer = ledger_accounts.buyer(str(ann))
    async with transaction(desk.engine) as conn:
        mine = ledger_accounts.operator_earnings(str(ann))
        for debit, credit, nano in ((ledger_accounts.LOSS, buyer, 999), (buyer, mine, 999)):
            dust = templates.correction(
                debit=debit, credit=credit, amount=Nano(nano), ref=f"{debit}", note="dust"
            )
            await post_transfer(conn, dust)
    with pytest.raises(NotEligible) as refused:
        await desk.request(ann, 9)
    assert refused.value.code == "minimum"
    everything = await desk.request(ann, None, "all")
    assert everything.amount == Micro(40_000_000)
    assert await desk.available(ann) == 999
    with pytest.raises(NotEligible) as refused:  # what is left can never be drained micro by micro
        await desk.request(ann, None, "again")
    assert refused.value.code == "minimum"


async def test_a47_whoever_planned_a_batch_brings_no_approval(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = (await desk.plan()).batch_id
    desk.pusher = "ada"  # who planned it
    with pytest.raises(ApprovalRefused) as refused:
        await desk.approve(batch_id, 0)
    assert refused.value.code == "planner_may_not_approve"
    desk.pusher = "bo"
    assert await desk.approve(batch_id, 0) is Payout.PLANNED
