"""D5, D6, S1, L2 under a chain that forks, lags and stalls at random: the tables equal a fresh index."""

from __future__ import annotations

import random
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import ChainError
from chain.networks import Chain
from chain.simulated import Movement, SimulatedChain
from marketplace.deposits.booking import Rules
from marketplace.deposits.reconcile import check_chain
from marketplace.deposits.tables import deposit_addresses, deposits, sweeps
from marketplace.deposits.watcher import Pace, Watcher
from marketplace.ledger.accounts import buyer, read_balance, total_by_kind
from marketplace.platform.database import transaction

ESCROW, STRANGER = "0x" + "e" * 40, "0x" + "5" * 40
MINIMUM = 5_000_000


class SteppingClock:
    def __init__(self) -> None:
        self.at = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        self.at += timedelta(milliseconds=1)
        return self.at

    def monotonic(self) -> float:
        return self.at.timestamp()


class Everything:
    def is_watched(self, address: str) -> bool:
        return address != STRANGER

    def is_reference(self, key: str) -> bool:
        return False


class World:
    def __init__(self, engine: AsyncEngine, seed: int) -> None:
        self.engine = engine
        self.chance = random.Random(seed)
        self.node = SimulatedChain(chain=Chain.ETHEREUM)
        self.clock = SteppingClock()
        self.people: dict[str, uuid.UUID] = {}
        self.serial = 0
        self.highest = 0
        self.lost: list[Movement] = []
        self.watcher = self.a_watcher()

    def a_watcher(self) -> Watcher:
        rules = Rules(Chain.ETHEREUM, ESCROW, MINIMUM)
        pace = Pace(blocks_per_tick=self.chance.randint(1, 9))
        return Watcher(rules, self.node, self.engine, self.clock, pace=pace)

    async def add_person(self) -> None:
        person, address = uuid.uuid4(), "0x" + uuid.uuid4().hex + "00000000"
        self.people[address] = person
        async with transaction(self.engine) as conn:
            await conn.execute(
                insert(deposit_addresses).values(
                    person_id=person,
                    chain_family="evm",
                    address=address,
                    watched=address,
                    salt=person.bytes * 2,
                    created_at=self.clock.now(),
                )
            )

    def a_movement(self) -> Movement:
        self.serial += 1
        address = self.chance.choice(list(self.people))
        amount = self.chance.choice([1, 999_999, 2_000_000, 5_000_000, 40_000_000])
        to, sender = self.chance.choice(
            [(address, STRANGER)] * 5 + [(ESCROW, STRANGER), (STRANGER, STRANGER)]
        )
        return Movement(f"0x{self.serial}", to, sender, amount)

    def a_sweep(self) -> Movement | None:
        """Empty an address by what is final on it, as a sweep transaction would."""
        self.serial += 1
        for address in self.people:
            held = self._held(address)
            if held > 0:
                return Movement(f"0x{self.serial}", ESCROW, address, held)
        return None

    def _held(self, address: str) -> int:
        moves = [m for block in self.node.movements for m in block]
        return sum(m.amount_micro for m in moves if m.to == address) - sum(
            m.amount_micro for m in moves if m.sender == address
        )

    async def step(self) -> None:
        match self.chance.randint(0, 11):
            case 0:
                await self.add_person()
            case 1 | 2 | 3:
                self.mine()
            case 4:
                for _ in range(self.chance.randint(1, 12)):
                    self.mine()
            case 5:
                self.fork()
            case 6:
                behind = self.chance.randint(0, 6)
                if (
                    self.node.headers[max(0, len(self.node.headers) - 1 - behind)].height
                    > self.node.final_height
                ):
                    self.node.finalize(behind)
            case 7:
                self.node.head_lag = self.chance.choice([0, 0, 3])
            case 8:
                self.watcher = self.a_watcher()  # killed and restarted
            case _:
                await self.tick()

    def mine(self) -> None:
        movements = [self.a_movement() for _ in range(self.chance.randint(0, 3))]
        while self.lost and self.chance.random() < 0.5:
            movements.append(self.lost.pop())  # mined again, perhaps at another index
        if self.chance.random() < 0.15 and (swept := self.a_sweep()) is not None:
            movements.append(swept)
        self.chance.shuffle(movements)
        self.node.mine(*movements)

    def fork(self) -> None:
        unfinal = sum(header.height > self.node.final_height for header in self.node.headers)
        self.highest = max(self.highest, self.node.headers[-1].height)
        dropped = self.node.drop(self.chance.randint(0, unfinal))
        self.lost += [m for m in dropped if m.sender == STRANGER]
        for _ in range(self.chance.randint(0, 8)):
            self.mine()

    async def tick(self) -> None:
        try:
            await self.watcher.tick()
        except ChainError:
            self.node.head_lag = 0

    async def come_to_rest(self) -> None:
        self.node.head_lag = 0
        while self.node.headers[-1].height <= self.highest:
            self.node.mine()  # above anything dropped, else behind cannot be told from reorganised
        for _ in range(300):
            if not await self.watcher.tick():
                return
        raise AssertionError("never at rest")

    async def check_books(self) -> None:
        async with transaction(self.engine) as conn:
            assert sum(total.n for total in (await total_by_kind(conn)).values()) == 0
        for result in await check_chain(self.engine, self.node, ESCROW, patience_s=0):
            assert result.is_equal, result

    async def check_against_fresh_index(self) -> None:
        facts = self.node.facts(1, self.node.headers[-1].height, Everything())
        inbound = [t for block in facts for t in block.inbound]
        to_people = [t for t in inbound if t.to in self.people]
        final = {
            t.key: ("final", t.block_hash)
            for t in inbound
            if t.height <= self.node.final_height and t.sender not in self.people
        }
        seen = {t.key: ("seen", t.block_hash) for t in to_people if t.height > self.node.final_height}
        swept = {t.key for t in inbound if t.sender in self.people and t.height <= self.node.final_height}
        async with transaction(self.engine) as conn:
            rows = (await conn.execute(select(deposits).where(deposits.c.status != "orphaned"))).all()
            assert {row.key: (row.status, row.block_hash) for row in rows} == final | seen
            assert set(await conn.scalars(select(sweeps.c.key))) == swept
            for address, person in self.people.items():
                balance = await read_balance(conn, buyer(str(person)))
                assert (balance.posted.n if balance else 0) == self._credit_due(address) * 1000

    def _credit_due(self, address: str) -> int:
        """R7, told once more in the simplest words: whenever what waits reaches the minimum, all of it."""
        credited = waiting = 0
        for header, block in zip(self.node.headers, self.node.movements, strict=True):
            for movement in block:
                if movement.to == address and header.height <= self.node.final_height:
                    waiting += movement.amount_micro
                    if waiting >= MINIMUM:
                        credited, waiting = credited + waiting, 0
        return credited


@pytest.mark.parametrize("seed", range(6))
async def test_any_history_ends_as_a_fresh_index(engine: AsyncEngine, seed: int) -> None:
    world = World(engine, seed)
    await world.add_person()
    await world.add_person()
    await world.tick()
    for _ in range(90):
        await world.step()
    await world.check_books()
    await world.come_to_rest()
    await world.check_books()
    await world.check_against_fresh_index()
