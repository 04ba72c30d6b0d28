"""Aliases: names that stand for models, in the order in which they are tried.

A buyer asks for `fast` and gets the first of its models that can be served just now; the answer names the
model that wrote it, and that one's prices hold.  A model's own name always means that model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.catalog.models import CatalogError
from marketplace.catalog.tables import model_aliases, models

MODELS_MAX: Final = 16


async def set_alias(connection: AsyncConnection, alias: str, names: Sequence[str]) -> None:
    """Let `alias` stand for these models; CatalogError if one is unknown or the alias is a model's name."""
    if not 1 <= len(names) <= MODELS_MAX or len(set(names)) != len(names):
        raise CatalogError(f"an alias stands for one to {MODELS_MAX} different models")
    known = set(await connection.scalars(select(models.c.name).where(models.c.retired_at.is_(None))))
    if alias in known:
        raise CatalogError(f"{alias} is a model")
    if missing := [name for name in names if name not in known]:
        raise CatalogError(f"no model is named {', '.join(missing)}")
    values = {"models": list(names), "changed_at": func.now()}
    await connection.execute(
        insert(model_aliases)
        .values(alias=alias, **values)
        .on_conflict_do_update(index_elements=["alias"], set_=values)
    )


async def drop_alias(connection: AsyncConnection, alias: str) -> bool:
    """Forget an alias; False if there is none."""
    dropped = await connection.execute(delete(model_aliases).where(model_aliases.c.alias == alias))
    return bool(dropped.rowcount)


async def list_aliases(connection: AsyncConnection) -> dict[str, tuple[str, ...]]:
    """Every alias and its models, in order."""
    rows = await connection.execute(select(model_aliases).order_by(model_aliases.c.alias))
    return {row.alias: tuple(row.models) for row in rows}
