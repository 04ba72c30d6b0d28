"""Does each chain hold what is to be paid there?  Asked before it is needed.

S3: a chain's escrow covers its payouts in flight, and all escrows together cover operators' earnings past
their reserve.  S4: money that is not USDC in an escrow (card money, deposits not yet swept) covers nothing.
Moving USDC between chains is people's work; this names chain and amount, in time, and `rebalance` books it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.networks import Chain
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import templates
from marketplace.ledger.accounts import read_balance
from marketplace.ledger.money import Nano, from_micro
from marketplace.ledger.posting import find_transfer, post_transfer
from marketplace.settlement import earnings
from marketplace.settlement.batches import lock_chain
from marketplace.settlement.earnings import Reserve
from marketplace.settlement.errors import WrongState
from marketplace.settlement.tables import withdrawals


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
    amount: Micro,
    ref: str,
    actor: str,
    reason: str,
) -> None:
    """Book USDC that people moved into `target`'s escrow: from another chain's, or bought with card money.

    What arrives in an escrow from nobody we know is booked by the watcher, final, as unattributed; this says
    that it was ours: unattributed:target → escrow:source (or Stripe's available money).  `ref` names the
    movement (the transaction that left, the purchase), so that it is booked once.  WrongState unless that
    much has arrived, and the source has it.  Halt the source chain's payouts between sending and booking:
    until then its books say more than its escrow holds, which S1 reports.
    """
    nano = from_micro(amount.n)
    given = ledger_accounts.STRIPE_AVAILABLE if source == "card" else ledger_accounts.escrow(source.value)
    entry = templates.correction(
        debit=ledger_accounts.unattributed(target.value),
        credit=given,
        amount=nano,
        ref=f"rebalance:{ref}",
        note=f"{actor}: {reason}",
    )
    if await find_transfer(conn, entry.kind, entry.ref) is not None:
        await post_transfer(conn, entry)  # a replay, or refused as another movement under this name
        return
    await lock_chain(conn, target)
    arrived = await read_balance(conn, ledger_accounts.unattributed(target.value))
    if arrived is None or arrived.available.n < nano.n:
        raise WrongState(f"${nano} has not arrived unattributed in the escrow on {target}, at finality")
    if await _has(conn, source) < nano.n:
        raise WrongState(f"{source} has no ${nano} to give beyond what is in flight")
    await post_transfer(conn, entry)


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
