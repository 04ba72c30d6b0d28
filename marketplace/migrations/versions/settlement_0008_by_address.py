"""What was withdrawn to one wallet or IBAN, by however many accounts (A81), is found without reading all."""

from __future__ import annotations

from typing import Final

from alembic import op

revision = "settlement_0008"
down_revision = "settlement_0007"
branch_labels = None
depends_on = None

STATEMENTS: Final = (
    "CREATE INDEX withdrawals_address ON withdrawals (address)",
    "CREATE INDEX bank_accounts_iban ON bank_accounts (iban)",
    "CREATE INDEX bank_withdrawals_account_id ON bank_withdrawals (account_id)",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
