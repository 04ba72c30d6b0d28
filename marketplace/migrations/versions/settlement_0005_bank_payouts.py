"""Withdrawals to a bank account, approved and sent by people."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "settlement_0005"
down_revision = "settlement_0004"
branch_labels = None
depends_on = None

STATEMENTS: Final = (
    """
    CREATE TABLE bank_accounts (
        id         UUID PRIMARY KEY,
        person_id  UUID NOT NULL REFERENCES people (id),
        holder     TEXT NOT NULL CHECK (length(holder) BETWEEN 1 AND 140),
        iban       TEXT NOT NULL CHECK (iban ~ '^[A-Z]{2}[0-9]{2}[A-Z0-9]{11,30}$'),
        created_at TIMESTAMPTZ NOT NULL,
        usable_at  TIMESTAMPTZ NOT NULL CHECK (usable_at >= created_at),
        retired_at TIMESTAMPTZ
    )""",
    "CREATE UNIQUE INDEX bank_accounts_in_use ON bank_accounts (person_id, iban) WHERE retired_at IS NULL",
    """
    CREATE TABLE bank_withdrawals (
        id              UUID PRIMARY KEY,
        person_id       UUID NOT NULL REFERENCES people (id),
        account_id      UUID NOT NULL REFERENCES bank_accounts (id),
        amount_micro    BIGINT NOT NULL CHECK (amount_micro > 0),
        status          TEXT NOT NULL CHECK (status IN
                        ('requested', 'approved', 'paid', 'refused', 'cancelled')),
        idempotency_key TEXT NOT NULL CHECK (length(idempotency_key) BETWEEN 1 AND 200),
        input_hash      BYTEA NOT NULL CHECK (length(input_hash) = 32),
        hold_id         UUID,
        decided_by      TEXT CHECK (length(decided_by) <= 200),
        reason          TEXT CHECK (length(reason) <= 1000),
        paid_by         TEXT CHECK (length(paid_by) <= 200),
        reference       TEXT UNIQUE CHECK (length(reference) BETWEEN 1 AND 200),
        created_at      TIMESTAMPTZ NOT NULL,
        changed_at      TIMESTAMPTZ NOT NULL,
        UNIQUE (person_id, idempotency_key),
        CHECK ((status IN ('requested', 'approved')) = (hold_id IS NOT NULL)),
        CHECK ((status = 'paid') = (reference IS NOT NULL) AND (status = 'paid') = (paid_by IS NOT NULL)),
        -- Whoever approves does not send (A47).
        CHECK (paid_by IS NULL OR paid_by <> decided_by)
    )""",
    "CREATE INDEX bank_withdrawals_person_id ON bank_withdrawals (person_id, id DESC)",
    "CREATE INDEX bank_withdrawals_open ON bank_withdrawals (id) WHERE status IN ('requested', 'approved')",
    "GRANT SELECT, INSERT ON bank_accounts, bank_withdrawals TO tollway_app",
    "GRANT UPDATE (retired_at) ON bank_accounts TO tollway_app",
    """
    GRANT UPDATE (status, hold_id, decided_by, reason, paid_by, reference, changed_at)
        ON bank_withdrawals TO tollway_app""",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
