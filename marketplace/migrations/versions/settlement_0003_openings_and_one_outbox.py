"""Token accounts we paid the rent of, one an operator; notices go to the one outbox."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "settlement_0003"
down_revision = "settlement_0002"
branch_labels = None
depends_on = ("notices_0001",)

STATEMENTS: Final = (
    # One row an operator and chain: whoever closes what we opened opens the next one himself (A45).
    """
    CREATE TABLE account_openings (
        person_id UUID NOT NULL REFERENCES people (id),
        chain     TEXT NOT NULL CHECK (chain IN ('ethereum', 'base', 'solana')),
        address   TEXT NOT NULL CHECK (length(address) BETWEEN 32 AND 44),
        at        TIMESTAMPTZ NOT NULL,
        PRIMARY KEY (person_id, chain)
    )""",
    # Whoever was paid on Solana before has had his.
    """
    INSERT INTO account_openings (person_id, chain, address, at)
    SELECT DISTINCT ON (p.person_id) p.person_id, b.chain, p.address, b.changed_at
    FROM payouts p JOIN settlement_batches b ON b.id = p.batch_id
    WHERE b.chain = 'solana' AND b.status = 'final' ORDER BY p.person_id, b.changed_at""",
    "GRANT SELECT, INSERT ON account_openings TO tollway_app",
    "DROP TABLE settlement_notices",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
