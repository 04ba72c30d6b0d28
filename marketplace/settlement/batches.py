"""Settlement batches on record: reading them, and the one way to move one on.

`move` is a compare-and-set of the machine in `chain.payouts`: zero rows means another worker won.
Everything that plans or ends a batch of a chain takes that chain's lock first, in its own transaction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy import Row, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.networks import Chain
from chain.payouts import LIVE, Fact, Payout, advance
from chain.ports import Approval, PayoutLine
from chain.units import Micro
from marketplace.settlement.errors import AnotherWon, NotFound
from marketplace.settlement.tables import approvals, broadcasts, payouts, settlement_batches

TROUBLE_CHARACTERS_MAX: Final = 2000
PAGE_MAX: Final = 200


@dataclass(frozen=True, slots=True)
class Batch:
    """One settlement batch, without its members."""

    id: UUID
    chain: Chain
    status: Payout
    digest: bytes
    merkle_root: bytes
    escrow: str
    fence: str
    context: dict[str, str]
    total: Micro
    count: int
    threshold: int
    planned_by: str
    planned_at: datetime
    changed_at: datetime
    trouble: str
    """Why it does not move on, as last seen; empty while nothing is wrong."""


@dataclass(frozen=True, slots=True)
class Member:
    """One payout of a batch."""

    payout_id: UUID
    position: int
    withdrawal_id: UUID
    person_id: UUID
    address: str
    amount: Micro

    @property
    def line(self) -> PayoutLine:
        return PayoutLine(str(self.payout_id), self.address, self.amount)


@dataclass(frozen=True, slots=True)
class Broadcast:
    """One envelope around a batch's payload."""

    attempt: int
    raw: bytes
    tx: str
    fence: str
    stored_at: datetime
    first_sent_at: datetime | None
    last_sent_at: datetime | None
    final_tx: str | None
    final_height: int | None
    final_block_hash: str | None


def lock_key(purpose: str, chain: Chain | Literal["all"]) -> int:
    """Give the advisory lock's key (int64) for a purpose on a chain."""
    digest = hashlib.sha256(f"tollway settlement {purpose} {chain}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)


async def lock_chain(conn: AsyncConnection, chain: Chain) -> None:
    """Wait until no other transaction plans or ends a batch of this chain; held until ours ends."""
    await conn.execute(select(func.pg_advisory_xact_lock(lock_key("batches", chain))))


async def lock_day(conn: AsyncConnection) -> None:
    """Wait until nobody else plans on any chain, after `lock_chain`: a day has one maximum for all."""
    await conn.execute(select(func.pg_advisory_xact_lock(lock_key("day", "all"))))


async def find_batch(conn: AsyncConnection, batch_id: UUID) -> Batch:
    """One batch; NotFound."""
    statement = select(settlement_batches).where(settlement_batches.c.id == batch_id)
    row = (await conn.execute(statement)).one_or_none()
    if row is None:
        raise NotFound(f"there is no batch {batch_id}")
    return _batch(row)


async def live_batch(conn: AsyncConnection, chain: Chain) -> Batch | None:
    """The chain's batch under way; there is at most one."""
    t = settlement_batches.c
    statement = select(settlement_batches).where(
        t.chain == chain.value, t.status.in_([s.value for s in LIVE])
    )
    row = (await conn.execute(statement)).one_or_none()
    return None if row is None else _batch(row)


async def listing(
    conn: AsyncConnection, *, chain: Chain | None = None, before: UUID | None = None, limit: int = PAGE_MAX
) -> list[Batch]:
    """Batches, newest first, those older than `before`."""
    t = settlement_batches.c
    statement = select(settlement_batches).order_by(t.id.desc()).limit(min(limit, PAGE_MAX))
    if chain is not None:
        statement = statement.where(t.chain == chain.value)
    if before is not None:
        statement = statement.where(t.id < before)
    return [_batch(row) for row in await conn.execute(statement)]


async def members(conn: AsyncConnection, batch_id: UUID) -> list[Member]:
    """A batch's payouts in their frozen order."""
    statement = select(payouts).where(payouts.c.batch_id == batch_id).order_by(payouts.c.position)
    return [
        Member(r.id, r.position, r.withdrawal_id, r.person_id, r.address, Micro(r.amount_micro))
        for r in await conn.execute(statement)
    ]


async def stored_approvals(conn: AsyncConnection, batch_id: UUID) -> list[Approval]:
    """A batch's approvals, oldest first."""
    t = approvals.c
    statement = select(t.signer, t.signatures).where(t.batch_id == batch_id).order_by(t.created_at, t.signer)
    return [Approval(r.signer, signatures_from_hex(r.signatures)) for r in await conn.execute(statement)]


async def stored_broadcasts(conn: AsyncConnection, batch_id: UUID) -> list[Broadcast]:
    """A batch's envelopes, oldest first."""
    t = broadcasts.c
    statement = select(broadcasts).where(t.batch_id == batch_id).order_by(t.attempt)
    return [
        Broadcast(
            r.attempt,
            r.raw,
            r.tx,
            r.fence,
            r.stored_at,
            r.first_sent_at,
            r.last_sent_at,
            r.final_tx,
            r.final_height,
            r.final_block_hash,
        )
        for r in await conn.execute(statement)
    ]


async def final_transactions(conn: AsyncConnection, batch_ids: Collection[UUID]) -> dict[UUID, str]:
    """The transaction that paid each of these batches, where one has, by batch."""
    t = broadcasts.c
    statement = select(t.batch_id, t.final_tx).where(t.batch_id.in_(batch_ids), t.final_tx.is_not(None))
    return {row.batch_id: row.final_tx for row in await conn.execute(statement)}


async def batch_of(conn: AsyncConnection, *, person: UUID, withdrawal_id: UUID) -> UUID | None:
    """The batch that pays or paid a person's withdrawal; None if there is none."""
    t = payouts.c
    found: UUID | None = await conn.scalar(
        select(t.batch_id).where(t.withdrawal_id == withdrawal_id, t.person_id == person, t.is_live)
    )
    return found


async def move(conn: AsyncConnection, batch: Batch, fact: Fact, *, now: datetime) -> Payout:
    """Move a batch on by one fact; AnotherWon if it is not any more as `batch` says."""
    after = advance(batch.status, fact)
    t = settlement_batches.c
    done = await conn.execute(
        update(settlement_batches)
        .where(t.id == batch.id, t.status == batch.status.value)
        .values(status=after.value, changed_at=now, trouble=t.trouble if after not in LIVE else "")
    )
    if done.rowcount == 0:
        raise AnotherWon(f"batch {batch.id} is not {batch.status} any more")
    return after


async def note_trouble(conn: AsyncConnection, batch_id: UUID, trouble: str) -> None:
    """Write down why a live batch does not move on (empty: all is well again)."""
    t = settlement_batches.c
    text = trouble[:TROUBLE_CHARACTERS_MAX]
    await conn.execute(
        update(settlement_batches)
        .where(t.id == batch_id, t.status.in_([s.value for s in LIVE]), t.trouble != text)
        .values(trouble=text)
    )


def signatures_to_hex(signatures: Mapping[str, bytes]) -> dict[str, str]:
    return {label: signature.hex() for label, signature in signatures.items()}


def signatures_from_hex(signatures: Mapping[str, str]) -> dict[str, bytes]:
    """Read signatures by label; ValueError if one is not hex."""
    return {label: bytes.fromhex(signature) for label, signature in signatures.items()}


def lines_of(batch_members: Sequence[Member]) -> tuple[PayoutLine, ...]:
    return tuple(member.line for member in batch_members)


def _batch(r: Row[Any]) -> Batch:
    return Batch(
        id=r.id,
        chain=Chain(r.chain),
        status=Payout(r.status),
        digest=r.digest,
        merkle_root=r.merkle_root,
        escrow=r.escrow,
        fence=r.fence,
        context=dict(r.context),
        total=Micro(r.total_micro),
        count=r._mapping["count"],  # noqa: SLF001 - a Row has a method of that name
        threshold=r.threshold,
        planned_by=r.planned_by,
        planned_at=r.planned_at,
        changed_at=r.changed_at,
        trouble=r.trouble,
    )
