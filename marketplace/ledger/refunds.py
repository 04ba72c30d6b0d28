"""Giving a charge back, wholly or in part: from both who had shared it, in proportion.

A charge is refunded at most once, and never beyond what each had of it; `posting` holds every refund to the
charge as it is stored, whoever built it.
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger.errors import ReversalRefused
from marketplace.ledger.ids import NewId, uuid7
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfers
from marketplace.ledger.tables import accounts, charges
from marketplace.ledger.templates import charge_refund


async def refund_charge(
    conn: AsyncConnection, charge_id: UUID, *, amount: Nano | None = None, note: str, new_id: NewId = uuid7
) -> bool:
    """Give the buyer `amount` of this charge back (None: all of it); `note` says why and who decided.

    True: moved now.  False: the same refund was on record already.  Raises `ReversalRefused` for a charge
    that cost nothing, is not (or no longer) in the book, or cost less than `amount`; `KeyReused` if it was
    refunded otherwise before; `InsufficientFunds` if the operator's earnings do not hold his share any more
    (`templates.refund` gives goodwill out of the platform's own).  Never commits.
    """
    row = (await conn.execute(select(charges).where(charges.c.id == charge_id))).one_or_none()
    if row is None or not row.amount:
        raise ReversalRefused(f"{charge_id} is not a charge that cost something")
    whole = Nano(row.amount) if amount is None else amount
    if not 0 < whole.n <= row.amount:
        raise ReversalRefused(f"charge {charge_id} cost {Nano(row.amount)}, not {whole}")
    owners = {
        owner.id: owner.owner
        for owner in await conn.execute(select(accounts).where(accounts.c.id.in_((row.buyer, row.operator))))
    }
    earned, fee = shares(whole, cost=Nano(row.amount), fee=Nano(row.fee))
    parts = charge_refund(
        person=owners[row.buyer], operator=owners[row.operator], lane=row.lane, earned=earned, fee=fee,
        ref=str(charge_id), note=note,
    )  # fmt: skip
    return any(await post_transfers(conn, parts, new_id=new_id))


def shares(part: Nano, *, cost: Nano, fee: Nano) -> tuple[Nano, Nano]:
    """(operator's, platform's) share of a part of a cost: they sum to it, and neither exceeds its own.

    >>> shares(Nano(50), cost=Nano(101), fee=Nano(21))
    (Nano(n=39), Nano(n=11))
    >>> shares(Nano(101), cost=Nano(101), fee=Nano(21))
    (Nano(n=80), Nano(n=21))
    """
    earned = Nano((cost.n - fee.n) * part.n // cost.n)
    return earned, part - earned
