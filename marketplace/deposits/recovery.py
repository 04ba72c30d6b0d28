"""After a chain broke its word: a person accepts its new history, and the books follow it (A15).

A halted chain whose final blocks changed cannot be resumed: every range contradicts the cursor.  Given a
block that the fork did not touch, `accept_history` reads the chain anew from there to the node's final block
and, in one transaction,

    the same movement in another block   its row takes the new block; no money moves
    not there any more                   every entry it caused is reversed, even below zero; a case, a notice;
                                         who is below zero then is frozen
    not there before                     booked, as the watcher would
    the cursor                           stands on the node's final block; the chain goes on

so that books and chain meet again at this commit (S1).  What the chain brings back later is booked under a
key of its own (`booking.ledger_refs`), since the first one is spent.  Payouts are not looked at: one that the
chain took back shows as a difference between escrow and books (`service.audit`), a person's to correct.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import structlog
from sqlalchemy import Row, bindparam, delete, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chain.deposits import Deposit, TakenBack, advance
from chain.errors import RpcUnavailable
from chain.headers import require_linked
from chain.networks import Chain
from chain.ports import BlockFacts, ChainReader, Departure, Header, TransferSeen
from chain.units import Micro
from marketplace.deposits.alarms import note_changes
from marketplace.deposits.attribution import part_sweeps
from marketplace.deposits.booking import (
    Rules,
    as_known,
    book_final,
    decision_key,
    ledger_refs,
    open_case,
    orphan_seen_above,
    post_entries,
    record_foreign,
    transaction_of,
)
from marketplace.deposits.cursor import Cursor, load_cursor, move_halted_cursor
from marketplace.deposits.directory import KnownAddresses, look_up
from marketplace.deposits.errors import HistoryRefused, NotHalted
from marketplace.deposits.tables import chain_cursors, deposits, sweeps, taken_back
from marketplace.ledger import accounts, templates
from marketplace.ledger.accounts import read_balance
from marketplace.ledger.money import Nano, from_micro
from marketplace.ledger.tables import transfers
from marketplace.ledger.templates import Transfer
from marketplace.notices.outbox import enqueue
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction

BLOCKS_PER_READ: Final = 500
PARAMETERS_MAX: Final = 5_000
"""In one statement: the wire protocol carries 32,767."""
TOLD_TRANSACTIONS_MAX: Final = 50
_FREEZE: Final = text("UPDATE people SET frozen_at = coalesce(frozen_at, :now) WHERE id = :id")
_log: Final = structlog.get_logger("marketplace.deposits")


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a new history changed."""

    height: int
    """Where the books stand now."""
    kept: int
    taken_back: tuple[str, ...]
    """Keys of deposits and sweeps that are not in it."""
    frozen: tuple[UUID, ...]
    """People whose balance is below zero now."""


@dataclass(frozen=True, slots=True)
class _Said:
    """What the chain says now: (account, micro) and block by key."""

    deposits: dict[str, tuple[str, int, int, str]]
    """Key → to, micro, height, block hash."""
    sweeps: dict[str, tuple[str, int, int, str]]
    """Key → from, micro, height, block hash."""


async def accept_history(
    engine: AsyncEngine,
    clock: Clock,
    reader: ChainReader,
    rules: Rules,
    *,
    from_height: int,
    actor: str,
    reason: str,
) -> Accepted:
    """Make the chain above `from_height`, as it is now, the books' history; the chain must be halted.

    Too low a height reads more and changes nothing else.  Raises NotHalted, HistoryRefused (the height is
    not a block below the cursor, or the fork goes deeper), ChainError; then nothing changed.
    """
    chain = reader.chain
    before, begin = await _check(engine, reader, from_height)
    facts = await _read(engine, clock, reader, rules.escrow, begin)
    inbound = [transfer for block in facts for transfer in block.inbound]
    outbound = [departure for block in facts for departure in block.outbound]
    foreign = [found for block in facts for found in block.foreign]
    changes = [change for block in facts for change in block.changes]
    newest, now = facts[-1].header if facts else begin, clock.now()
    async with transaction(engine) as conn:
        await move_halted_cursor(
            conn, before, newest, actor=actor, reason=f"above {from_height}: {reason}", now=now
        )
        await orphan_seen_above(conn, chain, from_height, now)
        said = _history(inbound, outbound, rules.escrow)
        kept, lost_sweeps, lost_deposits = await _compare(conn, chain, from_height, said)
        refs = await ledger_refs(conn, chain, [row.key for row in lost_sweeps])
        originals = [_sweep_of(chain, row, refs[row.key]) for row in lost_sweeps]
        originals += [entry for row in lost_deposits for entry in _entries_of(chain, row)]
        await _forget(conn, chain, lost_sweeps, lost_deposits, refs, actor=actor, reason=reason, now=now)
        await _tell(conn, chain, lost_deposits, now)
        await post_entries(conn, await _undo(conn, originals))
        arrived = [*inbound, *(found.transfer for found in foreign)]
        directory = await look_up(conn, chain, rules.escrow, arrived)
        await book_final(
            conn, rules, inbound, directory, through_height=newest.height, now=now, outbound=outbound
        )
        await record_foreign(conn, chain, foreign, directory, now)
        await note_changes(conn, chain, changes, now)
        frozen = await _freeze_below_zero(conn, chain, lost_deposits, now)
    keys = tuple(row.key for row in (*lost_sweeps, *lost_deposits))
    _log.critical(
        "history accepted", chain=chain.value, height=from_height, actor=actor, taken_back=len(keys)
    )
    return Accepted(newest.height, kept, keys, frozen)


async def _check(engine: AsyncEngine, reader: ChainReader, height: int) -> tuple[Cursor, Header]:
    """The halted cursor, and the block at `height` if nothing in the books says that it is another's."""
    chain = reader.chain
    async with transaction(engine) as conn:
        before = await load_cursor(conn, chain)
        if before is None or before.halt is None:
            raise NotHalted(f"{chain} is not halted")
        started = await conn.scalar(
            select(chain_cursors.c.started_height).where(chain_cursors.c.chain == chain.value)
        )
        anchor = await _newest_booked(conn, chain, height)
    if not (started or 0) <= height < before.window.final.height:
        raise HistoryRefused(
            f"{chain}: choose a block from {started} to {before.window.final.height - 1}, below the books'"
        )
    begin = await reader.header_at(height)
    if begin is None or begin.height > (await reader.final()).height:
        raise HistoryRefused(f"{chain}: {height} is no final block")
    if anchor is not None:
        there = await reader.header_at(anchor.height)
        if there is None or there.hash != anchor.block_hash:
            raise HistoryRefused(
                f"{chain}: the fork goes below {height}: {anchor.key} is booked in {anchor.block_hash} at "
                f"{anchor.height}, where the chain has {there.hash if there else 'nothing'}"
            )
    return before, begin


async def _newest_booked(conn: AsyncConnection, chain: Chain, height: int) -> Row[*tuple[Any, ...]] | None:
    statement = (
        select(deposits.c.key, deposits.c.height, deposits.c.block_hash)
        .where(
            deposits.c.chain == chain.value,
            deposits.c.status == Deposit.FINAL.value,
            deposits.c.height <= height,
        )
        .order_by(deposits.c.height.desc())
        .limit(1)
    )
    return (await conn.execute(statement)).one_or_none()


async def _read(
    engine: AsyncEngine, clock: Clock, reader: ChainReader, escrow: str, begin: Header
) -> list[BlockFacts]:
    """Every block above `begin` up to the node's final one, in one line.

    All of it, even above where the books stand: what was mined again further up is the same money.
    """
    final = await reader.final()
    addresses = KnownAddresses(reader.chain, escrow)
    async with transaction(engine) as conn:
        await addresses.refresh(conn, clock.now())
    facts: list[BlockFacts] = []
    for first in range(begin.height + 1, final.height + 1, BLOCKS_PER_READ):
        last = min(final.height, first + BLOCKS_PER_READ - 1)
        facts += await reader.blocks(first, last, addresses)
    headers = [begin, *(block.header for block in facts)]
    require_linked(headers)
    if headers[-1].hash != final.hash:
        raise RpcUnavailable(f"{reader.chain} moved at block {final.height} while it was read")
    return facts


def _history(inbound: Sequence[TransferSeen], outbound: Sequence[Departure], escrow: str) -> _Said:
    parted = part_sweeps(inbound, outbound, escrow)
    swept = {d.key: (d.account, d.amount.n, d.height, d.block_hash) for d in parted.swept}
    swept |= {t.key: (t.sender, t.amount.n, t.height, t.block_hash) for t in parted.inbound if t.to == escrow}
    return _Said({t.key: (t.to, t.amount.n, t.height, t.block_hash) for t in parted.inbound}, swept)


async def _compare(
    conn: AsyncConnection, chain: Chain, height: int, said: _Said
) -> tuple[int, list[Row[Any]], list[Row[Any]]]:
    """How many movements stay, and which sweeps and deposits do not; what stays takes its new block."""
    booked = select(sweeps).where(sweeps.c.chain == chain.value, sweeps.c.height > height)
    final = select(deposits).where(
        deposits.c.chain == chain.value,
        deposits.c.status == Deposit.FINAL.value,
        deposits.c.height > height,
    )
    kept = 0
    lost: list[list[Row[Any]]] = []
    for table, found, account, statement in (
        (sweeps, said.sweeps, "from_address", booked),
        (deposits, said.deposits, "to_address", final),
    ):
        rows = (await conn.execute(statement.order_by(table.c.height.desc()).with_for_update())).all()
        moved = [
            {"movement": row.key, "to_height": found[row.key][2], "to_hash": found[row.key][3]}
            for row in rows
            if row.key in found and found[row.key][:2] == (getattr(row, account), row.amount_micro)
        ]
        if moved:
            there = update(table).where(table.c.chain == chain.value, table.c.key == bindparam("movement"))
            await conn.execute(
                there.values(height=bindparam("to_height"), block_hash=bindparam("to_hash")), moved
            )
        kept += len(moved)
        stays = {entry["movement"] for entry in moved}
        lost.append([row for row in rows if row.key not in stays])
    return kept, lost[0], lost[1]


def _sweep_of(chain: Chain, row: Row[Any], ref: str) -> Transfer:
    return templates.sweep(chain=chain.value, amount=from_micro(row.amount_micro), ref=ref)


def _entries_of(chain: Chain, row: Row[Any]) -> list[Transfer]:
    """Every entry that this deposit may have caused, the last first."""
    name, amount, ref = chain.value, from_micro(row.amount_micro), row.transfer_ref
    aside = templates.deposit_unattributed(chain=name, amount=amount, ref=ref, in_escrow=row.is_direct)
    if row.credited_at is None:
        return [aside]
    person = str(row.person_id)
    straight = templates.deposit_direct if row.is_direct else templates.deposit
    return [
        templates.attribution(chain=name, person=person, amount=amount, ref=ref),
        aside,
        straight(chain=name, person=person, amount=amount, ref=ref),
    ]


async def _undo(conn: AsyncConnection, originals: Sequence[Transfer]) -> list[Transfer]:
    """Reversals of those that were posted."""
    posted: dict[tuple[str, str], tuple[UUID, int]] = {}
    refs = sorted({original.ref for original in originals})
    kinds = {original.kind.value for original in originals}
    for start in range(0, len(refs), PARAMETERS_MAX):
        some = transfers.c.ref.in_(refs[start : start + PARAMETERS_MAX])
        columns = transfers.c.kind, transfers.c.ref, transfers.c.id, transfers.c.amount
        for kind, ref, identity, amount in await conn.execute(
            select(*columns).where(some, transfers.c.kind.in_(kinds))
        ):
            posted[kind, ref] = identity, amount
    return [
        templates.reversal(
            of=posted[original.kind.value, original.ref][0],
            original=original,
            amount=Nano(posted[original.kind.value, original.ref][1]),
            ref=f"taken-back:{original.kind.value}:{original.ref}",
            note="its chain took it back",
            lifts_floor=True,
        )
        for original in originals
        if (original.kind.value, original.ref) in posted
    ]


async def _forget(
    conn: AsyncConnection,
    chain: Chain,
    lost_sweeps: Sequence[Row[Any]],
    lost_deposits: Sequence[Row[Any]],
    refs: Mapping[str, str],
    *,
    actor: str,
    reason: str,
    now: datetime,
) -> None:
    """Take these out of what is final, keep them in `taken_back`, and open a case for each deposit."""
    gone = [(row, "sweep", refs[row.key], None) for row in lost_sweeps]
    gone += [(row, "deposit", row.transfer_ref, row.person_id) for row in lost_deposits]
    if not gone:
        return
    rows = [
        {
            "chain": chain.value,
            "key": row.key,
            "what": what,
            "ref": ref,
            "block_hash": row.block_hash,
            "amount_micro": row.amount_micro,
            "person_id": person,
            "actor": actor,
            "reason": reason[:1000],
            "at": now,
        }
        for row, what, ref, person in gone
    ]
    await conn.execute(insert(taken_back), rows)
    if lost_sweeps:
        there = delete(sweeps).where(sweeps.c.chain == chain.value, sweeps.c.key == bindparam("movement"))
        await conn.execute(there, [{"movement": row.key} for row in lost_sweeps])
    for row in lost_deposits:
        assert advance(as_known(row), TakenBack()).status is Deposit.ORPHANED
    if lost_deposits:
        orphaned = {"status": Deposit.ORPHANED.value, "is_held": False}
        undated = dict.fromkeys(("final_at", "credited_at", "transfer_ref"))
        statement = update(deposits).where(deposits.c.id == bindparam("row_id"))
        await conn.execute(
            statement.values(**orphaned, **undated), [{"row_id": row.id} for row in lost_deposits]
        )
    for row in lost_deposits:
        detail = (
            f"{Micro(row.amount_micro)} USDC to {row.to_address} in {row.tx} left {chain} after it was final"
        )
        if row.credited_at is not None:
            detail += f"; taken back from {row.person_id}"
        key = f"{decision_key(chain, row.transfer_ref)}/taken-back"
        await open_case(conn, chain, kind="deposit_taken_back", key=key, detail=detail, now=now)


async def _freeze_below_zero(
    conn: AsyncConnection, chain: Chain, rows: Sequence[Row[Any]], now: datetime
) -> tuple[UUID, ...]:
    """Stop everybody who has spent what was never his: his keys within 5 s (K2), his sessions at once."""
    frozen: list[UUID] = []
    for person in sorted({row.person_id for row in rows if row.credited_at is not None}):
        balance = await read_balance(conn, accounts.buyer(str(person)))
        if balance is not None and balance.posted.n < 0:
            await conn.execute(_FREEZE, {"id": person, "now": now})
            detail = f"{person} stands at {balance.posted}: {chain} took back a deposit already spent"
            key = f"owes:{person}:{now.isoformat()}"
            await open_case(conn, chain, kind="spent_before_taken_back", key=key, detail=detail, now=now)
            frozen.append(person)
    return tuple(frozen)


async def _tell(conn: AsyncConnection, chain: Chain, rows: Sequence[Row[Any]], now: datetime) -> None:
    by_person: dict[UUID, list[Row[Any]]] = defaultdict(list)
    for row in rows:
        if row.credited_at is not None:
            by_person[row.person_id].append(row)
    for person, of_person in by_person.items():
        amount = Micro(sum(row.amount_micro for row in of_person))
        payload = {
            "chain": chain.value,
            "amount": str(amount),
            "amount_micro": amount.n,
            "transactions": sorted({transaction_of(row.key) for row in of_person[:TOLD_TRANSACTIONS_MAX]}),
        }
        await enqueue(conn, "deposit_taken_back", person, payload, now=now)
