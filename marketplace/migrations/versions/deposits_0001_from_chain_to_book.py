"""Deposits: addresses, intents, the Solana pool, what came in and was swept, where each watcher stands."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "deposits_0001"
down_revision = None
branch_labels = ("deposits",)
depends_on = ("ledger_0001",)

CHAIN: Final = "TEXT NOT NULL CHECK (chain IN ('ethereum', 'base', 'solana'))"

TABLES: Final = (
    # `seq` grows in commit order (writers hold an advisory lock), so a watcher can read only the new.
    # `address` is what people are shown; `watched` is what the chain is read for.  On EVM they are equal.
    """
    CREATE TABLE deposit_addresses (
        seq           BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE,
        person_id     UUID NOT NULL,
        chain_family  TEXT NOT NULL CHECK (chain_family IN ('evm', 'solana')),
        address       TEXT NOT NULL PRIMARY KEY CHECK (length(address) BETWEEN 32 AND 44),
        watched       TEXT NOT NULL UNIQUE CHECK (length(watched) BETWEEN 32 AND 44),
        salt          BYTEA CHECK (length(salt) = 32),
        pool_index    INTEGER,
        created_at    TIMESTAMPTZ NOT NULL,
        retired_at    TIMESTAMPTZ,
        CONSTRAINT origin CHECK ((chain_family = 'evm') = (salt IS NOT NULL)
                             AND (chain_family = 'solana') = (pool_index IS NOT NULL))
    )""",
    """
    CREATE UNIQUE INDEX deposit_addresses_one_active ON deposit_addresses (person_id, chain_family)
        WHERE retired_at IS NULL""",
    # Watched from the moment the row exists, which is before the account exists on chain.
    """
    CREATE TABLE solana_pool (
        pool_index    INTEGER PRIMARY KEY CHECK (pool_index >= 0),
        owner         TEXT NOT NULL UNIQUE,
        token_account TEXT NOT NULL UNIQUE,
        ready_at      TIMESTAMPTZ,
        person_id     UUID
    )""",
    "CREATE INDEX solana_pool_free ON solana_pool (pool_index) WHERE person_id IS NULL",
    """
    CREATE TABLE deposit_intents (
        seq          BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE,
        reference    TEXT PRIMARY KEY CHECK (length(reference) BETWEEN 32 AND 44),
        person_id    UUID NOT NULL,
        amount_micro BIGINT CHECK (amount_micro > 0),
        expires_at   TIMESTAMPTZ NOT NULL,
        created_at   TIMESTAMPTZ NOT NULL
    )""",
    "CREATE INDEX deposit_intents_person ON deposit_intents (person_id, expires_at)",
    f"""
    CREATE TABLE deposits (
        id           UUID PRIMARY KEY,
        chain        {CHAIN},
        key          TEXT NOT NULL CHECK (length(key) BETWEEN 1 AND 200),
        tx           TEXT NOT NULL,
        height       BIGINT NOT NULL,
        block_hash   TEXT NOT NULL,
        to_address   TEXT NOT NULL,
        sender       TEXT NOT NULL,
        amount_micro BIGINT NOT NULL CHECK (amount_micro > 0),
        person_id    UUID,
        intent       TEXT REFERENCES deposit_intents (reference),
        is_direct    BOOLEAN NOT NULL,
        status       TEXT NOT NULL CHECK (status IN ('seen', 'final', 'orphaned')),
        seen_at      TIMESTAMPTZ NOT NULL,
        final_at     TIMESTAMPTZ,
        credited_at  TIMESTAMPTZ,
        transfer_ref TEXT,
        CONSTRAINT one_row_per_movement UNIQUE (chain, key),
        CONSTRAINT final_has_time CHECK ((status = 'final') = (final_at IS NOT NULL)),
        CONSTRAINT only_final_is_credited CHECK (
            credited_at IS NULL OR (status = 'final' AND person_id IS NOT NULL)),
        CONSTRAINT booked_once_final CHECK ((status = 'final') = (transfer_ref IS NOT NULL))
    )""",
    "CREATE INDEX deposits_person ON deposits (person_id, id DESC)",
    "CREATE INDEX deposits_unfinal ON deposits (chain, height) WHERE status = 'seen'",
    """
    CREATE INDEX deposits_waiting ON deposits (chain, to_address, person_id)
        WHERE status = 'final' AND credited_at IS NULL AND person_id IS NOT NULL""",
    "CREATE INDEX deposits_held ON deposits (chain, to_address) WHERE status = 'final' AND NOT is_direct",
    f"""
    CREATE TABLE sweeps (
        chain        {CHAIN},
        key          TEXT NOT NULL,
        tx           TEXT NOT NULL,
        height       BIGINT NOT NULL,
        block_hash   TEXT NOT NULL,
        from_address TEXT NOT NULL,
        amount_micro BIGINT NOT NULL CHECK (amount_micro > 0),
        booked_at    TIMESTAMPTZ NOT NULL,
        PRIMARY KEY (chain, key)
    )""",
    "CREATE INDEX sweeps_from ON sweeps (chain, from_address)",
    # height, hash: newest block read.  final_*: where the books stand.  head_height: the node's newest.
    f"""
    CREATE TABLE chain_cursors (
        chain               {CHAIN} PRIMARY KEY,
        version             BIGINT NOT NULL DEFAULT 0,
        height              BIGINT NOT NULL,
        hash                TEXT NOT NULL,
        final_height        BIGINT NOT NULL,
        final_hash          TEXT NOT NULL,
        final_parent_height BIGINT NOT NULL,
        final_parent_hash   TEXT NOT NULL,
        final_time_s        BIGINT NOT NULL,
        head_height         BIGINT NOT NULL,
        started_height      BIGINT NOT NULL,
        updated_at          TIMESTAMPTZ NOT NULL,
        halted_at           TIMESTAMPTZ,
        halt_reason         TEXT CHECK (length(halt_reason) <= 1000),
        halted_by           TEXT CHECK (length(halted_by) <= 200),
        CONSTRAINT halt_is_whole CHECK (num_nulls(halted_at, halt_reason, halted_by) IN (0, 3)),
        CONSTRAINT final_below_tip CHECK (final_height <= height)
    )""",
    f"""
    CREATE TABLE chain_headers (
        chain         {CHAIN},
        height        BIGINT NOT NULL,
        hash          TEXT NOT NULL,
        parent_height BIGINT NOT NULL,
        parent_hash   TEXT NOT NULL,
        time_s        BIGINT NOT NULL,
        PRIMARY KEY (chain, height)
    )""",
    f"""
    CREATE TABLE chain_halts (
        id     BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        chain  {CHAIN},
        action TEXT NOT NULL CHECK (action IN ('halt', 'resume')),
        actor  TEXT NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
        reason TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
        at     TIMESTAMPTZ NOT NULL
    )""",
    f"""
    CREATE TABLE support_cases (
        id         UUID PRIMARY KEY,
        kind       TEXT NOT NULL CHECK (length(kind) BETWEEN 1 AND 60),
        chain      {CHAIN},
        key        TEXT NOT NULL,
        detail     TEXT NOT NULL CHECK (length(detail) <= 1000),
        created_at TIMESTAMPTZ NOT NULL,
        UNIQUE (kind, chain, key)
    )""",
)

GRANTS: Final = (
    "GRANT SELECT, INSERT ON deposit_intents, sweeps, chain_halts, support_cases TO tollway_app",
    "GRANT SELECT, INSERT, UPDATE ON deposit_addresses, solana_pool, deposits, chain_cursors TO tollway_app",
    "GRANT SELECT, INSERT, DELETE ON chain_headers TO tollway_app",
)

TABLE_NAMES: Final = (
    "support_cases",
    "chain_halts",
    "chain_headers",
    "chain_cursors",
    "sweeps",
    "deposits",
    "deposit_intents",
    "solana_pool",
    "deposit_addresses",
)


def upgrade() -> None:
    for statement in (*TABLES, *GRANTS):
        op.execute(statement)


def downgrade() -> None:
    for name in TABLE_NAMES:
        op.execute(f"DROP TABLE {name}")
