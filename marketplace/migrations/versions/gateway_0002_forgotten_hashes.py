"""Hashes beside old charges are forgotten; the pages that sign them stay."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "gateway_0002"
down_revision = "gateway_0001"
branch_labels = None
depends_on = None

# The application may forget what is old and sealed, and nothing else: it has no DELETE on the table.
# A day of margin lies between what is forgotten and what must be sealed: ids are as old as a request's start.
FORGET: Final = """
    CREATE FUNCTION forget_receipts(most INTEGER) RETURNS INTEGER
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
    DECLARE
        old    UUID := lowest_charge_id((now() - interval '400 days') AT TIME ZONE 'UTC');
        margin UUID := lowest_charge_id((now() - interval '399 days') AT TIME ZONE 'UTC');
        gone   INTEGER;
    BEGIN
        IF EXISTS (
            SELECT FROM generate_series(0, 63) AS l (lane) LEFT JOIN receipt_marks m ON m.lane = l.lane
            CROSS JOIN LATERAL (
                SELECT first_id FROM batches b WHERE b.lane = l.lane AND b.n > coalesce(m.n, 0)
                ORDER BY n LIMIT 1) AS unsealed
            WHERE unsealed.first_id < margin) THEN
            RETURN 0;
        END IF;
        DELETE FROM receipts WHERE id IN (
            SELECT id FROM receipts WHERE id < old ORDER BY id LIMIT most FOR UPDATE SKIP LOCKED);
        GET DIAGNOSTICS gone = ROW_COUNT;
        RETURN gone;
    END $$"""
STATEMENTS: Final = (
    FORGET,
    "REVOKE EXECUTE ON FUNCTION forget_receipts(INTEGER) FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION forget_receipts(INTEGER) TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
