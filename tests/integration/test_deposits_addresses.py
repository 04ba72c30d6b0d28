"""Addresses, the pool and what is due for a sweep, on the real database."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from datetime import UTC, datetime

import pytest
from sqlalchemy import Table, func, insert, inspect, select
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import Reverted, UnknownResult
from chain.evm.forwarders import Forwarders
from chain.networks import Chain
from chain.ports import Landed, SignedTransaction
from chain.solana.deposits import PoolAddress, pool_address
from marketplace.deposits.addresses import evm_address, retire_address, solana_address
from marketplace.deposits.directory import KnownAddresses
from marketplace.deposits.pool import REFUSED_WAIT_S, PoolKeeper
from marketplace.deposits.sweeper import REBROADCAST_S, EvmSweeper, SweepPolicy, due_for_sweep
from marketplace.deposits.tables import (
    chain_cursors,
    chain_halts,
    chain_headers,
    deposit_addresses,
    deposit_intents,
    deposits,
    screening_decisions,
    solana_pool,
    support_cases,
    sweeps,
    taken_back,
)
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SECRET = b"s" * 32
FORWARDERS = Forwarders("0x" + "ab" * 20)
SEED = bytes(32)
TABLES = [
    chain_cursors,
    chain_halts,
    chain_headers,
    deposit_addresses,
    deposit_intents,
    deposits,
    solana_pool,
]
TABLES += [support_cases, sweeps, taken_back, screening_decisions]


async def make_evm(engine: AsyncEngine, person: uuid.UUID) -> str:
    async with transaction(engine) as conn:
        return await evm_address(conn, FORWARDERS, person, secret=SECRET, now=NOW)


async def make_solana(engine: AsyncEngine, person: uuid.UUID) -> str | None:
    async with transaction(engine) as conn:
        return await solana_address(conn, person, now=NOW)


def a_keeper(engine: AsyncEngine, *, ready: int, fails: int = 0) -> PoolKeeper:
    failures = iter(range(fails))

    async def prepare(index: int) -> PoolAddress:
        if next(failures, None) is not None:
            raise UnknownResult("no answer")
        return pool_address(SEED, index)

    return PoolKeeper(engine, SystemClock(), lambda index: pool_address(SEED, index), prepare, ready)


async def test_one_address_per_person_whoever_asks_at_once(engine: AsyncEngine) -> None:
    person, other = uuid.uuid4(), uuid.uuid4()
    answers = await asyncio.gather(*(make_evm(engine, person) for _ in range(6)), make_evm(engine, other))
    assert len(set(answers[:6])) == 1
    assert answers[6] != answers[0]


async def test_a_retired_address_is_replaced_and_still_watched(engine: AsyncEngine) -> None:
    person = uuid.uuid4()
    first = await make_evm(engine, person)
    async with transaction(engine) as conn:
        why = {"actor": "ann", "reason": "leaked", "now": NOW}
        assert await retire_address(conn, person, "evm", **why) == first
        assert await retire_address(conn, person, "evm", **why) is None
    second = await make_evm(engine, person)
    assert second != first
    known = KnownAddresses(Chain.BASE, "escrow")
    async with transaction(engine) as conn:
        await known.refresh(conn, NOW)
    assert known.is_watched(first)
    assert known.is_watched(second)


async def test_no_address_is_skipped_by_a_refresh_between_two_commits(engine: AsyncEngine) -> None:
    """The slower writer has the lower number; a refresh after the faster one must still find both."""
    known, people = KnownAddresses(Chain.BASE, "escrow"), [uuid.uuid4() for _ in range(2)]
    made: list[str] = []
    async with transaction(engine) as slow:
        made.append(await evm_address(slow, FORWARDERS, people[0], secret=SECRET, now=NOW))
        fast = asyncio.create_task(make_evm(engine, people[1]))
        await asyncio.sleep(0.2)
        async with transaction(engine) as conn:
            await known.refresh(conn, NOW)
    made.append(await fast)
    async with transaction(engine) as conn:
        await known.refresh(conn, NOW)
    assert all(known.is_watched(address) for address in made)


async def test_the_pool_is_watched_before_it_is_ready_and_given_once(engine: AsyncEngine) -> None:
    people = [uuid.uuid4() for _ in range(5)]
    assert await make_solana(engine, people[0]) is None
    keeper = a_keeper(engine, ready=3, fails=1)
    known = KnownAddresses(Chain.SOLANA, "escrow")
    with pytest.raises(UnknownResult):
        await keeper.tick()
    async with transaction(engine) as conn:
        await known.refresh(conn, NOW)
    assert known.is_watched(pool_address(SEED, 0).token_account)
    assert await make_solana(engine, people[0]) is None  # it may not exist on chain
    while await keeper.tick():
        pass
    given = await asyncio.gather(*(make_solana(engine, person) for person in people))
    assert len(set(given) - {None}) == 3
    assert given.count(None) == 2
    while await keeper.tick():
        pass
    again = await asyncio.gather(*(make_solana(engine, person) for person in people))
    assert len(set(again)) == 5
    assert all(before in (None, now) for before, now in zip(given, again, strict=True))
    async with transaction(engine) as conn:
        owners = select(solana_pool.c.owner).where(solana_pool.c.person_id.is_not(None))
        assert set(await conn.scalars(owners)) == set(again)


async def test_an_address_the_chain_refuses_does_not_keep_the_others_waiting(engine: AsyncEngine) -> None:
    clock, refused = SteppingClock(), [0]

    async def prepare(index: int) -> PoolAddress:
        if index in refused:
            raise Reverted("owner does not match")
        return pool_address(SEED, index)

    keeper = PoolKeeper(engine, clock, lambda index: pool_address(SEED, index), prepare, ready=3)

    async def ready() -> list[int]:
        while await keeper.tick():
            pass
        async with transaction(engine) as conn:
            made = select(solana_pool.c.pool_index).where(solana_pool.c.ready_at.is_not(None))
            return sorted(await conn.scalars(made))

    assert await ready() == [1, 2]
    refused.clear()
    assert await ready() == [1, 2]
    clock.seconds += REFUSED_WAIT_S
    assert await ready() == [0, 1, 2]


class FakeRail:
    """Sends nothing; the test says what landed."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.final: Landed | None = None
        self.numbers = itertools.count()

    async def gas_price_wei(self) -> int:
        return 1

    async def replace(self, signed: SignedTransaction) -> SignedTransaction | None:
        return None  # its nonce is used: it is mined, and not final yet

    async def assemble(self, salts: list[bytes]) -> SignedTransaction:
        return SignedTransaction(b"".join(salts), f"0x{next(self.numbers)}", "")

    async def broadcast(self, signed: SignedTransaction) -> None:
        self.sent.append(signed.tx)

    async def landed(self, signed: SignedTransaction) -> Landed | None:
        return self.final


class SteppingClock(SystemClock):
    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


async def _final_deposit(engine: AsyncEngine, address: str, micro: int, key: str) -> None:
    async with transaction(engine) as conn:
        await conn.execute(
            insert(deposits).values(
                id=uuid.uuid4(), chain="base", key=key, tx=key, height=1, block_hash="h", to_address=address,
                sender="s", amount_micro=micro, is_direct=False, status="final", seen_at=NOW, final_at=NOW,
                transfer_ref=f"base:{key}",
            )
        )  # fmt: skip


async def test_what_is_due_is_final_minus_swept(engine: AsyncEngine) -> None:
    rich, poor, empty = [await make_evm(engine, uuid.uuid4()) for _ in range(3)]
    await _final_deposit(engine, rich, 9_000_000, "a")
    await _final_deposit(engine, rich, 1_000_000, "b")
    await _final_deposit(engine, poor, 900_000, "c")
    await _final_deposit(engine, empty, 7_000_000, "d")
    async with transaction(engine) as conn:
        await conn.execute(
            insert(sweeps).values(
                chain="base", key="s", tx="s", height=2, block_hash="h", from_address=empty,
                amount_micro=7_000_000, booked_at=NOW,
            )
        )  # fmt: skip
        due = await due_for_sweep(conn, Chain.BASE, SweepPolicy())
        assert [(d.address, d.amount.n) for d in due] == [(rich, 10_000_000)]
        assert await due_for_sweep(conn, Chain.ETHEREUM, SweepPolicy()) == []
        salt = await conn.scalar(select(deposit_addresses.c.salt).where(deposit_addresses.c.address == rich))
    assert due[0].salt == salt
    assert FORWARDERS.address_of(due[0].salt) == rich


async def test_one_sweep_at_a_time_until_the_watcher_is_past_it(engine: AsyncEngine) -> None:
    await _final_deposit(engine, await make_evm(engine, uuid.uuid4()), 9_000_000, "a")
    async with transaction(engine) as conn:
        await conn.execute(
            insert(chain_cursors).values(
                chain="base", version=0, height=5, hash="h", final_height=5, final_hash="h",
                final_parent_height=4, final_parent_hash="g", final_time_s=0, head_height=5, started_height=0,
                updated_at=NOW,
            )
        )  # fmt: skip
    rail, clock = FakeRail(), SteppingClock()
    sweeper = EvmSweeper(Chain.BASE, engine, rail, clock)
    assert await sweeper.tick() == "0x0"
    assert await sweeper.tick() is None
    clock.seconds += REBROADCAST_S
    assert await sweeper.tick() is None
    assert rail.sent == ["0x0", "0x0"]  # the same bytes again
    rail.final = Landed("0x0", 6, "h", is_success=True)
    assert await sweeper.tick() is None  # final on chain, not yet in the books
    async with transaction(engine) as conn:
        await conn.execute(chain_cursors.update().values(height=6, final_height=6))
        assert await conn.scalar(select(func.count()).select_from(sweeps)) == 0
    assert await sweeper.tick() == "0x1"  # nothing was booked (say, it moved nothing): it is due again


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
async def test_tables_are_the_migration(engine: AsyncEngine, table: Table) -> None:
    async with engine.connect() as conn:
        there = await conn.run_sync(lambda sync: inspect(sync).get_columns(table.name))
    assert {c["name"]: c["nullable"] for c in there} == {c.name: c.nullable for c in table.columns}
