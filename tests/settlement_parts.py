"""Parts for tests of settlement: a clock that is set, operators who have earned, a desk that settles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chain.networks import Chain
from chain.payouts import Payout
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import templates
from marketplace.ledger.accounts import Account, read_balance, total_by_kind
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.platform.database import transaction
from marketplace.platform.ids import uuid7
from marketplace.settlement import (
    address_book,
    batches,
    planner,
    signing,
    withdrawals,
)
from marketplace.settlement.earnings import Reserve
from marketplace.settlement.settler import Pace, Settler
from marketplace.settlement.simulated_rail import SimulatedRail
from marketplace.settlement.withdrawals import Limits, Withdrawal

LIMITS = Limits(minimum=Nano(10**10), reserve=Reserve(usdc_s=86_400, card_s=7 * 86_400))
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


@dataclass
class SetClock:
    at: datetime = NOW

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return (self.at - NOW).total_seconds()

    def pass_s(self, seconds: int) -> None:
        self.at += timedelta(seconds=seconds)


def address(n: int) -> str:
    return "0x" + f"{n:040d}".replace("0", "1")  # digits only: the same in every spelling


async def a_person(engine: AsyncEngine) -> UUID:
    person = uuid7()
    async with transaction(engine) as conn:
        await conn.execute(
            text("INSERT INTO people (id, display_name) VALUES (:id, 'somebody')"), {"id": person}
        )
    return person


async def earn(engine: AsyncEngine, person: UUID, dollars: int, chain: Chain) -> None:
    """Book USDC of a buyer in the chain's escrow, and as this operator's earnings of long ago."""
    buyer, amount = await a_person(engine), Nano(dollars * 10**9)
    async with transaction(engine) as conn:
        paid = templates.deposit_direct(
            chain=chain.value, person=str(buyer), amount=amount, ref=f"paid by {buyer}"
        )
        await post_transfer(conn, paid)
        earned = templates.correction(
            debit=ledger_accounts.buyer(str(buyer)),
            credit=ledger_accounts.operator_earnings(str(person)),
            amount=amount,
            ref=f"earned from {buyer}",
            note="test",
        )
        await post_transfer(conn, earned)


async def posted(engine: AsyncEngine, account: Account) -> int:
    async with transaction(engine) as conn:
        balance = await read_balance(conn, account)
    return 0 if balance is None else balance.posted.n


@dataclass
class Desk:
    """One installation: a book, a chain, a clock."""

    engine: AsyncEngine
    rail: SimulatedRail = field(default_factory=SimulatedRail)
    clock: SetClock = field(default_factory=SetClock)
    pusher: str = "bo"

    def settler(self, reached: Callable[[str], None] = lambda _: None) -> Settler:
        return Settler(self.engine, self.rail, self.clock, pace=Pace(expire_s=0), reached=reached)

    async def operator(self, dollars: int, *, cooled: bool = True) -> UUID:
        """Somebody who earned this much long ago, with an address that has cooled."""
        person = await a_person(self.engine)
        await earn(self.engine, person, dollars, Chain.BASE)
        async with transaction(self.engine) as conn:
            await address_book.add(
                conn,
                person=person,
                chain=Chain.BASE,
                text=self.address_of(person),
                forbidden=(),
                cooling_s=3600,
                now=self.clock.now() - timedelta(seconds=3600 if cooled else 3599),
            )
        return person

    async def add_address(
        self, conn: AsyncConnection, person: UUID, address: str
    ) -> address_book.PayoutAddress:
        """Add an address now, with an hour to cool."""
        entry, _ = await address_book.add(
            conn,
            person=person,
            chain=Chain.BASE,
            text=address,
            forbidden=(),
            cooling_s=3600,
            now=self.clock.now(),
        )
        return entry

    def address_of(self, person: UUID) -> str:
        return address(person.int % 10**30)

    async def request(self, person: UUID, dollars: int | None, key: str = "k1") -> Withdrawal:
        async with transaction(self.engine) as conn:
            made, _ = await withdrawals.request(
                conn,
                person=person,
                chain=Chain.BASE,
                address=self.address_of(person),
                amount=None if dollars is None else Micro(dollars * 10**6),
                key=key,
                limits=LIMITS,
                now=self.clock.now(),
            )
        return made

    async def status(self, person: UUID, made: Withdrawal) -> Withdrawal:
        async with transaction(self.engine) as conn:
            return await withdrawals.find(conn, person=person, withdrawal_id=made.id)

    async def plan(self) -> planner.Planned:
        return await planner.plan(self.engine, self.rail, self.clock, planned_by="ada")

    async def approve(self, batch_id: UUID, signer: int) -> Payout:
        async with transaction(self.engine) as conn:
            export = await signing.export_batch(conn, batch_id)
        unsigned, _ = signing.check_export(export, self.rail)
        approval = self.rail.approve(unsigned, self.rail.signers[signer])
        document = signing.ApprovalDocument(
            signing.APPROVAL_FORMAT,
            export.batch,
            export.chain,
            export.digest,
            approval.signer,
            batches.signatures_to_hex(approval.signatures),
        )
        async with transaction(self.engine) as conn:
            return await signing.store_approval(
                conn, self.rail, document, pushed_by=self.pusher, now=self.clock.now()
            )

    async def approved(self) -> UUID:
        planned = await self.plan()
        await self.approve(planned.batch_id, 0)
        assert await self.approve(planned.batch_id, 2) is Payout.APPROVED
        return planned.batch_id

    async def batch(self, batch_id: UUID) -> batches.Batch:
        async with transaction(self.engine) as conn:
            return await batches.find_batch(conn, batch_id)

    async def posted(self, account: Account) -> int:
        return await posted(self.engine, account)

    async def available(self, person: UUID) -> int:
        async with transaction(self.engine) as conn:
            balance = await read_balance(conn, ledger_accounts.operator_earnings(str(person)))
        return 0 if balance is None else balance.available.n

    async def check(self) -> None:
        """The books: closed, nothing held without a request, in flight = live batch, escrow = chain."""
        async with transaction(self.engine) as conn:
            assert sum(total.n for total in (await total_by_kind(conn)).values()) == 0
            live = [await batches.live_batch(conn, chain) for chain in Chain]
            held = (await conn.execute(text("SELECT coalesce(sum(held), 0) FROM balances"))).scalar_one()
            waiting = await conn.execute(
                text("SELECT coalesce(sum(amount_micro), 0) FROM withdrawals WHERE status = 'requested'")
            )
            assert held == waiting.scalar_one() * 1000
        for chain, batch in zip(Chain, live, strict=True):
            in_flight = await self.posted(ledger_accounts.payouts_in_flight(chain.value))
            assert in_flight == (0 if batch is None else batch.total.n * 1000), chain


class Stop(Exception):
    """The process dies here."""


async def run_out(desk: Desk, settler: Settler, steps: int = 12) -> None:
    for _ in range(steps):
        await settler.tick()
        desk.rail.mine()
        desk.clock.pass_s(20)
