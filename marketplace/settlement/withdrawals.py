"""Requests to be paid: decided once, held in the ledger, cancellable until planned.

The decision is made while the operator's earnings are locked, so parallel requests of the whole balance
are decided one after the other (A33).  A repeated request with the same key gives the same withdrawal
(A32).
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Self
from uuid import UUID

from sqlalchemy import Row, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.networks import Chain
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger.holds import hold, release
from marketplace.ledger.money import Nano, from_micro, to_micro
from marketplace.platform.ids import uuid7
from marketplace.platform.settings import Settings
from marketplace.settlement import address_book, kyc, people
from marketplace.settlement.earnings import Earnings, Reserve, lock_earnings
from marketplace.settlement.eligibility import Case, broken_rules, kyc_address_rule, kyc_rule
from marketplace.settlement.errors import KeyReused, NotEligible, NotFound, WrongState
from marketplace.settlement.tables import withdrawals

KEY_CHARACTERS_MAX: Final = 200
PAGE_MAX: Final = 200


class Status(StrEnum):
    """Where a withdrawal stands."""

    REQUESTED = "requested"
    PLANNED = "planned"
    PAID = "paid"
    FAILED = "failed"
    """Refused when it was to be planned; the money stayed in earnings."""
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Limits:
    """The numbers the rules compare with."""

    minimum: Nano
    reserve: Reserve

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(Nano(settings.withdrawal_nano_min), Reserve.of(settings))


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """One request to be paid."""

    id: UUID
    person_id: UUID
    chain: Chain
    address: str
    amount: Micro
    status: Status
    created_at: datetime
    changed_at: datetime
    batch_id: UUID | None
    refusal: str | None
    """Why it failed; of one that is requested: what it waits for."""


async def request(
    conn: AsyncConnection,
    *,
    person: UUID,
    chain: Chain,
    address: str,
    amount: Micro | None,
    key: str,
    limits: Limits,
    now: datetime,
) -> tuple[Withdrawal, bool]:
    """Request a payout of `amount` (None: everything matured) to a canonical `address` of the address book.

    Gives the withdrawal, and whether this call made it.  NotEligible names every broken rule; KeyReused
    for a key used with other inputs.
    """
    if not 0 < len(key) <= KEY_CHARACTERS_MAX:
        raise KeyReused(
            f"an idempotency key has 1 to {KEY_CHARACTERS_MAX} characters", code="bad_idempotency_key"
        )
    inputs = input_hash(chain.value, address, amount)
    if (made := await _by_key(conn, person, key, inputs)) is not None:
        return made, False
    earned = await lock_earnings(conn, person, now=now, reserve=limits.reserve)
    if (made := await _by_key(conn, person, key, inputs)) is not None:  # made while we waited for the lock
        return made, False
    entry = await address_book.find_in_use(conn, person, chain, address)
    wanted = await decide(
        conn,
        person=person,
        amount=amount,
        earned=earned,
        address=None if entry is None else address,
        usable_at=None if entry is None else entry.usable_at,
        limits=limits,
        now=now,
    )
    identity = uuid7()
    account = ledger_accounts.operator_earnings(str(person))
    held = await hold(conn, account, from_micro(wanted.n), reason=f"withdrawal {identity}")
    await conn.execute(
        insert(withdrawals).values(
            id=identity,
            person_id=person,
            chain=chain.value,
            address=address,
            amount_micro=wanted.n,
            status=Status.REQUESTED.value,
            idempotency_key=key,
            input_hash=inputs,
            hold_id=held,
            created_at=now,
            changed_at=now,
        )
    )
    return Withdrawal(identity, person, chain, address, wanted, Status.REQUESTED, now, now, None, None), True


async def decide(
    conn: AsyncConnection,
    *,
    person: UUID,
    amount: Micro | None,
    earned: Earnings,
    address: str | None,
    usable_at: datetime | None,
    limits: Limits,
    now: datetime,
) -> Micro:
    """Give what may be withdrawn: `amount`, or everything matured; the same rules on chain and at a bank.

    `address` (at a bank the IBAN) and `usable_at` are None where the address book has no such address; the
    earnings are locked.  NotEligible says every broken rule and its remedy; its code is the first rule's
    name.  The lock is one person's: of two who ask at once for one address `over_limit` bars the younger.
    """
    wanted = amount if amount is not None else Micro(to_micro(earned.matured)[0])
    tier = await kyc.tier_of(conn, person)
    before, by_others = await withdrawn_before(conn, person, address or "")
    case = Case(
        amount=from_micro(wanted.n),
        matured=earned.matured,
        withdrawn_before=before,
        bad_standing=(await people.bad_standings(conn, [person])).get(person),
        address_usable_at=usable_at,
        now=now,
        minimum=limits.minimum,
        withdrawal_max=tier.withdrawal_max,
        total_max=tier.total_max,
        withdrawn_by_others=by_others,
    )
    if broken := broken_rules(case):
        told = "; ".join(f"{rule.message} ({rule.remedy})" for rule in broken)
        raise NotEligible(told, code=broken[0].rule)
    return wanted


async def cancel(conn: AsyncConnection, *, person: UUID, withdrawal_id: UUID, now: datetime) -> Withdrawal:
    """Take a request back and free its hold; WrongState once it is planned.  Cancelling twice is harmless."""
    t = withdrawals.c
    statement = select(withdrawals).where(t.id == withdrawal_id, t.person_id == person)
    row = (await conn.execute(statement.with_for_update(key_share=True))).one_or_none()
    if row is None:
        raise NotFound("you have no such withdrawal")
    if row.status == Status.CANCELLED:
        return _withdrawal(row)
    if row.status != Status.REQUESTED:
        raise WrongState(f"the withdrawal is {row.status} and cannot be cancelled any more")
    await release(conn, row.hold_id)
    await conn.execute(
        update(withdrawals)
        .where(t.id == withdrawal_id)
        .values(status=Status.CANCELLED.value, hold_id=None, refusal=None, changed_at=now)
    )
    return await find(conn, person=person, withdrawal_id=withdrawal_id)


async def find(conn: AsyncConnection, *, person: UUID, withdrawal_id: UUID) -> Withdrawal:
    """One withdrawal of a person; NotFound."""
    t = withdrawals.c
    statement = select(withdrawals).where(t.id == withdrawal_id, t.person_id == person)
    row = (await conn.execute(statement)).one_or_none()
    if row is None:
        raise NotFound("you have no such withdrawal")
    return _withdrawal(row)


async def listing(
    conn: AsyncConnection,
    *,
    person: UUID | None = None,
    status: Status | None = None,
    before: UUID | None = None,
    limit: int = PAGE_MAX,
) -> list[Withdrawal]:
    """Withdrawals, newest first, those older than `before`: a person's, or (for admins) everybody's."""
    t = withdrawals.c
    statement = select(withdrawals).order_by(t.id.desc()).limit(min(limit, PAGE_MAX))
    if person is not None:
        statement = statement.where(t.person_id == person)
    if status is not None:
        statement = statement.where(t.status == status.value)
    if before is not None:
        statement = statement.where(t.id < before)
    return [_withdrawal(row) for row in await conn.execute(statement)]


async def withdrawn_before(conn: AsyncConnection, person: UUID, address: str) -> tuple[Nano, Nano]:
    """What was paid, or may still be, and counts towards a limited person's limit in all: his own, others'.

    His own on chain and at the bank, wherever to; others' only to `address`, and only of limited people.
    """
    found = await _counted(conn, [person], [address], await _limited(conn))
    own = sum(row.amount_micro for row in found if row.person_id == person)
    others = sum(row.amount_micro for row in found if row.person_id != person)
    return from_micro(int(own)), from_micro(int(others))


async def over_limit(conn: AsyncConnection, persons: Collection[UUID]) -> dict[UUID, str]:
    """Of these persons' waiting requests those that today's KYC limits no longer let out, and why (R16).

    A person's tier or a tier's limits may have changed since he asked, and two accounts that asked at once
    for the same address did not see each other's request.  A request counts together with what was paid or
    is being paid, on chain and at the bank, and with older requests that may still go out: his own, and to
    its address those of others whose tier is limited (A81).
    """
    tiers = await _limited(conn)
    asked = {p for p, tier in (await kyc.tiers_of(conn, persons)).items() if tier.is_limited}
    addresses = list(await conn.scalars(_WAITING_AT, {"persons": list(asked)}))
    total: dict[UUID, Nano] = defaultdict(lambda: Nano(0))
    there: dict[str, Nano] = defaultdict(lambda: Nano(0))
    his_there: dict[tuple[UUID, str], Nano] = defaultdict(lambda: Nano(0))
    over: dict[UUID, str] = {}
    for row in await _counted(conn, asked, addresses, tiers):
        tier, amount, key = tiers[row.tier], from_micro(int(row.amount_micro)), (row.person_id, row.address)
        own = total[row.person_id] + amount
        shared = own + there[row.address] - his_there[key]
        broken = row.waiting and (
            kyc_rule(amount, own, withdrawal_max=tier.withdrawal_max, total_max=tier.total_max)
            or kyc_address_rule(shared, total_max=tier.total_max)
        )
        if not broken:
            total[row.person_id] = own
            there[row.address] += amount
            his_there[key] += amount
        elif row.person_id in asked:  # not another's, of whom only what he has at these addresses was read
            over[row.waiting] = f"{broken.message} ({broken.remedy})"
    return over


async def _limited(conn: AsyncConnection) -> dict[str, kyc.Tier]:
    return {name: tier for name, tier in (await kyc.tiers(conn)).items() if tier.is_limited}


async def _counted(
    conn: AsyncConnection, persons: Collection[UUID], addresses: Collection[str], tiers: Collection[str]
) -> Sequence[Row[Any]]:
    found = await conn.execute(
        _COUNTED,
        {"persons": list(persons), "addresses": list(addresses), "tiers": list(tiers), "none": kyc.NONE},
    )
    return found.all()


_COUNTED: Final = text(
    """
    SELECT person_id, tier, address, waiting, amount_micro FROM (
        SELECT person_id, address, waiting, sum(amount_micro) AS amount_micro FROM (
            SELECT person_id, address, CASE WHEN status = 'requested' THEN id END AS waiting, amount_micro
            FROM withdrawals WHERE status NOT IN ('failed', 'cancelled')
                AND (person_id = ANY(CAST(:persons AS UUID[])) OR address = ANY(CAST(:addresses AS TEXT[])))
            UNION ALL
            SELECT w.person_id, a.iban, CASE WHEN w.status = 'requested' THEN w.id END, w.amount_micro
            FROM bank_withdrawals w JOIN bank_accounts a ON a.id = w.account_id
            WHERE w.status NOT IN ('refused', 'cancelled')
                AND (w.person_id = ANY(CAST(:persons AS UUID[])) OR w.account_id = ANY(ARRAY(
                    SELECT id FROM bank_accounts WHERE iban = ANY(CAST(:addresses AS TEXT[])))))
        ) AS counted GROUP BY person_id, address, waiting
    ) AS summed CROSS JOIN LATERAL (
        SELECT coalesce((
            SELECT tier FROM kyc WHERE kyc.person_id = summed.person_id ORDER BY kyc.id DESC LIMIT 1
        ), :none) AS tier
    ) AS decided
    WHERE tier = ANY(CAST(:tiers AS TEXT[]))
    ORDER BY waiting NULLS FIRST"""
)
"""What people of `tiers` have out, a sum a person and address, then each request that waits, oldest first (by
its uuid7): all of `persons`, and to `addresses` (an IBAN at the bank) everybody's.  A wallet is the same on
Ethereum and on Base; what is only people's without a limit, a company's treasury, is left out here."""
_WAITING_AT: Final = text(
    """
    SELECT address FROM withdrawals
    WHERE status = 'requested' AND person_id = ANY(CAST(:persons AS UUID[]))
    UNION
    SELECT a.iban FROM bank_withdrawals w JOIN bank_accounts a ON a.id = w.account_id
    WHERE w.status = 'requested' AND w.person_id = ANY(CAST(:persons AS UUID[]))"""
)


async def _by_key(conn: AsyncConnection, person: UUID, key: str, inputs: bytes) -> Withdrawal | None:
    t = withdrawals.c
    statement = select(withdrawals).where(t.person_id == person, t.idempotency_key == key)
    row = (await conn.execute(statement)).one_or_none()
    if row is None:
        return None
    if row.input_hash != inputs:
        raise KeyReused("this Idempotency-Key was used for another withdrawal; use a new key")
    return _withdrawal(row)


def input_hash(*inputs: str | Micro | None) -> bytes:
    """What an idempotency key was used with; an amount of None is everything."""
    plain = [one if isinstance(one, str) else "all" if one is None else one.n for one in inputs]
    return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).digest()


def _withdrawal(r: Row[Any]) -> Withdrawal:
    return Withdrawal(
        r.id,
        r.person_id,
        Chain(r.chain),
        r.address,
        Micro(r.amount_micro),
        Status(r.status),
        r.created_at,
        r.changed_at,
        r.batch_id,
        r.refusal,
    )
