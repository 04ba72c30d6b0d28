"""Where a watcher stands, and who stopped it.

One row per chain.  Every write names the version it read (compare and set), so that a watcher that
lost its lock without noticing can write nothing; a halted chain's row accepts no progress at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, insert, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.headers import Window
from chain.networks import Chain
from chain.ports import Header
from marketplace.deposits.errors import ChainHalted, NotHalted, Superseded
from marketplace.deposits.tables import chain_cursors, chain_halts, chain_headers


@dataclass(frozen=True, slots=True)
class Halt:
    """Why a chain stands still."""

    at: datetime
    reason: str
    by: str


@dataclass(frozen=True, slots=True)
class Cursor:
    """A chain's progress: everything up to `window.final` is in the books."""

    chain: Chain
    version: int
    window: Window
    head_height: int
    halt: Halt | None


async def load_cursor(conn: AsyncConnection, chain: Chain) -> Cursor | None:
    """Read the cursor and its headers; None before the first start.

    In one statement: between two, the watcher may commit, and the headers would not follow the final one.
    """
    columns, cursor = chain_headers.c, chain_cursors.c
    header = (columns.height, columns.hash, columns.parent_hash, columns.parent_height, columns.time_s)
    above_final = (columns.chain == cursor.chain) & (columns.height > cursor.final_height)
    found = await conn.execute(
        select(chain_cursors, *(column.label(f"above_{column.name}") for column in header))
        .select_from(chain_cursors.outerjoin(chain_headers, above_final))
        .where(cursor.chain == chain.value)
        .order_by(columns.height)
    )
    rows = found.all()
    if not rows:
        return None
    row = rows[0]
    above = [tuple(each)[-len(header) :] for each in rows if each.above_height is not None]
    final = Header(
        row.final_height, row.final_hash, row.final_parent_hash, row.final_parent_height, row.final_time_s
    )
    halt = None if row.halted_at is None else Halt(row.halted_at, row.halt_reason, row.halted_by)
    window = Window(final, tuple(Header(*header) for header in above))
    return Cursor(chain, row.version, window, row.head_height, halt)


async def create_cursor(conn: AsyncConnection, chain: Chain, final: Header, now: datetime) -> bool:
    """Start a chain above `final`; False if somebody else has started it."""
    statement = (
        postgresql.insert(chain_cursors)
        .values(
            chain=chain.value,
            version=0,
            height=final.height,
            hash=final.hash,
            final_height=final.height,
            final_hash=final.hash,
            final_parent_height=final.parent_height,
            final_parent_hash=final.parent_hash,
            final_time_s=final.time_s,
            head_height=final.height,
            started_height=final.height,
            updated_at=now,
        )
        .on_conflict_do_nothing()
        .returning(chain_cursors.c.chain)
    )
    return await conn.scalar(statement) is not None


async def save_cursor(
    conn: AsyncConnection, before: Cursor, window: Window, *, head_height: int, now: datetime
) -> Cursor:
    """Write the new window over `before`; raises ChainHalted or Superseded, and then nothing was written."""
    statement = (
        update(chain_cursors)
        .where(
            chain_cursors.c.chain == before.chain.value,
            chain_cursors.c.version == before.version,
            chain_cursors.c.halted_at.is_(None),
        )
        .values(
            version=before.version + 1,
            height=window.tip.height,
            hash=window.tip.hash,
            final_height=window.final.height,
            final_hash=window.final.hash,
            final_parent_height=window.final.parent_height,
            final_parent_hash=window.final.parent_hash,
            final_time_s=window.final.time_s,
            head_height=max(head_height, window.tip.height),
            updated_at=now,
        )
        .returning(chain_cursors.c.version)
    )
    version = await conn.scalar(statement)
    if version is None:
        now_there = await load_cursor(conn, before.chain)
        if now_there is not None and now_there.halt is not None:
            raise ChainHalted(f"{before.chain}: {now_there.halt.reason} ({now_there.halt.by})")
        raise Superseded(f"{before.chain}: the cursor moved from version {before.version}")
    await _save_headers(conn, before.chain, old=before.window.above, new=window.above)
    return Cursor(before.chain, version, window, head_height, None)


async def _save_headers(
    conn: AsyncConnection, chain: Chain, *, old: Iterable[Header], new: Iterable[Header]
) -> None:
    kept = set(old) & set(new)
    gone = [header.height for header in old if header not in kept]
    if gone:
        await conn.execute(
            delete(chain_headers).where(
                chain_headers.c.chain == chain.value, chain_headers.c.height.in_(gone)
            )
        )
    rows = [
        {
            "chain": chain.value,
            "height": header.height,
            "hash": header.hash,
            "parent_height": header.parent_height,
            "parent_hash": header.parent_hash,
            "time_s": header.time_s,
        }
        for header in new
        if header not in kept
    ]
    if rows:
        await conn.execute(insert(chain_headers), rows)


async def halt_chain(conn: AsyncConnection, chain: Chain, *, actor: str, reason: str, now: datetime) -> bool:
    """Stop all credits on `chain` until `resume_chain`; a chain that is halted keeps its first reason.

    True if it was not halted before.
    """
    halted = await conn.scalar(
        update(chain_cursors)
        .where(chain_cursors.c.chain == chain.value, chain_cursors.c.halted_at.is_(None))
        .values(halted_at=now, halt_reason=reason[:1000], halted_by=actor)
        .returning(chain_cursors.c.chain)
    )
    await _journal(conn, chain, "halt", actor=actor, reason=reason, now=now)
    return halted is not None


async def resume_chain(
    conn: AsyncConnection, chain: Chain, *, actor: str, reason: str, now: datetime
) -> None:
    """Let the watcher of `chain` go on; raises NotHalted."""
    resumed = await conn.scalar(
        update(chain_cursors)
        .where(chain_cursors.c.chain == chain.value, chain_cursors.c.halted_at.is_not(None))
        .values(halted_at=None, halt_reason=None, halted_by=None)
        .returning(chain_cursors.c.chain)
    )
    if resumed is None:
        raise NotHalted(f"{chain} is not halted")
    await _journal(conn, chain, "resume", actor=actor, reason=reason, now=now)


async def move_halted_cursor(
    conn: AsyncConnection, before: Cursor, to: Header, *, actor: str, reason: str, now: datetime
) -> None:
    """Stand the halted chain on `to` and let it go on; raises NotHalted if it moved or was resumed since."""
    chain = before.chain
    version = await conn.scalar(
        update(chain_cursors)
        .where(
            chain_cursors.c.chain == chain.value,
            chain_cursors.c.version == before.version,
            chain_cursors.c.halted_at.is_not(None),
        )
        .values(
            version=before.version + 1,
            height=to.height,
            hash=to.hash,
            final_height=to.height,
            final_hash=to.hash,
            final_parent_height=to.parent_height,
            final_parent_hash=to.parent_hash,
            final_time_s=to.time_s,
            halted_at=None,
            halt_reason=None,
            halted_by=None,
            updated_at=now,
        )
        .returning(chain_cursors.c.version)
    )
    if version is None:
        raise NotHalted(f"{chain} is not halted any more")
    await conn.execute(delete(chain_headers).where(chain_headers.c.chain == chain.value))
    told = f"new history accepted, {reason}"
    await _journal(conn, chain, "resume", actor=actor, reason=told, now=now)


async def _journal(
    conn: AsyncConnection, chain: Chain, action: str, *, actor: str, reason: str, now: datetime
) -> None:
    await conn.execute(
        insert(chain_halts).values(
            chain=chain.value, action=action, actor=actor, reason=reason[:1000], at=now
        )
    )
