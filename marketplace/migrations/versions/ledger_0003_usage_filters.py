"""Indexes for the usage listing's filters that match few of a large account's requests."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "ledger_0003"
down_revision = "ledger_0002"
branch_labels = None
depends_on = None

INDEXES: Final = (
    "CREATE INDEX charges_buyer_model ON charges (buyer, model, id DESC)",
    # Failures are few: this one costs the poster nothing for a request that succeeds.
    "CREATE INDEX charges_operator_failed ON charges (operator, id DESC) WHERE status <> 200",
)
NAMES: Final = ("charges_operator_failed", "charges_buyer_model")


def upgrade() -> None:
    for statement in INDEXES:
        op.execute(statement)


def downgrade() -> None:
    for name in NAMES:
        op.execute(f"DROP INDEX {name}")
