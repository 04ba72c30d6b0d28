"""The catalogue's tables."""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    func,
)

from marketplace.platform.database import metadata

tokenizers: Final = Table(
    "tokenizers",
    metadata,
    Column("sha256", Text, primary_key=True),
    Column("tokenizer", LargeBinary, nullable=False),
    Column("chat_template", Text, nullable=False),
    Column("special_tokens", Text, nullable=False),
)

models: Final = Table(
    "models",
    metadata,
    Column("name", Text, primary_key=True),
    Column("tier", Text, nullable=False),
    Column("context", Integer, nullable=False),
    Column("tokenizer_sha256", Text, ForeignKey("tokenizers.sha256"), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("retired_at", DateTime(timezone=True)),
)

model_aliases: Final = Table(
    "model_aliases",
    metadata,
    Column("alias", Text, primary_key=True),
    Column("models", ARRAY(Text), nullable=False),
    Column("changed_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

price_versions: Final = Table(
    "price_versions",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("node_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("price_in", BigInteger, nullable=False),
    Column("price_out", BigInteger, nullable=False),
    Column("since", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Index("price_versions_node_id_model_idx", "node_id", "model", "id"),
)
