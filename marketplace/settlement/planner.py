"""From requests to a frozen batch.

Two transactions with the dry run between them, so that none is open across a call to the outside:

1. read: requests of one chain, oldest first, as many as the rail takes and the escrow covers;
2. outside: the rail dry-runs them and freezes what will be signed (`dry_run` splits off who cannot be paid);
3. write, under the chain's lock: check again everything 1 relied on, then batch, payouts and ledger at once.

Whoever asked may have lost the right to it since.  In bad standing his request waits, and says so; over
today's KYC limits, on a sanctions list or not payable on chain it fails, with the reason, and he is told.

The write is READ COMMITTED under locks (chain, day, requests, then every balance in account order), not
SERIALIZABLE: the poster changes operators' balances many times a second, and a serializable write is
refused whenever one of its 300 operators earned something meanwhile.  With the locks nothing is left to
serialize.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chain.errors import ChainRefusal
from chain.networks import Chain
from chain.payouts import Payout
from chain.ports import PayoutLine, PayoutRail, Unsigned
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import tables as ledger_tables
from marketplace.ledger import templates
from marketplace.ledger.accounts import Account, ensure_account, read_balance
from marketplace.ledger.holds import release_all
from marketplace.ledger.money import Nano, from_micro
from marketplace.ledger.posting import lock_balances, post_transfers
from marketplace.notices import outbox
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.platform.ids import uuid7
from marketplace.settlement import halts, payout_rules, people, sanctions
from marketplace.settlement.batches import live_batch, lock_chain, lock_day
from marketplace.settlement.digest import batch_digest, merkle_root
from marketplace.settlement.dry_run import prepare
from marketplace.settlement.errors import PlanRefused
from marketplace.settlement.tables import account_openings, payouts, settlement_batches, withdrawals
from marketplace.settlement.withdrawals import Status, over_limit

LINES_MAX: Final = 300
"""Of one batch on any chain; a rail may take fewer (`max_lines`)."""
ON_A_LIST: Final = "the address is on a sanctions list"
SUSPENDED: Final = "this account is not in good standing"
ACCOUNT_MISSING: Final = (
    "the wallet has no USDC account, and we have opened one for you before (closed since, or another "
    "wallet's): open it, then ask again"
)
ATTEMPTS_MAX: Final = 3
"""How often the plan is made again because a request changed during the dry run."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that may join, under the payout id it will have."""

    payout_id: UUID
    withdrawal_id: UUID
    person_id: UUID
    address: str
    amount: Micro
    hold_id: UUID

    @property
    def line(self) -> PayoutLine:
        return PayoutLine(str(self.payout_id), self.address, self.amount)


@dataclass(frozen=True, slots=True)
class Planned:
    """A batch that was just frozen."""

    batch_id: UUID
    count: int
    total: Micro
    split_off: tuple[tuple[UUID, str], ...]
    """(withdrawal, reason): could not be paid; their money stays in earnings."""


class _Changed(Exception):
    """A request changed while the dry run was under way."""


async def plan(engine: AsyncEngine, rail: PayoutRail, clock: Clock, *, planned_by: str) -> Planned:
    """Freeze one batch of the rail's chain.

    PlanRefused (code `halted`, `batch_under_way`, `nothing_to_plan`, `escrow_short`, `daily_max`,
    `dry_run_failed`, `nobody_payable`, `keeps_changing`) with nothing changed but,
    for `nobody_payable`, the failed requests.
    """
    async with transaction(engine) as conn:
        await _tell_suspended(conn, rail.chain, clock.now())
    for _ in range(ATTEMPTS_MAX):
        async with transaction(engine) as conn:
            candidates = await _read(conn, rail, clock.now())
            barred = await _barred(conn, candidates)
        try:
            barred |= await _rent_farmers(engine, rail, candidates, clock.now())
            lines = [c.line for c in candidates if str(c.payout_id) not in barred]
            try:
                unsigned, refused = await prepare(rail, lines)
            finally:
                await _note_opened(engine, rail, lines, clock.now())
        except ChainRefusal as e:
            raise PlanRefused(f"the dry run fails: {e}", code="dry_run_failed") from e
        try:
            async with transaction(engine) as conn:
                planned = await _write(
                    conn,
                    rail=rail,
                    candidates=candidates,
                    unsigned=unsigned,
                    refused=refused | barred,
                    planned_by=planned_by,
                    now=clock.now(),
                )
        except _Changed:
            continue
        except (
            IntegrityError
        ) as e:  # the constraints' last word: one live batch per chain, one batch per fence
            raise PlanRefused(f"the fence is used by another batch: {e.orig}", code="batch_under_way") from e
        if planned is None:
            reasons = "; ".join(sorted({*refused.values(), *barred.values()}))
            raise PlanRefused(f"no request can be paid: {reasons}", code="nobody_payable")
        return planned
    raise PlanRefused("requests keep changing during the dry run; try again", code="keeps_changing")


async def _read(conn: AsyncConnection, rail: PayoutRail, now: datetime) -> list[Candidate]:
    await _check_free(conn, rail.chain)
    t = withdrawals.c
    limit = min(LINES_MAX, int(getattr(rail, "max_lines", LINES_MAX)))
    statement = (
        select(withdrawals)
        .where(t.chain == rail.chain.value, t.status == Status.REQUESTED.value)
        .where(t.person_id.not_in(people.in_bad_standing()))
        .order_by(t.created_at, t.id)
        .limit(limit)
    )
    waiting = (await conn.execute(statement)).all()
    if not waiting:
        raise PlanRefused(f"no withdrawal waits on {rail.chain}", code="nothing_to_plan")
    left = from_micro((await payout_rules.left_today(conn, now=now)).n)
    if left.n < from_micro(waiting[0].amount_micro).n:
        message = (
            f"${left} may still be planned today, less than the next withdrawal: wait or change the rules"
        )
        raise PlanRefused(message, code="daily_max")
    return await _covered(conn, rail.chain, waiting, left)


async def _tell_suspended(conn: AsyncConnection, chain: Chain, now: datetime) -> None:
    """Write down, and tell whoever is not in good standing, why his request waits; once a reason."""
    t, bad = withdrawals.c, people.in_bad_standing()
    waiting = (t.chain == chain.value) & (t.status == Status.REQUESTED.value)
    settled = waiting & t.refusal.is_not(None) & t.person_id.not_in(bad)
    await conn.execute(update(withdrawals).where(settled).values(refusal=None))
    statement = select(t.id, t.person_id, t.amount_micro, t.refusal).where(waiting, t.person_id.in_(bad))
    rows = (await conn.execute(statement.order_by(t.id).with_for_update(key_share=True))).all()
    reasons = await people.bad_standings(conn, {row.person_id for row in rows})
    for row in rows:
        why = f"{SUSPENDED}: {reasons[row.person_id]}"[:1000]
        if row.refusal == why:
            continue
        await conn.execute(update(withdrawals).where(t.id == row.id).values(refusal=why, changed_at=now))
        message = (
            f"Your withdrawal of {Micro(row.amount_micro)} USDC waits: {why}. It joins the next batch by "
        )
        message += "itself when that is settled"
        message += "." if reasons[row.person_id] == people.FROZEN else "; until then you can cancel it."
        await outbox.enqueue(conn, "withdrawal_refused", row.person_id, {"message": message}, now=now)


async def _barred(conn: AsyncConnection, candidates: Sequence[Candidate]) -> dict[str, str]:
    """Whom the rules of this moment do not let us pay, by payout id, and why."""
    listed = await sanctions.listed(conn, {c.address for c in candidates})
    over = await over_limit(conn, {c.person_id for c in candidates})
    found = {str(c.payout_id): over[c.withdrawal_id] for c in candidates if c.withdrawal_id in over}
    return found | {str(c.payout_id): ON_A_LIST for c in candidates if c.address in listed}


async def _rent_farmers(
    engine: AsyncEngine, rail: PayoutRail, candidates: Sequence[Candidate], now: datetime
) -> dict[str, str]:
    """Payees without a token account for whom we opened one before: its rent went to them (A45).

    We open one per operator and chain; whoever closes it, or comes with another wallet, opens the next one
    himself.  That we are about to is on record before, that we did right after the dry run: so nothing that
    ends a plan early (a request cancelled meanwhile, a refusal, another's fault) gives an operator a second.
    """
    missing = await _note_opened(engine, rail, [c.line for c in candidates], now)
    barred: dict[str, str] = {}
    async with transaction(engine) as conn:
        for candidate in (c for c in candidates if c.address in missing):
            if not await _may_open(conn, rail.chain, candidate, now):
                barred[str(candidate.payout_id)] = ACCOUNT_MISSING
    return barred


async def _note_opened(
    engine: AsyncEngine, rail: PayoutRail, lines: Sequence[PayoutLine], now: datetime
) -> frozenset[str]:
    """Note which of the token accounts we meant to open are there; gives the payees without one."""
    look: Callable[[Sequence[PayoutLine]], Awaitable[frozenset[str]]] | None
    look = getattr(rail, "missing_accounts", None)
    if look is None:
        return frozenset()
    missing: frozenset[str] = await look(lines)
    t = account_openings.c
    there = {line.to for line in lines} - missing
    async with transaction(engine) as conn:
        await conn.execute(
            update(account_openings)
            .where(t.chain == rail.chain.value, t.address.in_(there), t.opened_at.is_(None))
            .values(opened_at=now)
        )
    return missing


async def _may_open(conn: AsyncConnection, chain: Chain, candidate: Candidate, now: datetime) -> bool:
    """Note that we are about to open this payee's token account; False if we have opened one for him.

    The same address may be tried again until it has succeeded.
    """
    t = account_openings.c
    row = insert(account_openings).values(
        person_id=candidate.person_id, chain=chain.value, address=candidate.address, at=now
    )
    if await conn.scalar(row.on_conflict_do_nothing().returning(t.address)) is not None:
        return True
    tried = select(t.address).where(t.person_id == candidate.person_id, t.chain == chain.value)
    tried = tried.where(t.address == candidate.address, t.opened_at.is_(None))
    return await conn.scalar(tried) is not None


async def _covered(
    conn: AsyncConnection, chain: Chain, waiting: Sequence[Row[Any]], most: Nano
) -> list[Candidate]:
    """As many requests, oldest first, as escrow (S3) and `most` cover; no smaller one overtakes."""
    left = min(await payable(conn, chain), most)
    chosen: list[Candidate] = []
    for row in waiting:
        left = left - from_micro(row.amount_micro)
        if left.n < 0:
            break
        candidate = Candidate(
            uuid7(), row.id, row.person_id, row.address, Micro(row.amount_micro), row.hold_id
        )
        chosen.append(candidate)
    if not chosen:
        first = from_micro(waiting[0].amount_micro)
        message = f"the escrow on {chain} does not cover the next withdrawal, ${first}: move USDC there"
        raise PlanRefused(message, code="escrow_short")
    return chosen


async def payable(conn: AsyncConnection, chain: Chain) -> Nano:
    """What the books say the chain's escrow holds beyond payouts in flight; may be below zero."""
    escrow = await read_balance(conn, ledger_accounts.escrow(chain.value))
    flight = await read_balance(conn, ledger_accounts.payouts_in_flight(chain.value))
    held = -(escrow.posted.n if escrow else 0)  # an asset's balance is negative
    return Nano(held - (flight.posted.n if flight else 0))


async def _check_free(conn: AsyncConnection, chain: Chain) -> None:
    if (why := await halts.halted(conn, chain)) is not None:
        raise PlanRefused(f"payouts on {chain} are halted: {why}", code="halted")
    if (live := await live_batch(conn, chain)) is not None:
        message = f"batch {live.id} is {live.status}; a chain has one fence, so one batch at a time"
        raise PlanRefused(message, code="batch_under_way")


async def _write(
    conn: AsyncConnection,
    *,
    rail: PayoutRail,
    candidates: Sequence[Candidate],
    unsigned: Unsigned | None,
    refused: Mapping[str, str],
    planned_by: str,
    now: datetime,
) -> Planned | None:
    await lock_chain(conn, rail.chain)
    await lock_day(conn)
    await _check_free(conn, rail.chain)
    await _lock_requests(conn, candidates)
    if not (await _barred(conn, candidates)).keys() <= refused.keys():
        raise _Changed
    await lock_accounts(conn, rail.chain, {c.person_id for c in candidates})
    kept = [c for c in candidates if str(c.payout_id) not in refused]
    split_off = tuple(
        (c.withdrawal_id, refused[str(c.payout_id)]) for c in candidates if str(c.payout_id) in refused
    )
    await release_all(conn, [c.hold_id for c in candidates])
    for candidate in candidates:
        if str(candidate.payout_id) in refused:
            await _fail(conn, candidate, refused[str(candidate.payout_id)], now)
    if unsigned is None:
        return None
    if unsigned.lines != tuple(c.line for c in kept):
        raise AssertionError("the rail froze other lines than it was given")
    total = Micro(sum(c.amount.n for c in kept))
    if (await payable(conn, rail.chain)).n < from_micro(total.n).n:
        raise _Changed
    if await payout_rules.left_today(conn, now=now) < total:
        raise _Changed
    batch_id = await _freeze(
        conn, rail=rail, kept=kept, unsigned=unsigned, total=total, planned_by=planned_by, now=now
    )
    return Planned(batch_id, len(kept), total, split_off)


async def _lock_requests(conn: AsyncConnection, candidates: Sequence[Candidate]) -> None:
    """Lock the requests as they were read; _Changed if one was cancelled, or its operator suspended."""
    t = withdrawals.c
    statement = (
        select(t.id, t.hold_id)
        .where(t.id.in_([c.withdrawal_id for c in candidates]), t.status == Status.REQUESTED.value)
        .order_by(t.id)
        .with_for_update(key_share=True)
    )
    found = {row.id: row.hold_id for row in await conn.execute(statement)}
    if found != {c.withdrawal_id: c.hold_id for c in candidates}:
        raise _Changed
    if await people.bad_standings(conn, {c.person_id for c in candidates}):
        raise _Changed


async def lock_accounts(conn: AsyncConnection, chain: Chain, persons: set[UUID]) -> None:
    """Lock every balance a batch's ledger entries touch, in account order, before the first of them."""
    names: list[Account] = [
        ledger_accounts.payouts_in_flight(chain.value),
        ledger_accounts.escrow(chain.value),
    ]
    ids = [await ensure_account(conn, name) for name in sorted(names)]
    t, owners = ledger_tables.accounts.c, [str(person) for person in persons]  # who earned has an account
    earned = select(t.id).where(t.kind == ledger_accounts.Kind.OPERATOR_EARNINGS.value, t.owner.in_(owners))
    await lock_balances(conn, [*ids, *(await conn.scalars(earned))])


async def _fail(conn: AsyncConnection, candidate: Candidate, reason: str, now: datetime) -> None:
    await conn.execute(
        update(withdrawals)
        .where(withdrawals.c.id == candidate.withdrawal_id)
        .values(status=Status.FAILED.value, hold_id=None, refusal=reason[:1000], changed_at=now)
    )
    message = (
        f"Your withdrawal of {candidate.amount} USDC to {candidate.address} cannot be paid: {reason}. "
        "The money is in your earnings; request it again when the reason is gone."
    )
    await outbox.enqueue(conn, "withdrawal_refused", candidate.person_id, {"message": message}, now=now)


async def _freeze(
    conn: AsyncConnection,
    *,
    rail: PayoutRail,
    kept: Sequence[Candidate],
    unsigned: Unsigned,
    total: Micro,
    planned_by: str,
    now: datetime,
) -> UUID:
    batch_id = uuid7()
    await conn.execute(
        insert(settlement_batches).values(
            id=batch_id,
            chain=rail.chain.value,
            status=Payout.PLANNED.value,
            digest=batch_digest(
                chain=rail.chain, escrow=rail.escrow, fence=unsigned.fence, lines=unsigned.lines
            ),
            merkle_root=merkle_root(unsigned.lines),
            escrow=rail.escrow,
            fence=unsigned.fence,
            context=unsigned.context,
            total_micro=total.n,
            count=len(kept),
            threshold=rail.threshold,
            planned_by=planned_by,
            planned_at=now,
            changed_at=now,
        )
    )
    rows = [
        {
            "id": c.payout_id,
            "batch_id": batch_id,
            "position": position,
            "withdrawal_id": c.withdrawal_id,
            "person_id": c.person_id,
            "address": c.address,
            "amount_micro": c.amount.n,
        }
        for position, c in enumerate(kept)
    ]
    await conn.execute(insert(payouts), rows)
    await conn.execute(
        update(withdrawals)
        .where(withdrawals.c.id.in_([c.withdrawal_id for c in kept]))
        .values(status=Status.PLANNED.value, hold_id=None, batch_id=batch_id, refusal=None, changed_at=now)
    )
    moved = [
        templates.withdrawal_planned(
            chain=rail.chain.value,
            person=str(c.person_id),
            amount=from_micro(c.amount.n),
            ref=str(c.payout_id),
        )
        for c in kept
    ]
    await post_transfers(conn, moved)
    return batch_id
