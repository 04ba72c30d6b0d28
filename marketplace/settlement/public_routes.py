"""What anybody may see (R35), what an operator sees of his money, and what the treasury sees."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from chain.networks import Chain
from chain.payouts import Payout
from chain.units import Micro
from marketplace.ledger.money import dollars
from marketplace.platform.database import transaction
from marketplace.platform.http import (
    AccountIdentity,
    AdminIdentity,
    Refusal,
    RefusalOut,
    ServicesDep,
)
from marketplace.settlement import batches, statement, treasury
from marketplace.settlement.answers import actor_of, errors, work
from marketplace.settlement.digest import merkle_proof
from marketplace.settlement.earnings import Reserve
from marketplace.settlement.errors import NotFound

router = APIRouter()
"""Included by `routes.router`, under /api."""

PUBLIC_BATCHES: Final = 50
_GUARDED: Final[dict[int | str, dict[str, Any]]] = {
    401: {"model": RefusalOut, "description": "no valid credential"},
    403: {"model": RefusalOut, "description": "the credential lacks the scope"},
}


class ChainPublic(BaseModel):
    """One chain: everything needed to look for yourself."""

    chain: Chain
    chain_id: int | None = Field(description="EVM chain id; null on Solana")
    usdc: str = Field(description="the USDC contract, or mint")
    multisig: str = Field(description="who holds the escrow: the Safe, or the SPL multisig")
    escrow: str = Field(description="where the USDC is: the Safe itself, or the multisig's token account")
    signers: list[str]
    threshold: int


class BatchPublic(BaseModel):
    """One settlement batch, without its recipients."""

    id: UUID
    chain: Chain
    status: Payout
    count: int
    total: str
    total_micro: int
    digest: str
    merkle_root: str
    fence: str
    tx: str | None = Field(description="the transaction that paid it, once final")

    @classmethod
    def of(cls, batch: batches.Batch, tx: str | None) -> Self:
        return cls(
            id=batch.id,
            chain=batch.chain,
            status=batch.status,
            count=batch.count,
            total=str(batch.total),
            total_micro=batch.total.n,
            digest=batch.digest.hex(),
            merkle_root=batch.merkle_root.hex(),
            fence=batch.fence,
            tx=tx,
        )


class Transparency(BaseModel):
    """Where the money is and where it went."""

    chains: list[ChainPublic]
    batches: list[BatchPublic] = Field(description="newest first")


class InclusionProof(BaseModel):
    """Proof that a payout is in a batch whose root is public (RFC 6962 audit path)."""

    payout_id: UUID
    batch_id: UUID
    chain: Chain
    address: str
    amount_micro: int
    position: int
    count: int
    proof: list[str] = Field(description="hashes from the leaf's sibling to the root's child, hex")
    merkle_root: str
    tx: str | None


class StatementLine(BaseModel):
    """One movement of your earnings."""

    id: UUID
    kind: str
    amount: str
    amount_nano: str
    model: str | None
    tokens: int | None
    withdrawal_id: UUID | None
    batch_id: UUID | None
    tx: str | None


class Statement(BaseModel):
    """Your statement and what settled demand says of the days to come."""

    data: list[StatementLine]
    has_more: bool
    forecast_days: int
    forecast_earned_nano: str = Field(description="earned in the last `forecast_days` days")
    forecast_per_day_nano: str


class ChainCoverBody(BaseModel):
    """One chain's escrow against what is to be paid from it; nano-dollars."""

    chain: Chain
    escrow_nano: str
    in_flight_nano: str
    requested_nano: str
    left_nano: str


class Rebalancing(BaseModel):
    """USDC that people moved into an escrow."""

    model_config = ConfigDict(extra="forbid")

    source: Chain | Literal["card"] = Field(
        description="whose escrow it left; `card`: bought with card money"
    )
    target: Chain = Field(description="whose escrow it arrived in")
    arrived: Annotated[str, Field(min_length=1, max_length=200, description="the deposit's key there")]
    amount_micro: Annotated[int, Field(gt=0, le=10**15, description="exactly what that deposit brought")]
    fee_micro: Annotated[int, Field(ge=0, le=10**15, description="left too, kept on the way")] = 0
    ref: Annotated[str, Field(min_length=1, max_length=200, description="the movement's own name")]
    reason: Annotated[str, Field(min_length=1, max_length=800)]


class CoverBody(BaseModel):
    """The treasury."""

    chains: list[ChainCoverBody]
    matured_nano: str
    maturing_nano: str
    broken: list[str]
    warnings: list[str]


@router.get("/transparency", tags=["public"])
async def get_transparency(services: ServicesDep) -> Transparency:
    """Chains, USDC contracts, escrow and multisig addresses, and the newest batches.  No credential."""
    async with transaction(services.engine) as conn:
        found = await batches.listing(conn, limit=PUBLIC_BATCHES)
        paid = await batches.final_transactions(conn, [batch.id for batch in found])
    evm = ((Chain.ETHEREUM, services.chains.ethereum), (Chain.BASE, services.chains.base))
    named = [
        ChainPublic(
            chain=chain,
            chain_id=config.chain_id,
            usdc=config.usdc,
            multisig=config.escrow,
            escrow=config.escrow,
            signers=list(config.signers),
            threshold=config.threshold,
        )
        for chain, config in evm
    ]
    solana = services.chains.solana
    named.append(
        ChainPublic(
            chain=Chain.SOLANA,
            chain_id=None,
            usdc=solana.usdc_mint,
            multisig=solana.multisig,
            escrow=solana.escrow,
            signers=list(solana.signers),
            threshold=solana.threshold,
        )
    )
    return Transparency(
        chains=named,
        batches=[BatchPublic.of(batch, paid.get(batch.id)) for batch in found],
    )


@router.get(
    "/transparency/batches/{batch_id}",
    responses={404: {"model": RefusalOut, "description": "no such batch"}},
    tags=["public"],
)
async def get_public_batch(services: ServicesDep, batch_id: UUID) -> BatchPublic:
    """One batch of any age, to check a payout's inclusion proof against.  No credential."""
    async with transaction(services.engine) as conn:
        try:
            batch = await batches.find_batch(conn, batch_id)
        except NotFound as e:
            raise Refusal(404, e.code, str(e)) from e
        paid = await batches.final_transactions(conn, [batch_id])
    return BatchPublic.of(batch, paid.get(batch_id))


@router.get(
    "/withdrawals/{withdrawal_id}/proof",
    responses={**_GUARDED, 404: {"model": RefusalOut, "description": "not yours, or not in a batch"}},
    tags=["operators"],
)
async def prove_inclusion(
    services: ServicesDep, identity: AccountIdentity, withdrawal_id: UUID
) -> InclusionProof:
    """Prove that your payout is in its batch; compare the root with the public one."""
    async with transaction(services.engine) as conn:
        batch_id = await batches.batch_of(conn, person=identity.person_id, withdrawal_id=withdrawal_id)
        if batch_id is None:
            raise Refusal(404, "not_found", "you have no such withdrawal in a batch")
        batch = await batches.find_batch(conn, batch_id)
        joined = await batches.members(conn, batch_id)
        paid = await batches.final_transactions(conn, [batch_id])
    mine = next(member for member in joined if member.withdrawal_id == withdrawal_id)
    return InclusionProof(
        payout_id=mine.payout_id,
        batch_id=batch_id,
        chain=batch.chain,
        address=mine.address,
        amount_micro=mine.amount.n,
        position=mine.position,
        count=batch.count,
        proof=[step.hex() for step in merkle_proof(batches.lines_of(joined), mine.position)],
        merkle_root=batch.merkle_root.hex(),
        tx=paid.get(batch_id),
    )


@router.get("/earnings/statement", responses=_GUARDED, tags=["operators"])
async def get_statement(
    services: ServicesDep,
    identity: AccountIdentity,
    before: Annotated[UUID | None, Query(description="only movements older than this id")] = None,
    limit: Annotated[int, Query(ge=1, le=statement.LINES_MAX)] = 100,
) -> Statement:
    """Every movement of your earnings, newest first: request, batch, transaction."""
    async with transaction(services.engine) as conn:
        found = await statement.lines(conn, identity.person_id, before=before, limit=limit)
        coming = await statement.forecast(conn, identity.person_id, now=services.clock.now())
    return Statement(
        data=[
            StatementLine(
                id=line.id,
                kind=line.kind,
                amount=dollars(line.amount),
                amount_nano=str(line.amount.n),
                model=line.model,
                tokens=line.tokens,
                withdrawal_id=line.withdrawal_id,
                batch_id=line.batch_id,
                tx=line.tx,
            )
            for line in found
        ],
        has_more=len(found) == limit,
        forecast_days=coming.days,
        forecast_earned_nano=str(coming.earned.n),
        forecast_per_day_nano=str(coming.per_day.n),
    )


@router.get("/treasury", responses=_GUARDED, tags=["settlement"])
async def get_treasury(services: ServicesDep, identity: AdminIdentity) -> CoverBody:
    """Escrows against payouts due and earnings maturing; what is broken and what will be short."""
    del identity
    async with transaction(services.engine) as conn:
        cover = await treasury.read_cover(
            conn, now=services.clock.now(), reserve=Reserve.of(services.settings)
        )
    return CoverBody(
        chains=[
            ChainCoverBody(
                chain=c.chain,
                escrow_nano=str(c.escrow.n),
                in_flight_nano=str(c.in_flight.n),
                requested_nano=str(c.requested.n),
                left_nano=str(c.left.n),
            )
            for c in cover.chains
        ],
        matured_nano=str(cover.matured.n),
        maturing_nano=str(cover.maturing.n),
        broken=list(cover.broken()),
        warnings=list(cover.warnings()),
    )


@router.post(
    "/treasury/rebalancings",
    status_code=204,
    responses=errors(
        s409="it has not arrived, is somebody's, is another amount, or is booked; the source has less"
    ),
    tags=["settlement"],
)
async def book_rebalancing(services: ServicesDep, identity: AdminIdentity, body: Rebalancing) -> None:
    """Book USDC moved between escrows, or bought with card money, once it has arrived; twice is once."""
    async with work(services) as conn:
        await treasury.rebalance(
            conn,
            source=body.source,
            target=body.target,
            arrived=body.arrived,
            amount=Micro(body.amount_micro),
            fee=Micro(body.fee_micro),
            ref=body.ref,
            actor=actor_of(identity),
            reason=body.reason,
            now=services.clock.now(),
        )
