"""What a person must look at before a chain's deposits are booked, and what he may look at afterwards.

    token-code:<implementation>     Circle changed the code behind USDC: it may mean something else now
    owner:<tx>:<account>            a token account of ours obeys somebody else

An alarm that nobody has acknowledged halts its chain (`Watcher._require_acknowledged`).  The code that
runs at the first start is taken as known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.networks import Chain
from chain.ports import AccountChange
from marketplace.deposits.booking import open_case
from marketplace.deposits.cursor import halt_chain
from marketplace.deposits.errors import Unacknowledged
from marketplace.deposits.tables import chain_acknowledgements, solana_pool

HALTED: Final = "chain_halted"
"""A case's kind: a chain stands still and somebody has to look."""
TOKEN_CODE: Final = "token-code:"  # noqa: S105  the name of an alarm


async def require_acknowledged(
    conn: AsyncConnection, chain: Chain, alarms: Mapping[str, str], now: datetime
) -> None:
    """Raise Unacknowledged for the first of `alarms` (name → what happened) that nobody has acknowledged."""
    acknowledged = chain_acknowledgements.c.alarm
    known = set(await conn.scalars(select(acknowledged).where(chain_acknowledgements.c.chain == chain.value)))
    if not any(name.startswith(TOKEN_CODE) for name in known):
        for name in alarms:
            if name.startswith(TOKEN_CODE):
                await acknowledge(conn, chain, name, actor="watcher", reason="ran at first start", now=now)
                known.add(name)
    for name in sorted(alarms.keys() - known):
        raise Unacknowledged(f"{alarms[name]}; to go on, acknowledge {name}")


async def acknowledge(
    conn: AsyncConnection, chain: Chain, alarm: str, *, actor: str, reason: str, now: datetime
) -> None:
    """Record that somebody has looked at `alarm`; the chain still has to be resumed."""
    await conn.execute(
        postgresql.insert(chain_acknowledgements)
        .values(chain=chain.value, alarm=alarm, actor=actor, reason=reason[:1000], at=now)
        .on_conflict_do_nothing()
    )


async def halt_and_ask(
    conn: AsyncConnection, chain: Chain, *, actor: str, reason: str, now: datetime
) -> None:
    """Halt the chain and, unless it was halted already, open a case: somebody has to look."""
    if await halt_chain(conn, chain, actor=actor, reason=reason, now=now):
        key = f"halt:{now.isoformat()}"
        await open_case(conn, chain, kind=HALTED, key=key, detail=f"{actor}: {reason}", now=now)


async def note_changes(
    conn: AsyncConnection, chain: Chain, changes: Sequence[AccountChange], now: datetime
) -> None:
    """Open a case for each; a closed pool account is made anew by the pool keeper (A29)."""
    for change in changes:
        detail = f"{change.account} in {change.tx}: {change.detail}"
        kind = f"account_{change.what}"
        await open_case(conn, chain, kind=kind, key=f"{change.tx}:{change.account}", detail=detail, now=now)
        if change.what == "closed":
            await conn.execute(
                update(solana_pool).where(solana_pool.c.token_account == change.account).values(ready_at=None)
            )
