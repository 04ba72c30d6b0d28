"""Billing's tables as SQLAlchemy sees them; the migrations are the truth."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Column, DateTime, Table, Text

from marketplace.platform.database import metadata

stripe_events: Final = Table(
    "stripe_events",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("object_id", Text, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
)
