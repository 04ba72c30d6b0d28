"""Stripe's events, each once."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "billing_0001"
down_revision = None
branch_labels = ("billing",)
depends_on = ("ledger_0001",)

STATEMENTS: Final = (
    """
    CREATE TABLE stripe_events (
        id        TEXT PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 200),
        kind      TEXT NOT NULL CHECK (length(kind) BETWEEN 1 AND 200),
        object_id TEXT NOT NULL CHECK (length(object_id) BETWEEN 1 AND 200),
        at        TIMESTAMPTZ NOT NULL
    )""",
    "GRANT SELECT, INSERT ON stripe_events TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
