"""Aliases over HTTP: what they stand for, for everybody; changing them, for administrators."""

from __future__ import annotations

from typing import Annotated, Any, Final

import structlog
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from marketplace.catalog import aliases
from marketplace.catalog.models import CatalogError
from marketplace.platform.database import transaction
from marketplace.platform.http import AdminIdentity, Refusal, RefusalOut, ServicesDep

router = APIRouter(tags=["models"])
_log = structlog.get_logger()

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": RefusalOut} for status in (400, 401, 403, 404, 429, 503)
}


class AliasOut(BaseModel):
    alias: str
    models: list[str] = Field(description="Tried in this order; the first that can serve just now answers")


class AliasesOut(BaseModel):
    data: list[AliasOut]


class AliasRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    models: list[ModelName] = Field(min_length=1, max_length=aliases.MODELS_MAX)


@router.get("/v1/aliases", responses={429: {"model": RefusalOut}})
async def list_aliases(services: ServicesDep) -> AliasesOut:
    """Names that stand for models."""
    async with services.engine.connect() as connection:
        found = await aliases.list_aliases(connection)
    return AliasesOut(data=[AliasOut(alias=alias, models=list(models)) for alias, models in found.items()])


@router.put("/api/admin/aliases/{alias}", responses=_REFUSALS)
async def set_alias(
    alias: ModelName, asked: AliasRequest, services: ServicesDep, identity: AdminIdentity
) -> AliasOut:
    """Let a name stand for these models, in force at every gateway within 3 s."""
    try:
        async with transaction(services.engine) as connection:
            await aliases.set_alias(connection, alias, asked.models)
    except CatalogError as e:
        raise Refusal(400, "invalid_alias", str(e), param="models") from e
    _log.info("alias set", alias=alias, models=asked.models, actor=str(identity.person_id))
    return AliasOut(alias=alias, models=asked.models)


@router.delete("/api/admin/aliases/{alias}", status_code=204, responses=_REFUSALS)
async def drop_alias(alias: ModelName, services: ServicesDep, identity: AdminIdentity) -> None:
    """Forget an alias."""
    async with transaction(services.engine) as connection:
        was_there = await aliases.drop_alias(connection, alias)
    if not was_there:
        raise Refusal(404, "alias_not_found", f"no alias is named {alias!r}")
    _log.info("alias dropped", alias=alias, actor=str(identity.person_id))
