"""Receipts (B1): what the marketplace states of each served request, and its signature.

A statement is made of the charge and the hashes noted beside it (`receipts_writer`); both are append-only,
so it can be written again for as long as the hashes are kept, to the same bytes.  `receipts_sealer` gathers
statements in pages and has them signed; this module knows how one is written, signed and shown.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.fabric.node_ids import node_id_of
from marketplace.ledger.charges import CountedBy
from marketplace.metering.counting import CountedOn
from marketplace.platform.errors import SetupFault
from marketplace.platform.settings import Settings
from node_agent import protocol
from node_agent.protocol import Statement

VERSION: Final = 1
HASH_BYTES: Final = 32
HASHES_KEPT_DAYS: Final = 400
"""As long as a receipt can be asked for; the migrations' `forget_receipts` forgets nothing younger."""
_SEED_PURPOSE: Final = b"tollway receipt signing key v1"


class ReceiptSigner:
    """The marketplace's Ed25519 key."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key: bytes = self._key.public_key().public_bytes_raw()

    def sign(self, count: int, root: bytes) -> bytes:
        """Sign a page."""
        return self._key.sign(protocol.page_signing_bytes(count, root))


def signer_of(settings: Settings) -> ReceiptSigner:
    """The key of TOLLWAY_RECEIPT_SEED, else one derived from TOLLWAY_SECRET."""
    given = settings.receipt_seed.get_secret_value()
    if not given:
        secret = settings.secret.get_secret_value().encode()
        return ReceiptSigner(hmac.new(secret, _SEED_PURPOSE, hashlib.sha256).digest())
    try:
        return ReceiptSigner(bytes.fromhex(given))
    except ValueError as e:
        raise SetupFault("TOLLWAY_RECEIPT_SEED must be 64 hex digits") from e


def key_id(public_key: bytes) -> str:
    """A key's short name.

    >>> key_id(bytes(32))
    '66687aadf862bd77'
    """
    return hashlib.sha256(public_key).hexdigest()[:16]


# ---- statements


@dataclass(frozen=True, slots=True)
class Stated:
    """A statement, and where its charge stands."""

    id: UUID
    node: UUID
    lane: int
    batch: int
    is_hashed: bool
    statement: bytes


_COLUMNS: Final = """
    SELECT c.id, c.lane, c.batch, c.model, c.tok_in, c.tok_out, c.counted_by, c.price_version, c.amount,
           c.fee, c.status, c.finish, c.node, a.owner AS operator, p.price_in, p.price_out,
           r.request_sha256, r.response_sha256, r.counted_on
    FROM charges c JOIN accounts a ON a.id = c.operator LEFT JOIN receipts r ON r.id = c.id
         LEFT JOIN price_versions p ON p.id = c.price_version
    WHERE c.node IS NOT NULL AND (c.amount > 0 OR r.id IS NOT NULL)"""
_ONE: Final = text(f"{_COLUMNS} AND c.id = :id")
_SPAN: Final = text(
    f"""{_COLUMNS} AND c.lane = :lane AND c.batch BETWEEN :first_batch AND :last_batch
    AND c.id BETWEEN :first_id AND :last_id ORDER BY c.node, c.id"""
)


async def statement_of(connection: AsyncConnection, request_id: UUID) -> Stated | None:
    """The statement of one request; None if nothing was served."""
    row = (await connection.execute(_ONE, {"id": request_id})).one_or_none()
    return None if row is None else _stated(row)


async def statements_of(connection: AsyncConnection, span: dict[str, Any]) -> list[Stated]:
    """The statements of a span of a lane's batches, by node and id."""
    return [_stated(row) for row in await connection.execute(_SPAN, span)]


def _stated(row: Any) -> Stated:
    statement = Statement(
        v=VERSION,
        id=str(row.id),
        time_ms=row.id.int >> 80,
        model=row.model,
        node=node_id_of(row.node),
        operator=row.operator,
        request_sha256=None if row.request_sha256 is None else row.request_sha256.hex(),
        response_sha256=None if row.response_sha256 is None else row.response_sha256.hex(),
        prompt_tokens=row.tok_in,
        completion_tokens=row.tok_out,
        counted_by=CountedBy(row.counted_by).name.lower(),
        counted_on=None if row.counted_on is None else CountedOn(row.counted_on).name.lower(),
        price_version=row.price_version,
        price_in=row.price_in,
        price_out=row.price_out,
        cost_nano=row.amount,
        operator_nano=row.amount - row.fee,
        status=row.status,
        finish_reason=row.finish,
    )
    return Stated(
        row.id, row.node, row.lane, row.batch, row.request_sha256 is not None,
        protocol.encode_statement(statement),
    )  # fmt: skip


# ---- pages


@dataclass(frozen=True, slots=True)
class Page:
    """Statements about one node, signed together."""

    id: UUID
    lane: int
    first_batch: int
    last_batch: int
    node: UUID
    leaves: tuple[bytes, ...]
    public_key: bytes
    signature: bytes


def sign_page(
    page_id: UUID, signer: ReceiptSigner, statements: Sequence[Stated], *, batches: tuple[int, int]
) -> Page:
    """Sign statements about one node from one lane's span of batches."""
    first = statements[0]
    leaves = tuple(protocol.receipt_leaf(stated.statement) for stated in statements)
    signature = signer.sign(len(leaves), protocol.merkle_root(leaves))
    return Page(page_id, first.lane, *batches, first.node, leaves, signer.public_key, signature)


def split_leaves(leaves: bytes) -> tuple[bytes, ...]:
    return tuple(leaves[at : at + HASH_BYTES] for at in range(0, len(leaves), HASH_BYTES))
