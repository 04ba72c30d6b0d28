"""Withdrawals, settlement batches, approvals, broadcasts, and the facts about people that gate them."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "settlement_0001"
down_revision = None
branch_labels = ("settlement",)
depends_on = ("ledger_0001", "accounts_0001")

CHAINS: Final = "('ethereum', 'base', 'solana')"

TABLES: Final = (
    f"""
    CREATE TABLE payout_addresses (
        id         UUID PRIMARY KEY,
        person_id  UUID NOT NULL REFERENCES people (id),
        chain      TEXT NOT NULL CHECK (chain IN {CHAINS}),
        address    TEXT NOT NULL CHECK (length(address) BETWEEN 32 AND 44),
        created_at TIMESTAMPTZ NOT NULL,
        usable_at  TIMESTAMPTZ NOT NULL CHECK (usable_at >= created_at),
        retired_at TIMESTAMPTZ
    )""",
    """
    CREATE UNIQUE INDEX payout_addresses_in_use ON payout_addresses (person_id, chain, address)
        WHERE retired_at IS NULL""",
    # Append-only: the newest row of a person counts, the older ones are the journal.
    """
    CREATE TABLE standings (
        id        BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        person_id UUID NOT NULL REFERENCES people (id),
        is_good   BOOLEAN NOT NULL,
        reason    TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
        actor     TEXT NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
        at        TIMESTAMPTZ NOT NULL
    )""",
    "CREATE INDEX standings_person_id ON standings (person_id, id DESC)",
    """
    CREATE TABLE kyc (
        id          BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        person_id   UUID NOT NULL REFERENCES people (id),
        is_verified BOOLEAN NOT NULL,
        reason      TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
        actor       TEXT NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
        at          TIMESTAMPTZ NOT NULL
    )""",
    "CREATE INDEX kyc_person_id ON kyc (person_id, id DESC)",
    # rail = a chain, or 'payouts' for all of them.
    f"""
    CREATE TABLE payout_halts (
        id          BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        rail        TEXT NOT NULL CHECK (rail = 'payouts' OR rail IN {CHAINS}),
        actor       TEXT NOT NULL CHECK (length(actor) BETWEEN 1 AND 200),
        reason      TEXT NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
        at          TIMESTAMPTZ NOT NULL,
        lifted_at   TIMESTAMPTZ,
        lifted_by   TEXT,
        lift_reason TEXT,
        CHECK ((lifted_at IS NULL) = (lifted_by IS NULL) AND (lifted_at IS NULL) = (lift_reason IS NULL))
    )""",
    "CREATE UNIQUE INDEX payout_halts_in_force ON payout_halts (rail) WHERE lifted_at IS NULL",
    f"""
    CREATE TABLE settlement_batches (
        id          UUID PRIMARY KEY,
        chain       TEXT NOT NULL CHECK (chain IN {CHAINS}),
        status      TEXT NOT NULL CHECK (status IN
                    ('planned', 'approved', 'signed', 'broadcast', 'final', 'failed', 'expired')),
        digest      BYTEA NOT NULL CHECK (length(digest) = 32),
        merkle_root BYTEA NOT NULL CHECK (length(merkle_root) = 32),
        escrow      TEXT NOT NULL,
        fence       TEXT NOT NULL,
        context     JSONB NOT NULL,
        total_micro BIGINT NOT NULL CHECK (total_micro > 0),
        count       INTEGER NOT NULL CHECK (count > 0),
        threshold   INTEGER NOT NULL CHECK (threshold > 0),
        planned_by  TEXT NOT NULL CHECK (length(planned_by) BETWEEN 1 AND 200),
        planned_at  TIMESTAMPTZ NOT NULL,
        changed_at  TIMESTAMPTZ NOT NULL,
        trouble     TEXT NOT NULL DEFAULT '' CHECK (length(trouble) <= 2000),
        -- A fence is used by one batch: what could land twice cannot be written down twice (P3, A37).
        UNIQUE (chain, fence)
    )""",
    """
    CREATE UNIQUE INDEX settlement_batches_one_live ON settlement_batches (chain)
        WHERE status IN ('planned', 'approved', 'signed', 'broadcast')""",
    f"""
    CREATE TABLE withdrawals (
        id              UUID PRIMARY KEY,
        person_id       UUID NOT NULL REFERENCES people (id),
        chain           TEXT NOT NULL CHECK (chain IN {CHAINS}),
        address         TEXT NOT NULL CHECK (length(address) BETWEEN 32 AND 44),
        amount_micro    BIGINT NOT NULL CHECK (amount_micro > 0),
        status          TEXT NOT NULL CHECK (status IN
                        ('requested', 'planned', 'paid', 'failed', 'cancelled')),
        idempotency_key TEXT NOT NULL CHECK (length(idempotency_key) BETWEEN 1 AND 200),
        input_hash      BYTEA NOT NULL CHECK (length(input_hash) = 32),
        hold_id         UUID,
        batch_id        UUID REFERENCES settlement_batches (id),
        refusal         TEXT CHECK (length(refusal) <= 1000),
        created_at      TIMESTAMPTZ NOT NULL,
        changed_at      TIMESTAMPTZ NOT NULL,
        UNIQUE (person_id, idempotency_key),
        CONSTRAINT held_while_requested CHECK ((status = 'requested') = (hold_id IS NOT NULL)),
        CONSTRAINT planned_in_a_batch CHECK (status NOT IN ('planned', 'paid') OR batch_id IS NOT NULL),
        CONSTRAINT failed_with_a_reason CHECK (status <> 'failed' OR refusal IS NOT NULL)
    )""",
    "CREATE INDEX withdrawals_waiting ON withdrawals (chain, created_at, id) WHERE status = 'requested'",
    "CREATE INDEX withdrawals_person_id ON withdrawals (person_id, id DESC)",
    # is_live: may still reach the chain or has reached it; a withdrawal has at most one such payout (P1).
    """
    CREATE TABLE payouts (
        id            UUID PRIMARY KEY,
        batch_id      UUID NOT NULL REFERENCES settlement_batches (id),
        position      INTEGER NOT NULL CHECK (position >= 0),
        withdrawal_id UUID NOT NULL REFERENCES withdrawals (id),
        person_id     UUID NOT NULL REFERENCES people (id),
        address       TEXT NOT NULL,
        amount_micro  BIGINT NOT NULL CHECK (amount_micro > 0),
        is_live       BOOLEAN NOT NULL DEFAULT TRUE,
        UNIQUE (batch_id, position)
    )""",
    "CREATE UNIQUE INDEX payouts_one_live ON payouts (withdrawal_id) WHERE is_live",
    "CREATE INDEX payouts_person_id ON payouts (person_id, id DESC)",
    """
    CREATE TABLE approvals (
        batch_id   UUID NOT NULL REFERENCES settlement_batches (id),
        signer     TEXT NOT NULL CHECK (length(signer) BETWEEN 32 AND 44),
        signatures JSONB NOT NULL,
        pushed_by  TEXT NOT NULL CHECK (length(pushed_by) BETWEEN 1 AND 200),
        created_at TIMESTAMPTZ NOT NULL,
        PRIMARY KEY (batch_id, signer)
    )""",
    # One row per envelope around the batch's payload; raw, tx and fence are never changed (P2).
    """
    CREATE TABLE broadcasts (
        batch_id         UUID NOT NULL REFERENCES settlement_batches (id),
        attempt          INTEGER NOT NULL CHECK (attempt > 0),
        raw              BYTEA NOT NULL CHECK (length(raw) BETWEEN 1 AND 1048576),
        tx               TEXT NOT NULL,
        fence            TEXT NOT NULL,
        stored_at        TIMESTAMPTZ NOT NULL,
        first_sent_at    TIMESTAMPTZ,
        last_sent_at     TIMESTAMPTZ,
        final_tx         TEXT,
        final_height     BIGINT,
        final_block_hash TEXT,
        PRIMARY KEY (batch_id, attempt),
        UNIQUE (batch_id, tx)
    )""",
    # Planning needs the settler's keys (a dry run may create token accounts), so it is asked for here.
    f"""
    CREATE TABLE plan_requests (
        id       UUID PRIMARY KEY,
        chain    TEXT NOT NULL CHECK (chain IN {CHAINS}),
        asked_by TEXT NOT NULL CHECK (length(asked_by) BETWEEN 1 AND 200),
        asked_at TIMESTAMPTZ NOT NULL,
        done_at  TIMESTAMPTZ,
        batch_id UUID REFERENCES settlement_batches (id),
        code     TEXT CHECK (length(code) <= 60),
        outcome  TEXT CHECK (length(outcome) <= 2000)
    )""",
    "CREATE INDEX plan_requests_open ON plan_requests (chain, asked_at) WHERE done_at IS NULL",
)

GRANTS: Final = (
    """
    GRANT SELECT, INSERT ON payout_addresses, standings, kyc, payout_halts, settlement_batches, withdrawals,
        payouts, approvals, broadcasts, plan_requests TO tollway_app""",
    "GRANT UPDATE (retired_at) ON payout_addresses TO tollway_app",
    "GRANT UPDATE (lifted_at, lifted_by, lift_reason) ON payout_halts TO tollway_app",
    # What was approved cannot be changed: no grant on digest, fence, context, totals, lines, signed bytes.
    "GRANT UPDATE (status, changed_at, trouble) ON settlement_batches TO tollway_app",
    "GRANT UPDATE (status, hold_id, batch_id, refusal, changed_at) ON withdrawals TO tollway_app",
    "GRANT UPDATE (is_live) ON payouts TO tollway_app",
    """
    GRANT UPDATE (first_sent_at, last_sent_at, final_tx, final_height, final_block_hash)
        ON broadcasts TO tollway_app""",
    "GRANT UPDATE (done_at, batch_id, code, outcome) ON plan_requests TO tollway_app",
)


def upgrade() -> None:
    for statement in (*TABLES, *GRANTS):
        op.execute(statement)
