"""Deposits: Solana sweeps that signers approve, unsupported tokens, alarms, people's decisions."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "deposits_0002"
down_revision = "deposits_0001"
branch_labels = None
depends_on = None

CHAIN: Final = "TEXT NOT NULL CHECK (chain IN ('ethereum', 'base', 'solana'))"

TABLES: Final = (
    # `lines` and `fence` are all that signers sign (with their own pinned terms); `raw` is durable before
    # the first send.  The ledger is moved by the watcher, never from here.
    """
    CREATE TABLE solana_sweeps (
        id           UUID PRIMARY KEY,
        status       TEXT NOT NULL CHECK (status IN ('prepared', 'signed', 'final', 'void')),
        fence        TEXT NOT NULL CHECK (length(fence) BETWEEN 32 AND 44),
        lines        JSONB NOT NULL,
        amount_micro BIGINT NOT NULL CHECK (amount_micro > 0),
        prepared_by  TEXT NOT NULL CHECK (length(prepared_by) BETWEEN 1 AND 200),
        prepared_at  TIMESTAMPTZ NOT NULL,
        raw          BYTEA CHECK (length(raw) <= 1232),
        tx           TEXT UNIQUE,
        ended_at     TIMESTAMPTZ,
        note         TEXT CHECK (length(note) <= 1000),
        CONSTRAINT signed_has_bytes CHECK ((raw IS NULL) = (tx IS NULL)
                                       AND (status NOT IN ('signed', 'final') OR raw IS NOT NULL)),
        CONSTRAINT ended_has_time CHECK ((status IN ('final', 'void')) = (ended_at IS NOT NULL))
    )""",
    """
    CREATE UNIQUE INDEX solana_sweeps_one_live ON solana_sweeps ((true))
        WHERE status IN ('prepared', 'signed')""",
    """
    CREATE TABLE solana_sweep_approvals (
        sweep_id   UUID NOT NULL REFERENCES solana_sweeps (id),
        signer     TEXT NOT NULL CHECK (length(signer) BETWEEN 32 AND 44),
        signatures JSONB NOT NULL,
        brought_by TEXT NOT NULL CHECK (length(brought_by) BETWEEN 1 AND 200),
        at         TIMESTAMPTZ NOT NULL,
        PRIMARY KEY (sweep_id, signer)
    )""",
    # `amount` in the token's own smallest unit; nobody's balance ever comes from here.
    f"""
    CREATE TABLE unsupported_deposits (
        chain      {CHAIN},
        key        TEXT NOT NULL CHECK (length(key) BETWEEN 1 AND 200),
        tx         TEXT NOT NULL,
        height     BIGINT NOT NULL,
        block_hash TEXT NOT NULL,
        token      TEXT NOT NULL,
        name       TEXT NOT NULL,
        to_address TEXT NOT NULL,
        sender     TEXT NOT NULL,
        amount     NUMERIC(78) NOT NULL CHECK (amount > 0),
        person_id  UUID,
        at         TIMESTAMPTZ NOT NULL,
        PRIMARY KEY (chain, key)
    )""",
    # An alarm that is not in here holds every deposit of its chain.
    f"""
    CREATE TABLE chain_acknowledgements (
        chain  {CHAIN},
        alarm  TEXT NOT NULL CHECK (length(alarm) BETWEEN 1 AND 300),
        actor  TEXT NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
        reason TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
        at     TIMESTAMPTZ NOT NULL,
        PRIMARY KEY (chain, alarm)
    )""",
    f"""
    CREATE TABLE deposit_decisions (
        id        BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        chain     {CHAIN},
        key       TEXT NOT NULL,
        decision  TEXT NOT NULL CHECK (decision IN ('attribute', 'leave')),
        person_id UUID,
        actor     TEXT NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
        reason    TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
        at        TIMESTAMPTZ NOT NULL,
        CONSTRAINT to_somebody CHECK ((decision = 'attribute') = (person_id IS NOT NULL))
    )""",
    """
    CREATE UNIQUE INDEX deposit_decisions_attributed_once ON deposit_decisions (chain, key)
        WHERE decision = 'attribute'""",
    """
    CREATE TABLE screened_senders (
        address  TEXT PRIMARY KEY CHECK (length(address) BETWEEN 32 AND 44),
        reason   TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
        added_by TEXT NOT NULL CHECK (length(added_by) BETWEEN 1 AND 200),
        added_at TIMESTAMPTZ NOT NULL
    )""",
)

GRANTS: Final = (
    "GRANT SELECT, INSERT ON solana_sweep_approvals, unsupported_deposits TO tollway_app",
    "GRANT SELECT, INSERT ON chain_acknowledgements, deposit_decisions TO tollway_app",
    "GRANT SELECT, INSERT, DELETE ON screened_senders TO tollway_app",
    "GRANT SELECT, INSERT, UPDATE ON solana_sweeps TO tollway_app",
)

TABLE_NAMES: Final = (
    "screened_senders",
    "deposit_decisions",
    "chain_acknowledgements",
    "unsupported_deposits",
    "solana_sweep_approvals",
    "solana_sweeps",
)


def upgrade() -> None:
    for statement in (*TABLES, *GRANTS):
        op.execute(statement)


def downgrade() -> None:
    for name in TABLE_NAMES:
        op.execute(f"DROP TABLE {name}")
