"""Rules by amount, notices to operators, and the addresses nobody may pay."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "settlement_0002"
down_revision = "settlement_0001"
branch_labels = None
depends_on = None

STATEMENTS: Final = (
    # Append-only: the newest row counts, the older ones are the journal (K4).
    """
    CREATE TABLE payout_rules (
        id                  BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        large_above_micro   BIGINT NOT NULL CHECK (large_above_micro >= 0),
        large_approvals     INTEGER NOT NULL CHECK (large_approvals BETWEEN 1 AND 11),
        daily_micro_max     BIGINT NOT NULL CHECK (daily_micro_max >= 0),
        actor               TEXT NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
        reason              TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
        at                  TIMESTAMPTZ NOT NULL
    )""",
    """
    INSERT INTO payout_rules (large_above_micro, large_approvals, daily_micro_max, actor, reason, at)
    VALUES (10000000000, 3, 100000000000, 'migration',
            'three people above $10,000; $100,000 a day', now())""",
    # What an operator must be told; whoever delivers notices sets delivered_at.
    """
    CREATE TABLE settlement_notices (
        id           UUID PRIMARY KEY,
        person_id    UUID NOT NULL REFERENCES people (id),
        kind         TEXT NOT NULL CHECK (length(kind) BETWEEN 1 AND 60),
        message      TEXT NOT NULL CHECK (length(message) BETWEEN 1 AND 2000),
        at           TIMESTAMPTZ NOT NULL,
        delivered_at TIMESTAMPTZ
    )""",
    "CREATE INDEX settlement_notices_waiting ON settlement_notices (at) WHERE delivered_at IS NULL",
    """
    CREATE TABLE sanctioned_addresses (
        address   TEXT PRIMARY KEY CHECK (length(address) BETWEEN 1 AND 100),
        source    TEXT NOT NULL CHECK (length(source) BETWEEN 1 AND 200),
        listed_at TIMESTAMPTZ NOT NULL
    )""",
    "GRANT SELECT, INSERT ON payout_rules, settlement_notices TO tollway_app",
    "GRANT UPDATE (delivered_at) ON settlement_notices TO tollway_app",
    "GRANT SELECT, INSERT, DELETE ON sanctioned_addresses TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
