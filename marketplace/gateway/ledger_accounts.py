"""People's ledger accounts, remembered: their ids never change."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger.accounts import Account, buyer, ensure_account, operator_earnings
from marketplace.ledger.errors import LedgerUnavailable
from marketplace.platform.database import transaction


class RememberedAccounts:
    """Account ids by person, read (or created) at first use."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._known: dict[Account, int] = {}

    async def buyer(self, person_id: UUID) -> int:
        """The person's spending account; LedgerUnavailable when the database does not answer."""
        return await self._id_of(buyer(str(person_id)))

    async def operator(self, person_id: UUID) -> int:
        """The person's earnings account; LedgerUnavailable when the database does not answer."""
        return await self._id_of(operator_earnings(str(person_id)))

    async def _id_of(self, account: Account) -> int:
        known = self._known.get(account)
        if known is not None:
            return known
        try:
            async with transaction(self._engine) as connection:
                found = await ensure_account(connection, account)
        except (SQLAlchemyError, OSError) as e:
            raise LedgerUnavailable(f"{account} cannot be read") from e
        self._known[account] = found
        return found
