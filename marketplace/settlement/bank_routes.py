"""Bank accounts and withdrawals to them: operators' own; and what admins approve, refuse, report sent."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Self
from uuid import UUID

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from marketplace.platform.http import (
    AccountIdentity,
    AdminIdentity,
    ServicesDep,
    require_another,
    require_recent_proof,
)
from marketplace.settlement import bank, withdrawals
from marketplace.settlement.answers import (
    AmountText,
    Before,
    Decision,
    IdempotencyKey,
    Limit,
    Page,
    PayeeBody,
    actor_of,
    asked,
    errors,
    parse_amount,
    work,
)

router = APIRouter()
"""Included by `routes.router`, under /api."""


class BankAccountBody(PayeeBody):
    """One bank account of yours."""

    holder: str
    iban: str


class BankAccounts(BaseModel):
    """Your bank accounts, retired ones included."""

    data: list[BankAccountBody]


class NewBankAccount(BaseModel):
    """An account to add."""

    model_config = ConfigDict(extra="forbid")

    holder: Annotated[str, Field(min_length=1, max_length=140)]
    iban: Annotated[str, Field(min_length=15, max_length=50, description="its check digits are checked")]


class NewBankWithdrawal(BaseModel):
    """A request to be paid at a bank."""

    model_config = ConfigDict(extra="forbid")

    account_id: UUID
    amount: AmountText


class BankWithdrawalBody(BaseModel):
    """One withdrawal to a bank."""

    id: UUID
    person_id: UUID
    account_id: UUID
    amount: str = Field(description="decimal dollars")
    amount_micro: int
    status: bank.Status
    reason: str | None = Field(description="why it was approved or refused")
    reference: str | None = Field(description="the bank's, once sent")
    created_at: datetime
    changed_at: datetime

    @classmethod
    def of(cls, made: bank.BankWithdrawal) -> Self:
        return cls(
            id=made.id,
            person_id=made.person_id,
            account_id=made.account_id,
            amount=str(made.amount),
            amount_micro=made.amount.n,
            status=made.status,
            reason=made.reason,
            reference=made.reference,
            created_at=made.created_at,
            changed_at=made.changed_at,
        )


class BankWithdrawals(Page):
    """A page, newest first."""

    data: list[BankWithdrawalBody]

    @classmethod
    def of(cls, found: list[bank.BankWithdrawal], limit: int) -> Self:
        return cls(data=[BankWithdrawalBody.of(made) for made in found], has_more=len(found) == limit)


class SentByBank(BaseModel):
    """That it has been sent."""

    model_config = ConfigDict(extra="forbid")

    reference: Annotated[str, Field(min_length=1, max_length=200, description="the bank's own")]


@router.get("/bank-accounts", responses=errors(), tags=["operators"])
async def list_bank_accounts(services: ServicesDep, identity: AccountIdentity) -> BankAccounts:
    """Your bank accounts."""
    async with work(services) as conn:
        found = await bank.accounts_of(conn, identity.person_id)
    return BankAccounts(data=[BankAccountBody.model_validate(account) for account in found])


@router.post(
    "/bank-accounts",
    status_code=201,
    responses=errors(s400="not an IBAN", s409="too many accounts"),
    tags=["operators"],
)
async def add_bank_account(
    services: ServicesDep, identity: AccountIdentity, body: NewBankAccount
) -> BankAccountBody:
    """Add a bank account; it can be used after the cooling time.  Needs a proof at most five minutes old."""
    require_recent_proof(services, identity)
    async with work(services) as conn:
        made = await bank.add_account(
            conn,
            person=identity.person_id,
            holder=body.holder,
            iban=body.iban,
            cooling_s=services.settings.cooling_s,
            now=services.clock.now(),
        )
    return BankAccountBody.model_validate(made)


@router.delete(
    "/bank-accounts/{account_id}",
    status_code=204,
    responses=errors(s404="no such account in use"),
    tags=["operators"],
)
async def retire_bank_account(services: ServicesDep, identity: AccountIdentity, account_id: UUID) -> None:
    """Retire a bank account."""
    async with work(services) as conn:
        await bank.retire_account(
            conn, person=identity.person_id, account_id=account_id, now=services.clock.now()
        )


@router.get("/bank-withdrawals", responses=errors(), tags=["operators"])
async def list_bank_withdrawals(
    services: ServicesDep, identity: AccountIdentity, before: Before = None, limit: Limit = 50
) -> BankWithdrawals:
    """Your withdrawals to banks, newest first."""
    async with work(services) as conn:
        found = await bank.listing(conn, person=identity.person_id, before=before, limit=limit)
    return BankWithdrawals.of(found, limit)


@router.post(
    "/bank-withdrawals",
    status_code=201,
    responses=asked("not an amount"),
    tags=["operators"],
)
async def request_bank_withdrawal(
    services: ServicesDep,
    identity: AccountIdentity,
    body: NewBankWithdrawal,
    response: Response,
    idempotency_key: IdempotencyKey,
) -> BankWithdrawalBody:
    """Request a payout to your bank; people approve and send it.  The same key gives the same one (200)."""
    amount = parse_amount(body.amount)
    async with work(services) as conn:
        made, is_new = await bank.request(
            conn,
            person=identity.person_id,
            account_id=body.account_id,
            amount=amount,
            key=idempotency_key,
            limits=withdrawals.Limits.of(services.settings),
            now=services.clock.now(),
        )
    response.status_code = 201 if is_new else 200
    return BankWithdrawalBody.of(made)


@router.delete(
    "/bank-withdrawals/{withdrawal_id}",
    responses=errors(s404="no such withdrawal", s409="it is approved already"),
    tags=["operators"],
)
async def cancel_bank_withdrawal(
    services: ServicesDep, identity: AccountIdentity, withdrawal_id: UUID
) -> BankWithdrawalBody:
    """Cancel a withdrawal that nobody has approved; the money is earnings again."""
    async with work(services) as conn:
        gone = await bank.cancel(
            conn, person=identity.person_id, withdrawal_id=withdrawal_id, now=services.clock.now()
        )
    return BankWithdrawalBody.of(gone)


# ── admins ────────────────────────────────────────────────────────────────────────────────────────────


@router.get("/admin/bank-withdrawals", responses=errors(), tags=["settlement"])
async def list_open_bank_withdrawals(
    services: ServicesDep, identity: AdminIdentity, before: Before = None, limit: Limit = 50
) -> BankWithdrawals:
    """What waits to be approved or sent."""
    del identity
    async with work(services) as conn:
        found = await bank.listing(conn, before=before, limit=limit)
    return BankWithdrawals.of(found, limit)


@router.post(
    "/admin/bank-withdrawals/{withdrawal_id}/approve",
    responses=errors(s404="no such withdrawal", s409="not requested any more, or payouts are halted"),
    tags=["settlement"],
)
async def approve_bank_withdrawal(
    services: ServicesDep, identity: AdminIdentity, withdrawal_id: UUID, body: Decision
) -> BankWithdrawalBody:
    """Let a withdrawal out, not one's own; another person sends it."""
    async with work(services) as conn:
        require_another(identity, (await bank.find(conn, withdrawal_id)).person_id)
        return BankWithdrawalBody.of(
            await bank.approve(
                conn, withdrawal_id, actor=actor_of(identity), reason=body.reason, now=services.clock.now()
            )
        )


@router.post(
    "/admin/bank-withdrawals/{withdrawal_id}/refuse",
    responses=errors(s404="no such withdrawal", s409="it is over"),
    tags=["settlement"],
)
async def refuse_bank_withdrawal(
    services: ServicesDep, identity: AdminIdentity, withdrawal_id: UUID, body: Decision
) -> BankWithdrawalBody:
    """Refuse a withdrawal that has not been sent; the operator is told why."""
    async with work(services) as conn:
        return BankWithdrawalBody.of(
            await bank.refuse(
                conn, withdrawal_id, actor=actor_of(identity), reason=body.reason, now=services.clock.now()
            )
        )


@router.post(
    "/admin/bank-withdrawals/{withdrawal_id}/paid",
    responses=errors(s404="no such withdrawal", s409="not approved, approved by you, or no money for it"),
    tags=["settlement"],
)
async def report_bank_withdrawal_paid(
    services: ServicesDep, identity: AdminIdentity, withdrawal_id: UUID, body: SentByBank
) -> BankWithdrawalBody:
    """Report that the bank has sent it, under its reference; whoever approved or gets it cannot."""
    async with work(services) as conn:
        require_another(identity, (await bank.find(conn, withdrawal_id)).person_id)
        return BankWithdrawalBody.of(
            await bank.paid(
                conn,
                withdrawal_id,
                actor=actor_of(identity),
                reference=body.reference,
                now=services.clock.now(),
            )
        )
