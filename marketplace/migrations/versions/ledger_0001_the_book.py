"""The book: accounts, balances, charges, transfers, holds, leases, batches, and who may write what."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "ledger_0001"
down_revision = None
branch_labels = ("ledger",)
depends_on = None

TABLES: Final = (
    """
    CREATE TABLE accounts (
        id         BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        kind       TEXT NOT NULL CHECK (kind <> ''),
        owner      TEXT NOT NULL,
        created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
        UNIQUE (kind, owner)
    )""",
    # posted = credits − debits.  fillfactor leaves room on the page, so that updates stay in place.
    """
    CREATE TABLE balances (
        account_id BIGINT PRIMARY KEY REFERENCES accounts (id),
        posted     BIGINT NOT NULL DEFAULT 0,
        held       BIGINT NOT NULL DEFAULT 0 CHECK (held >= 0),
        floor      BIGINT,
        CONSTRAINT available_at_least_floor CHECK (floor IS NULL OR posted - held >= floor)
    ) WITH (fillfactor = 50)""",
    # The usage row is the transfer: buyer −amount, operator +(amount − fee), platform_revenue:<lane> +fee.
    # No foreign keys: the poster locks every account it moves, and a check per row would double its cost.
    """
    CREATE TABLE charges (
        id            UUID PRIMARY KEY,
        buyer         BIGINT NOT NULL,
        operator      BIGINT,
        amount        BIGINT NOT NULL CHECK (amount >= 0),
        fee           BIGINT NOT NULL CHECK (fee >= 0 AND fee <= amount),
        node          UUID,
        model         TEXT NOT NULL CHECK (length(model) <= 200),
        key_id        UUID,
        tok_in        INTEGER NOT NULL CHECK (tok_in >= 0),
        tok_out       INTEGER NOT NULL CHECK (tok_out >= 0),
        counted_by    SMALLINT NOT NULL,
        price_version BIGINT NOT NULL,
        latency_ms    INTEGER NOT NULL CHECK (latency_ms >= 0),
        ttft_ms       INTEGER CHECK (ttft_ms >= 0),
        status        SMALLINT NOT NULL,
        finish        TEXT CHECK (length(finish) <= 40),
        lane          SMALLINT NOT NULL,
        batch         BIGINT NOT NULL,
        stream        BOOLEAN NOT NULL,
        CONSTRAINT paid_to_somebody CHECK (amount = 0 OR operator IS NOT NULL)
    ) PARTITION BY RANGE (id)""",
    "CREATE TABLE charges_default PARTITION OF charges DEFAULT",
    "CREATE INDEX charges_buyer_id ON charges (buyer, id DESC)",
    "CREATE INDEX charges_operator_id ON charges (operator, id DESC)",
    "CREATE INDEX charges_buyer_failed ON charges (buyer, id DESC) WHERE status <> 200",
    """
    CREATE TABLE transfers (
        id         UUID PRIMARY KEY,
        kind       TEXT NOT NULL CHECK (kind <> ''),
        debit      BIGINT NOT NULL REFERENCES accounts (id),
        credit     BIGINT NOT NULL REFERENCES accounts (id),
        amount     BIGINT NOT NULL CHECK (amount > 0),
        ref        TEXT NOT NULL CHECK (ref <> '' AND length(ref) <= 300),
        input_hash BYTEA NOT NULL CHECK (length(input_hash) = 32),
        reverses   UUID REFERENCES transfers (id),
        note       TEXT NOT NULL DEFAULT '' CHECK (length(note) <= 1000),
        created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
        CONSTRAINT two_accounts CHECK (debit <> credit),
        CONSTRAINT one_transfer_per_key UNIQUE (kind, ref)
    )""",
    "CREATE INDEX transfers_debit_id ON transfers (debit, id DESC)",
    "CREATE INDEX transfers_credit_id ON transfers (credit, id DESC)",
    "CREATE INDEX transfers_reverses ON transfers (reverses) WHERE reverses IS NOT NULL",
    # amount = what is left unspent of the slice; Σ leases + Σ holds of an account = its held.
    """
    CREATE TABLE leases (
        id      UUID PRIMARY KEY,
        buyer   BIGINT NOT NULL REFERENCES balances (account_id),
        worker  TEXT NOT NULL CHECK (worker <> '' AND length(worker) <= 200),
        amount  BIGINT NOT NULL CHECK (amount >= 0),
        expires TIMESTAMPTZ NOT NULL
    ) WITH (fillfactor = 50)""",
    "CREATE INDEX leases_worker ON leases (worker)",
    """
    CREATE TABLE holds (
        id         UUID PRIMARY KEY,
        account    BIGINT NOT NULL REFERENCES balances (account_id),
        amount     BIGINT NOT NULL CHECK (amount > 0),
        reason     TEXT NOT NULL CHECK (reason <> '' AND length(reason) <= 300),
        created_at TIMESTAMPTZ NOT NULL DEFAULT now()
    )""",
    "CREATE INDEX holds_account ON holds (account)",
    """
    CREATE TABLE batches (
        lane      SMALLINT NOT NULL,
        n         BIGINT NOT NULL CHECK (n > 0),
        first_id  UUID NOT NULL,
        last_id   UUID NOT NULL,
        rows      INTEGER NOT NULL CHECK (rows > 0),
        sum       BIGINT NOT NULL CHECK (sum >= 0),
        prev_hash BYTEA NOT NULL CHECK (length(prev_hash) = 32),
        hash      BYTEA NOT NULL CHECK (length(hash) = 32),
        posted_at TIMESTAMPTZ NOT NULL DEFAULT now(),
        PRIMARY KEY (lane, n)
    )""",
)

ENSURE_PARTITIONS: Final = """
    CREATE FUNCTION ensure_partitions(months_ahead INTEGER) RETURNS INTEGER
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
    DECLARE
        month   TIMESTAMP := TIMESTAMP '2026-01-01';
        last    TIMESTAMP := date_trunc('month', now() AT TIME ZONE 'UTC');
        name    TEXT;
        created INTEGER := 0;
    BEGIN
        IF months_ahead NOT BETWEEN 0 AND 120 THEN
            RAISE EXCEPTION 'months_ahead % is outside 0..120', months_ahead;
        END IF;
        PERFORM pg_advisory_xact_lock(1953459317);
        last := last + make_interval(months => months_ahead);
        WHILE month <= last LOOP
            name := 'charges_' || to_char(month, 'YYYY_MM');
            IF to_regclass(name) IS NULL THEN
                EXECUTE format('CREATE TABLE %I PARTITION OF charges FOR VALUES FROM (%L) TO (%L)',
                    name, lowest_charge_id(month), lowest_charge_id(month + interval '1 month'));
                created := created + 1;
            END IF;
            month := month + interval '1 month';
        END LOOP;
        RETURN created;
    END $$"""

FUNCTIONS: Final = (
    # The smallest uuidv7 of a moment (UTC): its 48 bits of milliseconds, then zeros.
    """
    CREATE FUNCTION lowest_charge_id(moment TIMESTAMP) RETURNS UUID LANGUAGE sql IMMUTABLE AS $$
        SELECT (lpad(to_hex((extract(epoch FROM moment) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid
    $$""",
    ENSURE_PARTITIONS,
    "REVOKE EXECUTE ON FUNCTION ensure_partitions(INTEGER) FROM PUBLIC",
    "SELECT ensure_partitions(12)",
)

ROLE: Final = """
    DO $$ BEGIN
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'tollway_app') THEN
            CREATE ROLE tollway_app NOLOGIN;
        END IF;
        IF NOT pg_has_role(current_user, 'tollway_app', 'MEMBER')
           OR (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
            EXECUTE format('GRANT tollway_app TO %I', current_user);
        END IF;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN
        EXECUTE format('GRANT tollway_app TO %I', current_user);
    END $$"""

GRANTS: Final = (
    ROLE,
    "GRANT USAGE ON SCHEMA public TO tollway_app",
    # Append-only: no UPDATE, DELETE or TRUNCATE on what is written; partitions get no grant of their own.
    "GRANT SELECT, INSERT ON accounts, transfers, charges, batches TO tollway_app",
    "GRANT SELECT, INSERT, UPDATE ON balances TO tollway_app",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON leases, holds TO tollway_app",
    "GRANT EXECUTE ON FUNCTION ensure_partitions(INTEGER) TO tollway_app",
)

TABLE_NAMES: Final = ("batches", "holds", "leases", "transfers", "charges", "balances", "accounts")


def upgrade() -> None:
    for statement in (*TABLES, *FUNCTIONS, *GRANTS):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP FUNCTION ensure_partitions(INTEGER)")
    for name in TABLE_NAMES:
        op.execute(f"DROP TABLE {name}")
    op.execute("DROP FUNCTION lowest_charge_id(TIMESTAMP)")
