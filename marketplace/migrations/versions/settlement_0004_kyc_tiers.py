"""KYC as tiers in data, and the checks a provider makes."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "settlement_0004"
down_revision = "settlement_0003"
branch_labels = None
depends_on = None

STATEMENTS: Final = (
    # Append-only: of each tier the newest row counts, the older ones are the journal (K4).  NULL: no limit.
    """
    CREATE TABLE kyc_tiers (
        id                   BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        tier                 TEXT NOT NULL CHECK (tier ~ '^[a-z_]{1,30}$'),
        withdrawal_micro_max BIGINT CHECK (withdrawal_micro_max >= 0),
        total_micro_max      BIGINT CHECK (total_micro_max >= 0),
        actor                TEXT NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
        reason               TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
        at                   TIMESTAMPTZ NOT NULL
    )""",
    """
    INSERT INTO kyc_tiers (tier, withdrawal_micro_max, total_micro_max, actor, reason, at) VALUES
        ('none', 500000000, 500000000, 'migration', 'R16: over $500.00, at once or in all', now()),
        ('identity', NULL, NULL, 'migration', 'R16: identity verified', now())""",
    "ALTER TABLE kyc ADD COLUMN tier TEXT CHECK (tier ~ '^[a-z_]{1,30}$')",
    "UPDATE kyc SET tier = CASE WHEN is_verified THEN 'identity' ELSE 'none' END",
    "ALTER TABLE kyc ALTER COLUMN tier SET NOT NULL, DROP COLUMN is_verified",
    """
    CREATE TABLE identity_checks (
        id         UUID PRIMARY KEY,
        person_id  UUID NOT NULL REFERENCES people (id),
        provider   TEXT NOT NULL CHECK (length(provider) BETWEEN 1 AND 60),
        session    TEXT CHECK (length(session) BETWEEN 1 AND 200),
        url        TEXT CHECK (length(url) <= 2000),
        status     TEXT NOT NULL CHECK (status IN ('asked', 'open', 'verified', 'cancelled')),
        reason     TEXT NOT NULL DEFAULT '' CHECK (length(reason) <= 500),
        created_at TIMESTAMPTZ NOT NULL,
        changed_at TIMESTAMPTZ NOT NULL,
        UNIQUE (provider, session),
        CHECK (status = 'asked' OR session IS NOT NULL)
    )""",
    # One under way per person: asking again continues it.
    """
    CREATE UNIQUE INDEX identity_checks_one_open ON identity_checks (person_id)
        WHERE status IN ('asked', 'open')""",
    "GRANT SELECT, INSERT ON kyc_tiers, identity_checks TO tollway_app",
    "GRANT UPDATE (session, url, status, reason, changed_at) ON identity_checks TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
