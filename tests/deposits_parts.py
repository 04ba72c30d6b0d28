"""A simulated chain, its watcher and the book: what tests of deposits work with."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.simulated import Movement, SimulatedChain
from marketplace.deposits.booking import Rules
from marketplace.deposits.reconcile import check_chain
from marketplace.deposits.tables import deposit_addresses, deposits, support_cases
from marketplace.deposits.watcher import Pace, Watcher
from marketplace.ledger import accounts
from marketplace.ledger.accounts import read_balance, total_by_kind
from marketplace.platform.database import transaction

ESCROW = "0x" + "e" * 40
STRANGER = "0x" + "5" * 40
QUICK = Pace(blocks_per_tick=5, poll_s=0.01, fault_wait_s=0.01, standby_poll_s=0.05)


class ManualClock:
    def __init__(self) -> None:
        self.at = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        self.at += timedelta(milliseconds=1)
        return self.at

    def monotonic(self) -> float:
        return self.at.timestamp()


@dataclass
class Bench:
    """A chain, its watcher and the book."""

    engine: AsyncEngine
    node: SimulatedChain
    clock: ManualClock = field(default_factory=ManualClock)
    serial: Iterator[int] = field(default_factory=lambda: iter(range(1_000_000)))

    def a_watcher(self) -> Watcher:
        rules = Rules(self.node.chain, ESCROW, deposit_micro_min=5_000_000)
        return Watcher(rules, self.node, self.engine, self.clock, pace=QUICK)

    async def a_buyer(self) -> tuple[uuid.UUID, str]:
        person, address = uuid.uuid4(), "0x" + uuid.uuid4().hex + "00000000"
        async with transaction(self.engine) as conn:
            await conn.execute(
                insert(deposit_addresses).values(
                    person_id=person,
                    chain_family="evm",
                    address=address,
                    watched=address,
                    salt=uuid.uuid4().bytes * 2,
                    created_at=self.clock.now(),
                )
            )
        return person, address

    def pays(
        self, address: str, usdc: str | int, *, sender: str = STRANGER, tx: str | None = None
    ) -> Movement:
        micro = int(usdc) * 1_000_000 if isinstance(usdc, int) else int(usdc)
        return Movement(tx or f"0xtx{next(self.serial)}", address, sender, micro)

    async def settle(self, watcher: Watcher) -> None:
        for _ in range(200):
            if not await watcher.tick():
                return
        raise AssertionError("the watcher never came to rest")

    async def balance(self, account: accounts.Account) -> int:
        async with transaction(self.engine) as conn:
            found = await read_balance(conn, account)
        return 0 if found is None else found.posted.n

    async def buyer(self, person: uuid.UUID) -> int:
        return await self.balance(accounts.buyer(str(person)))

    async def statuses(self) -> dict[str, str]:
        async with transaction(self.engine) as conn:
            rows = await conn.execute(select(deposits.c.tx, deposits.c.status))
            return {row.tx: row.status for row in rows}

    async def cases(self) -> list[str]:
        async with transaction(self.engine) as conn:
            return list(await conn.scalars(select(support_cases.c.kind)))

    async def books_hold(self) -> None:
        """L2 and S1 at this very moment."""
        async with transaction(self.engine) as conn:
            assert sum(total.n for total in (await total_by_kind(conn)).values()) == 0
        for result in await check_chain(self.engine, self.node, ESCROW, patience_s=0):
            assert result.is_equal, result


async def start(bench: Bench, **rules: object) -> Watcher:
    watcher = bench.a_watcher()
    watcher.rules = replace(watcher.rules, **rules)
    await bench.settle(watcher)
    return watcher


async def final(bench: Bench, watcher: Watcher, *movements: Movement) -> None:
    bench.node.mine(*movements)
    bench.node.finalize()
    await bench.settle(watcher)


async def a_known_person(bench: Bench) -> uuid.UUID:
    person = uuid.uuid4()
    async with transaction(bench.engine) as conn:
        await conn.execute(text("INSERT INTO people (id, display_name) VALUES (:id, 'x')"), {"id": person})
    return person
