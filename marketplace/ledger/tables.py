"""The ledger's tables as SQLAlchemy sees them.

The migrations `ledger_…` are the truth (constraints, partitions, grants); a test compares the two.
Amounts are nano-dollars; `posted` is credits − debits.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Identity,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Text,
    Uuid,
    func,
)

ledger_metadata: Final = MetaData()

accounts: Final = Table(
    "accounts",
    ledger_metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("kind", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

balances: Final = Table(
    "balances",
    ledger_metadata,
    Column("account_id", BigInteger, primary_key=True, autoincrement=False),
    Column("posted", BigInteger, nullable=False, server_default="0"),
    Column("held", BigInteger, nullable=False, server_default="0"),
    Column("floor", BigInteger),
)

charges: Final = Table(
    "charges",
    ledger_metadata,
    Column("id", Uuid, primary_key=True),
    Column("buyer", BigInteger, nullable=False),
    Column("operator", BigInteger),
    Column("amount", BigInteger, nullable=False),
    Column("fee", BigInteger, nullable=False),
    Column("node", Uuid),
    Column("model", Text, nullable=False),
    Column("key_id", Uuid),
    Column("tok_in", Integer, nullable=False),
    Column("tok_out", Integer, nullable=False),
    Column("counted_by", SmallInteger, nullable=False),
    Column("price_version", BigInteger, nullable=False),
    Column("latency_ms", Integer, nullable=False),
    Column("ttft_ms", Integer),
    Column("status", SmallInteger, nullable=False),
    Column("finish", Text),
    Column("lane", SmallInteger, nullable=False),
    Column("batch", BigInteger, nullable=False),
    Column("stream", Boolean, nullable=False),
)

transfers: Final = Table(
    "transfers",
    ledger_metadata,
    Column("id", Uuid, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("debit", BigInteger, nullable=False),
    Column("credit", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("ref", Text, nullable=False),
    Column("input_hash", LargeBinary, nullable=False),
    Column("reverses", Uuid),
    Column("note", Text, nullable=False, server_default=""),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("lifts_floor", Boolean, nullable=False, server_default="false"),
)

leases: Final = Table(
    "leases",
    ledger_metadata,
    Column("id", Uuid, primary_key=True),
    Column("buyer", BigInteger, nullable=False),
    Column("worker", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("expires", DateTime(timezone=True), nullable=False),
)

holds: Final = Table(
    "holds",
    ledger_metadata,
    Column("id", Uuid, primary_key=True),
    Column("account", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

batches: Final = Table(
    "batches",
    ledger_metadata,
    Column("lane", SmallInteger, primary_key=True, autoincrement=False),
    Column("n", BigInteger, primary_key=True, autoincrement=False),
    Column("first_id", Uuid, nullable=False),
    Column("last_id", Uuid, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("sum", BigInteger, nullable=False),
    Column("prev_hash", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("posted_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

overdrafts: Final = Table(
    "overdrafts",
    ledger_metadata,
    Column("account_id", BigInteger, primary_key=True, autoincrement=False),
    Column("limit_nano", BigInteger, nullable=False),
    Column("is_drawn", Boolean, nullable=False, server_default="false"),
)

usage_daily: Final = Table(
    "usage_daily",
    ledger_metadata,
    Column("day", Date, nullable=False),
    Column("buyer", BigInteger, nullable=False),
    Column("operator", BigInteger, nullable=False),
    Column("model", Text, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("tok_in", Numeric, nullable=False),
    Column("tok_out", Numeric, nullable=False),
    Column("amount", Numeric, nullable=False),
    Column("fee", Numeric, nullable=False),
)

rollup_marks: Final = Table(
    "rollup_marks",
    ledger_metadata,
    Column("lane", SmallInteger, primary_key=True, autoincrement=False),
    Column("n", BigInteger, nullable=False),
)

archived_months: Final = Table(
    "archived_months",
    ledger_metadata,
    Column("month", Date, primary_key=True),
    Column("upper_id", Uuid, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("detached_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

archived_moves: Final = Table(
    "archived_moves",
    ledger_metadata,
    Column("month", Date, primary_key=True),
    Column("account", BigInteger, primary_key=True, autoincrement=False),
    Column("delta", Numeric, nullable=False),
)
