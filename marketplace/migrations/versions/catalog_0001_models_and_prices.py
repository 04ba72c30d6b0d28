"""Models, tokenizers by digest, and price versions (append-only: a charge names the one it used)."""

from __future__ import annotations

from alembic import op

revision = "catalog_0001"
down_revision = None
branch_labels = ("catalog",)
depends_on = ("ledger_0001",)

STATEMENTS = """
CREATE TABLE tokenizers (
    sha256 TEXT PRIMARY KEY CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    tokenizer BYTEA NOT NULL,
    chat_template TEXT NOT NULL,
    special_tokens TEXT NOT NULL
);
CREATE TABLE models (
    name TEXT PRIMARY KEY CHECK (length(name) BETWEEN 1 AND 200),
    tier TEXT NOT NULL CHECK (tier IN ('small', 'medium', 'large', 'premium')),
    context INTEGER NOT NULL CHECK (context > 0),
    tokenizer_sha256 TEXT NOT NULL CONSTRAINT models_tokenizer_sha256_fkey REFERENCES tokenizers (sha256),
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    retired_at TIMESTAMPTZ
);
CREATE TABLE price_versions (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    node_id TEXT NOT NULL,
    model TEXT NOT NULL,
    price_in BIGINT NOT NULL CHECK (price_in >= 0),
    price_out BIGINT NOT NULL CHECK (price_out >= 0),
    since TIMESTAMPTZ NOT NULL DEFAULT now()
);
CREATE INDEX price_versions_node_id_model_idx ON price_versions (node_id, model, id);
GRANT SELECT, INSERT ON tokenizers TO tollway_app;
GRANT SELECT, INSERT, UPDATE ON models TO tollway_app;
GRANT SELECT, INSERT ON price_versions TO tollway_app;
"""


def upgrade() -> None:
    for statement in filter(None, (part.strip() for part in STATEMENTS.split(";\n"))):
        op.execute(statement)
