"""Who else has seen a prompt: nodes that were asked and did not answer, beside the request's usage row."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "gateway_0003"
down_revision = "gateway_0002"
branch_labels = None
depends_on = None

# A gateway that takes over a repeated request of one that died counts its own attempts under the same id.
STATEMENTS: Final = (
    """CREATE TABLE failed_attempts (
        id UUID NOT NULL,
        attempt SMALLINT NOT NULL CHECK (attempt > 0),
        at TIMESTAMPTZ NOT NULL DEFAULT now(),
        node UUID NOT NULL,
        model TEXT NOT NULL,
        reason TEXT NOT NULL,
        PRIMARY KEY (id, attempt, node)
    )""",
    "CREATE INDEX failed_attempts_at_idx ON failed_attempts (at)",
    "GRANT SELECT, INSERT, DELETE ON failed_attempts TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
