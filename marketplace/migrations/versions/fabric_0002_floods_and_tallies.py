"""What a node did that no honest one does, how long it stays out for it, and why requests went to others."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "fabric_0002"
down_revision = "fabric_0001"
branch_labels = None
depends_on = None

STATEMENTS: Final = (
    "ALTER TABLE nodes ADD COLUMN barred_until TIMESTAMPTZ",
    # Append-only: reputation reads it, nobody corrects it.
    """
    CREATE TABLE node_offences (
        id      BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        node_id TEXT NOT NULL REFERENCES nodes (id),
        kind    TEXT NOT NULL CHECK (kind IN ('flood')),
        at      TIMESTAMPTZ NOT NULL DEFAULT now()
    )""",
    "CREATE INDEX node_offences_node_id_idx ON node_offences (node_id, at)",
    # Why requests went where they went, per hour; `own` and `winner` are sums over `requests` decisions,
    # in the outcome's own unit (marketplace.routing.tally).
    """
    CREATE TABLE routing_tallies (
        node_id  TEXT NOT NULL REFERENCES nodes (id),
        hour     TIMESTAMPTZ NOT NULL,
        model    TEXT NOT NULL CHECK (length(model) <= 200),
        outcome  TEXT NOT NULL CHECK (length(outcome) BETWEEN 1 AND 40),
        requests BIGINT NOT NULL CHECK (requests > 0),
        own      NUMERIC(30) NOT NULL,
        winner   NUMERIC(30) NOT NULL,
        PRIMARY KEY (node_id, hour, model, outcome)
    )""",
    "CREATE INDEX routing_tallies_hour_idx ON routing_tallies (hour)",
    "GRANT SELECT, INSERT ON node_offences TO tollway_app",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON routing_tallies TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
