"""What the marketplace asks of a node that wants to serve a model; `tollway-node doctor` compares."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from sqlalchemy import text

from marketplace.platform.database import transaction
from marketplace.platform.http import Refusal, RefusalOut, ServicesDep

router = APIRouter(tags=["nodes"])

_MODEL = text("SELECT name, context, tokenizer_sha256 FROM models WHERE name = :name AND retired_at IS NULL")


class Requirements(BaseModel):
    """What every node of a model has in common."""

    model: str
    context: int = Field(description="Tokens, prompt and completion together, as the model was listed")
    tokenizer_sha256: str = Field(
        description="SHA-256 of (SHA-256 of tokenizer.json, JSON of [chat template, special tokens])"
    )


@router.get(
    "/api/nodes/requirements",
    responses={404: {"model": RefusalOut, "description": "no model of this name is sold here"}},
)
async def get_requirements(
    services: ServicesDep, model: Annotated[str, Query(min_length=1, max_length=200)]
) -> Requirements:
    """Tokenizer and context the marketplace counts this model with.  No credential."""
    async with transaction(services.engine) as connection:
        row = (await connection.execute(_MODEL, {"name": model})).one_or_none()
    if row is None:
        raise Refusal(404, "model_not_found", f"no model is named {model!r}", param="model")
    return Requirements(model=row.name, context=row.context, tokenizer_sha256=row.tokenizer_sha256)
