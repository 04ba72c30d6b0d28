"""Nodes and their enrolment tokens; of a token only a digest is stored."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "fabric_0001"
down_revision = None
branch_labels = ("fabric",)
depends_on = ("accounts_0001", "ledger_0001")

STATEMENTS: Final = (
    # A public key belongs to one node for ever: a revoked key cannot come back under another name.
    """
    CREATE TABLE nodes (
        id             TEXT PRIMARY KEY CHECK (id ~ '^n-[a-z2-7]{26}$'),
        operator_id    UUID NOT NULL REFERENCES people (id),
        name           TEXT NOT NULL CHECK (length(name) <= 200),
        public_key     TEXT NOT NULL UNIQUE CHECK (public_key ~ '^U[A-Z2-7]{55}$'),
        created_at     TIMESTAMPTZ NOT NULL DEFAULT now(),
        revoked_at     TIMESTAMPTZ,
        last_seen_at   TIMESTAMPTZ,
        session_server TEXT CHECK (length(session_server) <= 64),
        session_client BIGINT,
        CHECK ((session_server IS NULL) = (session_client IS NULL))
    )""",
    "CREATE INDEX nodes_operator_id_idx ON nodes (operator_id)",
    "CREATE INDEX nodes_created_at_idx ON nodes (created_at)",
    "CREATE INDEX nodes_revoked_at_idx ON nodes (revoked_at) WHERE revoked_at IS NOT NULL",
    # What every gateway sweeps each second; empty but for moments.
    "CREATE INDEX nodes_to_cut_idx ON nodes (id) WHERE revoked_at IS NOT NULL AND session_server IS NOT NULL",
    """
    CREATE TABLE enrolment_tokens (
        digest      BYTEA PRIMARY KEY CHECK (length(digest) = 32),
        operator_id UUID NOT NULL REFERENCES people (id),
        created_at  TIMESTAMPTZ NOT NULL DEFAULT now(),
        expires_at  TIMESTAMPTZ NOT NULL,
        used_at     TIMESTAMPTZ,
        node_id     TEXT REFERENCES nodes (id),
        CHECK ((used_at IS NULL) = (node_id IS NULL))
    )""",
    "CREATE INDEX enrolment_tokens_operator_id_idx ON enrolment_tokens (operator_id)",
    "GRANT SELECT, INSERT, UPDATE ON nodes TO tollway_app",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON enrolment_tokens TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
