"""Price versions: what a node asked for a model, from when.

Rows are only ever added; a charge names the version it was priced by, so a price raised between
admission and billing changes nothing (V7) and every bill can be recomputed.
"""

from __future__ import annotations

from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.catalog.tables import price_versions
from marketplace.platform.database import transaction


class PriceBook:
    """Gives every (node, model, price) a version number, remembering the current ones."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._current: dict[tuple[str, str], tuple[int, int, int]] = {}

    async def version_of(self, node_id: str, model: str, price_in: int, price_out: int) -> int:
        """Give the version of this price, adding one if it differs from the node's latest.

        Prices are nano-dollars per million tokens.
        """
        known = self._current.get((node_id, model))
        if known is not None and known[:2] == (price_in, price_out):
            return known[2]
        async with transaction(self._engine) as connection:
            # Two gateways hear the same status: one of them adds the row, the other finds it.
            await connection.execute(
                text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))"), {"key": f"{node_id}/{model}"}
            )
            latest = (
                await connection.execute(
                    select(price_versions)
                    .where(price_versions.c.node_id == node_id, price_versions.c.model == model)
                    .order_by(price_versions.c.id.desc())
                    .limit(1)
                )
            ).one_or_none()
            if latest is not None and (latest.price_in, latest.price_out) == (price_in, price_out):
                version = int(latest.id)
            else:
                row = insert(price_versions).values(
                    node_id=node_id, model=model, price_in=price_in, price_out=price_out
                )
                version = int((await connection.execute(row.returning(price_versions.c.id))).scalar_one())
        self._current[(node_id, model)] = (price_in, price_out, version)
        return version
