"""Requests, planning and settling on real PostgreSQL, with a multisig in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import ChainRefusal, RpcUnavailable, UnknownResult
from chain.networks import Chain
from chain.payouts import Payout
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import templates
from marketplace.ledger.accounts import Account, read_balance, total_by_kind
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.platform.database import transaction
from marketplace.platform.ids import uuid7
from marketplace.settlement import (
    address_book,
    batches,
    halts,
    people,
    plan_requests,
    planner,
    signing,
    withdrawals,
)
from marketplace.settlement.errors import (
    ApprovalRefused,
    KeyReused,
    NotEligible,
    PlanRefused,
    WrongState,
)
from marketplace.settlement.settler import Pace, Settler
from marketplace.settlement.simulated_rail import SimulatedRail
from marketplace.settlement.withdrawals import Limits, Status, Withdrawal

LIMITS = Limits(minimum=Nano(10**10), kyc_limit=Nano(5 * 10**11), reserve_s=86_400)
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


@dataclass
class SetClock:
    at: datetime = NOW

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return (self.at - NOW).total_seconds()

    def pass_s(self, seconds: int) -> None:
        self.at += timedelta(seconds=seconds)


def address(n: int) -> str:
    return "0x" + f"{n:040d}".replace("0", "1")  # digits only: the same in every spelling


@dataclass
class Desk:
    """One installation: a book, a chain, a clock."""

    engine: AsyncEngine
    rail: SimulatedRail = field(default_factory=SimulatedRail)
    clock: SetClock = field(default_factory=SetClock)
    made: int = 0

    def settler(self, reached: Callable[[str], None] = lambda _: None) -> Settler:
        return Settler(self.engine, self.rail, self.clock, pace=Pace(expire_s=0), reached=reached)

    async def fund(self, dollars: int) -> UUID:
        """A buyer with USDC in the escrow."""
        person = await self._person()
        async with transaction(self.engine) as conn:
            amount = Nano(dollars * 10**9)
            await post_transfer(
                conn,
                templates.deposit_direct(chain="base", person=str(person), amount=amount, ref=f"t{person}"),
            )
        return person

    async def operator(self, dollars: int, *, cooled: bool = True) -> UUID:
        """Somebody who earned this much long ago, with an address that has cooled."""
        buyer, person = await self.fund(dollars), await self._person()
        async with transaction(self.engine) as conn:
            await post_transfer(
                conn,
                templates.correction(
                    debit=ledger_accounts.buyer(str(buyer)),
                    credit=ledger_accounts.operator_earnings(str(person)),
                    amount=Nano(dollars * 10**9),
                    ref=f"earned {person}",
                    note="test",
                ),
            )
            await address_book.add(
                conn,
                person=person,
                chain=Chain.BASE,
                text=self.address_of(person),
                forbidden=(),
                cooling_s=3600,
                now=self.clock.now() - timedelta(seconds=3600 if cooled else 3599),
            )
        return person

    def address_of(self, person: UUID) -> str:
        return address(person.int % 10**30)

    async def _person(self) -> UUID:
        self.made += 1
        person = uuid7()
        async with transaction(self.engine) as conn:
            await conn.execute(
                text("INSERT INTO people (id, display_name) VALUES (:id, :name)"),
                {"id": person, "name": f"person {self.made}"},
            )
        return person

    async def request(self, person: UUID, dollars: int | None, key: str = "k1") -> Withdrawal:
        async with transaction(self.engine) as conn:
            made, _ = await withdrawals.request(
                conn,
                person=person,
                chain=Chain.BASE,
                address=self.address_of(person),
                amount=None if dollars is None else Micro(dollars * 10**6),
                key=key,
                limits=LIMITS,
                now=self.clock.now(),
            )
        return made

    async def status(self, person: UUID, made: Withdrawal) -> Withdrawal:
        async with transaction(self.engine) as conn:
            return await withdrawals.find(conn, person=person, withdrawal_id=made.id)

    async def plan(self) -> planner.Planned:
        return await planner.plan(self.engine, self.rail, self.clock, planned_by="ada")

    async def approve(self, batch_id: UUID, signer: int) -> Payout:
        async with transaction(self.engine) as conn:
            export = await signing.export_batch(conn, batch_id)
        unsigned, _ = signing.check_export(export, self.rail)
        approval = self.rail.approve(unsigned, self.rail.signers[signer])
        document = signing.ApprovalDocument(
            signing.APPROVAL_FORMAT,
            export.batch,
            export.chain,
            export.digest,
            approval.signer,
            batches.signatures_to_hex(approval.signatures),
        )
        async with transaction(self.engine) as conn:
            return await signing.store_approval(
                conn, self.rail, document, pushed_by="ada", now=self.clock.now()
            )

    async def approved(self) -> UUID:
        planned = await self.plan()
        await self.approve(planned.batch_id, 0)
        assert await self.approve(planned.batch_id, 2) is Payout.APPROVED
        return planned.batch_id

    async def batch(self, batch_id: UUID) -> batches.Batch:
        async with transaction(self.engine) as conn:
            return await batches.find_batch(conn, batch_id)

    async def posted(self, account: Account) -> int:
        async with transaction(self.engine) as conn:
            balance = await read_balance(conn, account)
        return 0 if balance is None else balance.posted.n

    async def available(self, person: UUID) -> int:
        async with transaction(self.engine) as conn:
            balance = await read_balance(conn, ledger_accounts.operator_earnings(str(person)))
        return 0 if balance is None else balance.available.n

    async def check(self) -> None:
        """The books: closed, nothing held without a request, in flight = live batch, escrow = chain."""
        async with transaction(self.engine) as conn:
            assert sum(total.n for total in (await total_by_kind(conn)).values()) == 0
            live = await batches.live_batch(conn, Chain.BASE)
            held = (await conn.execute(text("SELECT coalesce(sum(held), 0) FROM balances"))).scalar_one()
            waiting = await conn.execute(
                text("SELECT coalesce(sum(amount_micro), 0) FROM withdrawals WHERE status = 'requested'")
            )
            assert held == waiting.scalar_one() * 1000
        in_flight = await self.posted(ledger_accounts.payouts_in_flight("base"))
        assert in_flight == (0 if live is None else live.total.n * 1000)


@pytest.fixture
async def desk(engine: AsyncEngine) -> AsyncIterator[Desk]:
    desk = Desk(engine)
    yield desk
    await desk.check()


async def run_out(desk: Desk, settler: Settler, steps: int = 12) -> None:
    for _ in range(steps):
        await settler.tick()
        desk.rail.mine()
        desk.clock.pass_s(20)


async def test_request_to_final(desk: Desk) -> None:
    ann, ben = await desk.operator(40), await desk.operator(25)
    first, second = await desk.request(ann, 30), await desk.request(ben, None)
    assert second.amount == Micro(25_000_000)
    assert await desk.available(ann) == 10 * 10**9
    escrow_before = desk.rail.escrow_micro
    batch_id = await desk.approved()
    assert await desk.posted(ledger_accounts.payouts_in_flight("base")) == 55 * 10**9
    assert await desk.posted(ledger_accounts.escrow("base")) == -65 * 10**9
    await run_out(desk, desk.settler())
    assert (await desk.batch(batch_id)).status is Payout.FINAL
    assert desk.rail.balances == {desk.address_of(ann): 30_000_000, desk.address_of(ben): 25_000_000}
    assert escrow_before - desk.rail.escrow_micro == 55_000_000
    assert await desk.posted(ledger_accounts.escrow("base")) == -10 * 10**9
    for person, made in ((ann, first), (ben, second)):
        assert (await desk.status(person, made)).status is Status.PAID
    async with transaction(desk.engine) as conn:
        (sent,) = await batches.stored_broadcasts(conn, batch_id)
    assert sent.final_tx == sent.tx
    assert sent.final_height is not None


class Stop(Exception):
    """The process dies here."""


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


async def test_a_crash_in_every_step_still_pays_once(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    async with transaction(desk.engine) as conn:
        asked = await plan_requests.ask(conn, chain=Chain.BASE, asked_by="ada", now=desk.clock.now())

    def die(_: str) -> None:
        raise Stop

    for _ in range(40):  # a process that dies after every commit and every send
        async with transaction(desk.engine) as conn:
            live = await batches.live_batch(conn, Chain.BASE)
        if live is not None and live.status is Payout.PLANNED:
            await desk.settler().tick()
            await desk.approve(live.id, 0)
            await desk.approve(live.id, 1)
        with contextlib.suppress(Stop):
            await desk.settler(die).tick()
        desk.rail.mine()
        desk.clock.pass_s(20)
        await desk.check()
    async with transaction(desk.engine) as conn:
        answered = await plan_requests.find(conn, asked.id)
        (batch,) = await batches.listing(conn)
    assert answered.code == "planned"
    assert answered.batch_id == batch.id
    assert batch.status is Payout.FINAL
    assert desk.rail.balances == {desk.address_of(ann): 40_000_000}


async def test_bytes_are_durable_before_the_first_send(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = await desk.approved()

    def at_stored(reached: str) -> None:
        assert reached != "sent" or stored, "sent before stored"
        stored.append(reached)

    stored: list[str] = []
    settler = desk.settler(at_stored)
    await settler.tick()
    assert stored == ["stored"]
    assert desk.rail.sends == []
    async with transaction(desk.engine) as conn:
        (kept,) = await batches.stored_broadcasts(conn, batch_id)
    await settler.tick()
    assert desk.rail.sends == [kept.raw]


async def test_an_unknown_result_is_asked_for_and_the_same_bytes_are_sent(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = await desk.approved()
    desk.rail.send_errors = [UnknownResult("timeout"), RpcUnavailable("down"), UnknownResult("timeout")]
    await run_out(desk, desk.settler())
    assert (await desk.batch(batch_id)).status is Payout.FINAL
    assert len(desk.rail.sends) >= 4
    assert len(set(desk.rail.sends)) == 1


async def test_a_dead_envelope_is_replaced_around_the_same_payload(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = await desk.approved()
    desk.rail.send_errors = [ChainRefusal("the gas payer's nonce is taken")]
    await run_out(desk, desk.settler())
    assert (await desk.batch(batch_id)).status is Payout.FINAL
    assert len(set(desk.rail.sends)) == 2
    assert desk.rail.balances == {desk.address_of(ann): 40_000_000}


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


async def test_a_fence_spent_above_finality_does_not_expire(desk: Desk) -> None:
    desk.rail.is_final_at_once = False
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = await desk.approved()
    settler = desk.settler()
    await settler.tick()
    desk.rail.spend_fence()
    await run_out(desk, settler, 4)
    assert (await desk.batch(batch_id)).status is Payout.BROADCAST
    assert await desk.posted(ledger_accounts.payouts_in_flight("base")) == 40 * 10**9


async def test_executed_by_a_strangers_transaction_is_final(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = await desk.approved()
    settler = desk.settler()
    await settler.tick()
    async with transaction(desk.engine) as conn:
        (ours,) = await batches.stored_broadcasts(conn, batch_id)
    desk.rail.mempool["0xstranger"] = ours.raw
    desk.rail.mine()
    await settler.tick()
    assert (await desk.batch(batch_id)).status is Payout.FINAL
    async with transaction(desk.engine) as conn:
        (ours,) = await batches.stored_broadcasts(conn, batch_id)
    assert ours.final_tx == "0xstranger"


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


async def test_one_live_batch_per_chain(desk: Desk) -> None:
    ann, ben = await desk.operator(40), await desk.operator(40)
    await desk.request(ann, 40)
    await desk.plan()
    await desk.request(ben, 40)
    with pytest.raises(PlanRefused) as refused:
        await desk.plan()
    assert refused.value.code == "batch_under_way"


async def test_two_planners_at_once_freeze_one_batch(desk: Desk) -> None:
    for _ in range(3):
        await desk.request(await desk.operator(20), None)
    outcomes = await asyncio.gather(desk.plan(), desk.plan(), return_exceptions=True)
    assert sorted(type(o).__name__ for o in outcomes) == ["PlanRefused", "Planned"]


async def test_s3_the_planner_waits_for_cover_in_order(desk: Desk) -> None:
    ann, ben, cleo = await desk.operator(30), await desk.operator(60), await desk.operator(10)
    made = [await desk.request(person, None) for person in (ann, ben, cleo)]
    async with transaction(desk.engine) as conn:  # 60 of 100 went away from this chain
        gone = templates.correction(
            debit=ledger_accounts.escrow("ethereum"),
            credit=ledger_accounts.escrow("base"),
            amount=Nano(60 * 10**9),
            ref="moved",
            note="test",
        )
        await post_transfer(conn, gone)
    planned = await desk.plan()
    assert planned.count == 1
    assert planned.total == Micro(30_000_000)
    assert (await desk.status(cleo, made[2])).status is Status.REQUESTED  # does not overtake ben
    for signer in (0, 1):
        await desk.approve(planned.batch_id, signer)
    await run_out(desk, desk.settler())
    with pytest.raises(PlanRefused) as refused:
        await desk.plan()
    assert refused.value.code == "escrow_short"


async def test_a_halt_stops_planning_and_the_first_send(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = await desk.approved()
    await desk.settler().tick()
    async with transaction(desk.engine) as conn:
        await halts.halt(conn, rail="payouts", actor="ada", reason="drill", now=desk.clock.now())
    await run_out(desk, desk.settler(), 3)
    assert desk.rail.sends == []
    with pytest.raises(PlanRefused) as refused:
        await desk.plan()
    assert refused.value.code == "halted"
    async with transaction(desk.engine) as conn:
        await halts.lift(conn, rail="payouts", actor="ada", reason="drill over", now=desk.clock.now())
    await run_out(desk, desk.settler())
    assert (await desk.batch(batch_id)).status is Payout.FINAL


async def test_suspended_operators_wait(desk: Desk) -> None:
    ann, ben = await desk.operator(40), await desk.operator(40)
    made = await desk.request(ann, 40)
    await desk.request(ben, 40)
    async with transaction(desk.engine) as conn:
        await people.set_standing(
            conn, person=ann, is_good=False, reason="canary", actor="ada", now=desk.clock.now()
        )
    assert (await desk.plan()).count == 1
    assert (await desk.status(ann, made)).status is Status.REQUESTED


async def test_p7_approvals_are_by_distinct_signers_over_this_batch(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = (await desk.plan()).batch_id
    assert await desk.approve(batch_id, 0) is Payout.PLANNED
    assert await desk.approve(batch_id, 0) is Payout.PLANNED  # twice is once
    async with transaction(desk.engine) as conn:
        export = await signing.export_batch(conn, batch_id)
    unsigned, _ = signing.check_export(export, desk.rail)
    good = desk.rail.approve(unsigned, desk.rail.signers[1])
    document = signing.ApprovalDocument(
        signing.APPROVAL_FORMAT,
        export.batch,
        export.chain,
        export.digest,
        good.signer,
        batches.signatures_to_hex(good.signatures),
    )
    from msgspec.structs import replace

    for bad in (
        replace(document, digest="00" * 32),
        replace(document, chain=Chain.ETHEREUM),
        replace(document, signer=desk.rail.signers[2]),
        replace(document, signer="0x" + "dd" * 20),
        replace(document, signatures={"payload": "zz"}),
        replace(document, batch="nonsense"),
    ):
        with pytest.raises(ApprovalRefused):
            async with transaction(desk.engine) as conn:
                await signing.store_approval(conn, desk.rail, bad, pushed_by="eve", now=NOW)
    assert (await desk.batch(batch_id)).status is Payout.PLANNED
    assert await desk.approve(batch_id, 1) is Payout.APPROVED


async def test_an_unsigned_batch_expires_by_hand_only_when_the_fence_is_spent(desk: Desk) -> None:
    ann = await desk.operator(40)
    made = await desk.request(ann, 40)
    batch_id = (await desk.plan()).batch_id
    settler = desk.settler()
    with pytest.raises(WrongState):
        await settler.expire_unsigned(actor="ada", reason="looked")
    desk.rail.spend_fence()
    await settler.tick()
    assert "investigate" in (await desk.batch(batch_id)).trouble
    await settler.expire_unsigned(actor="ada", reason="looked at the Safe")
    ended = await desk.batch(batch_id)
    assert ended.status is Payout.EXPIRED
    assert ended.trouble == "expired by ada: looked at the Safe"
    assert (await desk.status(ann, made)).status is Status.REQUESTED


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


async def test_cancel_until_planned(desk: Desk) -> None:
    ann = await desk.operator(40)
    made = await desk.request(ann, 40)
    for _ in range(2):
        async with transaction(desk.engine) as conn:
            gone = await withdrawals.cancel(conn, person=ann, withdrawal_id=made.id, now=NOW)
        assert gone.status is Status.CANCELLED
    assert await desk.available(ann) == 40 * 10**9
    planned = await desk.request(ann, 40, "k2")
    await desk.plan()
    with pytest.raises(WrongState):
        async with transaction(desk.engine) as conn:
            await withdrawals.cancel(conn, person=ann, withdrawal_id=planned.id, now=NOW)


async def test_kyc_counts_everything_not_given_up(desk: Desk) -> None:
    ann = await desk.operator(2000)
    await desk.request(ann, 300, "a")
    await desk.request(ann, 200, "b")  # exactly 500 in all
    with pytest.raises(NotEligible) as refused:
        await desk.request(ann, 10, "c")
    assert refused.value.code == "kyc_cumulative"
    async with transaction(desk.engine) as conn:
        await people.set_kyc(conn, person=ann, is_verified=True, reason="passport seen", actor="ada", now=NOW)
    await desk.request(ann, 501, "d")


async def test_a_new_address_cools_and_a_retired_one_is_unknown(desk: Desk) -> None:
    ann = await desk.operator(40, cooled=False)
    with pytest.raises(NotEligible) as refused:
        await desk.request(ann, 40)
    assert refused.value.code == "address_cooling"
    desk.clock.pass_s(1)
    await desk.request(ann, 20)
    async with transaction(desk.engine) as conn:
        (entry,) = await address_book.listing(conn, ann)
        await address_book.retire(conn, person=ann, address_id=entry.id, now=NOW)
    with pytest.raises(NotEligible) as refused:
        await desk.request(ann, 20, "k2")
    assert refused.value.code == "address_unknown"


async def test_signed_bytes_and_frozen_lines_cannot_be_changed(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    await desk.approved()
    await desk.settler().tick()
    for forbidden in (
        "UPDATE broadcasts SET raw = 'x'",
        "UPDATE settlement_batches SET digest = digest",
        "UPDATE settlement_batches SET fence = '0'",
        "UPDATE payouts SET address = 'x'",
        "DELETE FROM approvals",
        "DELETE FROM payouts",
        "UPDATE kyc SET is_verified = true",
    ):
        with pytest.raises(Exception, match="permission denied"):
            async with transaction(desk.engine) as conn:
                await conn.execute(text(forbidden))
