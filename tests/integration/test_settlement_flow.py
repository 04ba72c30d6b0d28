"""Requests, planning and settling on real PostgreSQL, with a multisig in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from sqlalchemy import Table, text
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import ChainBroken, ChainRefusal, RpcUnavailable, UnknownResult, WrongChain
from chain.networks import Chain
from chain.payouts import Payout
from chain.ports import Landed, SignedTransaction
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import templates
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.platform.database import connect, transaction
from marketplace.settlement import (
    address_book,
    batches,
    halts,
    kyc,
    people,
    plan_requests,
    planner,
    signing,
    tables,
    withdrawals,
)
from marketplace.settlement.errors import (
    ApprovalRefused,
    NotEligible,
    PlanRefused,
    WrongState,
)
from marketplace.settlement.service import Schedule, Turn, run_settlers
from marketplace.settlement.settler import Pace, Settler
from marketplace.settlement.simulated_rail import Executed, SimulatedRail
from marketplace.settlement.withdrawals import Status
from tests.settlement_parts import NOW, Desk, Stop, run_out


@pytest.fixture
async def desk(engine: AsyncEngine) -> AsyncIterator[Desk]:
    desk = Desk(engine)
    yield desk
    await desk.check()


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


async def test_patience_begins_anew_when_somebody_may_have_seen_it_land(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two answers of "nothing landed" with a doubt between them are not one long one."""
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = await desk.approved()
    settler = Settler(desk.engine, desk.rail, desk.clock, pace=Pace(expire_s=60))
    await settler.tick()
    desk.rail.spend_fence()
    looks_away = SimulatedRail.landed

    async def doubtful(rail: SimulatedRail, signed: SignedTransaction) -> None:
        raise RpcUnavailable("1 of 3 providers saw the batch land")

    for answer in (looks_away, doubtful, looks_away, doubtful, looks_away):
        monkeypatch.setattr(SimulatedRail, "landed", answer)
        await settler.tick()
        desk.clock.pass_s(45)
    assert (await desk.batch(batch_id)).status in (Payout.SIGNED, Payout.BROADCAST)
    await settler.tick()
    desk.clock.pass_s(61)
    await settler.tick()
    assert (await desk.batch(batch_id)).status is Payout.EXPIRED


async def test_the_newest_transaction_is_found_although_an_older_one_cannot_be_asked_for(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await desk.request(await desk.operator(40), 40)
    batch_id = await desk.approved()
    settler = Settler(desk.engine, desk.rail, desk.clock, pace=Pace(new_envelope_s=60))
    for _ in range(2):
        await settler.tick()  # signed, sent
        await settler.tick()
        desk.clock.pass_s(61)
    async with transaction(desk.engine) as conn:
        first, *_, newest = await batches.stored_broadcasts(conn, batch_id)
    desk.rail.mine()
    landed = SimulatedRail.landed

    async def half_blind(rail: SimulatedRail, signed: SignedTransaction) -> Landed | None:
        if signed.tx == first.tx:
            raise RpcUnavailable("the range of blocks is too wide")
        return await landed(rail, signed)

    monkeypatch.setattr(SimulatedRail, "landed", half_blind)
    assert newest.tx != first.tx
    await settler.tick()
    assert (await desk.batch(batch_id)).status is Payout.FINAL


async def test_a_batch_of_another_escrow_is_neither_expired_nor_sent(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody changed the chains file: the other escrow's fence says nothing of this batch."""
    await desk.request(await desk.operator(40), 40)
    batch_id = await desk.approved()
    settler = desk.settler()
    await settler.tick()
    monkeypatch.setattr(desk.rail, "escrow", "0x" + "e6" * 20)
    sends = len(desk.rail.sends)
    desk.rail.spend_fence()
    for _ in range(2):
        with pytest.raises(ChainBroken, match="another escrow"):
            await settler.tick()
        desk.clock.pass_s(3600)
    assert (await desk.batch(batch_id)).status in (Payout.SIGNED, Payout.BROADCAST)
    assert len(desk.rail.sends) == sends


async def test_a_batch_of_another_escrow_is_not_expired_by_hand(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await desk.request(await desk.operator(40), 40)
    batch_id = (await desk.plan()).batch_id
    monkeypatch.setattr(desk.rail, "escrow", "0x" + "e6" * 20)
    desk.rail.spend_fence()
    with pytest.raises(ChainBroken, match="another escrow"):
        await desk.settler().expire_unsigned(actor="ada", reason="looked")
    assert (await desk.batch(batch_id)).status is Payout.PLANNED


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
    async with transaction(desk.engine) as conn:
        assert await planner.payable(conn, Chain.BASE) == Nano(10 * 10**9)  # 40 held, 30 in flight
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
        await kyc.decide(conn, person=ann, tier="identity", reason="passport seen", actor="ada", now=NOW)
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


async def test_however_many_were_retired_those_in_use_are_counted_and_shown(desk: Desk) -> None:
    ann = await desk.operator(40)
    retired = (
        "INSERT INTO payout_addresses (id, person_id, chain, address, created_at, usable_at, retired_at)"
        " SELECT (lpad(g::text, 8, '0') || '-0000-7000-8000-000000000000')::uuid, :person, 'base',"
        " '0x' || lpad(g::text, 40, '1'), :now, :now, CAST(:now AS timestamptz) + g * interval '1 s'"
        " FROM generate_series(1, 1000) g"
    )
    async with transaction(desk.engine) as conn:
        await conn.execute(text(retired), {"person": ann, "now": NOW})
        (first, *_) = await address_book.listing(conn, ann)
        added = [await desk.add_address(conn, ann, f"0x{7 * 10**39 + n}") for n in range(49)]
        with pytest.raises(WrongState, match="at most 50"):
            await desk.add_address(conn, ann, f"0x{8 * 10**39}")
        assert await desk.add_address(conn, ann, added[-1].address) == added[-1], "one in use is given back"
        shown = await address_book.listing(conn, ann)
    assert shown[:50] == sorted([first, *added], key=lambda entry: entry.id), "in use, oldest first"
    assert (first.retired_at, len(shown)) == (None, 1000)
    assert shown[50].retired_at == NOW + timedelta(seconds=1000), "then the last retired first"


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
        "UPDATE kyc SET tier = 'identity'",
    ):
        with pytest.raises(Exception, match="permission denied"):
            async with transaction(desk.engine) as conn:
                await conn.execute(text(forbidden))


async def test_a_spent_fence_is_doubted_before_the_money_goes_back(desk: Desk) -> None:
    desk.rail.is_final_at_once = False
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = await desk.approved()
    settler = Settler(desk.engine, desk.rail, desk.clock, pace=Pace(expire_s=60))
    for _ in range(2):
        await settler.tick()
    desk.rail.mine()
    desk.rail.final_nonce = desk.rail.nonce  # one of two answers lags: spent, but nothing seen to have landed
    sent = len(desk.rail.sends)
    for _ in range(3):
        assert await settler.tick() is False  # no hurry: the service sleeps between two looks
        desk.clock.pass_s(15)
    assert (await desk.batch(batch_id)).status is Payout.BROADCAST
    assert len(desk.rail.sends) == sent
    desk.rail.finalize()
    await settler.tick()
    assert (await desk.batch(batch_id)).status is Payout.FINAL


async def test_one_settler_has_the_turn_until_its_connection_ends(desk: Desk, database_url: str) -> None:
    async with Turn(desk.engine, Chain.BASE) as first, Turn(desk.engine, Chain.BASE) as second:
        assert await first.is_ours()
        assert await first.is_ours()
        assert not await second.is_ours()
        async with Turn(desk.engine, Chain.SOLANA) as other_chain:
            assert await other_chain.is_ours()
        owner = connect(database_url, role=None)
        async with transaction(owner) as conn:
            await conn.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
                    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                )
            )
        await owner.dispose()
        assert await second.is_ours()
        assert not await first.is_ours()


async def test_a_failed_transaction_with_a_spent_fence_gives_the_money_back(desk: Desk) -> None:
    ann = await desk.operator(40)
    made = await desk.request(ann, 40)
    batch_id = await desk.approved()
    settler = desk.settler()
    await settler.tick()
    async with transaction(desk.engine) as conn:
        (ours,) = await batches.stored_broadcasts(conn, batch_id)
    digest = json.loads(ours.raw)["digest"]
    desk.rail.executed[digest] = Executed(
        ours.tx, 123, is_success=False
    )  # as Solana: it failed, the nonce moved
    desk.rail.spend_fence()
    await settler.tick()
    ended = await desk.batch(batch_id)
    assert ended.status is Payout.FAILED
    assert await desk.posted(ledger_accounts.operator_earnings(str(ann))) == 40 * 10**9
    assert (await desk.status(ann, made)).status is Status.REQUESTED
    again = await desk.approved()
    await run_out(desk, desk.settler())
    assert (await desk.batch(again)).status is Payout.FINAL
    assert desk.rail.balances == {desk.address_of(ann): 40_000_000}


async def test_the_service_settles_and_stops_when_told(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    stop = asyncio.Event()
    schedule = Schedule(tick_s=0.01, standby_s=0.01, plan_every_s=3600)
    running = asyncio.create_task(
        run_settlers(desk.engine, {Chain.BASE: desk.rail}, desk.clock, stop, schedule=schedule)
    )
    for _ in range(500):
        async with transaction(desk.engine) as conn:
            made = await batches.listing(conn)
        if made and made[0].status is Payout.PLANNED:
            await desk.approve(made[0].id, 0)
            await desk.approve(made[0].id, 1)
        if made and made[0].status is Payout.FINAL:
            break
        desk.rail.mine()
        await asyncio.sleep(0.02)
    stop.set()
    await asyncio.wait_for(running, 5)
    assert made[0].status is Payout.FINAL
    assert made[0].planned_by == "settler"


async def test_a_broken_chain_halts_its_payouts(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = await desk.approved()
    desk.rail.send_errors = [WrongChain("another genesis")]
    stop = asyncio.Event()
    running = asyncio.create_task(
        run_settlers(desk.engine, {Chain.BASE: desk.rail}, desk.clock, stop, schedule=Schedule(tick_s=0.01))
    )
    for _ in range(500):
        async with transaction(desk.engine) as conn:
            why = await halts.halted(conn, Chain.BASE)
        if why is not None:
            break
        await asyncio.sleep(0.02)
    stop.set()
    await running
    assert why == "WrongChain: another genesis"
    assert (await desk.batch(batch_id)).status is Payout.SIGNED


async def test_a_third_approval_changes_nothing(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = await desk.approved()
    assert await desk.approve(batch_id, 1) is Payout.APPROVED
    await run_out(desk, desk.settler())
    assert desk.rail.balances == {desk.address_of(ann): 40_000_000}


async def test_a_late_approval_is_refused(desk: Desk) -> None:
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = await desk.approved()
    await desk.settler().tick()
    with pytest.raises(WrongState):
        await desk.approve(batch_id, 1)


async def test_the_tables_are_the_migrations(engine: AsyncEngine) -> None:
    declared = {t.name: t for t in vars(tables).values() if isinstance(t, Table)}
    async with engine.connect() as conn:
        for name, table in declared.items():
            rows = await conn.execute(
                text(
                    "SELECT column_name, is_nullable = 'YES' FROM information_schema.columns"
                    " WHERE table_name = :name AND table_schema = 'public'"
                ),
                {"name": name},
            )
            real = {row[0]: row[1] for row in rows}
            assert real == {c.name: bool(c.nullable) for c in table.columns}, name
    assert len(declared) == 17
