"""The gateway's ordinary routes: what can be bought, what was used, what is left."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from marketplace.gateway.ports import ModelFacts
from marketplace.ledger.accounts import buyer as buyer_account
from marketplace.ledger.accounts import operator_earnings, read_balance
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
