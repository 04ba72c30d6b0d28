"""Deposits: what a chain took back after it was final, once a person has accepted the new history."""

from __future__ import annotations

from alembic import op

revision = "deposits_0005"
down_revision = "deposits_0004"
branch_labels = None
depends_on = ("accounts_0001", "ledger_0001")

# How often a movement is in here numbers its next ledger key, should the chain bring it again.
TABLE = """
    CREATE TABLE taken_back (
        id           BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        chain        TEXT NOT NULL CHECK (chain IN ('ethereum', 'base', 'solana')),
        key          TEXT NOT NULL,
        what         TEXT NOT NULL CHECK (what IN ('deposit', 'sweep')),
        ref          TEXT NOT NULL,
        block_hash   TEXT NOT NULL,
        amount_micro BIGINT NOT NULL CHECK (amount_micro > 0),
        person_id    UUID,
        actor        TEXT NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
        reason       TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
        at           TIMESTAMPTZ NOT NULL,
        UNIQUE (what, ref)
    )"""


def upgrade() -> None:
    op.execute(TABLE)
    op.execute("CREATE INDEX taken_back_key ON taken_back (chain, key)")
    op.execute("GRANT SELECT, INSERT ON taken_back TO tollway_app")
    # A sweep that never was leaves `sweeps`; its row is kept here, its entries stay in the ledger.
    op.execute("GRANT UPDATE, DELETE ON sweeps TO tollway_app")


def downgrade() -> None:
    op.execute("REVOKE UPDATE, DELETE ON sweeps FROM tollway_app")
    op.execute("DROP TABLE taken_back")
