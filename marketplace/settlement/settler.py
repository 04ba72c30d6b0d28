"""Carries an approved batch to finality: one small step a tick, each step durable before the next.

The order is the promise.  Signed bytes and fence are committed before the first send (P2).  The same bytes
are sent again until something is final.  A batch is over only by what is final on chain, asked in this
order: is the fence spent, then has the payload landed (`chain.payouts` says what each answer means).  A
process may die after any commit and after any send; the next one finds everything it needs on record.

One settler is active per chain (`service.Turn`: a session advisory lock); two at once would send the same
bytes and lose each other's compare-and-set, never pay twice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy import func, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chain.errors import ChainError, ChainFault, ChainRefusal, Reverted, UnknownResult
from chain.networks import Chain
from chain.payouts import GIVES_BACK, Fact, FenceSpent, Finalized, Payout, Sent, Signed
from chain.payouts import Reverted as RevertedFact
from chain.ports import Landed, PayoutRail, SignedTransaction, Unsigned
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import templates
from marketplace.ledger.holds import hold
from marketplace.ledger.money import from_micro
from marketplace.ledger.posting import post_transfers
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.settlement import halts, planner
from marketplace.settlement.batches import (
    Batch,
    Broadcast,
    Member,
    lines_of,
    listing,
    live_batch,
    lock_chain,
    members,
    move,
    note_trouble,
    stored_approvals,
    stored_broadcasts,
)
from marketplace.settlement.errors import AnotherWon, PlanRefused, WrongState
from marketplace.settlement.plan_requests import finish, next_open
from marketplace.settlement.tables import broadcasts, payouts, withdrawals
from marketplace.settlement.withdrawals import Status

RETIRED_MAX: Final = 20
"""How many of the newest batches are looked at for lookup tables still open."""
ENVELOPES_MAX: Final = 20
"""Different transactions around one payload; a person looks when this many did not land."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """How patient a settler is, in seconds."""

    resend_s: int = 15
    """Between two sends of the same bytes."""
    new_envelope_s: int = 3600
    """After which bytes that did not land are wrapped anew (fees, the gas payer's nonce)."""
    expire_s: int = 60
    """How long `fence spent, nothing landed` must keep being the answer before the money goes back: a node
    that lags in one of the two answers must not cost the batch twice."""
    retire_s: int = 60
    """Between two steps of closing ended batches' lookup tables."""


class _Outlook(Enum):
    """What finality says of a batch whose bytes are signed."""

    OVER = "over"
    IN_DOUBT = "in doubt"
    """The fence is spent and nothing is seen to have landed: ask again, send nothing."""
    OPEN = "open"


class Settler:
    """One chain's settler.

    `reached` is told after every commit and every send; tests stop the process there.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        rail: PayoutRail,
        clock: Clock,
        *,
        pace: Pace | None = None,
        reached: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._rail = rail
        self._clock = clock
        self._pace = pace or Pace()
        self._reached = reached
        self._fence_seen_spent_at: datetime | None = None
        self._retire_at = clock.now()
        self._retired: set[UUID] = set()

    @property
    def chain(self) -> Chain:
        return self._rail.chain

    async def tick(self) -> bool:
        """Do the next step, if there is one; True if something changed.

        Chain faults and refusals are written to the batch's `trouble` and end the tick; ChainBroken passes.
        """
        try:
            return await self._tick()
        except AnotherWon:
            return True

    async def _tick(self) -> bool:
        async with transaction(self._engine) as conn:
            batch = await live_batch(conn, self.chain)
            why = await halts.halted(conn, self.chain)
        if batch is None:
            self._fence_seen_spent_at = None
            return await self._plan() or await self._retire_tables()
        await self._answer_plans(batch)
        try:
            return await self._step(batch, is_halted=why is not None)
        except (ChainFault, ChainRefusal) as e:
            log.warning("settlement batch waits", batch=str(batch.id), chain=self.chain.value, reason=str(e))
            await self._note(batch, f"{type(e).__name__}: {e}")
            return False

    async def _step(self, batch: Batch, *, is_halted: bool) -> bool:
        self._rail.require_ours(batch.context)
        if batch.status is Payout.PLANNED:
            return await self._look_while_waiting(batch)
        if batch.status is Payout.APPROVED:
            return False if is_halted else await self._sign(batch)
        async with transaction(self._engine) as conn:
            envelopes = await stored_broadcasts(conn, batch.id)
        outlook = await self._finish(batch, envelopes)
        if outlook is not _Outlook.OPEN or is_halted:
            return outlook is _Outlook.OVER
        return await self._send(batch, envelopes)

    # ── planning, when somebody asked ─────────────────────────────────────────────────────────────────

    async def _plan(self) -> bool:
        async with transaction(self._engine) as conn:
            asked = await next_open(conn, self.chain)
        if asked is None:
            return False
        try:
            planned = await planner.plan(self._engine, self._rail, self._clock, planned_by=asked.asked_by)
            batch_id, code, outcome = (
                planned.batch_id,
                "planned",
                f"{planned.count} payouts, {planned.total} USDC",
            )
        except PlanRefused as e:
            batch_id, code, outcome = None, e.code, str(e)
        except ChainFault as e:
            log.warning("planning waits", chain=self.chain.value, reason=str(e))
            return False
        self._reached("planned")
        async with transaction(self._engine) as conn:
            await finish(conn, asked.id, batch_id=batch_id, code=code, outcome=outcome, now=self._clock.now())
        return True

    async def _retire_tables(self) -> bool:
        """Get back what lookup tables of ended batches cost, where the chain has such a thing."""
        retire: Callable[[Mapping[str, str]], Awaitable[bool]] | None
        retire = getattr(self._rail, "retire_tables", None)
        now = self._clock.now()
        if retire is None or now < self._retire_at:
            return False
        self._retire_at = now + timedelta(seconds=self._pace.retire_s)
        async with transaction(self._engine) as conn:
            ended = await listing(conn, chain=self.chain, limit=RETIRED_MAX)
        try:
            for batch in ended:
                if batch.id not in self._retired and await retire(batch.context):
                    self._retired.add(batch.id)
        except (ChainFault, ChainRefusal) as e:
            log.warning("lookup table stays for now", chain=self.chain.value, reason=str(e))
        return False

    async def _answer_plans(self, batch: Batch) -> None:
        """Answer what was asked before this batch was planned (we died before answering), or during it."""
        async with transaction(self._engine) as conn:
            while (asked := await next_open(conn, self.chain)) is not None:
                is_its_own = asked.asked_by == batch.planned_by and asked.asked_at <= batch.planned_at
                code = "planned" if is_its_own else "batch_under_way"
                outcome = f"batch {batch.id} is {batch.status}"
                await finish(
                    conn, asked.id, batch_id=batch.id, code=code, outcome=outcome, now=self._clock.now()
                )

    async def _look_while_waiting(self, batch: Batch) -> bool:
        """A batch still waiting for signers whose fence something else spent: a person must look.

        Its signatures may exist outside, so nobody but a person can say that it was not executed.
        """
        if await self._rail.is_fence_spent(batch.fence):
            await self._note(
                batch, "the fence is spent although this batch was never signed here: investigate"
            )
        elif batch.trouble:
            await self._note(batch, "")
        return False

    # ── signing ───────────────────────────────────────────────────────────────────────────────────────

    async def _sign(self, batch: Batch) -> bool:
        async with transaction(self._engine) as conn:
            approved = await stored_approvals(conn, batch.id)
            joined = await members(conn, batch.id)
        signed = await self._rail.assemble(self._rebuild(batch, joined), approved)
        await self._store(batch, signed, attempt=1)
        return True

    def _rebuild(self, batch: Batch, joined: Sequence[Member]) -> Unsigned:
        return self._rail.rebuild(lines_of(joined), batch.fence, batch.context)

    async def _store(self, batch: Batch, signed: SignedTransaction, *, attempt: int) -> None:
        """Make bytes and fence durable; only what is durable is ever sent."""
        if signed.fence != batch.fence:
            raise AssertionError(f"bytes with fence {signed.fence} for a batch with fence {batch.fence}")
        async with transaction(self._engine) as conn:
            await move(conn, batch, Signed(), now=self._clock.now())
            row = insert(broadcasts).values(
                batch_id=batch.id,
                attempt=attempt,
                raw=signed.raw,
                tx=signed.tx,
                fence=signed.fence,
                stored_at=self._clock.now(),
            )
            kept = await conn.scalar(row.on_conflict_do_nothing().returning(broadcasts.c.attempt))
            if kept is None:
                raise AnotherWon(f"attempt {attempt} of batch {batch.id} is on record")
        self._reached("stored")

    # ── sending ───────────────────────────────────────────────────────────────────────────────────────

    async def _send(self, batch: Batch, envelopes: Sequence[Broadcast]) -> bool:
        newest, now = envelopes[-1], self._clock.now()
        if newest.last_sent_at is not None and now < newest.last_sent_at + timedelta(
            seconds=self._pace.resend_s
        ):
            return False
        if now >= newest.stored_at + timedelta(seconds=self._pace.new_envelope_s) and await self._rewrap(
            batch, envelopes, is_stuck=True
        ):
            return True
        try:
            await self._rail.broadcast(_signed(newest))
        except UnknownResult as e:  # it may have been sent: on record as sent, then asked for by key
            log.warning("send with unknown result", batch=str(batch.id), tx=newest.tx, reason=str(e))
        except Reverted:
            raise  # would fail now: nothing was sent, the bytes are kept
        except ChainRefusal as e:  # these bytes can never land, their payload still can
            log.warning("envelope is dead", batch=str(batch.id), tx=newest.tx, reason=str(e))
            return await self._rewrap(batch, envelopes)
        self._reached("sent")
        await self._record_sent(batch, newest)
        return batch.status is not Payout.BROADCAST

    async def _record_sent(self, batch: Batch, envelope: Broadcast) -> None:
        now, t = self._clock.now(), broadcasts.c
        async with transaction(self._engine) as conn:
            await move(conn, batch, Sent(), now=now)
            await conn.execute(
                update(broadcasts)
                .where(t.batch_id == batch.id, t.attempt == envelope.attempt)
                .values(first_sent_at=func.coalesce(t.first_sent_at, now), last_sent_at=now)
            )
        self._reached("recorded")

    async def _rewrap(self, batch: Batch, envelopes: Sequence[Broadcast], *, is_stuck: bool = False) -> bool:
        """Put the same payload into a new transaction; False if the chain has only one for it.

        One that is stuck is replaced on its own outer nonce where the chain has such a thing: a new nonce
        would only queue behind it.
        """
        if len(envelopes) >= ENVELOPES_MAX:
            await self._note(batch, f"{len(envelopes)} transactions did not land: a person must look")
            return False
        async with transaction(self._engine) as conn:
            approved = await stored_approvals(conn, batch.id)
            joined = await members(conn, batch.id)
        signed = await self._replaced(envelopes[-1]) if is_stuck else None
        if signed is None:
            signed = await self._rail.assemble(self._rebuild(batch, joined), approved)
        if signed.tx in {envelope.tx for envelope in envelopes}:
            return False
        await self._store(batch, signed, attempt=envelopes[-1].attempt + 1)
        return True

    async def _replaced(self, envelope: Broadcast) -> SignedTransaction | None:
        replace: Callable[[SignedTransaction], Awaitable[SignedTransaction | None]] | None
        replace = getattr(self._rail, "replace", None)
        return None if replace is None else await replace(_signed(envelope))

    # ── ending ────────────────────────────────────────────────────────────────────────────────────────

    async def _finish(self, batch: Batch, envelopes: Sequence[Broadcast]) -> _Outlook:
        """End the batch if finality says so; the fence is asked first, since finality moves in between."""
        if not await self._rail.is_fence_spent(batch.fence):
            self._fence_seen_spent_at = None
            return _Outlook.OPEN
        try:
            envelope, landed = await self._landed(envelopes)
        except ChainError:  # somebody may have seen it land: patience begins anew
            self._fence_seen_spent_at = None
            raise
        if landed is None:
            return await self._expire_when_sure(batch)
        await self._book(batch, Finalized() if landed.is_success else RevertedFact(), envelope, landed)
        return _Outlook.OVER

    async def _landed(self, envelopes: Sequence[Broadcast]) -> tuple[Broadcast | None, Landed | None]:
        """The newest first, which is the likeliest; one that cannot be asked for hides no other's landing."""
        failed: tuple[Broadcast | None, Landed | None] = (None, None)
        unknown: ChainError | None = None
        for envelope in reversed(envelopes):
            try:
                landed = await self._rail.landed(_signed(envelope))
            except (ChainFault, ChainRefusal) as e:
                unknown = e
                continue
            if landed is not None and landed.is_success:
                return envelope, landed
            if landed is not None:
                failed = envelope, landed
        if unknown is not None:
            raise unknown
        return failed

    async def _expire_when_sure(self, batch: Batch) -> _Outlook:
        now = self._clock.now()
        if self._fence_seen_spent_at is None:
            self._fence_seen_spent_at = now
        if now < self._fence_seen_spent_at + timedelta(seconds=self._pace.expire_s):
            return _Outlook.IN_DOUBT
        await self._book(batch, FenceSpent(), None, None)
        return _Outlook.OVER

    async def expire_unsigned(self, *, actor: str, reason: str) -> None:
        """End the live batch that was never signed here and whose fence something else spent.

        `actor` has looked on chain and states that none of its payouts was made: its signatures may have
        been used outside, so no program decides this.  WrongState unless the fence is spent at finality.
        """
        async with transaction(self._engine) as conn:
            batch = await live_batch(conn, self.chain)
        if batch is None or batch.status not in (Payout.PLANNED, Payout.APPROVED):
            raise WrongState(f"no batch waits for signatures on {self.chain}")
        self._rail.require_ours(batch.context)
        if not await self._rail.is_fence_spent(batch.fence):
            raise WrongState("the fence is not spent at finality: what was signed could still land")
        log.warning("batch expired by hand", batch=str(batch.id), actor=actor, reason=reason)
        await self._book(batch, FenceSpent(), None, None, trouble=f"expired by {actor}: {reason}")

    async def _book(
        self,
        batch: Batch,
        fact: Fact,
        envelope: Broadcast | None,
        landed: Landed | None,
        *,
        trouble: str = "",
    ) -> None:
        """End the batch and post its ledger entries in one transaction."""
        now = self._clock.now()
        async with transaction(self._engine) as conn:
            await lock_chain(conn, batch.chain)
            await note_trouble(conn, batch.id, trouble)
            after = await move(conn, batch, fact, now=now)
            joined = await members(conn, batch.id)
            if after in GIVES_BACK:
                await _give_back(conn, batch, joined, now)
            else:
                await _pay(conn, batch, joined, now)
            if envelope is not None and landed is not None:
                await _record_landed(conn, batch, envelope, landed)
        log.info("settlement batch ended", batch=str(batch.id), chain=batch.chain.value, status=after.value)
        self._reached("booked")

    async def _note(self, batch: Batch, trouble: str) -> None:
        async with transaction(self._engine) as conn:
            await note_trouble(conn, batch.id, trouble)


async def _pay(conn: AsyncConnection, batch: Batch, joined: Sequence[Member], now: datetime) -> None:
    paid = [
        templates.payout_final(chain=batch.chain.value, amount=from_micro(m.amount.n), ref=str(m.payout_id))
        for m in joined
    ]
    await post_transfers(conn, paid)
    await conn.execute(
        update(withdrawals)
        .where(withdrawals.c.id.in_([m.withdrawal_id for m in joined]))
        .values(status=Status.PAID.value, changed_at=now)
    )


async def _give_back(conn: AsyncConnection, batch: Batch, joined: Sequence[Member], now: datetime) -> None:
    """Return the money to earnings, and the requests to the queue: their owners still want to be paid.

    Each is held again under a new payout id when it is next planned; a payee who made the batch fail is
    found by that plan's dry run.
    """
    await planner.lock_accounts(conn, batch.chain, {m.person_id for m in joined})
    await conn.execute(update(payouts).where(payouts.c.batch_id == batch.id).values(is_live=False))
    returned = [
        templates.payout_failed(
            chain=batch.chain.value,
            person=str(m.person_id),
            amount=from_micro(m.amount.n),
            ref=str(m.payout_id),
        )
        for m in joined
    ]
    await post_transfers(conn, returned)
    for m in joined:
        amount, person = from_micro(m.amount.n), str(m.person_id)
        reason = f"withdrawal {m.withdrawal_id}"
        held = await hold(conn, ledger_accounts.operator_earnings(person), amount, reason=reason)
        await conn.execute(
            update(withdrawals)
            .where(withdrawals.c.id == m.withdrawal_id)
            .values(status=Status.REQUESTED.value, hold_id=held, batch_id=None, changed_at=now)
        )


async def _record_landed(conn: AsyncConnection, batch: Batch, envelope: Broadcast, landed: Landed) -> None:
    t = broadcasts.c
    await conn.execute(
        update(broadcasts)
        .where(t.batch_id == batch.id, t.attempt == envelope.attempt)
        .values(final_tx=landed.tx, final_height=landed.height, final_block_hash=landed.block_hash)
    )


def _signed(envelope: Broadcast) -> SignedTransaction:
    return SignedTransaction(envelope.raw, envelope.tx, envelope.fence)
