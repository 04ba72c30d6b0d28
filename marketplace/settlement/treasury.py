"""Does each chain hold what is to be paid there?  Asked before it is needed.

S3: a chain's escrow covers its payouts in flight, and all escrows together cover operators' earnings past
their reserve.  S4: money that is not USDC in an escrow (card money, deposits not yet swept) covers nothing.
Moving USDC between chains is people's work; this names chain and amount, in time, and `rebalance` books it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.networks import Chain
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import errors as ledger_errors
from marketplace.ledger import templates
from marketplace.ledger.accounts import TransferKind, read_balance
from marketplace.ledger.money import Nano, from_micro
from marketplace.ledger.posting import find_transfer, post_transfers
from marketplace.settlement import earnings
from marketplace.settlement.batches import lock_chain
from marketplace.settlement.earnings import Reserve
from marketplace.settlement.errors import KeyReused, WrongState
from marketplace.settlement.tables import withdrawals

NOTHING: Final = Micro(0)
_ARRIVED: Final = text(
    """
    SELECT amount_micro FROM deposits
    WHERE chain = :chain AND key = :movement AND transfer_ref = :ref
      AND status = 'final' AND person_id IS NULL AND is_direct
    FOR UPDATE"""
)
"""Locked as an attribution locks it: it is either somebody's or ours."""
_DECIDE: Final = text(
    """
    INSERT INTO deposit_decisions (chain, key, decision, actor, reason, at)
    VALUES (:chain, :key, 'leave', :actor, :reason, :at)"""
)


@dataclass(frozen=True, slots=True)
class ChainCover:
    """One chain's escrow against what is to be paid from it."""

    chain: Chain
    escrow: Nano
    in_flight: Nano
    requested: Nano
    """Withdrawals that wait to be planned."""

    @property
    def left(self) -> Nano:
        """What remains when everything asked for is paid; below zero: so much must be moved here."""
        return Nano(self.escrow.n - self.in_flight.n - self.requested.n)


@dataclass(frozen=True, slots=True)
class Cover:
    """The whole treasury at one moment."""

    chains: tuple[ChainCover, ...]
    matured: Nano
    """Operators' earnings past their reserve, without what is already requested."""
    maturing: Nano
    """Earnings that mature within the reserve time."""

    @property
    def uncommitted(self) -> Nano:
        """USDC in all escrows beyond payouts in flight and requests."""
        return Nano(sum(chain.left.n for chain in self.chains))

    def broken(self) -> tuple[str, ...]:
        """S3, where it does not hold now: payouts must stop."""
        found = [
            f"S3: the escrow on {c.chain} holds ${c.escrow}, ${c.in_flight} is in flight"
            for c in self.chains
            if c.escrow.n < c.in_flight.n
        ]
        if self.uncommitted.n < self.matured.n:
            found.append(f"S3: the escrows have ${self.uncommitted} left, ${self.matured} of earnings is due")
        return tuple(found)

    def warnings(self) -> tuple[str, ...]:
        """What will be short unless somebody acts."""
        found = [f"move ${Nano(-c.left.n)} to {c.chain}" for c in self.chains if c.left.n < 0]
        soon = Nano(self.matured.n + self.maturing.n)
        if self.matured.n <= self.uncommitted.n < soon.n:
            short = Nano(soon.n - self.uncommitted.n)
            found.append(f"${short} more USDC is needed within the reserve time, for earnings that mature")
        return tuple(found)


async def read_cover(conn: AsyncConnection, *, now: datetime, reserve: Reserve) -> Cover:
    """Read the treasury from the book; one pass over all operators, memory flat."""
    matured = maturing = 0
    async for page in earnings.pages(conn, now=now, reserve=reserve):
        for _, earned in page:
            matured += earned.matured.n
            maturing += max(0, min(earned.maturing.n, earned.posted.n - earned.held.n))
    return Cover(tuple([await _chain(conn, chain) for chain in Chain]), Nano(matured), Nano(maturing))


async def rebalance(
    conn: AsyncConnection,
    *,
    source: Chain | Literal["card"],
    target: Chain,
    arrived: str,
    amount: Micro,
    ref: str,
    actor: str,
    reason: str,
    now: datetime,
    fee: Micro = NOTHING,
) -> None:
    """Book USDC that people moved into `target`'s escrow: from another chain's, or bought with card money.

    What arrives in an escrow from nobody we know is booked by the watcher, final, as unattributed, beside
    what is people's own and waits.  So this names the one deposit that was ours by its key (`arrived`) and
    moves exactly its `amount`: unattributed:target → escrow:source (or Stripe's available money).  That is
    booked once and closes the deposit's case; it is nobody's to claim any more.  What a bridge kept is `fee`:
    fees → escrow:source; one forgotten is added by saying the rest again.  `ref` names the movement (the
    transaction that left, the purchase).  WrongState unless that deposit brought that much, and the source
    has it; KeyReused if it is booked in other words.  Halt the source chain's payouts between sending and
    booking: until then, and for a fee not booked, its books say more than its escrow holds, and S1 halts its
    deposits.
    """
    if source == target:
        raise WrongState(f"what left the escrow on {target} did not arrive in it")
    entries = _entries(source, target, arrived, amount, fee, f"{actor}: {ref}: {reason}")
    await lock_chain(conn, target)
    fresh = [entry for entry in entries if await find_transfer(conn, entry.kind, entry.ref) is None]
    if entries[0] in fresh:
        brought = await _brought(conn, target, arrived)
        if brought is None:
            raise WrongState(f"{arrived} has not arrived in the escrow on {target}, final and nobody's")
        if brought != entries[0].amount:
            raise WrongState(f"{arrived} brought ${brought}, not ${entries[0].amount}: a fee goes beside it")
    given = Nano(sum(entry.amount.n for entry in fresh))
    if fresh and await _has(conn, source) < given.n:
        raise WrongState(f"{source} has no ${given} to give beyond what is in flight")
    try:
        outcomes = await post_transfers(conn, entries)
    except ledger_errors.KeyReused as e:
        raise KeyReused(f"{arrived} is booked as another movement already") from e
    if outcomes[0]:  # no replay
        decided = {"chain": target.value, "key": arrived, "actor": actor, "at": now}
        await conn.execute(_DECIDE, decided | {"reason": f"rebalance {ref}: {reason}"[:1000]})


def _entries(
    source: Chain | Literal["card"],
    target: Chain,
    arrived: str,
    amount: Micro,
    fee: Micro,
    note: str,
) -> list[templates.Transfer]:
    """The movement, and its fee if it had one."""
    given = ledger_accounts.STRIPE_AVAILABLE if source == "card" else ledger_accounts.escrow(source.value)
    # Without the `#2` of what the chain took back and brought again: it is the same payment of ours, and an
    # attribution (`deposits.decisions`) looks for this very key.
    movement = f"{target.value}:{arrived.partition('#')[0]}"
    moved = [(ledger_accounts.unattributed(target.value), amount.n, f"rebalance:{movement}")]
    if fee.n:
        moved.append((ledger_accounts.FEES, fee.n, f"rebalance-fee:{movement}"))
    return [
        templates.correction(
            debit=debit,
            credit=given,
            amount=from_micro(micro),
            ref=key,
            note=note[: templates.NOTE_CHARACTERS_MAX],
        )
        for debit, micro, key in moved
    ]


async def _brought(conn: AsyncConnection, chain: Chain, key: str) -> Nano | None:
    """What this deposit brought into the escrow, locked; None unless it is final and nobody's."""
    ref = f"{chain.value}:{key}"
    if key.startswith("opening:"):  # what the escrow held before it was watched has no row
        opening = await find_transfer(conn, TransferKind.DEPOSIT_UNATTRIBUTED, ref)
        return None if opening is None else opening.amount
    named = {"chain": chain.value, "movement": key.partition("#")[0], "ref": ref}
    micro = await conn.scalar(_ARRIVED, named)
    return None if micro is None else from_micro(int(micro))


async def _has(conn: AsyncConnection, source: Chain | Literal["card"]) -> int:
    if source == "card":
        available = await read_balance(conn, ledger_accounts.STRIPE_AVAILABLE)
        return 0 if available is None else -available.posted.n
    cover = await _chain(conn, source)
    return cover.escrow.n - cover.in_flight.n


async def _chain(conn: AsyncConnection, chain: Chain) -> ChainCover:
    escrow = await read_balance(conn, ledger_accounts.escrow(chain.value))
    flight = await read_balance(conn, ledger_accounts.payouts_in_flight(chain.value))
    t = withdrawals.c
    waiting = select(func.coalesce(func.sum(t.amount_micro), 0)).where(
        t.chain == chain.value, t.status == "requested"
    )
    return ChainCover(
        chain=chain,
        escrow=Nano(-(escrow.posted.n if escrow else 0)),  # an asset's balance is negative
        in_flight=Nano(flight.posted.n if flight else 0),
        requested=from_micro(int(await conn.scalar(waiting) or 0)),
    )
