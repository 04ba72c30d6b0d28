"""An owner who is no superuser may act as the role he made; since PostgreSQL 16 he has to say so himself."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "ledger_0005"
down_revision = "ledger_0004"
branch_labels = None
depends_on = None

ACT_AS: Final = """
    DO $$ BEGIN
        IF current_setting('server_version_num')::int >= 160000 THEN
            IF NOT pg_has_role(current_user, 'tollway_app', 'SET') THEN
                EXECUTE format('GRANT tollway_app TO %I WITH INHERIT FALSE, SET TRUE', current_user);
            END IF;
        END IF;
    END $$"""


def upgrade() -> None:
    op.execute(ACT_AS)


def downgrade() -> None:
    """The right stays: others' databases on the same server may lean on it."""
