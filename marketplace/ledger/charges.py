"""A charge: one request's three-way movement, which is also its usage row.

Its id is the request's id.  Every request becomes a charge, a failed one with an amount of zero.
`pack` gives a row in PostgreSQL's binary COPY format; the same bytes are what the lane's hash chain
covers, so anybody who can read the table can prove the chain.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from datetime import datetime
from enum import IntEnum
from typing import Any, Final, Protocol
from uuid import UUID

import msgspec

from marketplace.ledger.ids import made_at
from marketplace.ledger.money import ZERO, Nano

MODEL_CHARACTERS_MAX: Final = 200
FINISH_CHARACTERS_MAX: Final = 40
_INT4_MAX: Final = 2**31 - 1

COLUMNS: Final = (
    "id",
    "buyer",
    "operator",
    "amount",
    "fee",
    "node",
    "model",
    "key_id",
    "tok_in",
    "tok_out",
    "counted_by",
    "price_version",
    "latency_ms",
    "ttft_ms",
    "status",
    "finish",
    "lane",
    "batch",
    "stream",
)
COPY_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_TRAILER: Final = b"\xff\xff"
GENESIS: Final = bytes(32)
"""What the first batch of a lane chains to."""


class CountedBy(IntEnum):
    """Who counted the tokens."""

    GATEWAY = 0
    NODE = 1
    AUDIT = 2


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """One finished request.  `buyer` and `operator` are account ids; `fee` is the platform's share.

    The operator gets amount − fee.  A request that never reached a node has no operator and no node.
    """

    id: UUID
    buyer: int
    amount: Nano = ZERO
    fee: Nano = ZERO
    operator: int | None = None
    node: UUID | None = None
    model: str
    key_id: UUID | None = None
    tok_in: int = 0
    tok_out: int = 0
    counted_by: CountedBy = CountedBy.GATEWAY
    price_version: int = 0
    latency_ms: int = 0
    ttft_ms: int | None = None
    status: int = 200
    finish: str | None = None
    stream: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.fee.n <= self.amount.n:
            raise ValueError(f"a fee of {self.fee} does not fit a charge of {self.amount}")
        if self.amount.n and self.operator is None:
            raise ValueError("a charge pays an operator")
        if not 0 <= self.tok_in <= _INT4_MAX or not 0 <= self.tok_out <= _INT4_MAX:
            raise ValueError("token counts are 0..2^31-1")
        if not 0 <= self.latency_ms <= _INT4_MAX or not 0 <= (self.ttft_ms or 0) <= _INT4_MAX:
            raise ValueError("times are 0..2^31-1 ms")
        if len(self.model) > MODEL_CHARACTERS_MAX or len(self.finish or "") > FINISH_CHARACTERS_MAX:
            raise ValueError("model or finish reason is too long")

    @property
    def made_at(self) -> datetime:
        """When the request arrived: the time in its id."""
        return made_at(self.id)


class Row(Protocol):
    """A row of `charges`, by column name, as either driver gives it."""

    def __getitem__(self, column: str, /) -> Any: ...


def charge_of(row: Row) -> Charge:
    """A charge as stored (its lane and batch left aside)."""
    values = {name: row[name] for name in COLUMNS if name not in {"lane", "batch"}}
    values["amount"], values["fee"] = Nano(values["amount"]), Nano(values["fee"])
    values["counted_by"] = CountedBy(values["counted_by"])
    return Charge(**values)


_HEAD: Final = struct.Struct(">hi16siqiqiqiqi16si")
_MIDDLE: Final = struct.Struct(">i16siiiiihiqiiiiihi")
_TAIL: Final = struct.Struct(">ihiqi?")
_INT2: Final = struct.Struct(">ih")
_INT4: Final = struct.Struct(">ii")
_INT8: Final = struct.Struct(">iq")
_LENGTH: Final = struct.Struct(">i")
_NULL: Final = _LENGTH.pack(-1)


def pack(charge: Charge, lane: int, batch: int) -> bytes:
    """One row of a binary COPY: column count, then each column's length and bytes, big-endian.

    https://www.postgresql.org/docs/18/sql-copy.html, "Binary Format".
    """
    c = charge
    if c.operator is None or c.node is None or c.key_id is None or c.ttft_ms is None or c.finish is None:
        return pack_sparse(c, lane, batch)
    model, finish = c.model.encode(), c.finish.encode()
    head = _HEAD.pack(
        19, 16, c.id.bytes, 8, c.buyer, 8, c.operator, 8, c.amount.n, 8, c.fee.n, 16, c.node.bytes, len(model)
    )  # fmt: skip
    middle = _MIDDLE.pack(
        16, c.key_id.bytes, 4, c.tok_in, 4, c.tok_out, 2, c.counted_by, 8, c.price_version,
        4, c.latency_ms, 4, c.ttft_ms, 2, c.status, len(finish),
    )  # fmt: skip
    return b"".join((head, model, middle, finish, _TAIL.pack(2, lane, 8, batch, 1, c.stream)))


def pack_sparse(charge: Charge, lane: int, batch: int) -> bytes:
    """The same as `pack`, column by column, for rows with NULLs."""
    c = charge
    return b"".join(
        (
            b"\x00\x13",
            _bytes(c.id.bytes),
            _INT8.pack(8, c.buyer),
            _NULL if c.operator is None else _INT8.pack(8, c.operator),
            _INT8.pack(8, c.amount.n),
            _INT8.pack(8, c.fee.n),
            _NULL if c.node is None else _bytes(c.node.bytes),
            _bytes(c.model.encode()),
            _NULL if c.key_id is None else _bytes(c.key_id.bytes),
            _INT4.pack(4, c.tok_in),
            _INT4.pack(4, c.tok_out),
            _INT2.pack(2, c.counted_by),
            _INT8.pack(8, c.price_version),
            _INT4.pack(4, c.latency_ms),
            _NULL if c.ttft_ms is None else _INT4.pack(4, c.ttft_ms),
            _INT2.pack(2, c.status),
            _NULL if c.finish is None else _bytes(c.finish.encode()),
            _TAIL.pack(2, lane, 8, batch, 1, c.stream),
        ),
    )


def extend_chain(previous: bytes, rows: Iterable[bytes]) -> bytes:
    """The batch's hash: SHA-256 over its predecessor's hash, then its packed rows in id order."""
    digest = hashlib.sha256(previous)
    for row in rows:
        digest.update(row)
    return digest.digest()


def _bytes(value: bytes) -> bytes:
    return _LENGTH.pack(len(value)) + value
