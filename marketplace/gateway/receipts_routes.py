"""Receipts for anybody: the one of a request, and the keys that sign them.

No credential: a receipt names neither buyer nor content, and its id is 74 random bits beside the time.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
from fastapi import APIRouter
from pydantic import BaseModel, Field
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.fabric.node_ids import node_id_of
from marketplace.gateway.receipts import (
    HASHES_KEPT_DAYS,
    Stated,
    key_id,
    signer_of,
    split_leaves,
    statement_of,
)
from marketplace.platform.http import Refusal, RefusalOut, ServicesDep
from node_agent import protocol

router = APIRouter(tags=["receipts"])

_PAGES = text("""
    SELECT id, leaves, public_key, signature, countersignature, disputed FROM receipt_pages
    WHERE node = :node AND lane = :lane AND last_batch >= :batch AND first_batch <= :batch
    ORDER BY last_batch LIMIT 64""")
_NODE_KEY = text("SELECT public_key FROM nodes WHERE id = :node")
_IS_ARCHIVED = text("SELECT EXISTS (SELECT FROM archived_months WHERE :id < upper_id)")
_KEYS = text("SELECT public_key, first_used FROM receipt_keys ORDER BY first_used")


class PageOut(BaseModel):
    """Where the statement stands: leaf `position` of `count` in an RFC 6962 tree."""

    id: UUID
    count: int
    position: int
    root: str = Field(description="Hex")
    proof: list[str] = Field(description="Siblings from the leaf to the root, nearest first, hex")


class MarketplaceSignatureOut(BaseModel):
    key_id: str
    public_key: str = Field(description="Ed25519, hex")
    signature: str = Field(description="Over the page's count and root, hex")


class NodeSignatureOut(BaseModel):
    public_key: str = Field(description="The node's nkey")
    signature: str = Field(description="Over the page's count, root and disputed positions, hex")
    disputed: list[int] = Field(description="Positions in the page the node does not agree with")
    is_disputed: bool = Field(description="This statement is one of them")


class ReceiptOut(BaseModel):
    """A receipt.  `statement` is what is signed, byte for byte; `says` is the same, parsed."""

    statement: str
    says: dict[str, Any]
    page: PageOut | None = Field(description="Null until it is signed, a second or two after the answer")
    marketplace: MarketplaceSignatureOut | None
    node: NodeSignatureOut | None = Field(description="Null until the node has signed too")


class KeyOut(BaseModel):
    key_id: str
    public_key: str = Field(description="Ed25519, hex")
    first_used: datetime | None
    is_current: bool


class KeysOut(BaseModel):
    data: list[KeyOut]


@router.get("/api/receipts/keys")
async def keys(services: ServicesDep) -> KeysOut:
    """Every key that has ever signed receipts, oldest first, and the current one."""
    current = signer_of(services.settings).public_key
    async with services.engine.connect() as connection:
        known = {row.public_key: row.first_used for row in await connection.execute(_KEYS)}
    return KeysOut(
        data=[
            KeyOut(key_id=key_id(key), public_key=key.hex(), first_used=used, is_current=key == current)
            for key, used in ({**known, current: known.get(current)}).items()
        ]
    )


@router.get("/api/receipts/{request_id}", responses={404: {"model": RefusalOut}, 410: {"model": RefusalOut}})
async def receipt(request_id: UUID, services: ServicesDep) -> ReceiptOut:
    """The receipt of a served request: who can prove what, without asking us again.  Kept for 400 days."""
    async with services.engine.connect() as connection:
        stated = await statement_of(connection, request_id)
        if stated is None:
            if await connection.scalar(_IS_ARCHIVED, {"id": request_id}):
                raise _expired()
            raise Refusal(404, "receipt_not_found", "no request of this id was served")
        found = await _signed(connection, stated)
    if found.page is None and not stated.is_hashed and _is_old(request_id, services.clock.now()):
        raise _expired()
    return found


def _is_old(request_id: UUID, now: datetime) -> bool:
    return (request_id.int >> 80) / 1000 < (now - timedelta(days=HASHES_KEPT_DAYS)).timestamp()


def _expired() -> Refusal:
    return Refusal(410, "receipt_expired", "too old to be written again; a copy you kept still proves itself")


async def _signed(connection: AsyncConnection, stated: Stated) -> ReceiptOut:
    unsigned = ReceiptOut(
        statement=stated.statement.decode(),
        says=_says(stated.statement),
        page=None,
        marketplace=None,
        node=None,
    )
    where = {"node": stated.node, "lane": stated.lane, "batch": stated.batch}
    leaf = protocol.receipt_leaf(stated.statement)
    for row in await connection.execute(_PAGES, where):
        leaves = split_leaves(row.leaves)
        if leaf not in leaves:
            continue
        position = leaves.index(leaf)
        node_key = (
            await connection.execute(_NODE_KEY, {"node": node_id_of(stated.node)})
        ).scalar_one_or_none()
        return unsigned.model_copy(
            update={
                "page": PageOut(
                    id=row.id,
                    count=len(leaves),
                    position=position,
                    root=protocol.merkle_root(leaves).hex(),
                    proof=[sibling.hex() for sibling in protocol.merkle_proof(leaves, position)],
                ),
                "marketplace": MarketplaceSignatureOut(
                    key_id=key_id(row.public_key),
                    public_key=row.public_key.hex(),
                    signature=row.signature.hex(),
                ),
                "node": None
                if row.countersignature is None or node_key is None
                else NodeSignatureOut(
                    public_key=node_key,
                    signature=row.countersignature.hex(),
                    disputed=list(row.disputed),
                    is_disputed=position in row.disputed,
                ),
            }
        )
    return unsigned


def _says(statement: bytes) -> dict[str, Any]:
    says: dict[str, Any] = msgspec.json.decode(statement)
    return says
