"""Overdrafts of one response, lifted floors, daily sums of usage, and months that can be detached."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "ledger_0002"
down_revision = "ledger_0001"
branch_labels = None
depends_on = None

TABLES: Final = (
    # A floor is a permission to be below zero, never a duty to keep more than zero.
    "ALTER TABLE balances ADD CONSTRAINT floor_at_most_zero CHECK (floor <= 0)",
    # Lowered the debited account's floor to where it left the account; see `templates`.
    "ALTER TABLE transfers ADD COLUMN lifts_floor BOOLEAN NOT NULL DEFAULT false",
    "CREATE INDEX transfers_lifting ON transfers (debit) WHERE lifts_floor",
    # Who may end below zero by how much; is_drawn: has been let below zero and was not yet seen back above.
    """
    CREATE TABLE overdrafts (
        account_id BIGINT PRIMARY KEY REFERENCES balances (account_id),
        limit_nano BIGINT NOT NULL CHECK (limit_nano >= 0),
        is_drawn   BOOLEAN NOT NULL DEFAULT false
    )""",
    "CREATE INDEX overdrafts_drawn ON overdrafts (account_id) WHERE is_drawn",
    # What the prover and the daily sums walk: a lane's batches.  BRIN costs the poster next to nothing.
    """
    CREATE INDEX charges_lane_batch ON charges USING brin (lane, batch)
    WITH (autosummarize = on, pages_per_range = 32)""",
    # A key's or a node's few requests among its owner's many.
    "CREATE INDEX charges_key_id ON charges (key_id, id DESC)",
    "CREATE INDEX charges_node_id ON charges (node, id DESC)",
    """
    CREATE TABLE usage_daily (
        day      DATE NOT NULL,
        buyer    BIGINT NOT NULL,
        operator BIGINT NOT NULL,
        model    TEXT NOT NULL,
        requests BIGINT NOT NULL CHECK (requests > 0),
        failed   BIGINT NOT NULL CHECK (failed >= 0),
        tok_in   NUMERIC NOT NULL,
        tok_out  NUMERIC NOT NULL,
        amount   NUMERIC NOT NULL,
        fee      NUMERIC NOT NULL,
        PRIMARY KEY (buyer, day, operator, model)
    ) WITH (fillfactor = 80)""",
    "CREATE INDEX usage_daily_operator ON usage_daily (operator, day)",
    # Up to which batch a lane is in usage_daily.
    """
    CREATE TABLE rollup_marks (
        lane SMALLINT PRIMARY KEY,
        n    BIGINT NOT NULL CHECK (n >= 0)
    )""",
    # What a detached month had moved, so that balances can still be derived.
    """
    CREATE TABLE archived_months (
        month       DATE PRIMARY KEY,
        upper_id    UUID NOT NULL,
        rows        BIGINT NOT NULL,
        detached_at TIMESTAMPTZ NOT NULL DEFAULT now()
    )""",
    """
    CREATE TABLE archived_moves (
        month   DATE NOT NULL REFERENCES archived_months (month),
        account BIGINT NOT NULL REFERENCES accounts (id),
        delta   NUMERIC NOT NULL,
        PRIMARY KEY (month, account)
    )""",
)

# Months go in order, are over for two months, and are in the daily sums; so nothing new comes to them.
DETACH_MONTH: Final = """
    CREATE FUNCTION detach_month(month DATE) RETURNS TEXT
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
    DECLARE
        first TIMESTAMP := date_trunc('month', month);
        name  TEXT := 'charges_' || to_char(first, 'YYYY_MM');
        upper UUID := lowest_charge_id(first + interval '1 month');
        older TEXT;
    BEGIN
        IF first + interval '3 months' > now() AT TIME ZONE 'UTC' THEN
            RAISE EXCEPTION '% is too recent to detach', name;
        END IF;
        PERFORM pg_advisory_xact_lock(1953459317);
        SELECT min(c.relname) INTO older FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'charges'::regclass AND c.relname ~ '^charges_[0-9]{4}_[0-9]{2}$';
        IF older IS DISTINCT FROM name THEN
            RAISE EXCEPTION 'the oldest month is %, not %', older, name;
        END IF;
        LOCK TABLE charges IN SHARE ROW EXCLUSIVE MODE;
        IF EXISTS (SELECT FROM batches b LEFT JOIN rollup_marks m ON m.lane = b.lane
                   WHERE b.first_id < upper AND b.n > coalesce(m.n, 0)) THEN
            RAISE EXCEPTION '% is not in the daily sums yet', name;
        END IF;
        EXECUTE format('INSERT INTO archived_months (month, upper_id, rows) SELECT %L, %L, count(*) FROM %I',
            first, upper, name);
        EXECUTE format($sql$
            INSERT INTO archived_moves (month, account, delta)
            SELECT %1$L, account, sum(delta) FROM (
                SELECT buyer AS account, -sum(amount) AS delta FROM %2$I GROUP BY buyer
                UNION ALL SELECT operator, sum(amount - fee) FROM %2$I WHERE operator IS NOT NULL
                          GROUP BY operator
                UNION ALL SELECT a.id, sum(c.fee) FROM %2$I c
                          JOIN accounts a ON a.kind = 'platform_revenue' AND a.owner = c.lane::text
                          GROUP BY a.id
            ) AS moves GROUP BY account HAVING sum(delta) <> 0$sql$, first, name);
        EXECUTE format('ALTER TABLE charges DETACH PARTITION %I', name);
        RETURN name;
    END $$"""

# Months that were detached are never made again.
ENSURE_PARTITIONS: Final = """
    CREATE OR REPLACE FUNCTION ensure_partitions(months_ahead INTEGER) RETURNS INTEGER
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
    DECLARE
        wanted  TIMESTAMP := TIMESTAMP '2026-01-01';
        last    TIMESTAMP := date_trunc('month', now() AT TIME ZONE 'UTC');
        name    TEXT;
        created INTEGER := 0;
    BEGIN
        IF months_ahead NOT BETWEEN 0 AND 120 THEN
            RAISE EXCEPTION 'months_ahead % is outside 0..120', months_ahead;
        END IF;
        PERFORM pg_advisory_xact_lock(1953459317);
        last := last + make_interval(months => months_ahead);
        WHILE wanted <= last LOOP
            name := 'charges_' || to_char(wanted, 'YYYY_MM');
            IF to_regclass(name) IS NULL
               AND NOT EXISTS (SELECT FROM archived_months a WHERE a.month = wanted::date) THEN
                EXECUTE format('CREATE TABLE %I PARTITION OF charges FOR VALUES FROM (%L) TO (%L)',
                    name, lowest_charge_id(wanted), lowest_charge_id(wanted + interval '1 month'));
                created := created + 1;
            END IF;
            wanted := wanted + interval '1 month';
        END LOOP;
        RETURN created;
    END $$"""

FUNCTIONS: Final = (
    DETACH_MONTH,
    "REVOKE EXECUTE ON FUNCTION detach_month(DATE) FROM PUBLIC",
    ENSURE_PARTITIONS,
)

GRANTS: Final = (
    "GRANT SELECT, INSERT, UPDATE ON overdrafts, usage_daily, rollup_marks TO tollway_app",
    "GRANT SELECT ON archived_months, archived_moves TO tollway_app",
)

TABLE_NAMES: Final = ("archived_moves", "archived_months", "rollup_marks", "usage_daily", "overdrafts")


def upgrade() -> None:
    for statement in (*TABLES, *FUNCTIONS, *GRANTS):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP FUNCTION detach_month(DATE)")
    for name in TABLE_NAMES:
        op.execute(f"DROP TABLE {name}")
    for index in ("charges_lane_batch", "charges_key_id", "charges_node_id", "transfers_lifting"):
        op.execute(f"DROP INDEX {index}")
    op.execute("ALTER TABLE transfers DROP COLUMN lifts_floor")
    op.execute("ALTER TABLE balances DROP CONSTRAINT floor_at_most_zero")
