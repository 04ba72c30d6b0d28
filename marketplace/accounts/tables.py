"""People, wallets, sessions and keys.

`people.changed` and `api_keys.changed` (xid8) are kept by the database and read only by `key_ring`, in
SQL of its own, so they are not declared here.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Integer,
    LargeBinary,
    Table,
    Text,
    Uuid,
    func,
)
from sqlalchemy.dialects.postgresql import JSONB

from marketplace.platform.database import metadata

people: Final = Table(
    "people",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("email", Text, unique=True),
    Column("password_hash", Text),
    Column("display_name", Text, nullable=False),
    Column("is_operator", Boolean, nullable=False),
    Column("is_admin", Boolean, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("frozen_at", DateTime(timezone=True)),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", BigInteger),
    Column("parallel_requests", Integer),
    Column("spend_nano_per_day", BigInteger),
    Column("allowed_models", ARRAY(Text)),
)

wallets: Final = Table(
    "wallets",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("person_id", Uuid, ForeignKey("people.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("verified_at", DateTime(timezone=True), nullable=False),
)

wallet_challenges: Final = Table(
    "wallet_challenges",
    metadata,
    Column("nonce", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("person_id", Uuid, ForeignKey("people.id")),
    Column("message", Text, nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
)

sessions: Final = Table(
    "sessions",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("person_id", Uuid, ForeignKey("people.id"), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("revoked_at", DateTime(timezone=True)),
    Column("proved_at", DateTime(timezone=True), nullable=False),
)

api_keys: Final = Table(
    "api_keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("person_id", Uuid, ForeignKey("people.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("last_used_at", DateTime(timezone=True)),
    Column("revoked_at", DateTime(timezone=True)),
    Column("expires_at", DateTime(timezone=True)),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", BigInteger),
    Column("parallel_requests", Integer),
    Column("spend_nano_per_day", BigInteger),
    Column("allowed_models", ARRAY(Text)),
)

account_decisions: Final = Table(
    "account_decisions",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("person_id", Uuid, ForeignKey("people.id"), nullable=False),
    Column("action", Text, nullable=False),
    Column("actor", Uuid, ForeignKey("people.id"), nullable=False),
    Column("reason", Text, nullable=False),
    Column("detail", JSONB, nullable=False),
    Column("decided_at", DateTime(timezone=True), nullable=False),
)
