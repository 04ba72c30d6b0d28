"""Deposits: who retired an address, who screened a sender or lifted it, and why (K4)."""

from __future__ import annotations

from alembic import op

revision = "deposits_0006"
down_revision = "deposits_0005"
branch_labels = None
depends_on = None

SCREENING = """
    CREATE TABLE screening_decisions (
        id      BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        address TEXT NOT NULL,
        action  TEXT NOT NULL CHECK (action IN ('screen', 'lift')),
        actor   TEXT NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
        reason  TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
        at      TIMESTAMPTZ NOT NULL
    )"""


def upgrade() -> None:
    op.execute(SCREENING)
    op.execute("CREATE INDEX screening_decisions_address ON screening_decisions (address)")
    op.execute("GRANT SELECT, INSERT ON screening_decisions TO tollway_app")
    op.execute("ALTER TABLE deposit_addresses ADD COLUMN retired_by TEXT, ADD COLUMN retire_reason TEXT")
    op.execute(
        """
        UPDATE deposit_addresses SET retired_by = 'unknown', retire_reason = 'before reasons were kept'
        WHERE retired_at IS NOT NULL"""
    )
    op.execute(
        """
        ALTER TABLE deposit_addresses ADD CONSTRAINT retired_says_why
            CHECK (num_nulls(retired_at, retired_by, retire_reason) IN (0, 3))"""
    )


def downgrade() -> None:
    op.execute("ALTER TABLE deposit_addresses DROP COLUMN retired_by, DROP COLUMN retire_reason")
    op.execute("DROP TABLE screening_decisions")
