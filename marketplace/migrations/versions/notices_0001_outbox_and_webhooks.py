"""Notices: what people are told, to whom it still has to go, and their webhooks."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "notices_0001"
down_revision = None
branch_labels = ("notices",)
depends_on = ("accounts_0001",)

STATEMENTS: Final = (
    # No reference to `people`: what a notice tells of (a credit, say) must never fail because of it.
    """
    CREATE TABLE notices (
        id        UUID PRIMARY KEY,
        kind      TEXT NOT NULL CHECK (length(kind) BETWEEN 1 AND 60),
        person_id UUID NOT NULL,
        payload   JSONB NOT NULL CHECK (length(payload::text) <= 20000),
        at        TIMESTAMPTZ NOT NULL
    )""",
    "CREATE INDEX notices_person ON notices (person_id, id DESC)",
    # `target`: the e-mail address as it was when the notice was written (so that the news of a change
    # goes to the old one), or the webhook's id.
    """
    CREATE TABLE notice_deliveries (
        id         UUID PRIMARY KEY,
        notice_id  UUID NOT NULL REFERENCES notices (id),
        channel    TEXT NOT NULL CHECK (channel IN ('email', 'webhook')),
        target     TEXT NOT NULL CHECK (length(target) BETWEEN 1 AND 254),
        status     TEXT NOT NULL CHECK (status IN ('waiting', 'delivered', 'given_up')),
        attempts   INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),
        next_at    TIMESTAMPTZ NOT NULL,
        last_error TEXT CHECK (length(last_error) <= 500),
        ended_at   TIMESTAMPTZ,
        UNIQUE (notice_id, channel, target),
        CONSTRAINT ended_has_time CHECK ((status = 'waiting') = (ended_at IS NULL))
    )""",
    "CREATE INDEX notice_deliveries_waiting ON notice_deliveries (next_at) WHERE status = 'waiting'",
    # A webhook's secret is derived from the platform's and its id; it is stored nowhere.
    """
    CREATE TABLE webhooks (
        id         UUID PRIMARY KEY,
        person_id  UUID NOT NULL REFERENCES people (id),
        url        TEXT NOT NULL CHECK (length(url) BETWEEN 8 AND 500),
        created_at TIMESTAMPTZ NOT NULL,
        removed_at TIMESTAMPTZ
    )""",
    "CREATE INDEX webhooks_person ON webhooks (person_id) WHERE removed_at IS NULL",
    "GRANT SELECT, INSERT ON notices, notice_deliveries, webhooks TO tollway_app",
    """
    GRANT UPDATE (status, attempts, next_at, last_error, ended_at) ON notice_deliveries TO tollway_app""",
    "GRANT UPDATE (removed_at) ON webhooks TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    for name in ("webhooks", "notice_deliveries", "notices"):
        op.execute(f"DROP TABLE {name}")
