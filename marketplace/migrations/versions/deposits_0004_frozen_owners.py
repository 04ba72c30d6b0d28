"""Deposits: what became final while its owner's account was frozen waits for a person's decision."""

from __future__ import annotations

from alembic import op

revision = "deposits_0004"
down_revision = "deposits_0003"
branch_labels = None
depends_on = ("accounts_0001",)


def upgrade() -> None:
    # Stays true once released: a decision with actor and reason credits it (deposit_decisions).
    op.execute(
        """
        ALTER TABLE deposits
            ADD COLUMN is_held BOOLEAN NOT NULL DEFAULT FALSE,
            ADD CONSTRAINT held_is_final CHECK (NOT is_held OR status = 'final')"""
    )


def downgrade() -> None:
    op.execute("ALTER TABLE deposits DROP COLUMN is_held")
