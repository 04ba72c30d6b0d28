"""One sanctions list for both directions: whom we never pay, and whose deposits wait for a person.

Payouts and deposits keep lists of their own and do not know each other; they meet here.  A refresh replaces
what an earlier list said, and leaves senders alone that a person has screened himself.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.deposits import decisions
from marketplace.deposits.tables import screened_senders
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.settlement import sanctions


async def refresh(engine: AsyncEngine, clock: Clock, file: Path) -> sanctions.AddressList:
    """Put a list in force for payout addresses and for senders of deposits; gives what it names.

    sanctions.BadList leaves both lists as they were.
    """
    found = await asyncio.to_thread(sanctions.read_list, file)
    await _replace(engine, clock, found.addresses, source=file.name)
    return found


async def empty(engine: AsyncEngine, clock: Clock) -> None:
    """Take both lists out of force; a file without an address never does that."""
    await _replace(engine, clock, frozenset(), source="no list")


async def _replace(engine: AsyncEngine, clock: Clock, addresses: frozenset[str], *, source: str) -> None:
    now, senders = clock.now(), {decisions.spelled(address) for address in addresses}
    async with transaction(engine) as conn:
        await sanctions.refresh(conn, addresses, source=source, now=now)
        t = screened_senders.c
        before = set(await conn.scalars(select(t.address).where(t.added_by == decisions.LIST)))
        for address in sorted(before - senders):
            await decisions.unscreen_sender(conn, address, actor=decisions.LIST, reason=source, now=now)
        for address in sorted(senders - before):
            await decisions.screen_sender(conn, address, actor=decisions.LIST, reason=source, now=now)
