"""Cover of the escrows, statements, proofs of inclusion, rules by amount, screening."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from deposits_parts import ESCROW, Bench, a_known_person, final, start
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chain.networks import Chain
from chain.payouts import Payout
from chain.simulated import SimulatedChain
from chain.units import Micro
from marketplace.deposits.decisions import attribute_deposit, open_cases
from marketplace.deposits.errors import NoDecision
from marketplace.deposits.explain import explain_transaction
from marketplace.deposits.tables import deposit_decisions
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import templates
from marketplace.ledger.accounts import ensure_account
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.platform.database import transaction
from marketplace.settlement import (
    address_book,
    batches,
    kyc,
    payout_rules,
    planner,
    sanctions,
    statement,
    treasury,
    withdrawals,
)
from marketplace.settlement.digest import is_included, merkle_proof
from marketplace.settlement.errors import KeyReused, PlanRefused, WrongState
from marketplace.settlement.payout_rules import PayoutRules
from marketplace.settlement.sanctions import BadList, Sanctioned
from marketplace.settlement.simulated_rail import SimulatedRail
from marketplace.settlement.treasury import ChainCover, Cover
from marketplace.settlement.withdrawals import Status
from tests.settlement_parts import LIMITS, Desk, earn, run_out


@pytest.fixture
async def desk(engine: AsyncEngine) -> AsyncIterator[Desk]:
    desk = Desk(engine)
    yield desk
    await desk.check()


async def cover(desk: Desk) -> Cover:
    async with transaction(desk.engine) as conn:
        return await treasury.read_cover(conn, now=desk.clock.now(), reserve=LIMITS.reserve)


async def verify(desk: Desk, person: UUID) -> None:
    async with transaction(desk.engine) as conn:
        await kyc.decide(
            conn, person=person, tier="identity", reason="passport seen", actor="bo", now=desk.clock.now()
        )


async def rule(desk: Desk, rules: PayoutRules) -> None:
    async with transaction(desk.engine) as conn:
        await payout_rules.change(conn, rules, actor="ada", reason="test", now=desk.clock.now())


async def test_the_treasury_follows_a_payout(desk: Desk) -> None:
    ann = await desk.operator(40)
    before = await cover(desk)
    base = next(c for c in before.chains if c.chain is Chain.BASE)
    assert (base.escrow, base.left, before.matured) == (Nano(40 * 10**9), Nano(40 * 10**9), Nano(40 * 10**9))
    assert (before.broken(), before.warnings()) == ((), ())
    await desk.request(ann, 40)
    asked = await cover(desk)
    assert (asked.uncommitted, asked.matured) == (Nano(0), Nano(0))
    await desk.approved()
    await run_out(desk, desk.settler())
    after = await cover(desk)
    assert (after.uncommitted, after.broken()) == (Nano(0), ())


def test_s3_says_where_usdc_is_missing_before_and_when_it_is() -> None:
    def chain(name: Chain, escrow: int, in_flight: int, requested: int) -> ChainCover:
        return ChainCover(name, *(Nano(n * 10**9) for n in (escrow, in_flight, requested)))

    fine = Cover((chain(Chain.BASE, 100, 10, 20),), Nano(50 * 10**9), Nano(20 * 10**9))
    assert (fine.broken(), fine.warnings()) == ((), ())
    soon = Cover((chain(Chain.BASE, 100, 10, 20),), Nano(50 * 10**9), Nano(30 * 10**9))
    assert soon.broken() == ()
    assert len(soon.warnings()) == 1
    assert "10" in soon.warnings()[0]
    here = Cover((chain(Chain.BASE, 10, 0, 30), chain(Chain.SOLANA, 90, 0, 0)), Nano(0), Nano(0))
    assert here.broken() == ()
    assert "base" in here.warnings()[0]
    assert len(Cover((chain(Chain.BASE, 9, 10, 0),), Nano(0), Nano(0)).broken()) == 2
    assert len(Cover((chain(Chain.BASE, 9, 0, 0),), Nano(10**10), Nano(0)).broken()) == 1


async def test_a_statement_leads_from_batch_to_transaction(desk: Desk) -> None:
    ann = await desk.operator(40)
    made = await desk.request(ann, 15)
    batch_id = await desk.approved()
    await run_out(desk, desk.settler())
    async with transaction(desk.engine) as conn:
        lines = await statement.lines(conn, ann)
        rest = await statement.lines(conn, ann, before=lines[0].id)
        tx = (await batches.final_transactions(conn, [batch_id]))[batch_id]
        coming = await statement.forecast(conn, ann, now=desk.clock.now())
    assert [line.amount.n for line in lines] == [-15 * 10**9, 40 * 10**9]
    assert (lines[0].withdrawal_id, lines[0].batch_id, lines[0].tx) == (made.id, batch_id, tx)
    assert rest == lines[1:]
    assert coming.earned == Nano(0)  # what was earned here was a correction, not demand


async def test_an_operator_proves_his_payout_in_the_public_root(desk: Desk) -> None:
    made = [await desk.request(await desk.operator(20 + n), None) for n in range(5)]
    batch_id = await desk.approved()
    batch = await desk.batch(batch_id)
    async with transaction(desk.engine) as conn:
        lines = batches.lines_of(await batches.members(conn, batch_id))
        assert await batches.batch_of(conn, person=made[3].person_id, withdrawal_id=made[3].id) == batch_id
        assert await batches.batch_of(conn, person=made[2].person_id, withdrawal_id=made[3].id) is None
    for position, line in enumerate(lines):
        proof = merkle_proof(lines, position)
        assert is_included(line, position=position, count=5, proof=proof, root=batch.merkle_root)


async def test_a_large_batch_needs_a_third_signer(desk: Desk) -> None:
    await rule(desk, PayoutRules(Micro(39_999_999), 3, Micro(10**12)))
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    planned = await desk.plan()
    assert await desk.approve(planned.batch_id, 0) is Payout.PLANNED
    assert await desk.approve(planned.batch_id, 1) is Payout.PLANNED
    assert await desk.approve(planned.batch_id, 1) is Payout.PLANNED  # the same person again
    assert await desk.approve(planned.batch_id, 2) is Payout.APPROVED
    await run_out(desk, desk.settler())
    assert (await desk.batch(planned.batch_id)).status is Payout.FINAL


async def test_a_batch_at_the_limit_needs_two(desk: Desk) -> None:
    await rule(desk, PayoutRules(Micro(40_000_000), 3, Micro(10**12)))
    await desk.request(await desk.operator(40), 40)
    await desk.approved()


async def test_a_day_has_a_maximum(desk: Desk) -> None:
    await rule(desk, PayoutRules(Micro(10**12), 3, Micro(50_000_000)))
    ann, ben = await desk.operator(40), await desk.operator(40)
    await desk.request(ann, 40)
    await desk.request(ben, 40)
    assert (await desk.plan()).count == 1
    async with transaction(desk.engine) as conn:
        live = await batches.live_batch(conn, Chain.BASE)
    assert live is not None
    await desk.approve(live.id, 0)
    await desk.approve(live.id, 1)
    await run_out(desk, desk.settler())
    with pytest.raises(PlanRefused) as refused:
        await desk.plan()
    assert refused.value.code == "daily_max"
    desk.clock.pass_s(86_400)
    assert (await desk.plan()).count == 1


async def test_a_day_has_one_maximum_for_all_chains_however_they_meet(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two settlers freeze at the same moment, each having seen room for its own batch."""
    await rule(desk, PayoutRules(Micro(10**12), 3, Micro(50_000_000)))
    ann, ben = await desk.operator(40), await desk.operator(40)
    await desk.request(ann, 40)
    await earn(desk.engine, ben, 40, Chain.ETHEREUM)
    async with transaction(desk.engine) as conn:
        for (
            chain
        ) in Chain:  # there since the first batch; making accounts lets one planner wait for the other
            await ensure_account(conn, ledger_accounts.payouts_in_flight(chain.value))
        await address_book.add(
            conn, person=ben, chain=Chain.ETHEREUM, text=desk.address_of(ben), forbidden=(), cooling_s=0,
            now=desk.clock.now(),
        )  # fmt: skip
        await withdrawals.request(
            conn, person=ben, chain=Chain.ETHEREUM, address=desk.address_of(ben), amount=Micro(40 * 10**6),
            key="k", limits=LIMITS, now=desk.clock.now(),
        )  # fmt: skip
    both, left_today = asyncio.Barrier(2), payout_rules.left_today

    async def looks_and_ponders(conn: AsyncConnection, *, now: datetime) -> Micro:
        found = await left_today(conn, now=now)
        await asyncio.sleep(0.2)  # long enough for the other to look too, if he may
        return found

    monkeypatch.setattr(payout_rules, "left_today", looks_and_ponders)

    async def meet() -> None:
        await asyncio.wait_for(both.wait(), 60)

    rails = [desk.rail, SimulatedRail(chain=Chain.ETHEREUM)]
    for rail in rails:
        rail.meanwhile = [meet]
    outcomes = await asyncio.gather(
        *(planner.plan(desk.engine, rail, desk.clock, planned_by="ada") for rail in rails),
        return_exceptions=True,
    )
    assert [o.code for o in outcomes if isinstance(o, PlanRefused)] == ["daily_max"]
    assert sum(isinstance(o, planner.Planned) for o in outcomes) == 1


async def test_a_sanctioned_address_is_neither_added_nor_paid(desk: Desk, tmp_path: Path) -> None:
    ann, ben = await desk.operator(40), await desk.operator(30)
    made = await desk.request(ann, 40)
    await desk.request(ben, 30)
    file = tmp_path / "list.txt"
    file.write_text(f"# from the treasury\n{desk.address_of(ann).replace('0x', '0X')}  # ann\n\n")
    async with transaction(desk.engine) as conn:
        await sanctions.refresh(
            conn, sanctions.read_list(file).addresses, source="test", now=desk.clock.now()
        )
    planned = await desk.plan()
    assert (planned.count, [w for w, _ in planned.split_off]) == (1, [made.id])
    refused = await desk.status(ann, made)
    assert refused.status is Status.FAILED
    assert "sanctions" in (refused.refusal or "")
    assert await desk.available(ann) == 40 * 10**9
    file.write_text(desk.address_of(UUID(int=5)))
    async with transaction(desk.engine) as conn:
        await sanctions.refresh(
            conn, sanctions.read_list(file).addresses, source="test", now=desk.clock.now()
        )
        assert await sanctions.listed(conn, [desk.address_of(ann)]) == frozenset()
        with pytest.raises(Sanctioned):
            await desk.add_address(conn, ann, desk.address_of(UUID(int=5)))


# ── USDC that people move ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def bench(engine: AsyncEngine) -> Bench:
    """Base, watched; $200 in the escrow on Ethereum."""
    async with transaction(engine) as conn:
        paid = templates.deposit_direct(
            chain="ethereum", person=str(UUID(int=1)), amount=Nano(200 * 10**9), ref="ethereum:0xpaid:0"
        )
        await post_transfer(conn, paid)
    return Bench(engine, SimulatedChain(chain=Chain.BASE))


async def rebalance(bench: Bench, arrived: str, usdc: int, **said: Any) -> None:
    """Ethereum to Base."""
    told: dict[str, Any] = {"source": Chain.ETHEREUM, "ref": "0xout", "actor": "ada"}
    told |= {"reason": "payouts on Base", "now": bench.clock.now()} | said
    async with transaction(bench.engine) as conn:
        await treasury.rebalance(
            conn,
            target=Chain.BASE,
            arrived=arrived,
            amount=Micro(usdc * 10**6),
            **told,
        )


async def test_a_rebalance_books_what_its_deposit_brought_and_never_what_waits_for_people(
    bench: Bench,
) -> None:
    """A bridge keeps 2 of 100 while 4 of ann's wait for the minimum."""
    ann, address = await bench.a_buyer()
    watcher = await start(bench)
    waits, moved = bench.pays(address, 4), bench.pays(ESCROW, 98)
    await final(bench, watcher, waits, moved)
    key = f"{moved.tx}:1"
    for arrived, usdc in ((key, 100), (key, 97), (f"{waits.tx}:0", 4), ("0xnone:0", 98)):
        with pytest.raises(WrongState, match=r"brought|arrived"):
            await rebalance(bench, arrived, usdc)
    with pytest.raises(WrongState, match="did not arrive"):
        await rebalance(bench, key, 98, source=Chain.BASE)
    with pytest.raises(WrongState, match="has no"):
        await rebalance(bench, key, 98, fee=Micro(103 * 10**6))
    await rebalance(bench, key, 98)
    assert await bench.balance(ledger_accounts.unattributed("base")) == 4 * 10**9
    assert await bench.balance(ledger_accounts.escrow("ethereum")) == -102 * 10**9
    for _ in range(2):  # the fee was forgotten, and is booked once
        await rebalance(bench, key, 98, fee=Micro(2 * 10**6))
    assert await bench.balance(ledger_accounts.escrow("ethereum")) == -100 * 10**9
    assert await bench.balance(ledger_accounts.FEES) == -2 * 10**9
    for changed in ({"ref": "0xother"}, {"fee": Micro(3 * 10**6)}):
        with pytest.raises(KeyReused):
            await rebalance(bench, key, 98, **changed)
    await final(bench, watcher, bench.pays(address, 4))
    assert await bench.buyer(ann) == 8 * 10**9
    assert await bench.balance(ledger_accounts.unattributed("base")) == 0
    await bench.books_hold()


async def test_a_deposit_is_either_the_treasurys_or_somebodys(bench: Bench) -> None:
    bob = await a_known_person(bench)
    watcher = await start(bench)
    await final(bench, watcher, bench.pays(ESCROW, 100, tx="0xours"))
    await rebalance(bench, "0xours:0", 100)
    async with transaction(bench.engine) as conn:
        assert await open_cases(conn) == []
        (decided,) = (await conn.execute(select(deposit_decisions))).all()
    assert (decided.key, decided.decision, decided.actor) == ("0xours:0", "leave", "ada")
    assert decided.reason == "rebalance 0xout: payouts on Base"
    async with transaction(bench.engine) as conn:
        said = await explain_transaction(conn, Chain.BASE, "0xours", deposit_micro_min=5_000_000)
    assert [one.verdict for one in said] == ["decided", "case", "decision"]
    await final(bench, watcher, bench.pays(ESCROW, 100, tx="0xbobs"))
    give = {"actor": "cleo", "reason": "he wrote to us", "now": bench.clock.now()}
    async with transaction(bench.engine) as conn:
        with pytest.raises(NoDecision, match="treasury"):
            await attribute_deposit(conn, Chain.BASE, "0xours:0", bob, **give)
        await attribute_deposit(conn, Chain.BASE, "0xbobs:0", bob, **give)
    assert await bench.buyer(bob) == 100 * 10**9
    with pytest.raises(WrongState, match="arrived"):
        await rebalance(bench, "0xbobs:0", 100, ref="0xout-2")
    await bench.books_hold()


async def test_of_an_attribution_and_a_rebalance_at_once_one_happens(bench: Bench) -> None:
    """A stranger's money lies beside it, so the balance alone would let both."""
    bob = await a_known_person(bench)
    watcher = await start(bench)
    await final(bench, watcher, bench.pays(ESCROW, 100, tx="0xone"), bench.pays(ESCROW, 100))
    give = {"actor": "cleo", "reason": "he wrote to us", "now": bench.clock.now()}
    async with transaction(bench.engine) as conn:
        await attribute_deposit(conn, Chain.BASE, "0xone:0", bob, **give)
        other = asyncio.create_task(rebalance(bench, "0xone:0", 100))
        await asyncio.sleep(0.2)  # long enough to come to the lock
        assert not other.done()
    with pytest.raises(WrongState, match="arrived"):
        await other
    assert await bench.balance(ledger_accounts.unattributed("base")) == 100 * 10**9


@pytest.mark.parametrize(
    "content", [b"", b"# nothing\n", b"0x12 0x13\n", b"\xff\xfe", b"a" * 101, b"7" * 88, b"7" * 31]
)
def test_what_is_no_list_of_addresses_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    with pytest.raises(BadList):
        sanctions.read_list(file)
