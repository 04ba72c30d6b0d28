"""The fabric's tables: who may connect as a node, and the tokens that let a node enrol.

The migrations `fabric_…` are the truth (constraints and grants).
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, DateTime, LargeBinary, Table, Text, Uuid, func

from marketplace.platform.database import metadata

nodes: Final = Table(
    "nodes",
    metadata,
    Column("id", Text, primary_key=True),
    Column("operator_id", Uuid, nullable=False),
    Column("name", Text, nullable=False),
    Column("public_key", Text, nullable=False, unique=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("revoked_at", DateTime(timezone=True)),
    Column("last_seen_at", DateTime(timezone=True)),
    # The live connection, as NATS names it: nobody else of this node may be connected.
    Column("session_server", Text),
    Column("session_client", BigInteger),
    Column("barred_until", DateTime(timezone=True)),
)

enrolment_tokens: Final = Table(
    "enrolment_tokens",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("operator_id", Uuid, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("used_at", DateTime(timezone=True)),
    Column("node_id", Text),
)
