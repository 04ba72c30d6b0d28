"""A gateway that takes a request over drops what the other noted of an answer nobody was billed for."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "gateway_0004"
down_revision = "gateway_0003"
branch_labels = None
depends_on = None

# The application may add hashes and never change them; these are of an answer that has no receipt.
DROP: Final = """
    CREATE FUNCTION drop_unbilled_hashes(request UUID) RETURNS VOID
    LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
        DELETE FROM receipts r
        WHERE r.id = request AND NOT EXISTS (SELECT FROM charges c WHERE c.id = request)
    $$"""
STATEMENTS: Final = (
    DROP,
    "REVOKE EXECUTE ON FUNCTION drop_unbilled_hashes(UUID) FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION drop_unbilled_hashes(UUID) TO tollway_app",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
