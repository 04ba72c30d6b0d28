"""Rights that lapse between request and payout (R16): KYC, standing, limits, the sanctions list."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.networks import Chain
from chain.units import Micro
from marketplace.platform.database import transaction
from marketplace.settlement import bank, kyc, people, sanctions
from marketplace.settlement.errors import NotEligible, PlanRefused, WrongState
from marketplace.settlement.withdrawals import Status
from tests.settlement_parts import LIMITS, Desk, earn, run_out


@pytest.fixture
async def desk(engine: AsyncEngine) -> AsyncIterator[Desk]:
    desk = Desk(engine)
    yield desk
    await desk.check()


async def tier(desk: Desk, person: UUID, name: str) -> None:
    async with transaction(desk.engine) as conn:
        await kyc.decide(conn, person=person, tier=name, reason="papers", actor="bo", now=desk.clock.now())


async def standing(desk: Desk, person: UUID, *, is_good: bool, reason: str = "canary") -> None:
    async with transaction(desk.engine) as conn:
        await people.set_standing(
            conn, person=person, is_good=is_good, reason=reason, actor="ada", now=desk.clock.now()
        )


async def freeze(desk: Desk, person: UUID, *, is_frozen: bool = True) -> None:
    statement = "UPDATE people SET frozen_at = CASE WHEN :frozen THEN now() END WHERE id = :id"
    async with transaction(desk.engine) as conn:
        await conn.execute(text(statement), {"id": person, "frozen": is_frozen})


async def limit(desk: Desk, name: str, dollars: int) -> None:
    most = Micro(dollars * 10**6)
    async with transaction(desk.engine) as conn:
        await kyc.change_tier(
            conn,
            name,
            withdrawal_max=most,
            total_max=most,
            actor="ada",
            reason="the law",
            now=desk.clock.now(),
        )


async def told(desk: Desk, person: UUID) -> list[str]:
    statement = "SELECT payload ->> 'message' FROM notices WHERE person_id = :p AND kind = :k ORDER BY id"
    async with transaction(desk.engine) as conn:
        return list(await conn.scalars(text(statement), {"p": person, "k": "withdrawal_refused"}))


async def test_r16_whose_identity_lapsed_is_left_out_and_told(desk: Desk) -> None:
    ann, ben = await desk.operator(2000), await desk.operator(40)
    await tier(desk, ann, "identity")
    made = await desk.request(ann, 600)
    await desk.request(ben, 40)
    await tier(desk, ann, "none")
    planned = await desk.plan()
    assert (planned.count, [w for w, _ in planned.split_off]) == (1, [made.id])
    left_out = await desk.status(ann, made)
    assert left_out.status is Status.FAILED
    assert "over $500.00 need a verified identity (verify" in (left_out.refusal or "")
    assert await desk.available(ann) == 2000 * 10**9
    (message,) = await told(desk, ann)
    assert "600.00" in message
    assert "verify your identity" in message


async def test_r16_what_was_paid_counts_and_older_requests_go_first(desk: Desk) -> None:
    """By a lower limit some of what was asked for may still go out: the older first, each only if it fits."""
    ann = await desk.operator(2000)
    await tier(desk, ann, "identity")
    await desk.request(ann, 300, "paid before")
    await desk.approved()
    await run_out(desk, desk.settler())
    too_much, fits, over = [await desk.request(ann, n, f"key {n}") for n in (250, 150, 60)]
    await tier(desk, ann, "none")
    assert (await desk.plan()).total == Micro(150 * 10**6)
    found = [(await desk.status(ann, made)).status for made in (too_much, fits, over)]
    assert found == [Status.FAILED, Status.PLANNED, Status.FAILED]


async def test_r16_limits_that_changed_hold_for_what_waits(desk: Desk) -> None:
    ann = await desk.operator(400)
    made = await desk.request(ann, 400)
    await limit(desk, "none", 399)
    with pytest.raises(PlanRefused) as refused:
        await desk.plan()
    assert refused.value.code == "nobody_payable"
    assert (await desk.status(ann, made)).status is Status.FAILED
    await limit(desk, "none", 400)
    await desk.request(ann, 400, "again")
    assert (await desk.plan()).count == 1


@pytest.mark.parametrize("lapses", ["kyc", "standing", "frozen", "sanctions"])
async def test_what_lapses_during_the_dry_run_is_found_before_the_batch_is_frozen(
    desk: Desk, lapses: str
) -> None:
    ann, ben = await desk.operator(600), await desk.operator(40)
    await tier(desk, ann, "identity")
    made = await desk.request(ann, 600)
    await desk.request(ben, 40)

    async def lapse() -> None:
        if lapses == "kyc":
            await tier(desk, ann, "none")
        elif lapses == "standing":
            await standing(desk, ann, is_good=False)
        elif lapses == "frozen":
            await freeze(desk, ann)
        else:
            async with transaction(desk.engine) as conn:
                listed = frozenset({desk.address_of(ann)})
                await sanctions.refresh(conn, listed, source="test", now=desk.clock.now())

    desk.rail.meanwhile = [lapse]
    assert (await desk.plan()).count == 1
    expected = Status.REQUESTED if lapses in {"standing", "frozen"} else Status.FAILED
    assert (await desk.status(ann, made)).status is expected


async def test_who_is_suspended_waits_is_told_once_and_joins_by_himself(desk: Desk) -> None:
    ann, ben = await desk.operator(80), await desk.operator(40)
    made = await desk.request(ann, 40)
    await desk.request(ben, 40)
    await standing(desk, ann, is_good=False, reason="serves another model")
    assert (await desk.plan()).count == 1
    for _ in range(2):
        with pytest.raises(PlanRefused):
            await desk.plan()
    waits = await desk.status(ann, made)
    assert (waits.status, waits.refusal) == (
        Status.REQUESTED, "this account is not in good standing: serves another model",
    )  # fmt: skip
    (message,) = await told(desk, ann)
    assert "serves another model" in message
    assert await desk.available(ann) == 40 * 10**9
    await run_ben_out(desk)
    await standing(desk, ann, is_good=True, reason="disputed with success")
    assert (await desk.plan()).count == 1
    assert (await desk.status(ann, made)).refusal is None


async def test_who_is_frozen_waits_is_told_once_and_joins_when_unfrozen(desk: Desk) -> None:
    ann, ben = await desk.operator(80), await desk.operator(40)
    made = await desk.request(ann, 40)
    await desk.request(ben, 40)
    await standing(desk, ann, is_good=True, reason="known")
    await freeze(desk, ann)
    assert (await desk.plan()).total == Micro(40 * 10**6)
    for _ in range(2):
        with pytest.raises(PlanRefused):
            await desk.plan()
    waits = await desk.status(ann, made)
    assert (waits.status, waits.refusal) == (
        Status.REQUESTED, "this account is not in good standing: this account is frozen",
    )  # fmt: skip
    (message,) = await told(desk, ann)
    assert "this account is frozen" in message
    with pytest.raises(NotEligible) as refused:
        await desk.request(ann, 40, "another")
    assert refused.value.code == "standing"
    await run_ben_out(desk)
    await freeze(desk, ann, is_frozen=False)
    assert (await desk.plan()).count == 1
    assert (await desk.status(ann, made)).refusal is None


async def run_ben_out(desk: Desk) -> None:
    async with transaction(desk.engine) as conn:
        live = await conn.scalar(text("SELECT id FROM settlement_batches WHERE status = 'planned'"))
    for signer in (0, 1):
        await desk.approve(live, signer)
    await run_out(desk, desk.settler())


async def test_the_suspended_do_not_stand_in_the_way_of_the_rest(desk: Desk) -> None:
    """However many of them asked first: a batch of one has room for whoever can be paid."""
    ann, ben = await desk.operator(20), await desk.operator(40)
    desk.rail.max_lines = 1
    await desk.request(ann, 20)
    await desk.request(ben, 40)
    await standing(desk, ann, is_good=False)
    assert (await desk.plan()).total == Micro(40 * 10**6)


async def test_r16_a_bank_withdrawal_is_asked_again_when_it_is_approved(desk: Desk) -> None:
    ann = await desk.operator(2000)
    await tier(desk, ann, "identity")
    async with transaction(desk.engine) as conn:
        account = await bank.add_account(
            conn, person=ann, holder="Ann", iban="GB82WEST12345698765432", cooling_s=3600,
            now=desk.clock.now() - timedelta(hours=1),
        )  # fmt: skip
        made, _ = await bank.request(
            conn, person=ann, account_id=account.id, amount=Micro(400 * 10**6), key="k", limits=LIMITS,
            now=desk.clock.now(),
        )  # fmt: skip

    async def refused() -> str:
        async with transaction(desk.engine) as conn:
            with pytest.raises(WrongState) as no:
                await bank.approve(conn, made.id, actor="ada", reason="ok", now=desk.clock.now())
        return no.value.code

    await standing(desk, ann, is_good=False)
    assert await refused() == "standing"
    await standing(desk, ann, is_good=True)
    await freeze(desk, ann)
    assert await refused() == "standing"
    await freeze(desk, ann, is_frozen=False)
    await limit(desk, "none", 399)
    await tier(desk, ann, "none")
    assert await refused() == "kyc"
    await limit(desk, "none", 400)
    await earn(desk.engine, ann, 20, Chain.BASE)
    async with transaction(desk.engine) as conn:
        done = await bank.approve(conn, made.id, actor="ada", reason="ok", now=desk.clock.now())
        assert done.status is bank.Status.APPROVED
        await bank.refuse(conn, made.id, actor="ada", reason="test over", now=desk.clock.now())
