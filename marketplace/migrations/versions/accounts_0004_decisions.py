"""Who decided what about an account, and why."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "accounts_0004"
down_revision = "accounts_0003"
branch_labels = None
depends_on = None

STATEMENTS: Final = (
    """
    CREATE TABLE account_decisions (
        id         BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        person_id  UUID NOT NULL REFERENCES people (id),
        action     TEXT NOT NULL CHECK (action IN ('limits', 'freeze', 'unfreeze')),
        actor      UUID NOT NULL REFERENCES people (id),
        reason     TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
        detail     JSONB NOT NULL,
        decided_at TIMESTAMPTZ NOT NULL
    )""",
    "CREATE INDEX account_decisions_person ON account_decisions (person_id, id DESC)",
    "GRANT SELECT, INSERT ON account_decisions TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TABLE account_decisions")
