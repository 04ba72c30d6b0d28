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
        self._buyers: dict[UUID, int] = {}
        self._operators: dict[UUID, int] = {}

    async def buyer(self, person_id: UUID) -> int:
        """The person's spending account; LedgerUnavailable when the database does not answer."""
        known = self._buyers.get(person_id)
        if known is None:
            known = self._buyers[person_id] = await self._id_of(buyer(str(person_id)))
        return known

    async def operator(self, person_id: UUID) -> int:
        """The person's earnings account; LedgerUnavailable when the database does not answer."""
        known = self._operators.get(person_id)
        if known is None:
            known = self._operators[person_id] = await self._id_of(operator_earnings(str(person_id)))
        return known

    async def _id_of(self, account: Account) -> int:
        try:
            async with transaction(self._engine) as connection:
                return await ensure_account(connection, account)
        except (SQLAlchemyError, OSError) as e:
            raise LedgerUnavailable(f"{account} cannot be read") from e
