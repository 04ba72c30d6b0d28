"""What an account and a key may use, and the shared counters that hold processes to it."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "accounts_0003"
down_revision = "accounts_0002"
branch_labels = None
depends_on = None

_LIMITS: Final = """
    ALTER TABLE {table}
        ADD COLUMN requests_per_minute INTEGER CHECK (requests_per_minute > 0),
        ADD COLUMN tokens_per_minute BIGINT CHECK (tokens_per_minute > 0),
        ADD COLUMN parallel_requests INTEGER CHECK (parallel_requests > 0),
        ADD COLUMN spend_nano_per_day BIGINT CHECK (spend_nano_per_day > 0),
        ADD COLUMN allowed_models TEXT[] CHECK (cardinality(allowed_models) BETWEEN 1 AND 100)"""

STATEMENTS: Final = (
    _LIMITS.format(table="people"),
    _LIMITS.format(table="api_keys"),
    "DROP TRIGGER api_keys_changed ON api_keys",
    # Not for last_used_at and name, which say nothing of what the key may do.
    """
    CREATE TRIGGER api_keys_changed
        BEFORE UPDATE OF scopes, revoked_at, expires_at, requests_per_minute, tokens_per_minute,
            parallel_requests, spend_nano_per_day, allowed_models ON api_keys
        FOR EACH ROW EXECUTE FUNCTION mark_changed()""",
    # marks: milliseconds at which units count as handed out, rounded up; units beside them.
    """
    CREATE TABLE allotments (
        subject    TEXT NOT NULL CHECK (length(subject) <= 100),
        rule       TEXT NOT NULL CHECK (length(rule) <= 40),
        marks      BIGINT[] NOT NULL DEFAULT '{}',
        units      BIGINT[] NOT NULL DEFAULT '{}',
        touched_at TIMESTAMPTZ NOT NULL DEFAULT now(),
        PRIMARY KEY (subject, rule)
    ) WITH (fillfactor = 50)""",
    # Each row: first gives back, then takes up to its want, or nothing if less than its least is left.
    # `reset_ms`: until enough has come back for the least; where something was given, until the first does.
    """
    CREATE FUNCTION take_allotments(
        subjects TEXT[], rules TEXT[], ceilings BIGINT[], windows BIGINT[], lives BIGINT[],
        wants BIGINT[], leasts BIGINT[], give_marks BIGINT[], give_units BIGINT[]
    ) RETURNS TABLE (place INTEGER, granted BIGINT, remaining BIGINT, mark BIGINT, reset_ms BIGINT)
    LANGUAGE plpgsql AS $$
    DECLARE
        now_ms BIGINT; span BIGINT; grain BIGINT; used BIGINT;
        old_marks BIGINT[]; old_units BIGINT[]; new_marks BIGINT[]; new_units BIGINT[];
    BEGIN
        FOR i IN 1 .. cardinality(subjects) LOOP
            INSERT INTO allotments (subject, rule) VALUES (subjects[i], rules[i]) ON CONFLICT DO NOTHING;
            SELECT a.marks, a.units INTO old_marks, old_units FROM allotments a
                WHERE a.subject = subjects[i] AND a.rule = rules[i] FOR UPDATE;
            now_ms := floor(extract(epoch FROM clock_timestamp()) * 1000);
            span := windows[i] + lives[i];
            grain := greatest(100, windows[i] / 120);
            mark := (now_ms / grain + 1) * grain;
            SELECT coalesce(array_agg(m ORDER BY m), '{}'), coalesce(array_agg(u ORDER BY m), '{}'),
                   coalesce(sum(u), 0)
                INTO new_marks, new_units, used
                FROM (SELECT m, u - CASE WHEN m = give_marks[i] THEN give_units[i] ELSE 0 END AS u
                      FROM unnest(old_marks, old_units) AS kept (m, u) WHERE m + span > now_ms) AS kept
                WHERE u > 0;
            granted := greatest(0, least(wants[i], ceilings[i] - used));
            IF granted < leasts[i] THEN
                granted := 0;
                SELECT min(m) + span - now_ms INTO reset_ms
                    FROM (SELECT m, sum(u) OVER (ORDER BY m) AS gone
                          FROM unnest(new_marks, new_units) AS kept (m, u)) AS leaving
                    WHERE used - gone + leasts[i] <= ceilings[i];
            ELSE
                reset_ms := coalesce(new_marks[1], mark) + span - now_ms;
            END IF;
            IF granted > 0 AND new_marks[cardinality(new_marks)] = mark THEN
                new_units[cardinality(new_units)] := new_units[cardinality(new_units)] + granted;
            ELSIF granted > 0 THEN
                new_marks := new_marks || mark;
                new_units := new_units || granted;
            END IF;
            UPDATE allotments a SET marks = new_marks, units = new_units, touched_at = now()
                WHERE a.subject = subjects[i] AND a.rule = rules[i];
            place := i;
            remaining := greatest(0, ceilings[i] - used - granted);
            reset_ms := greatest(0, coalesce(reset_ms, windows[i]));
            RETURN NEXT;
        END LOOP;
    END $$""",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON allotments TO tollway_app",
    """
    GRANT UPDATE (requests_per_minute, tokens_per_minute, parallel_requests, spend_nano_per_day,
        allowed_models, expires_at) ON api_keys TO tollway_app""",
    """
    GRANT UPDATE (requests_per_minute, tokens_per_minute, parallel_requests, spend_nano_per_day,
        allowed_models) ON people TO tollway_app""",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
