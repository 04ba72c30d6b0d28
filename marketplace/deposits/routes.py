"""A person's deposit addresses, payment links and deposits."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.networks import EVM_NETWORKS, SOLANA, Chain
from chain.units import MICRO_MAX, Micro, parse_usdc
from marketplace.deposits.addresses import create_intent, evm_address, shared_forwarders, solana_address
from marketplace.deposits.errors import TooManyIntents
from marketplace.deposits.tables import chain_cursors, deposits
from marketplace.ledger.money import NANO_PER_MICRO
from marketplace.platform.database import transaction
from marketplace.platform.http import AccountIdentity, Refusal, ServicesDep

PAGE_MAX: Final = 200

router: Final = APIRouter(prefix="/api", tags=["deposits"])


class ErrorDetail(BaseModel):
    """Why a request was declined."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every refusal's body."""

    error: ErrorDetail


class DepositAddress(BaseModel):
    """Where to send USDC on one chain."""

    chain: Chain
    address: str | None = Field(description="null while a Solana address is being made: ask again in seconds")
    token: str = Field(description="the USDC contract (EVM) or mint (Solana); nothing else is credited")
    minimum: str = Field(description="decimal USDC; smaller deposits wait until their sum reaches it")
    minimum_micro: int
    expected_finality_s: int = Field(description="how long a deposit usually takes to become final")


class DepositAddresses(BaseModel):
    """One entry per chain."""

    data: list[DepositAddress]


class NewIntent(BaseModel):
    """A payment link to make."""

    model_config = ConfigDict(extra="forbid")

    chain: Literal[Chain.SOLANA] = Chain.SOLANA
    amount: Annotated[str, Field(pattern=r"^[0-9]{1,12}(\.[0-9]{1,6})?$", examples=["25.00"])] | None = Field(
        default=None, description="decimal USDC; absent = the payer chooses"
    )


class DepositIntent(BaseModel):
    """A Solana Pay link of one's own."""

    chain: Chain
    reference: str
    url: str = Field(description="solana: URL of the Solana Pay transfer request")
    amount_micro: int | None
    expires_at: datetime


class DepositItem(BaseModel):
    """One inbound transfer."""

    id: UUID
    chain: Chain
    tx: str
    amount: str = Field(description="decimal USDC")
    amount_micro: int
    status: Literal["seen", "final", "orphaned"]
    confirmations: int = Field(description="blocks from the deposit's to the chain's newest, both included")
    is_credited: bool = Field(description="false on a final deposit: it waits for the minimum to be reached")
    credited_nano: int = Field(description="nano-dollars added to the balance; 0 until credited")
    seen_at: datetime
    final_at: datetime | None
    credited_at: datetime | None


class Deposits(BaseModel):
    """Newest first."""

    data: list[DepositItem]
    next_before: UUID | None = Field(description="give it as `before` for the next page; null on the last")


_ERRORS: Final[dict[int | str, dict[str, object]]] = {
    400: {"model": ErrorBody},
    401: {"model": ErrorBody},
    403: {"model": ErrorBody},
    429: {"model": ErrorBody},
}


@router.get("/deposit-addresses", responses=_ERRORS)
async def deposit_addresses(identity: AccountIdentity, services: ServicesDep) -> DepositAddresses:
    """Give the caller's own address on each chain, making it on first request."""
    settings, now = services.settings, services.clock.now()
    secret = settings.secret.get_secret_value().encode()
    async with transaction(services.engine) as conn:
        evm = await evm_address(
            conn, shared_forwarders(services.chains), identity.person_id, secret=secret, now=now
        )
        solana = await solana_address(conn, identity.person_id, now=now)
    minimum = Micro(settings.deposit_micro_min)

    def entry(chain: Chain, address: str | None, token: str, finality_s: int) -> DepositAddress:
        return DepositAddress(
            chain=chain,
            address=address,
            token=token,
            minimum=str(minimum),
            minimum_micro=minimum.n,
            expected_finality_s=finality_s,
        )

    entries = [entry(n.chain, evm, n.usdc, n.expected_finality_s) for n in EVM_NETWORKS.values()]
    entries.append(entry(Chain.SOLANA, solana, SOLANA.usdc_mint, SOLANA.expected_finality_s))
    return DepositAddresses(data=entries)


@router.post("/deposit-intents", status_code=201, responses=_ERRORS)
async def new_deposit_intent(
    body: NewIntent, identity: AccountIdentity, services: ServicesDep
) -> DepositIntent:
    """Make a Solana Pay link whose payments are credited to the caller, straight into the escrow."""
    amount = _parse_amount(body.amount)
    try:
        async with transaction(services.engine) as conn:
            made = await create_intent(
                conn, services.chains, identity.person_id, amount, now=services.clock.now()
            )
    except TooManyIntents as e:
        raise Refusal(429, "too_many_intents", str(e), retry_after_s=60) from e
    return DepositIntent(
        chain=Chain.SOLANA,
        reference=made.reference,
        url=made.url,
        amount_micro=amount.n if amount else None,
        expires_at=made.expires_at,
    )


@router.get("/deposits", responses=_ERRORS)
async def list_deposits(
    identity: AccountIdentity,
    services: ServicesDep,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 50,
    before: UUID | None = None,
) -> Deposits:
    """List the caller's deposits, from the moment they are seen in a block."""
    statement = (
        select(deposits)
        .where(deposits.c.person_id == identity.person_id)
        .order_by(deposits.c.id.desc())
        .limit(limit + 1)
    )
    if before is not None:
        statement = statement.where(deposits.c.id < before)
    async with transaction(services.engine) as conn:
        heads = await _heads(conn)
        rows = (await conn.execute(statement)).all()
    items = [
        DepositItem(
            id=row.id,
            chain=Chain(row.chain),
            tx=row.tx,
            amount=str(Micro(row.amount_micro)),
            amount_micro=row.amount_micro,
            status=row.status,
            confirmations=_confirmations(row.status, row.height, heads.get(row.chain, row.height)),
            is_credited=row.credited_at is not None,
            credited_nano=row.amount_micro * NANO_PER_MICRO if row.credited_at is not None else 0,
            seen_at=row.seen_at,
            final_at=row.final_at,
            credited_at=row.credited_at,
        )
        for row in rows[:limit]
    ]
    return Deposits(data=items, next_before=items[-1].id if len(rows) > limit else None)


def _confirmations(status: str, height: int, head: int) -> int:
    return 0 if status == "orphaned" else max(1, head - height + 1)


async def _heads(conn: AsyncConnection) -> dict[str, int]:
    rows = await conn.execute(select(chain_cursors.c.chain, chain_cursors.c.head_height))
    return {row.chain: row.head_height for row in rows}


def _parse_amount(text: str | None) -> Micro | None:
    if text is None:
        return None
    try:
        amount = parse_usdc(text)
    except (ValueError, TypeError) as e:
        raise Refusal(400, "invalid_amount", f"amount: {e}", param="amount") from e
    if not 0 < amount.n <= MICRO_MAX // NANO_PER_MICRO:
        raise Refusal(400, "invalid_amount", "amount: must be above zero", param="amount")
    return amount
