"""Payouts under Hypothesis: mostly wrong moves, in any order, and P1 to P8 after each of them.

Real PostgreSQL, a multisig in memory that loses, drops, reverts and lags.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.errors import ChainRefusal, Reverted, UnknownResult
from chain.networks import Chain
from chain.payouts import LIVE, Payout
from marketplace.platform import database
from marketplace.settlement import batches
from marketplace.settlement.errors import SettlementRefusal
from marketplace.settlement.settler import Settler
from tests.settlement_parts import Desk, Stop

pytestmark = pytest.mark.timeout(300)

DOLLARS = 40
POINTS = ("planned", "stored", "sent", "recorded", "booked")
ENDED = {Payout.FINAL, Payout.FAILED, Payout.EXPIRED}


class Payouts(RuleBasedStateMachine):
    """One book, one chain, two operators, and whatever happens to them."""

    loop: asyncio.AbstractEventLoop
    template: str
    number = 0
    reached: set[Payout]
    """States that any batch of any run came to."""

    def __init__(self) -> None:
        super().__init__()
        Payouts.number += 1
        url = make_url(self.template).set(database=f"machine_{id(self)}_{Payouts.number}")
        self.url = url.render_as_string(hide_password=False)
        self.do(database.create_database(self.url, template=make_url(self.template).database))
        self.desk = Desk(database.connect(self.url, pool_size=3))
        self.eye = self.do(self.look())
        self.desk.rail.is_final_at_once = False
        self.seen: dict[UUID, Payout] = {}
        self.frozen: dict[UUID, tuple[object, ...]] = {}
        self.keys = 0
        self.settler = self.new_settler()
        self.operators = [self.do(self.desk.operator(DOLLARS)) for _ in range(2)]

    async def look(self) -> AsyncConnection:
        """What the invariants read through: outside transactions, one trip to the server a statement."""
        conn = await self.desk.engine.connect()
        return await conn.execution_options(isolation_level="AUTOCOMMIT")

    def teardown(self) -> None:
        self.do(self.eye.close())
        self.do(self.desk.engine.dispose())
        self.do(database.drop_database(self.url))

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def new_settler(self, dies_at: str | None = None) -> Settler:
        def reached(point: str) -> None:
            # P2: at the moment of a send the bytes are on record.
            if point == dies_at:
                raise Stop

        return self.desk.settler(reached)

    # ── what people do ────────────────────────────────────────────────────────────────────────────────

    @rule(who=st.integers(0, 1), dollars=st.sampled_from([9, 10, 20, 41]), is_repeated=st.booleans())
    def request(self, who: int, dollars: int, is_repeated: bool) -> None:
        self.keys += not is_repeated
        code = self.refusal(self.desk.request(self.operators[who], dollars, f"key {self.keys}"))
        assert code in {None, "minimum", "earnings", "idempotency_key_reused"}

    @rule()
    def plan(self) -> None:
        code = self.refusal(self.desk.plan())
        known = {None, "nothing_to_plan", "batch_under_way", "dry_run_failed", "nobody_payable"}
        assert code in known

    @rule(signer=st.integers(0, 2))
    def approve(self, signer: int) -> None:
        """Twice, late, or in time."""
        live = self.live()
        if live is None:
            return
        assert self.refusal(self.desk.approve(live.id, signer)) in {None, "wrong_state"}

    @rule(dies_on_the_way=st.booleans())
    def go_to_the_end(self, dies_on_the_way: bool) -> None:
        """What should happen, so that some batches come to their end."""
        self.desk.rail.is_paused = False
        for _ in range(6):
            self.go_on(dies_on_the_way=dies_on_the_way)
            self.p8_status_only_goes_forward()

    def go_on(self, *, dies_on_the_way: bool) -> None:
        live = self.live()
        if live is None:
            self.request(0, 10, is_repeated=False)
            self.plan()
        elif live.status is Payout.PLANNED:
            self.approve(0)
            self.approve(1)
        elif live.status is Payout.APPROVED and dies_on_the_way:
            self.die("stored")
        else:
            self.tick(1)
            self.desk.rail.mine()
            self.desk.rail.finalize()

    @rule()
    def approve_what_is_over(self) -> None:
        over = [identity for identity, status in self.seen.items() if status in ENDED]
        if over:
            count = "SELECT count(*) FROM approvals"
            before = self.rows(count)
            # the same approval again is not refused, and changes nothing either
            assert self.refusal(self.desk.approve(over[0], 1)) in {None, "wrong_state"}
            assert self.rows(count) == before

    # ── what the settler does, and how it dies ────────────────────────────────────────────────────────

    @rule(minutes=st.sampled_from([0, 1, 90]))
    def tick(self, minutes: int) -> None:
        self.desk.clock.pass_s(60 * minutes)
        self.do(self.settler.tick())

    @rule(point=st.sampled_from(POINTS))
    def die(self, point: str) -> None:
        dying = self.new_settler(point)
        try:
            self.do(dying.tick())
        except Stop:
            self.settler = self.new_settler()

    @rule()
    def two_settlers(self) -> None:
        async def both() -> None:
            await asyncio.gather(self.settler.tick(), self.new_settler().tick())

        self.do(both())

    # ── what the chain does ───────────────────────────────────────────────────────────────────────────

    @rule()
    def lose_an_answer(self) -> None:
        self.desk.rail.answers_lost = 1

    @rule(error=st.sampled_from([UnknownResult("?"), ChainRefusal("dead"), Reverted("would fail")]))
    def fail_a_send(self, error: Exception) -> None:
        self.desk.rail.send_errors = [error]

    @rule()
    def drop(self) -> None:
        self.desk.rail.mempool.clear()

    @rule()
    def mine(self) -> None:
        self.desk.rail.mine()

    @rule()
    def finalize(self) -> None:
        self.desk.rail.finalize()

    @precondition(
        lambda self: self.live() is not None and self.live().status in {Payout.SIGNED, Payout.BROADCAST}
    )
    @rule()
    def replace_nonce(self) -> None:
        """The owners execute something else over the fence."""
        self.desk.rail.spend_fence()

    @precondition(lambda self: self.live() is not None and self.live().status is Payout.SIGNED)
    @rule()
    def expiry(self) -> None:
        """Nothing of it was mined, and the fence is gone for good."""
        self.desk.rail.mempool.clear()
        self.desk.rail.spend_fence()
        self.desk.rail.finalize()
        self.tick(1)

    @rule()
    def late_inclusion(self) -> None:
        """A stranger sends, late, an envelope of a batch that is over or not."""
        rows = self.rows("SELECT raw, tx FROM broadcasts ORDER BY stored_at")
        for row in rows:
            self.desk.rail.mempool[row.tx] = row.raw
        self.desk.rail.mine()

    @rule(is_blocked=st.booleans())
    def block(self, is_blocked: bool) -> None:
        self.desk.rail.blocked = {self.desk.address_of(self.operators[0])} if is_blocked else set()

    @rule(is_paused=st.booleans())
    def pause(self, is_paused: bool) -> None:
        self.desk.rail.is_paused = is_paused

    # ── what always holds ─────────────────────────────────────────────────────────────────────────────

    @invariant()
    def p1_nothing_is_paid_twice(self) -> None:
        paid = self.desk.rail.balances
        asked = self.rows(
            "SELECT person_id, sum(amount_micro) AS n FROM withdrawals"
            " WHERE status IN ('planned', 'paid') GROUP BY 1"
        )
        most = {row.person_id: row.n for row in asked}
        for person in self.operators:
            assert paid.get(self.desk.address_of(person), 0) <= most.get(person, 0)
        assert sum(paid.values()) + self.desk.rail.escrow_micro == 10**12

    @invariant()
    def p2_what_was_sent_is_on_record(self) -> None:
        stored = {bytes(row.raw) for row in self.rows("SELECT raw FROM broadcasts")}
        assert set(self.desk.rail.sends) <= stored

    @invariant()
    def p3_one_live_batch_and_a_batch_per_fence(self) -> None:
        found = self.rows("SELECT id, status, fence FROM settlement_batches")
        assert sum(row.status in LIVE for row in found) <= 1
        assert len({row.fence for row in found}) == len(found)
        live = self.rows("SELECT withdrawal_id, count(*) AS n FROM payouts WHERE is_live GROUP BY 1")
        assert all(row.n == 1 for row in live)

    @invariant()
    def p4_money_comes_back_only_over_a_spent_fence(self) -> None:
        for row in self.rows("SELECT fence FROM settlement_batches WHERE status IN ('failed', 'expired')"):
            assert self.desk.rail.final_nonce > int(row.fence)

    @invariant()
    def p5_p6_lines_are_what_was_requested(self) -> None:
        for row in self.rows(
            "SELECT b.id, b.total_micro, b.digest, b.count, sum(p.amount_micro) AS paid, count(*) AS lines,"
            " bool_and(p.address = w.address AND p.amount_micro = w.amount_micro) AS same,"
            " (SELECT sum(t.amount) FROM transfers t JOIN payouts q ON t.ref = q.id::text"
            "   WHERE q.batch_id = b.id AND t.kind = 'withdrawal_planned') AS booked"
            " FROM settlement_batches b JOIN payouts p ON p.batch_id = b.id"
            " JOIN withdrawals w ON w.id = p.withdrawal_id GROUP BY b.id"
        ):
            assert row.same
            assert (row.total_micro, row.count) == (row.paid, row.lines)
            assert row.booked == row.total_micro * 1000
            unchanged = (row.total_micro, bytes(row.digest), row.lines)
            assert self.frozen.setdefault(row.id, unchanged) == unchanged

    @invariant()
    def p7_signed_only_with_two_signers(self) -> None:
        for row in self.rows(
            "SELECT b.status, (SELECT count(DISTINCT signer) FROM approvals a WHERE a.batch_id = b.id) AS n"
            " FROM settlement_batches b WHERE status NOT IN ('planned', 'expired')"
        ):
            assert row.n >= 2

    @invariant()
    def p8_status_only_goes_forward(self) -> None:
        order = list(Payout)
        for row in self.rows("SELECT id, status FROM settlement_batches"):
            before, now = self.seen.get(row.id, Payout.PLANNED), Payout(row.status)
            assert order.index(now) >= order.index(before)
            assert before not in ENDED or now is before
            self.seen[row.id] = now
            self.reached.add(now)

    @invariant()
    def the_books_are_closed(self) -> None:
        self.do(self.desk.check())

    def refusal(self, work: Coroutine[Any, Any, Any]) -> str | None:
        """Do it; the refusal's code, None if it was done."""
        try:
            self.do(work)
        except SettlementRefusal as e:
            return e.code
        return None

    def rows(self, statement: str) -> Any:
        return self.do(self.eye.execute(text(statement))).all()

    def live(self) -> batches.Batch | None:
        found: batches.Batch | None = self.do(batches.live_batch(self.eye, Chain.BASE))
        return found


def test_p1_to_p8_hold_after_every_step(template_url: str) -> None:
    loop = asyncio.new_event_loop()
    machine: Any = type("Machine", (Payouts,), {"loop": loop, "template": template_url, "reached": set()})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=10,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                derandomize=True,
            ),
        )
        assert machine.reached >= set(Payout) - {Payout.FAILED}  # a Safe's batch never ends FAILED
    finally:
        loop.close()
