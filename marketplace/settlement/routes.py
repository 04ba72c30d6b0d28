"""Earnings, payout addresses and withdrawals of operators; batches, approvals and decisions of admins."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self
from uuid import UUID

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from chain.addresses import ADDRESS_TEXT_MAX, parse_payout_address
from chain.networks import Chain
from chain.payouts import Payout
from marketplace.ledger.money import dollars
from marketplace.platform.http import (
    AccountIdentity,
    AdminIdentity,
    Refusal,
    ServicesDep,
    require_another,
    require_recent_proof,
)
from marketplace.settlement import (
    address_book,
    batches,
    earnings,
    halts,
    kyc,
    people,
    plan_requests,
    signing,
    withdrawals,
)
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
from marketplace.settlement.bank_routes import router as bank_router
from marketplace.settlement.consents import consent_of
from marketplace.settlement.errors import ApprovalRefused
from marketplace.settlement.kyc_routes import router as kyc_router
from marketplace.settlement.public_routes import router as public_router

router = APIRouter(prefix="/api")
router.include_router(kyc_router)  # before /kyc/{person}, which would take its paths

AddressText = Annotated[str, Field(min_length=1, max_length=ADDRESS_TEXT_MAX)]


# ── an operator's own ─────────────────────────────────────────────────────────────────────────────────


class EarningsBody(BaseModel):
    """What an operator has earned; decimal dollars, and exact nano-dollars as integer strings."""

    posted: str = Field(description="everything earned and not yet paid or in a batch")
    posted_nano: str
    held: str = Field(description="set aside for withdrawals that wait to be planned")
    held_nano: str
    maturing: str = Field(description="earned within the reserve time; cannot be withdrawn yet")
    maturing_nano: str
    matured: str = Field(description="can be withdrawn now")
    matured_nano: str
    reserve_s: int = Field(description="how long what USDC paid for matures")
    card_reserve_s: int = Field(description="the same of what buyers who have paid by card paid for")


class PayoutAddressBody(PayeeBody):
    """One entry of the address book."""

    chain: Chain
    address: str


class PayoutAddresses(BaseModel):
    """The address book."""

    data: list[PayoutAddressBody]


class NewPayoutAddress(BaseModel):
    """An address to add."""

    model_config = ConfigDict(extra="forbid")

    chain: Chain
    address: AddressText = Field(description="a wallet's address; EVM checksums are checked")


class NewWithdrawal(BaseModel):
    """A request to be paid."""

    model_config = ConfigDict(extra="forbid")

    chain: Chain
    address: AddressText = Field(description="an address of your address book, past its cooling time")
    amount: AmountText = Field(
        description='decimal USDC with at most 6 decimals, or "all": everything matured'
    )


class WithdrawalBody(BaseModel):
    """One withdrawal, from request to transaction."""

    id: UUID
    chain: Chain
    address: str
    amount: str = Field(description="decimal USDC")
    amount_micro: int
    status: withdrawals.Status
    created_at: datetime
    changed_at: datetime
    batch_id: UUID | None
    tx: str | None = Field(description="the transaction that paid it, once final")
    refusal: str | None = Field(description="why it failed; while it is requested, what it waits for")

    @classmethod
    def of(cls, made: withdrawals.Withdrawal, tx: str | None = None) -> Self:
        return cls(
            id=made.id,
            chain=made.chain,
            address=made.address,
            amount=str(made.amount),
            amount_micro=made.amount.n,
            status=made.status,
            created_at=made.created_at,
            changed_at=made.changed_at,
            batch_id=made.batch_id,
            tx=tx,
            refusal=made.refusal,
        )


class Withdrawals(Page):
    """A page of withdrawals, newest first."""

    data: list[WithdrawalBody]


@router.get("/earnings", responses=errors(), tags=["operators"])
async def get_earnings(services: ServicesDep, identity: AccountIdentity) -> EarningsBody:
    """What you have earned, what is maturing, and what you can withdraw now."""
    reserve = earnings.Reserve.of(services.settings)
    async with work(services) as conn:
        found = await earnings.read_earnings(
            conn, identity.person_id, now=services.clock.now(), reserve=reserve
        )
    parts = {"posted": found.posted, "held": found.held, "maturing": found.maturing, "matured": found.matured}
    fields = {name: dollars(amount) for name, amount in parts.items()}
    fields |= {f"{name}_nano": str(amount.n) for name, amount in parts.items()}
    return EarningsBody(**fields, reserve_s=reserve.usdc_s, card_reserve_s=reserve.card_s)


@router.get("/payout-addresses", responses=errors(), tags=["operators"])
async def list_payout_addresses(services: ServicesDep, identity: AccountIdentity) -> PayoutAddresses:
    """Your address book, retired entries included."""
    async with work(services) as conn:
        entries = await address_book.listing(conn, identity.person_id)
    return PayoutAddresses(data=[PayoutAddressBody.model_validate(entry) for entry in entries])


@router.post(
    "/payout-addresses",
    status_code=201,
    responses=errors(s400="not a payable address", s409="too many addresses", s422="on a sanctions list"),
    tags=["operators"],
)
async def add_payout_address(
    services: ServicesDep, identity: AccountIdentity, body: NewPayoutAddress, response: Response
) -> PayoutAddressBody:
    """Add an address; it can be used after the cooling time.  200 if you have it already.

    Needs a proof of who you are that is at most five minutes old: sign in, or POST /api/auth/step-up.
    """
    require_recent_proof(services, identity)
    async with work(services) as conn:
        entry, is_new = await address_book.add(
            conn,
            person=identity.person_id,
            chain=body.chain,
            text=body.address,
            forbidden=address_book.ours(services.chains),
            cooling_s=services.settings.cooling_s,
            now=services.clock.now(),
        )
    response.status_code = 201 if is_new else 200
    return PayoutAddressBody.model_validate(entry)


@router.delete(
    "/payout-addresses/{address_id}",
    status_code=204,
    responses=errors(s404="no such address in use"),
    tags=["operators"],
)
async def retire_payout_address(services: ServicesDep, identity: AccountIdentity, address_id: UUID) -> None:
    """Retire an address.  Withdrawals already requested keep the address they were given."""
    async with work(services) as conn:
        await address_book.retire(
            conn, person=identity.person_id, address_id=address_id, now=services.clock.now()
        )


@router.get("/withdrawals", responses=errors(), tags=["operators"])
async def list_withdrawals(
    services: ServicesDep,
    identity: AccountIdentity,
    before: Before = None,
    limit: Limit = 50,
) -> Withdrawals:
    """Your withdrawals, newest first."""
    async with work(services) as conn:
        found = await withdrawals.listing(conn, person=identity.person_id, before=before, limit=limit)
        paid = await batches.final_transactions(conn, {w.batch_id for w in found if w.batch_id is not None})
    data = [WithdrawalBody.of(w, paid.get(w.batch_id) if w.batch_id else None) for w in found]
    return Withdrawals(data=data, has_more=len(found) == limit)


@router.post(
    "/withdrawals",
    status_code=201,
    responses=asked("not an amount or address"),
    tags=["operators"],
)
async def request_withdrawal(
    services: ServicesDep,
    identity: AccountIdentity,
    body: NewWithdrawal,
    response: Response,
    idempotency_key: IdempotencyKey,
) -> WithdrawalBody:
    """Request a payout.  The same Idempotency-Key gives the same withdrawal (200)."""
    amount = parse_amount(body.amount)
    async with work(services) as conn:
        made, is_new = await withdrawals.request(
            conn,
            person=identity.person_id,
            chain=body.chain,
            address=parse_payout_address(body.chain, body.address, address_book.ours(services.chains)),
            amount=amount,
            key=idempotency_key,
            limits=withdrawals.Limits.of(services.settings),
            now=services.clock.now(),
        )
    response.status_code = 201 if is_new else 200
    return WithdrawalBody.of(made)


@router.get("/withdrawals/{withdrawal_id}", responses=errors(s404="no such withdrawal"), tags=["operators"])
async def get_withdrawal(
    services: ServicesDep, identity: AccountIdentity, withdrawal_id: UUID
) -> WithdrawalBody:
    """One withdrawal of yours."""
    async with work(services) as conn:
        found = await withdrawals.find(conn, person=identity.person_id, withdrawal_id=withdrawal_id)
        paid = await batches.final_transactions(conn, [found.batch_id] if found.batch_id else [])
    return WithdrawalBody.of(found, paid.get(found.batch_id) if found.batch_id else None)


@router.delete(
    "/withdrawals/{withdrawal_id}",
    responses=errors(s404="no such withdrawal", s409="it is planned already"),
    tags=["operators"],
)
async def cancel_withdrawal(
    services: ServicesDep, identity: AccountIdentity, withdrawal_id: UUID
) -> WithdrawalBody:
    """Cancel a withdrawal that is not planned yet; the money is earnings again."""
    async with work(services) as conn:
        gone = await withdrawals.cancel(
            conn, person=identity.person_id, withdrawal_id=withdrawal_id, now=services.clock.now()
        )
    return WithdrawalBody.of(gone)


# ── admins ────────────────────────────────────────────────────────────────────────────────────────────


class CaseBody(WithdrawalBody):
    """Somebody's withdrawal."""

    person_id: UUID


class Cases(Page):
    """A page of withdrawals of everybody, newest first."""

    data: list[CaseBody]


class PlanBody(BaseModel):
    """Which chain to plan."""

    model_config = ConfigDict(extra="forbid")

    chain: Chain


class PlanRequestBody(BaseModel):
    """A request to plan, which the settler answers."""

    id: UUID
    chain: Chain
    asked_at: datetime
    done_at: datetime | None = Field(description="null while the settler has not answered")
    batch_id: UUID | None
    code: str | None = Field(description="`planned`, or why not")
    outcome: str | None

    @classmethod
    def of(cls, asked: plan_requests.PlanRequest) -> Self:
        return cls(
            id=asked.id,
            chain=asked.chain,
            asked_at=asked.asked_at,
            done_at=asked.done_at,
            batch_id=asked.batch_id,
            code=asked.code,
            outcome=asked.outcome,
        )


class BatchBody(BaseModel):
    """One settlement batch."""

    id: UUID
    chain: Chain
    status: Payout
    digest: str
    merkle_root: str
    escrow: str
    fence: str
    total: str
    total_micro: int
    count: int
    threshold: int
    planned_by: str
    planned_at: datetime
    changed_at: datetime
    trouble: str

    @classmethod
    def of(cls, batch: batches.Batch) -> Self:
        return cls(
            id=batch.id,
            chain=batch.chain,
            status=batch.status,
            digest=batch.digest.hex(),
            merkle_root=batch.merkle_root.hex(),
            escrow=batch.escrow,
            fence=batch.fence,
            total=str(batch.total),
            total_micro=batch.total.n,
            count=batch.count,
            threshold=batch.threshold,
            planned_by=batch.planned_by,
            planned_at=batch.planned_at,
            changed_at=batch.changed_at,
            trouble=batch.trouble,
        )


class PayoutBody(BaseModel):
    """One payout of a batch."""

    id: UUID
    position: int
    withdrawal_id: UUID
    person_id: UUID
    address: str
    amount_micro: int


class BroadcastBody(BaseModel):
    """One transaction around a batch."""

    attempt: int
    tx: str
    stored_at: datetime
    first_sent_at: datetime | None
    last_sent_at: datetime | None
    final_tx: str | None
    final_height: int | None


class BatchDetail(BatchBody):
    """A batch with everything about it."""

    payouts: list[PayoutBody]
    approved_by: list[str]
    broadcasts: list[BroadcastBody]


class Batches(Page):
    """A page of batches, newest first."""

    data: list[BatchBody]


class ApprovalBody(BaseModel):
    """What `tollway sign` writes."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["tollway-batch-approval-1"]
    batch: UUID
    chain: Chain
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    signer: Annotated[str, Field(min_length=32, max_length=44)]
    signatures: Annotated[
        dict[Annotated[str, Field(max_length=200)], Annotated[str, Field(max_length=400)]],
        Field(min_length=1, max_length=100),
    ] = Field(description="hex, by message label")


class KycBody(Decision):
    """What an admin found when he looked at somebody's papers himself."""

    tier: Annotated[str, Field(pattern=r"^[a-z_]{1,30}$")] = kyc.IDENTITY


class StandingBody(Decision):
    """A decision about an operator's standing."""

    is_good: bool


Rail = Literal["payouts", "ethereum", "base", "solana", "bank"]


@router.get("/admin/withdrawals", responses=errors(), tags=["settlement"])
async def list_cases(
    services: ServicesDep,
    identity: AdminIdentity,
    status: withdrawals.Status = withdrawals.Status.FAILED,
    before: Before = None,
    limit: Limit = 50,
) -> Cases:
    """Everybody's withdrawals in one state, newest first: `failed` are the ones left out, and why.

    Of those `requested`, a `refusal` says what keeps one out of the next batch.
    """
    del identity
    async with work(services) as conn:
        found = await withdrawals.listing(conn, status=status, before=before, limit=limit)
        paid = await batches.final_transactions(conn, {w.batch_id for w in found if w.batch_id is not None})
    shown = [(w, WithdrawalBody.of(w, paid.get(w.batch_id) if w.batch_id else None)) for w in found]
    data = [CaseBody(**body.model_dump(), person_id=w.person_id) for w, body in shown]
    return Cases(data=data, has_more=len(found) == limit)


@router.post("/batches/plan", status_code=202, responses=errors(), tags=["settlement"])
async def ask_for_plan(services: ServicesDep, identity: AdminIdentity, body: PlanBody) -> PlanRequestBody:
    """Ask the settler to plan a batch; it answers within seconds (GET /api/batches/plans/{id})."""
    async with work(services) as conn:
        made = await plan_requests.ask(
            conn, chain=body.chain, asked_by=actor_of(identity), now=services.clock.now()
        )
    return PlanRequestBody.of(made)


@router.get("/batches/plans/{plan_id}", responses=errors(s404="no such request"), tags=["settlement"])
async def get_plan(services: ServicesDep, identity: AdminIdentity, plan_id: UUID) -> PlanRequestBody:
    """What came of a request to plan."""
    del identity
    async with work(services) as conn:
        return PlanRequestBody.of(await plan_requests.find(conn, plan_id))


@router.get("/batches", responses=errors(), tags=["settlement"])
async def list_batches(
    services: ServicesDep,
    identity: AdminIdentity,
    chain: Chain | None = None,
    before: Before = None,
    limit: Limit = 50,
) -> Batches:
    """Batches, newest first."""
    del identity
    async with work(services) as conn:
        found = await batches.listing(conn, chain=chain, before=before, limit=limit)
    return Batches(data=[BatchBody.of(batch) for batch in found], has_more=len(found) == limit)


@router.get("/batches/{batch_id}", responses=errors(s404="no such batch"), tags=["settlement"])
async def get_batch(services: ServicesDep, identity: AdminIdentity, batch_id: UUID) -> BatchDetail:
    """A batch with its payouts, approvals and transactions."""
    del identity
    async with work(services) as conn:
        batch = await batches.find_batch(conn, batch_id)
        joined = await batches.members(conn, batch_id)
        approved = await batches.stored_approvals(conn, batch_id)
        sent = await batches.stored_broadcasts(conn, batch_id)
    return BatchDetail(
        **BatchBody.of(batch).model_dump(),
        payouts=[
            PayoutBody(
                id=m.payout_id,
                position=m.position,
                withdrawal_id=m.withdrawal_id,
                person_id=m.person_id,
                address=m.address,
                amount_micro=m.amount.n,
            )
            for m in joined
        ],
        approved_by=[approval.signer for approval in approved],
        broadcasts=[
            BroadcastBody(
                attempt=b.attempt,
                tx=b.tx,
                stored_at=b.stored_at,
                first_sent_at=b.first_sent_at,
                last_sent_at=b.last_sent_at,
                final_tx=b.final_tx,
                final_height=b.final_height,
            )
            for b in sent
        ],
    )


@router.get(
    "/batches/{batch_id}/export",
    responses={**errors(s404="no such batch"), 200: {"content": {"application/json": {}}}},
    response_class=Response,
    tags=["settlement"],
)
async def export_batch(services: ServicesDep, identity: AdminIdentity, batch_id: UUID) -> Response:
    """The file for signers' machines (`tollway sign`)."""
    del identity
    async with work(services) as conn:
        document = await signing.export_batch(conn, batch_id)
    return Response(signing.encode(document), media_type="application/json")


@router.post(
    "/batches/{batch_id}/approvals",
    responses=errors(
        s400="not over this batch, or not a signer's", s404="no such batch", s409="the batch takes no more"
    ),
    tags=["settlement"],
)
async def push_approval(
    services: ServicesDep, identity: AdminIdentity, batch_id: UUID, body: ApprovalBody
) -> BatchBody:
    """Store a signer's approval.  Whoever pushes it, the signature says whose it is."""
    document = signing.ApprovalDocument(
        body.format, str(body.batch), body.chain, body.digest, body.signer, dict(body.signatures)
    )
    if body.batch != batch_id:
        raise Refusal(400, ApprovalRefused.code, "the approval is over another batch", param="batch")
    async with work(services) as conn:
        await signing.store_approval(
            conn,
            consent_of(services.chains, body.chain),
            document,
            pushed_by=actor_of(identity),
            now=services.clock.now(),
        )
        return BatchBody.of(await batches.find_batch(conn, batch_id))


@router.post(
    "/kyc/{person}", status_code=204, responses=errors(s404="no such person or tier"), tags=["settlement"]
)
async def decide_kyc(services: ServicesDep, identity: AdminIdentity, person: UUID, body: KycBody) -> None:
    """Give somebody else a KYC tier after a review (`none` takes it away); a row with actor and reason."""
    require_another(identity, person)
    async with work(services) as conn:
        await kyc.decide(
            conn,
            person=person,
            tier=body.tier,
            reason=body.reason,
            actor=actor_of(identity),
            now=services.clock.now(),
        )


@router.post(
    "/standing/{person}", status_code=204, responses=errors(s404="no such person"), tags=["settlement"]
)
async def decide_standing(
    services: ServicesDep, identity: AdminIdentity, person: UUID, body: StandingBody
) -> None:
    """Record a decision about another operator's standing."""
    require_another(identity, person)
    async with work(services) as conn:
        await people.set_standing(
            conn,
            person=person,
            is_good=body.is_good,
            reason=body.reason,
            actor=actor_of(identity),
            now=services.clock.now(),
        )


@router.post("/payout-halts/{rail}", status_code=204, responses=errors(), tags=["settlement"])
async def halt_payouts(services: ServicesDep, identity: AdminIdentity, rail: Rail, body: Decision) -> None:
    """Stop payouts on a chain, at the bank, or all (`payouts`): no planning, approving, signing, sending."""
    async with work(services) as conn:
        await halts.halt(
            conn, rail=rail, actor=actor_of(identity), reason=body.reason, now=services.clock.now()
        )


@router.post(
    "/payout-halts/{rail}/lift", status_code=204, responses=errors(s404="not halted"), tags=["settlement"]
)
async def lift_payouts(services: ServicesDep, identity: AdminIdentity, rail: Rail, body: Decision) -> None:
    """Let payouts run again."""
    async with work(services) as conn:
        await halts.lift(
            conn, rail=rail, actor=actor_of(identity), reason=body.reason, now=services.clock.now()
        )


router.include_router(bank_router)
router.include_router(public_router)
