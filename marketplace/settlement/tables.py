"""Settlement's tables as SQLAlchemy sees them; the migrations are the truth.

Amounts are micro-USDC (`_micro`); the ledger's nano-dollars are 1,000 times that.
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
    Table,
    Text,
    Uuid,
)
from sqlalchemy.dialects.postgresql import JSONB

from marketplace.platform.database import metadata

_AT = DateTime(timezone=True)

payout_addresses: Final = Table(
    "payout_addresses",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("person_id", Uuid, nullable=False),
    Column("chain", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("created_at", _AT, nullable=False),
    Column("usable_at", _AT, nullable=False),
    Column("retired_at", _AT),
)

standings: Final = Table(
    "standings",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("person_id", Uuid, nullable=False),
    Column("is_good", Boolean, nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("at", _AT, nullable=False),
)

kyc: Final = Table(
    "kyc",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("person_id", Uuid, nullable=False),
    Column("tier", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("at", _AT, nullable=False),
)

kyc_tiers: Final = Table(
    "kyc_tiers",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("tier", Text, nullable=False),
    Column("withdrawal_micro_max", BigInteger),
    Column("total_micro_max", BigInteger),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", _AT, nullable=False),
)

identity_checks: Final = Table(
    "identity_checks",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("person_id", Uuid, nullable=False),
    Column("provider", Text, nullable=False),
    Column("session", Text),
    Column("url", Text),
    Column("status", Text, nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    Column("created_at", _AT, nullable=False),
    Column("changed_at", _AT, nullable=False),
)

bank_accounts: Final = Table(
    "bank_accounts",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("person_id", Uuid, nullable=False),
    Column("holder", Text, nullable=False),
    Column("iban", Text, nullable=False),
    Column("created_at", _AT, nullable=False),
    Column("usable_at", _AT, nullable=False),
    Column("retired_at", _AT),
)

bank_withdrawals: Final = Table(
    "bank_withdrawals",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("person_id", Uuid, nullable=False),
    Column("account_id", Uuid, nullable=False),
    Column("amount_micro", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("input_hash", LargeBinary, nullable=False),
    Column("hold_id", Uuid),
    Column("decided_by", Text),
    Column("reason", Text),
    Column("paid_by", Text),
    Column("reference", Text),
    Column("created_at", _AT, nullable=False),
    Column("changed_at", _AT, nullable=False),
)

payout_halts: Final = Table(
    "payout_halts",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("rail", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", _AT, nullable=False),
    Column("lifted_at", _AT),
    Column("lifted_by", Text),
    Column("lift_reason", Text),
)

settlement_batches: Final = Table(
    "settlement_batches",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("chain", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("merkle_root", LargeBinary, nullable=False),
    Column("escrow", Text, nullable=False),
    Column("fence", Text, nullable=False),
    Column("context", JSONB, nullable=False),
    Column("total_micro", BigInteger, nullable=False),
    Column("count", Integer, nullable=False),
    Column("threshold", Integer, nullable=False),
    Column("planned_by", Text, nullable=False),
    Column("planned_at", _AT, nullable=False),
    Column("changed_at", _AT, nullable=False),
    Column("trouble", Text, nullable=False, server_default=""),
)

withdrawals: Final = Table(
    "withdrawals",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("person_id", Uuid, nullable=False),
    Column("chain", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("amount_micro", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("input_hash", LargeBinary, nullable=False),
    Column("hold_id", Uuid),
    Column("batch_id", Uuid),
    Column("refusal", Text),
    Column("created_at", _AT, nullable=False),
    Column("changed_at", _AT, nullable=False),
)

payouts: Final = Table(
    "payouts",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("batch_id", Uuid, nullable=False),
    Column("position", Integer, nullable=False),
    Column("withdrawal_id", Uuid, nullable=False),
    Column("person_id", Uuid, nullable=False),
    Column("address", Text, nullable=False),
    Column("amount_micro", BigInteger, nullable=False),
    Column("is_live", Boolean, nullable=False, server_default="true"),
)

approvals: Final = Table(
    "approvals",
    metadata,
    Column("batch_id", Uuid, primary_key=True),
    Column("signer", Text, primary_key=True),
    Column("signatures", JSONB, nullable=False),
    Column("pushed_by", Text, nullable=False),
    Column("created_at", _AT, nullable=False),
)

broadcasts: Final = Table(
    "broadcasts",
    metadata,
    Column("batch_id", Uuid, primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("raw", LargeBinary, nullable=False),
    Column("tx", Text, nullable=False),
    Column("fence", Text, nullable=False),
    Column("stored_at", _AT, nullable=False),
    Column("first_sent_at", _AT),
    Column("last_sent_at", _AT),
    Column("final_tx", Text),
    Column("final_height", BigInteger),
    Column("final_block_hash", Text),
)

plan_requests: Final = Table(
    "plan_requests",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("chain", Text, nullable=False),
    Column("asked_by", Text, nullable=False),
    Column("asked_at", _AT, nullable=False),
    Column("done_at", _AT),
    Column("batch_id", Uuid),
    Column("code", Text),
    Column("outcome", Text),
)

payout_rules: Final = Table(
    "payout_rules",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("large_above_micro", BigInteger, nullable=False),
    Column("large_approvals", Integer, nullable=False),
    Column("daily_micro_max", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", _AT, nullable=False),
)

account_openings: Final = Table(
    "account_openings",
    metadata,
    Column("person_id", Uuid, primary_key=True),
    Column("chain", Text, primary_key=True),
    Column("address", Text, nullable=False),
    Column("at", _AT, nullable=False),
    Column("opened_at", _AT),
)

sanctioned_addresses: Final = Table(
    "sanctioned_addresses",
    metadata,
    Column("address", Text, primary_key=True),
    Column("source", Text, nullable=False),
    Column("listed_at", _AT, nullable=False),
)
