"""Withdrawals to a bank account: the same rules as on chain, and people instead of a multisig.

No bank's interface runs here.  What sends the money, a person today and perhaps an interface later, tells us
three facts by calling `approve`, `refuse` and `paid`; one person approves, another sends and gives the bank's
reference.  Until then the money stays earnings, held.  It comes from what Stripe has released to us
(`stripe_available`), never from an escrow: nobody is paid with money that is not there (S4).

    requested ──approve──▶ approved ──paid──▶ paid
        │ cancel, refuse       │ refuse
        ▼                      ▼
    cancelled, refused      refused
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, Row, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import templates
from marketplace.ledger.accounts import ensure_account
from marketplace.ledger.holds import hold, release
from marketplace.ledger.money import from_micro
from marketplace.ledger.posting import lock_balances, post_transfer
from marketplace.notices import outbox
from marketplace.platform.ids import uuid7
from marketplace.settlement import halts, people
from marketplace.settlement.earnings import lock_earnings
from marketplace.settlement.errors import KeyReused, NotFound, SettlementRefusal, WrongState
from marketplace.settlement.tables import bank_accounts, bank_withdrawals
from marketplace.settlement.withdrawals import PAGE_MAX, Limits, decide, input_hash, over_limit

ACCOUNTS_MAX: Final = 10
"""Bank accounts one person may have in use."""
LISTED_MAX: Final = 500
_IBAN: Final = re.compile(r"[A-Z]{2}\d{2}[A-Z0-9]{11,30}", re.ASCII)


class BadIban(SettlementRefusal):
    """The text is no IBAN, or one character of it is wrong."""

    code = "bad_iban"


class Status(StrEnum):
    """Where a withdrawal stands."""

    REQUESTED = "requested"
    APPROVED = "approved"
    PAID = "paid"
    REFUSED = "refused"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class BankAccount:
    """One entry of the bank address book."""

    id: UUID
    holder: str
    iban: str
    created_at: datetime
    usable_at: datetime
    retired_at: datetime | None


@dataclass(frozen=True, slots=True)
class BankWithdrawal:
    """One request to be paid at a bank."""

    id: UUID
    person_id: UUID
    account_id: UUID
    amount: Micro
    status: Status
    decided_by: str | None
    reason: str | None
    reference: str | None
    created_at: datetime
    changed_at: datetime


def parse_iban(text: str) -> str:
    """Give the IBAN without spaces; BadIban unless its two check digits agree (ISO 13616).

    >>> parse_iban("GB82 WEST 1234 5698 7654 32")
    'GB82WEST12345698765432'
    """
    iban = "".join(text.split()).upper()
    if not _IBAN.fullmatch(iban):
        raise BadIban("an IBAN has two letters, two digits and 11 to 30 letters or digits")
    if int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97 != 1:
        raise BadIban("the IBAN's check digits do not agree: a character was mistyped")
    return iban


async def add_account(
    conn: AsyncConnection, *, person: UUID, holder: str, iban: str, cooling_s: int, now: datetime
) -> BankAccount:
    """Add an account, usable after the cooling time (A43); one in use is given back.  He is told."""
    canonical = parse_iban(iban)
    t = bank_accounts.c
    if (found := await _find_in_use(conn, person, t.iban == canonical)) is not None:
        return found
    in_use = select(func.count()).where(t.person_id == person, t.retired_at.is_(None))
    if (await conn.scalar(in_use) or 0) >= ACCOUNTS_MAX:
        raise WrongState(f"at most {ACCOUNTS_MAX} bank accounts are in use at once; retire one first")
    made = BankAccount(uuid7(), holder, canonical, now, now + timedelta(seconds=cooling_s), None)
    row = insert(bank_accounts).values(
        id=made.id, person_id=person, holder=holder, iban=canonical, created_at=now, usable_at=made.usable_at
    )
    added = await conn.scalar(row.on_conflict_do_nothing().returning(t.id))
    if added is None:
        raise WrongState("the account was added a moment ago; look again")
    message = (
        f"The bank account ending in {canonical[-4:]} was added; it can be used from "
        f"{made.usable_at.isoformat(timespec='minutes')}. If it was not you, retire it and tell us."
    )
    await outbox.enqueue(conn, "payout_address_added", person, {"message": message}, now=now)
    return made


async def accounts_of(conn: AsyncConnection, person: UUID) -> list[BankAccount]:
    """A person's accounts: every one in use, oldest first, then the retired ones, the last retired first."""
    t = bank_accounts.c
    rows = await conn.execute(
        select(bank_accounts)
        .where(t.person_id == person)
        .order_by(t.retired_at.desc().nulls_first(), t.id)
        .limit(LISTED_MAX)
    )
    return [_account(row) for row in rows]


async def _find_in_use(conn: AsyncConnection, person: UUID, which: ColumnElement[bool]) -> BankAccount | None:
    t = bank_accounts.c
    statement = select(bank_accounts).where(t.person_id == person, t.retired_at.is_(None), which)
    row = (await conn.execute(statement)).one_or_none()
    return None if row is None else _account(row)


async def retire_account(conn: AsyncConnection, *, person: UUID, account_id: UUID, now: datetime) -> None:
    """Take an account out of use.  What was requested keeps the account it was given.  He is told."""
    t = bank_accounts.c
    done = await conn.execute(
        update(bank_accounts)
        .where(t.id == account_id, t.person_id == person, t.retired_at.is_(None))
        .values(retired_at=now)
    )
    if done.rowcount == 0:
        raise NotFound("you have no such bank account in use")
    message = f"bank account {account_id} was retired. If it was not you, tell us."
    await outbox.enqueue(conn, "payout_address_retired", person, {"message": message}, now=now)


async def request(
    conn: AsyncConnection,
    *,
    person: UUID,
    account_id: UUID,
    amount: Micro | None,
    key: str,
    limits: Limits,
    now: datetime,
) -> tuple[BankWithdrawal, bool]:
    """Request `amount` (None: everything matured); gives it, and whether this call made it.

    The rules are those of a withdrawal on chain, and both count towards the same KYC limits; the IBAN is the
    address that others' withdrawals may share (A81).
    """
    inputs = input_hash(str(account_id), amount)
    earned = await lock_earnings(conn, person, now=now, reserve=limits.reserve)
    t = bank_withdrawals.c
    same = select(bank_withdrawals).where(t.person_id == person, t.idempotency_key == key)
    if (found := (await conn.execute(same)).one_or_none()) is not None:
        if found.input_hash != inputs:
            raise KeyReused("this Idempotency-Key was used for another withdrawal; use a new key")
        return _withdrawal(found), False
    account = await _find_in_use(conn, person, bank_accounts.c.id == account_id)
    wanted = await decide(
        conn,
        person=person,
        amount=amount,
        earned=earned,
        address=None if account is None else account.iban,
        usable_at=None if account is None else account.usable_at,
        limits=limits,
        now=now,
    )
    identity = uuid7()
    earnings_account = ledger_accounts.operator_earnings(str(person))
    held = await hold(conn, earnings_account, from_micro(wanted.n), reason=f"bank withdrawal {identity}")
    await conn.execute(
        insert(bank_withdrawals).values(
            id=identity,
            person_id=person,
            account_id=account_id,
            amount_micro=wanted.n,
            status=Status.REQUESTED.value,
            idempotency_key=key,
            input_hash=inputs,
            hold_id=held,
            created_at=now,
            changed_at=now,
        )
    )
    return await find(conn, identity), True


async def cancel(
    conn: AsyncConnection, *, person: UUID, withdrawal_id: UUID, now: datetime
) -> BankWithdrawal:
    """Take a request back while nobody has approved it; twice is harmless."""
    row = await _lock(conn, withdrawal_id, person=person)
    if row.status == Status.CANCELLED:
        return _withdrawal(row)
    _require(row, Status.REQUESTED)
    await release(conn, row.hold_id)
    return await _move(conn, row.id, now, status=Status.CANCELLED.value, hold_id=None)


async def approve(
    conn: AsyncConnection, withdrawal_id: UUID, *, actor: str, reason: str, now: datetime
) -> BankWithdrawal:
    """One person lets it out.

    WrongState while payouts are halted, or if the operator has since lost his good standing (`standing`) or
    may by today's limits not withdraw as much (`kyc`); it can be approved later, or refused.
    """
    row = await _lock(conn, withdrawal_id)
    _require(row, Status.REQUESTED)
    await _require_running(conn)
    if why := (await people.bad_standings(conn, [row.person_id])).get(row.person_id):
        raise WrongState(f"the operator is not in good standing: {why}", code="standing")
    if why := (await over_limit(conn, [row.person_id])).get(row.id):
        raise WrongState(why, code="kyc")
    return await _move(conn, row.id, now, status=Status.APPROVED.value, decided_by=actor, reason=reason)


async def refuse(
    conn: AsyncConnection, withdrawal_id: UUID, *, actor: str, reason: str, now: datetime
) -> BankWithdrawal:
    """It cannot be sent, or came back before it was `paid`; the money is earnings again.  He is told."""
    row = await _lock(conn, withdrawal_id)
    _require(row, Status.REQUESTED, Status.APPROVED)
    await release(conn, row.hold_id)
    message = f"Your withdrawal of {Micro(row.amount_micro)} to your bank cannot be paid: {reason}"
    await outbox.enqueue(conn, "withdrawal_refused", row.person_id, {"message": message}, now=now)
    return await _move(
        conn, row.id, now, status=Status.REFUSED.value, hold_id=None, decided_by=actor, reason=reason
    )


async def paid(
    conn: AsyncConnection, withdrawal_id: UUID, *, actor: str, reference: str, now: datetime
) -> BankWithdrawal:
    """Another person has sent it, under the bank's `reference`; the same again changes nothing.

    WrongState if he approved it himself, or Stripe has not released that much to us (S4).
    """
    row = await _lock(conn, withdrawal_id)
    if row.status == Status.PAID and row.reference == reference:
        return _withdrawal(row)
    _require(row, Status.APPROVED)
    await _require_running(conn)
    if actor == row.decided_by:
        raise WrongState(f"{actor} approved this; another person sends it", code="approver_may_not_pay")
    nano = from_micro(row.amount_micro)
    entry = templates.correction(
        debit=ledger_accounts.operator_earnings(str(row.person_id)),
        credit=ledger_accounts.STRIPE_AVAILABLE,
        amount=nano,
        ref=f"bank:{row.id}",
        note=f"{actor}: bank transfer {reference}",
    )
    ids = [await ensure_account(conn, account) for account in sorted([entry.debit, entry.credit])]
    available = -(await lock_balances(conn, ids))[await ensure_account(conn, entry.credit)].posted.n
    if available < nano.n:
        raise WrongState(f"Stripe has not released ${nano} to us; the bank has less", code="bank_short")
    await release(conn, row.hold_id)
    await post_transfer(conn, entry)
    return await _move(
        conn, row.id, now, status=Status.PAID.value, hold_id=None, paid_by=actor, reference=reference
    )


async def find(conn: AsyncConnection, withdrawal_id: UUID, *, person: UUID | None = None) -> BankWithdrawal:
    """One withdrawal, of `person` if given; NotFound."""
    statement = select(bank_withdrawals).where(bank_withdrawals.c.id == withdrawal_id)
    if person is not None:
        statement = statement.where(bank_withdrawals.c.person_id == person)
    row = (await conn.execute(statement)).one_or_none()
    if row is None:
        raise NotFound("there is no such bank withdrawal")
    return _withdrawal(row)


async def listing(
    conn: AsyncConnection, *, person: UUID | None = None, before: UUID | None = None, limit: int = PAGE_MAX
) -> list[BankWithdrawal]:
    """Withdrawals, newest first: a person's, or (for admins) everybody's that wait."""
    t = bank_withdrawals.c
    statement = select(bank_withdrawals).order_by(t.id.desc()).limit(min(limit, PAGE_MAX))
    if person is not None:
        statement = statement.where(t.person_id == person)
    else:
        statement = statement.where(t.status.in_([Status.REQUESTED.value, Status.APPROVED.value]))
    if before is not None:
        statement = statement.where(t.id < before)
    return [_withdrawal(row) for row in await conn.execute(statement)]


async def _lock(conn: AsyncConnection, withdrawal_id: UUID, *, person: UUID | None = None) -> Row[Any]:
    statement = select(bank_withdrawals).where(bank_withdrawals.c.id == withdrawal_id)
    if person is not None:
        statement = statement.where(bank_withdrawals.c.person_id == person)
    row = (await conn.execute(statement.with_for_update())).one_or_none()
    if row is None:
        raise NotFound("there is no such bank withdrawal")
    return row


def _require(row: Row[Any], *states: Status) -> None:
    if row.status not in {state.value for state in states}:
        raise WrongState(f"the withdrawal is {row.status}")


async def _require_running(conn: AsyncConnection) -> None:
    if (why := await halts.halted(conn, halts.BANK)) is not None:
        raise WrongState(f"payouts are halted: {why}", code="halted")


async def _move(
    conn: AsyncConnection, withdrawal_id: UUID, now: datetime, **values: object
) -> BankWithdrawal:
    t = bank_withdrawals.c
    await conn.execute(update(bank_withdrawals).where(t.id == withdrawal_id).values(changed_at=now, **values))
    return await find(conn, withdrawal_id)


def _account(r: Row[Any]) -> BankAccount:
    return BankAccount(r.id, r.holder, r.iban, r.created_at, r.usable_at, r.retired_at)


def _withdrawal(r: Row[Any]) -> BankWithdrawal:
    return BankWithdrawal(
        r.id,
        r.person_id,
        r.account_id,
        Micro(r.amount_micro),
        Status(r.status),
        r.decided_by,
        r.reason,
        r.reference,
        r.created_at,
        r.changed_at,
    )
