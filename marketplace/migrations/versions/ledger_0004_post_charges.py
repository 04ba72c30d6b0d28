"""Posting a batch in one round trip: functions for what nearly every batch is."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "ledger_0004"
down_revision = "ledger_0003"
branch_labels = None
depends_on = None

# Everything of a batch but its rows: consumes leases, moves balances (leases by id, then balances by account,
# locked in that order), appends to the lane's chain.  Each statement sees what was committed before it, since
# the locks come first.  SQLSTATE TW001: a lease or an account is not there, or money is short; then nothing
# was done.
EXTEND_LANE: Final = """
    CREATE FUNCTION extend_lane(
        lane SMALLINT, n BIGINT, first_id UUID, last_id UUID, rows INTEGER, sum BIGINT,
        prev_hash BYTEA, hash BYTEA,
        lease_ids UUID[], consumed BIGINT[], account_ids BIGINT[], added BIGINT[], released BIGINT[]
    ) RETURNS VOID LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    DECLARE
        done BIGINT;
    BEGIN
        IF cardinality(lease_ids) > 0 THEN
            PERFORM FROM leases l WHERE l.id = ANY(lease_ids) ORDER BY l.id FOR NO KEY UPDATE;
            UPDATE leases l SET amount = l.amount - u.consumed
            FROM unnest(lease_ids, consumed) AS u (id, consumed)
            WHERE l.id = u.id AND l.amount >= u.consumed;
            GET DIAGNOSTICS done = ROW_COUNT;
            IF done <> cardinality(lease_ids) THEN
                RAISE EXCEPTION 'a lease does not cover its charges' USING ERRCODE = 'TW001';
            END IF;
        END IF;
        IF cardinality(account_ids) > 0 THEN
            PERFORM FROM balances b WHERE b.account_id = ANY(account_ids)
            ORDER BY b.account_id FOR NO KEY UPDATE;
            -- What no lease covers may take what is available, and nothing beyond.
            UPDATE balances b SET posted = b.posted + u.added, held = b.held - u.released
            FROM unnest(account_ids, added, released) AS u (account_id, added, released)
            WHERE b.account_id = u.account_id
              AND (b.floor IS NULL OR u.added + u.released >= 0
                   OR b.posted - b.held + u.added + u.released >= 0);
            GET DIAGNOSTICS done = ROW_COUNT;
            IF done <> cardinality(account_ids) THEN
                RAISE EXCEPTION 'an account cannot take its charges' USING ERRCODE = 'TW001';
            END IF;
        END IF;
        INSERT INTO batches (lane, n, first_id, last_id, rows, sum, prev_hash, hash)
        VALUES (lane, n, first_id, last_id, rows, sum, prev_hash, hash);
    END $$"""

POST_CHARGES: Final = """
    CREATE FUNCTION post_charges(
        ids UUID[], buyers BIGINT[], operators BIGINT[], amounts BIGINT[], fees BIGINT[], nodes UUID[],
        models TEXT[], key_ids UUID[], toks_in INTEGER[], toks_out INTEGER[], counted_bys SMALLINT[],
        price_versions BIGINT[], latencies_ms INTEGER[], ttfts_ms INTEGER[], statuses SMALLINT[],
        finishes TEXT[], streams BOOLEAN[],
        lane SMALLINT, n BIGINT, sum BIGINT, prev_hash BYTEA, hash BYTEA,
        lease_ids UUID[], consumed BIGINT[], account_ids BIGINT[], added BIGINT[], released BIGINT[]
    ) RETURNS VOID LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    BEGIN
        INSERT INTO charges (
            id, buyer, operator, amount, fee, node, model, key_id, tok_in, tok_out, counted_by,
            price_version, latency_ms, ttft_ms, status, finish, stream, lane, batch)
        SELECT c.*, post_charges.lane, post_charges.n FROM unnest(
            ids, buyers, operators, amounts, fees, nodes, models, key_ids, toks_in, toks_out, counted_bys,
            price_versions, latencies_ms, ttfts_ms, statuses, finishes, streams) AS c;
        PERFORM extend_lane(
            lane, n, ids[1], ids[cardinality(ids)], cardinality(ids), sum, prev_hash, hash,
            lease_ids, consumed, account_ids, added, released);
    END $$"""


def upgrade() -> None:
    op.execute(EXTEND_LANE)
    op.execute(POST_CHARGES)


def downgrade() -> None:
    op.execute("DROP FUNCTION post_charges")
    op.execute("DROP FUNCTION extend_lane")
