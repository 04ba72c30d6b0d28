from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import accounts, leases, templates
from marketplace.ledger.accounts import Balance, ensure_account, read_balance
from marketplace.ledger.charges import Charge
from marketplace.ledger.errors import InsufficientFunds, UnknownAccount
from marketplace.ledger.ids import uuid7
from marketplace.ledger.lease_book import Hold
from marketplace.ledger.lease_keeper import LeaseKeeper
from marketplace.ledger.money import Nano, split
from marketplace.ledger.poster import Poster
from marketplace.ledger.posting import post_transfer
from marketplace.ledger.reconcile import prove

DOLLAR = 1_000_000_000


@pytest.fixture
def ledger_engine(engine: AsyncEngine) -> AsyncEngine:
    return engine


@pytest.fixture
async def ann(ledger_engine: AsyncEngine) -> int:
    """A buyer with one dollar."""
    async with ledger_engine.begin() as conn:
        await post_transfer(conn, templates.top_up(person="ann", amount=Nano(DOLLAR), ref="top-up"))
        return await ensure_account(conn, accounts.buyer("ann"))


async def anns_balance(engine: AsyncEngine) -> Balance:
    async with engine.connect() as conn:
        balance = await read_balance(conn, accounts.buyer("ann"))
    assert balance is not None
    return balance


async def everything_holds(engine: AsyncEngine) -> bool:
    async with engine.connect() as conn:
        assert [check async for check in prove(conn) if not check.ok] == []
    return True


def a_keeper(engine: AsyncEngine, **options: object) -> LeaseKeeper:
    return LeaseKeeper(engine, worker=f"w-{uuid4()}", **options)


async def test_parallel_workers_drain_an_account_to_the_last_nano_and_no_further(ledger_engine, ann):
    granted: list[int] = []

    async def drain(worker: int) -> None:
        for size in (50_000_000, 3_000_000, 7_001, 1):
            while True:
                try:
                    async with ledger_engine.begin() as conn:
                        await leases.lease(conn, ann, f"worker-{worker}", Nano(size))
                except InsufficientFunds:
                    break
                granted.append(size)

    async def check() -> None:
        while sum(granted) < DOLLAR - 10_000_000:
            balance = await anns_balance(ledger_engine)
            assert 0 <= balance.held.n <= DOLLAR
            await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as tasks:
        for worker in range(8):
            tasks.create_task(drain_quickly(drain(worker)))
        tasks.create_task(check())
    balance = await anns_balance(ledger_engine)
    assert sum(granted) == DOLLAR
    assert (balance.held.n, balance.available.n) == (DOLLAR, 0)


async def drain_quickly(coroutine):
    async with asyncio.timeout(60):
        await coroutine


async def test_eight_gateways_serve_exactly_what_the_buyer_had(ledger_engine, ann):
    async with ledger_engine.begin() as conn:
        operator = await ensure_account(conn, accounts.operator_earnings("olga"))
    keepers = [a_keeper(ledger_engine) for _ in range(8)]
    served = 0
    async with Poster(ledger_engine, settle=keepers[0].settle) as poster:

        async def serve(keeper: LeaseKeeper, n: int) -> None:
            nonlocal served
            while True:
                try:
                    hold = await keeper.authorise(ann, Nano(4_000_000), minimum=Nano(1))
                except InsufficientFunds:
                    return
                cost = max(1, hold.amount_nano * (n % 3 + 1) // 3)
                charge = Charge(
                    id=uuid7(),
                    buyer=ann,
                    operator=operator,
                    amount=Nano(cost),
                    fee=split(Nano(cost))[1],
                    model="m",
                )
                await poster.post(charge, hold)
                served += cost

        async with asyncio.timeout(60):
            await asyncio.gather(*(serve(keeper, n) for n in range(4) for keeper in keepers))
        for keeper in keepers:
            await keeper.close()
    balance = await anns_balance(ledger_engine)
    assert (balance.posted.n, balance.held.n) == (DOLLAR - served, 0)
    assert balance.posted.n <= 8 * 4_000_000  # what the gateways' last slices kept from one another
    assert await everything_holds(ledger_engine)


async def test_a_dead_workers_slice_is_held_until_it_expired_and_then_reaped(ledger_engine, ann):
    async with ledger_engine.begin() as conn:
        await leases.lease(conn, ann, "dead", Nano(5_000), ttl_ms=50)
        await leases.lease(conn, ann, "alive", Nano(7_000))
    await asyncio.sleep(0.1)
    async with ledger_engine.begin() as conn:
        assert await leases.reap(conn, margin_ms=5_000) == 0
        assert await leases.reap(conn, margin_ms=10) == 1
    assert (await anns_balance(ledger_engine)).held.n == 7_000


async def test_giving_back_and_shrinking_return_what_is_left_once(ledger_engine, ann):
    async with ledger_engine.begin() as conn:
        lease_id = await leases.lease(conn, ann, "w", Nano(5_000))
        assert await leases.shrink(conn, lease_id, Nano(2_000)) is True
        assert await leases.give_back(conn, lease_id) == Nano(3_000)
        assert await leases.give_back(conn, lease_id) is None
        assert await leases.shrink(conn, lease_id, Nano(1)) is False
        assert await leases.extend(conn, lease_id, ann, minimum=Nano(1), wanted=Nano(1)) is None
        assert await leases.renew(conn, "w", {lease_id}) == set()
    assert (await anns_balance(ledger_engine)).held.n == 0


async def test_a_worker_renews_only_its_own_leases(ledger_engine, ann):
    async with ledger_engine.begin() as conn:
        mine, others = [await leases.lease(conn, ann, worker, Nano(1_000)) for worker in ("me", "you")]
        assert await leases.renew(conn, "me", {mine, others}, ttl_ms=60_000) == {mine}


async def test_a_buyer_who_cannot_afford_it_gets_what_is_left_or_a_refusal(ledger_engine, ann):
    async with a_keeper(ledger_engine) as keeper:
        hold = await keeper.authorise(ann, Nano(5 * DOLLAR), minimum=Nano(1_000))
        assert hold.amount_nano == DOLLAR
        with pytest.raises(InsufficientFunds) as refused:
            await keeper.authorise(ann, Nano(10), minimum=Nano(1))
        assert refused.value.available_nano == 0
        keeper.release(hold)
        assert (await keeper.authorise(ann, Nano(10))).amount_nano == 10
        with pytest.raises(InsufficientFunds):
            await keeper.authorise(ann, Nano(5 * DOLLAR))
        with pytest.raises(UnknownAccount):
            await keeper.authorise(987_654, Nano(10))
        assert (await keeper.authorise(987_654, Nano(0))).amount_nano == 0


async def test_what_is_free_in_the_slice_and_in_the_balance_count_together(ledger_engine, ann):
    async with a_keeper(ledger_engine) as keeper:
        first = await keeper.authorise(ann, Nano(600_000_000))
        keeper.release(first)  # 0.60 free in the slice (and what the refill added), the rest in the balance
        assert (await keeper.authorise(ann, Nano(DOLLAR))).amount_nano == DOLLAR


async def test_slices_are_one_percent_and_refilled_in_the_background(ledger_engine, ann):
    async with a_keeper(ledger_engine) as keeper:
        first = await keeper.authorise(ann, Nano(100))
        assert keeper.book.free(ann) == DOLLAR // 100 - 100
        await keeper.authorise(ann, Nano(6_000_000))
        async with asyncio.timeout(5):
            while keeper.book.free(ann) < DOLLAR // 100:
                await asyncio.sleep(0.01)
        assert (await anns_balance(ledger_engine)).held.n == 2 * (DOLLAR // 100)
        keeper.release(first)


async def test_leases_in_use_are_renewed_and_idle_ones_returned(ledger_engine, ann):
    async with a_keeper(ledger_engine, ttl_ms=600) as keeper:
        hold = await keeper.authorise(ann, Nano(100))
        await asyncio.sleep(1.5)  # several times to live
        async with ledger_engine.connect() as conn:
            assert await conn.scalar(text("SELECT count(*) FROM leases WHERE expires > now()")) == 1
        assert (await keeper.authorise(ann, Nano(10))).lease_id == hold.lease_id
        keeper.release(hold)
        assert len(keeper.book) == 1
    assert await everything_holds(ledger_engine)


async def test_an_idle_slice_goes_back_to_the_balance(ledger_engine, ann):
    async with a_keeper(ledger_engine, ttl_ms=300) as keeper:
        keeper.release(await keeper.authorise(ann, Nano(100)))
        async with asyncio.timeout(5):
            while len(keeper.book):
                await asyncio.sleep(0.05)
        assert (await anns_balance(ledger_engine)).held.n == 0


async def test_excess_after_a_large_hold_is_returned(ledger_engine, ann):
    async with a_keeper(ledger_engine) as keeper:
        keeper.release(await keeper.authorise(ann, Nano(900_000_000)))
        await keeper.tend()
        assert (await anns_balance(ledger_engine)).held.n <= 2 * (DOLLAR // 100)
        assert keeper.book.free(ann) == (await anns_balance(ledger_engine)).held.n


async def test_a_lapsed_slice_authorises_nothing_until_the_database_renewed_it(ledger_engine, ann):
    now_ns = 0
    keeper = a_keeper(ledger_engine, clock_ns=lambda: now_ns)  # not started: nothing renews
    first = await keeper.authorise(ann, Nano(100))
    now_ns = 9_500_000_000  # of 10 s: past the last moment it may be used
    assert keeper.book.authorise(ann, 100) is None
    assert (await keeper.authorise(ann, Nano(100))).lease_id == first.lease_id
    async with ledger_engine.begin() as conn:
        await conn.execute(text("UPDATE leases SET expires = now() - interval '1 hour'"))
        await leases.reap(conn)
    now_ns *= 3
    fresh: Hold = await keeper.authorise(ann, Nano(100))
    assert fresh.lease_id != first.lease_id
    keeper.release(first)
    assert keeper.book.free(ann) == DOLLAR // 100 - 100  # the reaped slice's hold frees nothing here
    await keeper.close()


async def test_requests_waiting_together_take_few_leases(ledger_engine, ann):
    async with a_keeper(ledger_engine) as keeper:
        holds = await asyncio.gather(*(keeper.authorise(ann, Nano(1_000)) for _ in range(500)))
        assert {hold.lease_id for hold in holds} == {holds[0].lease_id}
        for hold in holds:
            keeper.release(hold)
    assert (await anns_balance(ledger_engine)).held.n == 0
