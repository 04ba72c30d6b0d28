"""When a session's person last proved who he is."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "accounts_0002"
down_revision = "accounts_0001"
branch_labels = None
depends_on = None

STATEMENTS: Final = (
    "ALTER TABLE sessions ADD COLUMN proved_at TIMESTAMPTZ",
    "UPDATE sessions SET proved_at = created_at",
    "ALTER TABLE sessions ALTER COLUMN proved_at SET NOT NULL",
    "GRANT UPDATE (proved_at) ON sessions TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
