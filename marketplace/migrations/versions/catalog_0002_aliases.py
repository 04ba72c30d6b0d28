"""Names that stand for models, in the order in which they are tried."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "catalog_0002"
down_revision = "catalog_0001"
branch_labels = None
depends_on = None

STATEMENTS: Final = (
    """
    CREATE TABLE model_aliases (
        alias      TEXT PRIMARY KEY CHECK (length(alias) BETWEEN 1 AND 200),
        models     TEXT[] NOT NULL CHECK (cardinality(models) BETWEEN 1 AND 16),
        changed_at TIMESTAMPTZ NOT NULL DEFAULT now()
    )""",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON model_aliases TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
