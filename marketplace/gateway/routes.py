"""The gateway's ordinary routes: what can be bought, what was used, what is left."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from marketplace.gateway.ports import ModelFacts
from marketplace.ledger import usage as ledger_usage
from marketplace.ledger.accounts import buyer as buyer_account
from marketplace.ledger.accounts import find_account, operator_earnings, read_balance
from marketplace.ledger.charges import Charge
from marketplace.ledger.money import Nano, dollars
from marketplace.platform.http import AccountIdentity, Refusal, RefusalOut, ServicesDep
from marketplace.routing.choice import Exclusion, Question, exclusion
from marketplace.routing.registry import Registry

router = APIRouter()
REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": RefusalOut},
    403: {"model": RefusalOut},
    429: {"model": RefusalOut},
}


class OfferOut(BaseModel):
    """One operator's offer of a model."""

    node: str
    operator: str = Field(description="Whose node it is; `provider` preferences name it")
    price_in: str = Field(description="Dollars per million prompt tokens, decimal string")
    price_out: str = Field(description="Dollars per million completion tokens, decimal string")
    is_healthy: bool = Field(description="Would be asked now, if it has room")
    running: int
    capacity: int


class ModelOut(BaseModel):
    """A model, as OpenAI lists it, with what buyers compare."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["tollway"] = "tollway"
    context_length: int
    price_in: str | None = Field(description="Lowest price on offer now, dollars per million prompt tokens")
    price_out: str | None = Field(
        description="Lowest price on offer now, dollars per million completion tokens"
    )
    offers: list[OfferOut]


class ModelsOut(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelOut]


def _model_out(model: ModelFacts, registry: Registry) -> ModelOut:
    views = registry.views(model.name)
    question = Question(views, registry.now_ms, random=0)
    healthy = [view for view in views if exclusion(view, question) in {None, Exclusion.FULL}]
    return ModelOut(
        id=model.name,
        created=model.created_s,
        context_length=model.context,
        price_in=dollars(Nano(min(view.price_in for view in healthy))) if healthy else None,
        price_out=dollars(Nano(min(view.price_out for view in healthy))) if healthy else None,
        offers=[
            OfferOut(
                node=view.node_id,
                operator=view.operator_id,
                price_in=dollars(Nano(view.price_in)),
                price_out=dollars(Nano(view.price_out)),
                is_healthy=view in healthy,
                running=view.running,
                capacity=view.capacity,
            )
            for view in views
        ],
    )


@router.get("/v1/models", tags=["inference"])
async def list_models(request: Request) -> ModelsOut:
    """Every model on offer, with its operators' prices."""
    shelf, registry = request.app.state.shelf, request.app.state.registry
    return ModelsOut(data=[_model_out(model, registry) for model in shelf.models()])


@router.get("/v1/models/{name:path}", tags=["inference"], responses={404: {"model": RefusalOut}})
async def one_model(request: Request, name: str) -> ModelOut:
    """One model by name; of an alias, the first it stands for."""
    shelf, registry = request.app.state.shelf, request.app.state.registry
    found = shelf.resolve(name)
    if not found:
        raise Refusal(404, "model_not_found", f"no model is named {name!r}", param="model")
    return _model_out(found[0], registry)


class BalanceOut(BaseModel):
    """A buyer's money, decimal strings in dollars; `available` is what new requests may spend."""

    posted: str
    held: str = Field(description="Set aside for requests being served")
    available: str
    available_nano: int
    earnings: str = Field(description="What this person has earned as an operator and not withdrawn")


@router.get("/api/balance", tags=["account"], responses=REFUSALS)
async def balance(identity: AccountIdentity, services: ServicesDep) -> BalanceOut:
    """What is left to spend."""
    person = str(identity.person_id)
    async with services.engine.connect() as connection:
        spending = await read_balance(connection, buyer_account(person))
        earnings = await read_balance(connection, operator_earnings(person))
    zero = Nano(0)
    posted = spending.posted if spending else zero
    held = spending.held if spending else zero
    return BalanceOut(
        posted=dollars(posted),
        held=dollars(held),
        available=dollars(posted - held),
        available_nano=(posted - held).n,
        earnings=dollars(earnings.posted if earnings else zero),
    )


class UsageRow(BaseModel):
    """One request: what it was, who served it, what it cost."""

    id: UUID
    timestamp: datetime
    model: str
    status: int
    prompt_tokens: int
    completion_tokens: int
    counted_by: str
    cost: str = Field(description="Dollars, decimal string")
    cost_nano: int
    operator_nano: int
    platform_nano: int
    price_version: int
    node: UUID | None
    key_id: UUID | None
    latency_ms: int
    ttft_ms: int | None
    finish_reason: str | None
    stream: bool


class UsageOut(BaseModel):
    data: list[UsageRow]
    next_before: UUID | None = Field(description="Give this as `before` for the next page; null at the end")


def _usage_row(charge: Charge) -> UsageRow:
    return UsageRow(
        id=charge.id,
        timestamp=charge.made_at,
        model=charge.model,
        status=charge.status,
        prompt_tokens=charge.tok_in,
        completion_tokens=charge.tok_out,
        counted_by=charge.counted_by.name.lower(),
        cost=dollars(charge.amount),
        cost_nano=charge.amount.n,
        operator_nano=(charge.amount - charge.fee).n,
        platform_nano=charge.fee.n,
        price_version=charge.price_version,
        node=charge.node,
        key_id=charge.key_id,
        latency_ms=charge.latency_ms,
        ttft_ms=charge.ttft_ms,
        finish_reason=charge.finish,
        stream=charge.stream,
    )


@router.get("/api/usage", tags=["account"], responses={**REFUSALS, 400: {"model": RefusalOut}})
async def usage(
    identity: AccountIdentity,
    services: ServicesDep,
    limit: Annotated[int, Query(ge=1, le=ledger_usage.PAGE_ROWS_MAX)] = 100,
    before: UUID | None = None,
    model: Annotated[str | None, Query(max_length=200)] = None,
    key_id: UUID | None = None,
    node: UUID | None = None,
    status: Annotated[int | None, Query(ge=100, le=599)] = None,
    since: datetime | None = None,
    until: datetime | None = None,
    role: Literal["buyer", "operator"] = "buyer",
) -> UsageOut:
    """The caller's requests (or, as an operator, those served), newest first, by keyset."""
    person = str(identity.person_id)
    if (since is not None and since.tzinfo is None) or (until is not None and until.tzinfo is None):
        raise Refusal(400, "invalid_request", "since and until need a time zone, such as a trailing Z")
    account = buyer_account(person) if role == "buyer" else operator_earnings(person)
    async with services.engine.connect() as connection:
        account_id = await find_account(connection, account)
        if account_id is None:
            return UsageOut(data=[], next_before=None)
        selection = ledger_usage.Selection(
            buyer=account_id if role == "buyer" else None,
            operator=account_id if role == "operator" else None,
            model=model,
            key_id=key_id,
            node=node,
            status=status,
            since=since,
            until=until,
        )
        charges = await ledger_usage.page(connection, selection, limit=limit, before=before)
    return UsageOut(
        data=[_usage_row(charge) for charge in charges],
        next_before=charges[-1].id if len(charges) == limit else None,
    )
