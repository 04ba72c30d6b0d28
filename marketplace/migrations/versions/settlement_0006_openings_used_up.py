"""Which token accounts we have really opened: those are not opened a second time, paid or not (A45)."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "settlement_0006"
down_revision = "settlement_0005"
branch_labels = None
depends_on = None

STATEMENTS: Final = (
    "ALTER TABLE account_openings ADD COLUMN opened_at TIMESTAMPTZ",
    # Until now an opening was used up by a payout to its address.
    """
    UPDATE account_openings o SET opened_at = o.at
    WHERE EXISTS (SELECT 1 FROM payouts p WHERE p.person_id = o.person_id AND p.address = o.address)""",
    "GRANT UPDATE (opened_at) ON account_openings TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
