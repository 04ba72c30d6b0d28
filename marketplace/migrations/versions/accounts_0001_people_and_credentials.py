"""People, their wallets, sessions and API keys; no secret of theirs is stored, only digests."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "accounts_0001"
down_revision = None
branch_labels = ("accounts",)
depends_on = ("ledger_0001",)

TABLES: Final = (
    # `changed` on people and api_keys is the id of the transaction that last changed the row.  Unlike a
    # sequence it can be polled without missing a slow commit: everything that was still in flight at one
    # poll has an id at or above that poll's pg_snapshot_xmin, where the next poll starts.
    """
    CREATE TABLE people (
        id            UUID PRIMARY KEY,
        email         TEXT UNIQUE CHECK (email = lower(email) AND length(email) <= 254),
        password_hash TEXT,
        display_name  TEXT NOT NULL CHECK (length(display_name) <= 100),
        is_operator   BOOLEAN NOT NULL DEFAULT FALSE,
        is_admin      BOOLEAN NOT NULL DEFAULT FALSE,
        created_at    TIMESTAMPTZ NOT NULL DEFAULT now(),
        frozen_at     TIMESTAMPTZ,
        changed       XID8 NOT NULL DEFAULT pg_current_xact_id(),
        CHECK (password_hash IS NULL OR email IS NOT NULL)
    )""",
    "CREATE INDEX people_changed_idx ON people (changed)",
    """
    CREATE TABLE wallets (
        id          UUID PRIMARY KEY,
        person_id   UUID NOT NULL REFERENCES people (id),
        kind        TEXT NOT NULL CHECK (kind IN ('evm', 'solana')),
        address     TEXT NOT NULL,
        verified_at TIMESTAMPTZ NOT NULL,
        UNIQUE (kind, address)
    )""",
    "CREATE INDEX wallets_person_id_idx ON wallets (person_id)",
    # person_id: set when the message links a wallet to that person, null when it signs in.
    """
    CREATE TABLE wallet_challenges (
        nonce      TEXT PRIMARY KEY,
        kind       TEXT NOT NULL CHECK (kind IN ('evm', 'solana')),
        address    TEXT NOT NULL,
        person_id  UUID REFERENCES people (id),
        message    TEXT NOT NULL,
        expires_at TIMESTAMPTZ NOT NULL
    )""",
    "CREATE INDEX wallet_challenges_expires_at_idx ON wallet_challenges (expires_at)",
    """
    CREATE TABLE sessions (
        digest     BYTEA PRIMARY KEY CHECK (length(digest) = 32),
        person_id  UUID NOT NULL REFERENCES people (id),
        created_at TIMESTAMPTZ NOT NULL,
        expires_at TIMESTAMPTZ NOT NULL,
        revoked_at TIMESTAMPTZ
    )""",
    "CREATE INDEX sessions_person_id_idx ON sessions (person_id)",
    "CREATE INDEX sessions_expires_at_idx ON sessions (expires_at)",
    """
    CREATE TABLE api_keys (
        id           UUID PRIMARY KEY,
        person_id    UUID NOT NULL REFERENCES people (id),
        name         TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 64),
        prefix       TEXT NOT NULL CHECK (length(prefix) <= 20),
        digest       BYTEA NOT NULL UNIQUE CHECK (length(digest) = 32),
        scopes       TEXT[] NOT NULL CHECK (scopes <@ ARRAY['inference', 'account', 'admin']
                                            AND cardinality(scopes) > 0),
        created_at   TIMESTAMPTZ NOT NULL DEFAULT now(),
        last_used_at TIMESTAMPTZ,
        revoked_at   TIMESTAMPTZ,
        expires_at   TIMESTAMPTZ,
        changed      XID8 NOT NULL DEFAULT pg_current_xact_id()
    )""",
    "CREATE INDEX api_keys_person_id_idx ON api_keys (person_id)",
    "CREATE INDEX api_keys_changed_idx ON api_keys (changed)",
)

TRIGGERS: Final = (
    """
    CREATE FUNCTION mark_changed() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        NEW.changed := pg_current_xact_id();
        RETURN NEW;
    END $$""",
    """
    CREATE TRIGGER people_changed BEFORE UPDATE ON people
        FOR EACH ROW EXECUTE FUNCTION mark_changed()""",
    # Not for last_used_at, which says nothing of whether the key works.
    """
    CREATE TRIGGER api_keys_changed BEFORE UPDATE OF scopes, revoked_at, expires_at ON api_keys
        FOR EACH ROW EXECUTE FUNCTION mark_changed()""",
)

GRANTS: Final = (
    "GRANT SELECT, INSERT ON people, wallets, api_keys TO tollway_app",
    """
    GRANT UPDATE (email, password_hash, display_name, is_operator, is_admin, frozen_at)
        ON people TO tollway_app""",
    "GRANT UPDATE (name, last_used_at, revoked_at) ON api_keys TO tollway_app",
    "GRANT SELECT, INSERT, DELETE ON wallet_challenges, sessions TO tollway_app",
    "GRANT UPDATE (revoked_at) ON sessions TO tollway_app",
    # Nothing updates a challenge; sweeping ended ones past each other (SKIP LOCKED) asks for the right.
    "GRANT UPDATE (expires_at) ON wallet_challenges TO tollway_app",
)


def upgrade() -> None:
    for statement in (*TABLES, *TRIGGERS, *GRANTS):
        op.execute(statement)
