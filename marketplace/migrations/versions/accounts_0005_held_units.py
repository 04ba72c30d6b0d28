"""What is held stays counted: each part of it has a mark of its own, and its renewal is never refused.

Marks are shared by all that is handed out within a tenth of a second.  A process that renews what it holds
and does not learn the answer gives the same part back again: of a shared mark it took what is others'.
And a renewal that was refused (a ceiling lowered meanwhile, units counted twice for a while) left what is
held uncounted, for as long as it is held.
"""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "accounts_0005"
down_revision = "accounts_0004"
branch_labels = None
depends_on = None

# Each row: first gives back, then takes up to its want, or nothing if less than its least is left; what is
# held at once (a window of 0) gets its least in any case, which is what it holds already; `remaining` is
# then below zero where that is more than the ceiling.
# `reset_ms`: until enough has come back for the least; where something was given, until the first does.
TAKE: Final = """
    CREATE OR REPLACE FUNCTION take_allotments(
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
            IF windows[i] = 0 THEN
                mark := greatest(mark, old_marks[cardinality(old_marks)] + 1);
            END IF;
            SELECT coalesce(array_agg(m ORDER BY m), '{}'), coalesce(array_agg(u ORDER BY m), '{}'),
                   coalesce(sum(u), 0)
                INTO new_marks, new_units, used
                FROM (SELECT m, u - CASE WHEN m = give_marks[i] THEN give_units[i] ELSE 0 END AS u
                      FROM unnest(old_marks, old_units) AS kept (m, u) WHERE m + span > now_ms) AS kept
                WHERE u > 0;
            granted := greatest(0, least(wants[i], ceilings[i] - used));
            IF windows[i] = 0 THEN
                granted := greatest(granted, leasts[i]);
            END IF;
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
            remaining := ceilings[i] - used - granted;
            reset_ms := greatest(0, coalesce(reset_ms, windows[i]));
            RETURN NEXT;
        END LOOP;
    END $$"""


def upgrade() -> None:
    op.execute(TAKE)
