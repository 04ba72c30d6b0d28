"""Deposits: loans against deposits that are seen and not final; off unless a watcher is told otherwise."""

from __future__ import annotations

from alembic import op

revision = "deposits_0003"
down_revision = "deposits_0002"
branch_labels = None
depends_on = ("ledger_0002",)

# At most one loan per movement, for ever: what was called in once is not lent again.
TABLE = """
    CREATE TABLE early_credits (
        chain        TEXT NOT NULL CHECK (chain IN ('ethereum', 'base', 'solana')),
        key          TEXT NOT NULL,
        person_id    UUID NOT NULL,
        amount_micro BIGINT NOT NULL CHECK (amount_micro > 0),
        status       TEXT NOT NULL CHECK (status IN ('open', 'repaid', 'called_in')),
        lent_at      TIMESTAMPTZ NOT NULL,
        ended_at     TIMESTAMPTZ,
        PRIMARY KEY (chain, key),
        CONSTRAINT ended_has_time CHECK ((status = 'open') = (ended_at IS NULL))
    )"""


def upgrade() -> None:
    op.execute(TABLE)
    op.execute("CREATE INDEX early_credits_open ON early_credits (person_id) WHERE status = 'open'")
    op.execute("GRANT SELECT, INSERT, UPDATE ON early_credits TO tollway_app")


def downgrade() -> None:
    op.execute("DROP TABLE early_credits")
