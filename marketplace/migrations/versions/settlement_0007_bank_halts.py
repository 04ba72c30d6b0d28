"""The bank is a rail of its own: it can be halted while the chains run."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "settlement_0007"
down_revision = "settlement_0006"
branch_labels = None
depends_on = None

STATEMENTS: Final = (
    "ALTER TABLE payout_halts DROP CONSTRAINT payout_halts_rail_check",
    """
    ALTER TABLE payout_halts ADD CONSTRAINT payout_halts_rail_check
        CHECK (rail IN ('payouts', 'ethereum', 'base', 'solana', 'bank'))""",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
