"""A person's deposit addresses, payment links and deposits."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Path, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chain.networks import EVM_NETWORKS, SOLANA, Chain, EvmNetwork
from chain.units import Micro, parse_usdc
from marketplace.deposits.addresses import (
    create_intent,
    evm_address,
    intent_url,
    shared_forwarders,
    solana_address,
)
from marketplace.deposits.decisions import CASES_MAX, attribute_deposit, leave_deposit, open_cases
from marketplace.deposits.errors import NoDecision, TooManyIntents
from marketplace.deposits.qr import qr_svg
from marketplace.deposits.tables import chain_cursors, deposits
from marketplace.ledger.money import NANO_PER_MICRO
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.platform.http import (
    AccountIdentity,
    AdminIdentity,
    Refusal,
    RefusalOut,
    Services,
    ServicesDep,
    require_another,
)

PAGE_MAX: Final = 200
STREAMED: Final = 20
STREAMS_MAX: Final = 200
"""Of one process: each asks the database every STREAM_POLL_S seconds."""
STREAMS_OF_A_PERSON_MAX: Final = 8
"""Of one process: his browser's tabs, and nobody else's share."""
STREAM_POLL_S: Final = 1.0
STREAM_BEAT_S: Final = 15.0
STREAM_S_MAX: Final = 600.0
_open_streams: Final = Counter[UUID]()

Reference = Annotated[str, Path(pattern=r"^[1-9A-HJ-NP-Za-km-z]{32,44}$", description="base58")]

router: Final = APIRouter(prefix="/api", tags=["deposits"])


class DepositAddress(BaseModel):
    """Where to send USDC on one chain."""

    chain: Chain
    address: str | None = Field(description="null while a Solana address is being made: ask again in seconds")
    token: str = Field(description="the USDC contract (EVM) or mint (Solana); nothing else is credited")
    minimum: str = Field(description="decimal USDC; smaller deposits wait until their sum reaches it")
    minimum_micro: int
    expected_finality_s: int = Field(description="how long a deposit usually takes to become final")
    link: str | None = Field(description="for a wallet: EIP-681 (EVM) or Solana Pay; null with the address")
    qr: str | None = Field(description="path of the link's QR code (SVG); with ?of=address, of the address")


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
    qr: str = Field(description="path of the link's QR code (SVG)")


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
    is_held: bool = Field(description="became final while the account was frozen: a person decides")
    expected_final_at: datetime | None = Field(description="about when it should be final; null once it is")
    credited_nano: int = Field(description="nano-dollars added to the balance; 0 until credited")
    seen_at: datetime
    final_at: datetime | None
    credited_at: datetime | None


class Deposits(BaseModel):
    """Newest first."""

    data: list[DepositItem]
    next_before: UUID | None = Field(description="give it as `before` for the next page; null on the last")


_ERRORS: Final[dict[int | str, dict[str, object]]] = {
    400: {"model": RefusalOut},
    401: {"model": RefusalOut},
    403: {"model": RefusalOut},
    429: {"model": RefusalOut},
}

_SVG: Final[dict[int | str, dict[str, object]]] = {
    200: {"content": {"image/svg+xml": {}}},
    404: {"model": RefusalOut},
}


@router.get("/deposit-addresses", responses=_ERRORS)
async def deposit_addresses(identity: AccountIdentity, services: ServicesDep) -> DepositAddresses:
    """Give the caller's own address on each chain, making it on first request."""
    return DepositAddresses(data=await _addresses(services, identity.person_id))


@router.get("/deposit-addresses/{chain}/qr.svg", responses=_ERRORS | _SVG, response_class=Response)
async def deposit_address_qr(
    chain: Chain, identity: AccountIdentity, services: ServicesDep, of: Literal["link", "address"] = "link"
) -> Response:
    """Draw the QR code of the caller's own payment link, or bare address, on one chain."""
    (entry,) = [e for e in await _addresses(services, identity.person_id) if e.chain is chain]
    shown = entry.link if of == "link" else entry.address
    if shown is None:
        raise Refusal(404, "no_address_yet", "a Solana address is being made: ask again", retry_after_s=5)
    return await _drawn(shown)


async def _drawn(text: str) -> Response:
    svg = await asyncio.to_thread(qr_svg, text)
    return Response(svg, media_type="image/svg+xml", headers={"Cache-Control": "private, max-age=300"})


async def _addresses(services: Services, person_id: UUID) -> list[DepositAddress]:
    settings, now = services.settings, services.clock.now()
    secret = settings.secret.get_secret_value().encode()
    async with transaction(services.engine) as conn:
        evm = await evm_address(conn, shared_forwarders(services.chains), person_id, secret=secret, now=now)
        solana = await solana_address(conn, person_id, now=now)
    minimum = Micro(settings.deposit_micro_min)

    def entry(
        chain: Chain, address: str | None, token: str, finality_s: int, link: str | None
    ) -> DepositAddress:
        return DepositAddress(
            chain=chain,
            address=address,
            token=token,
            minimum=str(minimum),
            minimum_micro=minimum.n,
            expected_finality_s=finality_s,
            link=link,
            qr=f"/api/deposit-addresses/{chain}/qr.svg" if link else None,
        )

    entries = [
        entry(n.chain, evm, n.usdc, n.expected_finality_s, eip681_link(n, evm)) for n in EVM_NETWORKS.values()
    ]
    pay = f"solana:{solana}?spl-token={SOLANA.usdc_mint}" if solana else None
    entries.append(entry(Chain.SOLANA, solana, SOLANA.usdc_mint, SOLANA.expected_finality_s, pay))
    return entries


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
        qr=f"/api/deposit-intents/{made.reference}/qr.svg",
    )


@router.get("/deposit-intents/{reference}/qr.svg", responses=_ERRORS | _SVG, response_class=Response)
async def deposit_intent_qr(
    reference: Reference, identity: AccountIdentity, services: ServicesDep
) -> Response:
    """Draw the QR code of a payment link of the caller's own."""
    async with transaction(services.engine) as conn:
        url = await intent_url(conn, services.chains, identity.person_id, reference, now=services.clock.now())
    if url is None:
        raise Refusal(404, "no_such_intent", "no open payment link of yours has this reference")
    return await _drawn(url)


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
    items = _items(rows[:limit], heads)
    return Deposits(data=items, next_before=items[-1].id if len(rows) > limit else None)


@router.get(
    "/deposits/stream",
    responses=_ERRORS | {200: {"content": {"text/event-stream": {}}}, 503: {"model": RefusalOut}},
    response_class=StreamingResponse,
)
async def stream_deposits(identity: AccountIdentity, services: ServicesDep) -> StreamingResponse:
    """Tell changes of the caller's newest deposits as they happen: `event: deposit`, data as in the list.

    The newest are told at once; ends after STREAM_S_MAX seconds (connect again).
    """
    if _open_streams[identity.person_id] >= STREAMS_OF_A_PERSON_MAX:
        raise Refusal(429, "too_many_streams", "close one of your other status streams", retry_after_s=30)
    if _open_streams.total() >= STREAMS_MAX:
        raise Refusal(
            503, "too_many_streams", "too many status streams are open; poll instead", retry_after_s=30
        )
    return StreamingResponse(
        _changes(services.engine, services.clock, identity.person_id), media_type="text/event-stream"
    )


async def _changes(engine: AsyncEngine, clock: Clock, person_id: UUID) -> AsyncIterator[str]:
    statement = (
        select(deposits)
        .where(deposits.c.person_id == person_id)
        .order_by(deposits.c.id.desc())
        .limit(STREAMED)
    )
    told: dict[UUID, DepositItem] = {}
    _open_streams[person_id] += 1
    try:
        ends_at = clock.monotonic() + STREAM_S_MAX
        quiet_s = 0.0
        while clock.monotonic() < ends_at:
            async with transaction(engine) as conn:
                heads = await _heads(conn)
                rows = (await conn.execute(statement)).all()
            fresh = [item for item in reversed(_items(rows, heads)) if told.get(item.id) != item]
            for item in fresh:
                told[item.id] = item
                yield f"event: deposit\ndata: {item.model_dump_json()}\n\n"
            quiet_s = 0.0 if fresh else quiet_s + STREAM_POLL_S
            if quiet_s >= STREAM_BEAT_S:
                quiet_s = 0.0
                yield ": still here\n\n"
            await asyncio.sleep(STREAM_POLL_S)
    finally:
        _open_streams[person_id] -= 1
        if not _open_streams[person_id]:
            del _open_streams[person_id]


def eip681_link(network: EvmNetwork, address: str) -> str:
    """Write a wallet link that transfers USDC (EIP-681); the payer chooses the amount."""
    return f"ethereum:{network.usdc}@{network.chain_id}/transfer?address={address}"


def _items(rows: Sequence[Row[Any]], heads: dict[str, int]) -> list[DepositItem]:
    return [
        DepositItem(
            id=row.id,
            chain=Chain(row.chain),
            tx=row.tx,
            amount=str(Micro(row.amount_micro)),
            amount_micro=row.amount_micro,
            status=row.status,
            confirmations=_confirmations(row.status, row.height, heads.get(row.chain, row.height)),
            is_credited=row.credited_at is not None,
            is_held=row.is_held,
            expected_final_at=_expected_final_at(row),
            credited_nano=row.amount_micro * NANO_PER_MICRO if row.credited_at is not None else 0,
            seen_at=row.seen_at,
            final_at=row.final_at,
            credited_at=row.credited_at,
        )
        for row in rows
    ]


def _expected_final_at(row: Row[Any]) -> datetime | None:
    if row.status != "seen":
        return None
    expected: datetime = row.seen_at + timedelta(seconds=_finality_s(Chain(row.chain)))
    return expected


def _finality_s(chain: Chain) -> int:
    return EVM_NETWORKS[chain].expected_finality_s if chain.is_evm else SOLANA.expected_finality_s


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
    if amount.n == 0:
        raise Refusal(400, "invalid_amount", "amount: must be above zero", param="amount")
    return amount


# ── for administrators ────────────────────────────────────────────────────────────────────────────────


class SupportCase(BaseModel):
    """Something a person should look at."""

    id: UUID
    kind: str
    chain: Chain
    key: str
    detail: str
    created_at: datetime


class SupportCases(BaseModel):
    """Undecided ones, newest first."""

    data: list[SupportCase]
    next_before: UUID | None = Field(description="give it as `before` for the next page; null on the last")


class Decision(BaseModel):
    """What is decided about a deposit that nobody was credited for."""

    model_config = ConfigDict(extra="forbid")

    chain: Chain
    key: Annotated[str, Field(min_length=1, max_length=200)]
    person_id: UUID | None = Field(default=None, description="who gets it; null leaves it where it is")
    reason: Annotated[str, Field(min_length=1, max_length=1000)]


@router.get("/admin/deposit-cases", responses=_ERRORS)
async def list_cases(
    identity: AdminIdentity,
    services: ServicesDep,
    kind: Annotated[str | None, Query(max_length=60, description="only these, such as chain_halted")] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = CASES_MAX,
    before: UUID | None = None,
) -> SupportCases:
    """List what waits for a person's decision."""
    del identity
    async with transaction(services.engine) as conn:
        rows = await open_cases(conn, kind=kind, before=before, limit=limit + 1)
    return SupportCases(
        data=[
            SupportCase(
                id=row.id,
                kind=row.kind,
                chain=Chain(row.chain),
                key=row.key,
                detail=row.detail,
                created_at=row.created_at,
            )
            for row in rows[:limit]
        ],
        next_before=rows[limit - 1].id if len(rows) > limit else None,
    )


@router.post("/admin/deposit-decisions", status_code=204, responses=_ERRORS | {409: {"model": RefusalOut}})
async def decide(body: Decision, identity: AdminIdentity, services: ServicesDep) -> None:
    """Give a deposit to somebody else, or leave it; a fact with actor and reason."""
    if body.person_id is not None:
        require_another(identity, body.person_id)
    actor, now = str(identity.person_id), services.clock.now()
    try:
        async with transaction(services.engine) as conn:
            if body.person_id is None:
                await leave_deposit(conn, body.chain, body.key, actor=actor, reason=body.reason, now=now)
            else:
                await attribute_deposit(
                    conn, body.chain, body.key, body.person_id, actor=actor, reason=body.reason, now=now
                )
    except NoDecision as e:
        raise Refusal(409, "no_decision", str(e)) from e
