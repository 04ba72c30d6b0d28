"""What is known of how operators serve, what follows from it, and what they say to it."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "reputation_0001"
down_revision = None
branch_labels = ("reputation",)
depends_on = ("accounts_0001", "fabric_0002", "gateway_0001", "ledger_0001", "settlement_0001")

STATEMENTS: Final = (
    # One answer read again by the reference engine. No prompt, no answer: numbers only.
    """
    CREATE TABLE reputation_checks (
        id             BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        at             TIMESTAMPTZ NOT NULL,
        node_id        TEXT NOT NULL REFERENCES nodes (id),
        model          TEXT NOT NULL CHECK (length(model) <= 200),
        kind           TEXT NOT NULL CHECK (kind IN ('spot', 'canary')),
        tokens         INTEGER NOT NULL CHECK (tokens > 0),
        mean_milli     INTEGER NOT NULL,
        surprise_milli INTEGER NOT NULL,
        is_suspicious  BOOLEAN NOT NULL
    )""",
    "CREATE INDEX reputation_checks_at_idx ON reputation_checks (at)",
    # Sums over charges, each read once; `reputation_mark` says up to which charge.
    """
    CREATE TABLE reputation_lengths (
        node           UUID NOT NULL,
        model          TEXT NOT NULL,
        hour           TIMESTAMPTZ NOT NULL,
        completions    BIGINT NOT NULL,
        tokens         NUMERIC(30) NOT NULL,
        tokens_squared NUMERIC(40) NOT NULL,
        PRIMARY KEY (node, model, hour)
    )""",
    "CREATE INDEX reputation_lengths_hour_idx ON reputation_lengths (hour)",
    """
    CREATE TABLE reputation_mark (
        is_only  BOOLEAN PRIMARY KEY DEFAULT true CHECK (is_only),
        up_to    TIMESTAMPTZ NOT NULL
    )""",
    "INSERT INTO reputation_mark (up_to) VALUES (now())",
    # Append-only: the newest row counts, the older ones are the journal (K4).
    """
    CREATE TABLE reputation_policies (
        id     BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        policy JSONB NOT NULL,
        actor  TEXT NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
        reason TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
        at     TIMESTAMPTZ NOT NULL
    )""",
    """
    CREATE TABLE reputation_disputes (
        id          UUID PRIMARY KEY,
        operator_id UUID NOT NULL REFERENCES people (id),
        text        TEXT NOT NULL CHECK (length(text) BETWEEN 1 AND 2000),
        at          TIMESTAMPTZ NOT NULL,
        state       TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'accepted', 'rejected')),
        answer      TEXT CHECK (length(answer) BETWEEN 1 AND 1000),
        decided_by  TEXT,
        decided_at  TIMESTAMPTZ,
        CHECK ((state = 'open') = (decided_at IS NULL)),
        CHECK ((decided_at IS NULL) = (answer IS NULL)),
        CHECK ((decided_at IS NULL) = (decided_by IS NULL))
    )""",
    """
    CREATE UNIQUE INDEX reputation_disputes_open_idx ON reputation_disputes (operator_id)
        WHERE state = 'open'""",
    "CREATE INDEX reputation_disputes_operator_idx ON reputation_disputes (operator_id, at DESC)",
    # Append-only (K4).
    """
    CREATE TABLE reputation_journal (
        id          BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        operator_id UUID NOT NULL REFERENCES people (id),
        action      TEXT NOT NULL CHECK (action IN ('held', 'disputed', 'accepted', 'rejected')),
        actor       TEXT NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
        reason      TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 2000),
        at          TIMESTAMPTZ NOT NULL
    )""",
    "CREATE INDEX reputation_journal_operator_idx ON reputation_journal (operator_id, id DESC)",
    "GRANT SELECT, INSERT ON reputation_policies, reputation_journal TO tollway_app",
    "GRANT SELECT, INSERT, DELETE ON reputation_checks TO tollway_app",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON reputation_lengths TO tollway_app",
    "GRANT SELECT ON reputation_mark TO tollway_app",
    "GRANT UPDATE (up_to) ON reputation_mark TO tollway_app",
    "GRANT SELECT, INSERT ON reputation_disputes TO tollway_app",
    "GRANT UPDATE (state, answer, decided_by, decided_at) ON reputation_disputes TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
