"""The package's tables as SQLAlchemy sees them; the migrations `deposits_…` are the truth.

Amounts are micro-USDC.  `person_id` also owns the ledger's buyer account.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Identity,
    Integer,
    LargeBinary,
    Numeric,
    Table,
    Text,
    Uuid,
)
from sqlalchemy.dialects.postgresql import JSONB

from marketplace.platform.database import metadata

deposit_addresses: Final = Table(
    "deposit_addresses",
    metadata,
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    Column("person_id", Uuid, nullable=False),
    Column("chain_family", Text, nullable=False),
    Column("address", Text, primary_key=True),
    Column("watched", Text, nullable=False),
    Column("salt", LargeBinary),
    Column("pool_index", Integer),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("retired_at", DateTime(timezone=True)),
    Column("retired_by", Text),
    Column("retire_reason", Text),
)

solana_pool: Final = Table(
    "solana_pool",
    metadata,
    Column("pool_index", Integer, primary_key=True, autoincrement=False),
    Column("owner", Text, nullable=False),
    Column("token_account", Text, nullable=False),
    Column("ready_at", DateTime(timezone=True)),
    Column("person_id", Uuid),
)

deposit_intents: Final = Table(
    "deposit_intents",
    metadata,
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    Column("reference", Text, primary_key=True),
    Column("person_id", Uuid, nullable=False),
    Column("amount_micro", BigInteger),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
)

deposits: Final = Table(
    "deposits",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("chain", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("tx", Text, nullable=False),
    Column("height", BigInteger, nullable=False),
    Column("block_hash", Text, nullable=False),
    Column("to_address", Text, nullable=False),
    Column("sender", Text, nullable=False),
    Column("amount_micro", BigInteger, nullable=False),
    Column("person_id", Uuid),
    Column("intent", Text),
    Column("is_direct", Boolean, nullable=False),
    Column("status", Text, nullable=False),
    Column("seen_at", DateTime(timezone=True), nullable=False),
    Column("final_at", DateTime(timezone=True)),
    Column("credited_at", DateTime(timezone=True)),
    Column("transfer_ref", Text),
    Column("is_held", Boolean, nullable=False),
)

sweeps: Final = Table(
    "sweeps",
    metadata,
    Column("chain", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("tx", Text, nullable=False),
    Column("height", BigInteger, nullable=False),
    Column("block_hash", Text, nullable=False),
    Column("from_address", Text, nullable=False),
    Column("amount_micro", BigInteger, nullable=False),
    Column("booked_at", DateTime(timezone=True), nullable=False),
)

chain_cursors: Final = Table(
    "chain_cursors",
    metadata,
    Column("chain", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("height", BigInteger, nullable=False),
    Column("hash", Text, nullable=False),
    Column("final_height", BigInteger, nullable=False),
    Column("final_hash", Text, nullable=False),
    Column("final_parent_height", BigInteger, nullable=False),
    Column("final_parent_hash", Text, nullable=False),
    Column("final_time_s", BigInteger, nullable=False),
    Column("head_height", BigInteger, nullable=False),
    Column("started_height", BigInteger, nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
    Column("halted_at", DateTime(timezone=True)),
    Column("halt_reason", Text),
    Column("halted_by", Text),
)

chain_headers: Final = Table(
    "chain_headers",
    metadata,
    Column("chain", Text, primary_key=True),
    Column("height", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", Text, nullable=False),
    Column("parent_height", BigInteger, nullable=False),
    Column("parent_hash", Text, nullable=False),
    Column("time_s", BigInteger, nullable=False),
)

chain_halts: Final = Table(
    "chain_halts",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("chain", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
)

support_cases: Final = Table(
    "support_cases",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("chain", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
)

solana_sweeps: Final = Table(
    "solana_sweeps",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("status", Text, nullable=False),
    Column("fence", Text, nullable=False),
    Column("lines", JSONB, nullable=False),
    Column("amount_micro", BigInteger, nullable=False),
    Column("prepared_by", Text, nullable=False),
    Column("prepared_at", DateTime(timezone=True), nullable=False),
    Column("raw", LargeBinary),
    Column("tx", Text),
    Column("ended_at", DateTime(timezone=True)),
    Column("note", Text),
)

solana_sweep_approvals: Final = Table(
    "solana_sweep_approvals",
    metadata,
    Column("sweep_id", Uuid, primary_key=True),
    Column("signer", Text, primary_key=True),
    Column("signatures", JSONB, nullable=False),
    Column("brought_by", Text, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
)

unsupported_deposits: Final = Table(
    "unsupported_deposits",
    metadata,
    Column("chain", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("tx", Text, nullable=False),
    Column("height", BigInteger, nullable=False),
    Column("block_hash", Text, nullable=False),
    Column("token", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("to_address", Text, nullable=False),
    Column("sender", Text, nullable=False),
    Column("amount", Numeric(78), nullable=False),
    Column("person_id", Uuid),
    Column("at", DateTime(timezone=True), nullable=False),
)

chain_acknowledgements: Final = Table(
    "chain_acknowledgements",
    metadata,
    Column("chain", Text, primary_key=True),
    Column("alarm", Text, primary_key=True),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
)

deposit_decisions: Final = Table(
    "deposit_decisions",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("chain", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("decision", Text, nullable=False),
    Column("person_id", Uuid),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
)

taken_back: Final = Table(
    "taken_back",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("chain", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("what", Text, nullable=False),
    Column("ref", Text, nullable=False),
    Column("block_hash", Text, nullable=False),
    Column("amount_micro", BigInteger, nullable=False),
    Column("person_id", Uuid),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
)

screened_senders: Final = Table(
    "screened_senders",
    metadata,
    Column("address", Text, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("added_by", Text, nullable=False),
    Column("added_at", DateTime(timezone=True), nullable=False),
)

screening_decisions: Final = Table(
    "screening_decisions",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("address", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
)

early_credits: Final = Table(
    "early_credits",
    metadata,
    Column("chain", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("person_id", Uuid, nullable=False),
    Column("amount_micro", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Column("lent_at", DateTime(timezone=True), nullable=False),
    Column("ended_at", DateTime(timezone=True)),
)
