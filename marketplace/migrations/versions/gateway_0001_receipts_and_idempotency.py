"""Beside the charges: hashes, pages of receipts, idempotency keys, drift, sums by key."""

from __future__ import annotations

from alembic import op

revision = "gateway_0001"
down_revision = None
branch_labels = ("gateway",)
depends_on = ("ledger_0002",)

STATEMENTS = """
CREATE TABLE receipts (
    id UUID PRIMARY KEY,
    request_sha256 BYTEA NOT NULL CHECK (length(request_sha256) = 32),
    response_sha256 BYTEA NOT NULL CHECK (length(response_sha256) = 32),
    counted_on SMALLINT NOT NULL
);
CREATE TABLE receipt_keys (
    public_key BYTEA PRIMARY KEY CHECK (length(public_key) = 32),
    first_used TIMESTAMPTZ NOT NULL DEFAULT now()
);
CREATE TABLE receipt_pages (
    id UUID PRIMARY KEY,
    lane SMALLINT NOT NULL,
    first_batch BIGINT NOT NULL,
    last_batch BIGINT NOT NULL,
    node UUID NOT NULL,
    leaves BYTEA NOT NULL CHECK (length(leaves) > 0 AND length(leaves) % 32 = 0),
    public_key BYTEA NOT NULL REFERENCES receipt_keys (public_key),
    signature BYTEA NOT NULL CHECK (length(signature) = 64),
    made_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    countersignature BYTEA CHECK (length(countersignature) = 64),
    disputed SMALLINT[] NOT NULL DEFAULT '{}',
    offered_at TIMESTAMPTZ
);
CREATE INDEX receipt_pages_node_lane_last_batch_idx ON receipt_pages (node, lane, last_batch);
CREATE INDEX receipt_pages_unsigned_idx ON receipt_pages (made_at) WHERE countersignature IS NULL;
CREATE TABLE receipt_marks (
    lane SMALLINT PRIMARY KEY,
    n BIGINT NOT NULL CHECK (n >= 0)
);
CREATE TABLE idempotency (
    person_id UUID NOT NULL,
    key_digest BYTEA NOT NULL CHECK (length(key_digest) = 32),
    request_digest BYTEA NOT NULL CHECK (length(request_digest) = 32),
    request_id UUID NOT NULL,
    credential UUID NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'stored', 'charged')),
    owner UUID NOT NULL,
    alive_until TIMESTAMPTZ NOT NULL,
    expires_at TIMESTAMPTZ NOT NULL,
    response BYTEA,
    response_bytes INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (person_id, key_digest),
    CHECK ((state = 'stored') = (response IS NOT NULL))
);
CREATE INDEX idempotency_expires_at_idx ON idempotency (expires_at);
CREATE TABLE metering_drift (
    id UUID PRIMARY KEY,
    at TIMESTAMPTZ NOT NULL DEFAULT now(),
    node UUID NOT NULL,
    model TEXT NOT NULL,
    prompt_counted INTEGER NOT NULL,
    prompt_reported INTEGER,
    completion_counted INTEGER NOT NULL,
    completion_reported INTEGER
);
CREATE INDEX metering_drift_node_at_idx ON metering_drift (node, at);
CREATE INDEX metering_drift_at_idx ON metering_drift (at);
CREATE TABLE usage_daily_keys (
    day DATE NOT NULL,
    buyer BIGINT NOT NULL,
    key_id UUID NOT NULL,
    model TEXT NOT NULL,
    requests BIGINT NOT NULL CHECK (requests > 0),
    failed BIGINT NOT NULL CHECK (failed >= 0),
    tok_in NUMERIC NOT NULL,
    tok_out NUMERIC NOT NULL,
    amount NUMERIC NOT NULL,
    PRIMARY KEY (buyer, day, key_id, model)
) WITH (fillfactor = 80);
CREATE TABLE usage_key_marks (
    lane SMALLINT PRIMARY KEY,
    n BIGINT NOT NULL CHECK (n >= 0)
);
GRANT SELECT, INSERT ON receipts, receipt_keys TO tollway_app;
GRANT SELECT, INSERT ON receipt_pages TO tollway_app;
GRANT UPDATE (countersignature, disputed, offered_at) ON receipt_pages TO tollway_app;
GRANT SELECT, INSERT, UPDATE ON receipt_marks, usage_daily_keys, usage_key_marks TO tollway_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency TO tollway_app;
GRANT SELECT, INSERT, DELETE ON metering_drift TO tollway_app
"""


def upgrade() -> None:
    for statement in filter(None, (part.strip() for part in STATEMENTS.split(";\n"))):
        op.execute(statement)
