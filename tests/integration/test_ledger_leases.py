from __future__ import annotations

import asyncio
import contextlib
from types import ModuleType
from uuid import uuid4

import pytest
from asyncpg.transaction import Transaction
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import accounts, leases, overdrafts, templates
from marketplace.ledger.accounts import Balance, ensure_account, read_balance
from marketplace.ledger.charges import Charge
from marketplace.ledger.errors import InsufficientFunds, LedgerUnavailable, UnknownAccount
from marketplace.ledger.ids import uuid7
from marketplace.ledger.lease_book import Hold
from marketplace.ledger.lease_keeper import LeaseKeeper
from marketplace.ledger.money import Nano, split
from marketplace.ledger.overdrafts import Overdraft
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
            while (await anns_balance(ledger_engine)).held.n:
                await asyncio.sleep(0.05)
        assert len(keeper.book) == 0


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


# ---- many buyers at once


async def several(engine: AsyncEngine, count: int, dollars: int = 1) -> list[int]:
    """Buyers with a dollar each."""
    async with engine.begin() as conn:
        for number in range(count):
            await post_transfer(
                conn, templates.top_up(person=f"b{number}", amount=Nano(dollars * DOLLAR), ref=f"t{number}")
            )
        return [await ensure_account(conn, accounts.buyer(f"b{number}")) for number in range(count)]


async def held_in_all(engine: AsyncEngine) -> tuple[int, int]:
    """What the balances hold back, and what the leases say."""
    async with engine.connect() as conn:
        row = (
            await conn.execute(
                text("SELECT (SELECT sum(held) FROM balances), (SELECT coalesce(sum(amount), 0) FROM leases)")
            )
        ).one()
    return int(row[0]), int(row[1])


class Granting:
    """Stands before `leases.lease_all`: counts the calls, may hold the first one up or let one fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fault: Exception | None = None) -> None:
        self.turns: list[int] = []
        self.gate = asyncio.Event()
        self._fault, self._real = fault, leases.lease_all
        monkeypatch.setattr(leases, "lease_all", self)

    async def __call__(self, conn, worker, asks, **options):
        self.turns.append(len(asks))
        await self.gate.wait()
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        return await self._real(conn, worker, asks, **options)


async def test_each_buyer_of_a_turn_has_an_answer_of_his_own(ledger_engine, ann):
    rich, poor = await several(ledger_engine, 2)
    asks = [
        leases.Ask(ann, minimum=Nano(1), wanted=Nano(5)),
        leases.Ask(poor, minimum=Nano(DOLLAR + 1), wanted=Nano(DOLLAR + 1)),
        leases.Ask(987_654_321, minimum=Nano(1), wanted=Nano(1)),
        leases.Ask(rich, minimum=Nano(1), wanted=Nano(3 * DOLLAR)),
    ]
    async with ledger_engine.begin() as conn:
        first, second, third, fourth = await leases.lease_all(conn, "w", asks)
    assert (first.amount, first.usual) == (Nano(DOLLAR // 100), Nano(DOLLAR // 100))
    assert isinstance(second, InsufficientFunds)
    assert second.available_nano == DOLLAR
    assert isinstance(third, UnknownAccount)
    assert fourth.amount == Nano(DOLLAR), "what there is, where it is enough"
    assert await held_in_all(ledger_engine) == (DOLLAR + DOLLAR // 100,) * 2
    with pytest.raises(ValueError, match="twice"):
        async with ledger_engine.begin() as conn:
            await leases.lease_all(conn, "w", [asks[0], asks[0]])
    assert await everything_holds(ledger_engine)


async def test_many_buyers_who_come_and_go_at_once_take_few_transactions(ledger_engine, monkeypatch):
    buyers = await several(ledger_engine, 300)
    granting = Granting(monkeypatch)
    granting.gate.set()
    keeper = a_keeper(ledger_engine)
    holds = await asyncio.gather(*(keeper.authorise(buyer, Nano(1_000)) for buyer in buyers))
    assert {hold.buyer for hold in holds} == set(buyers)
    assert sum(granting.turns) == 300
    assert len(granting.turns) <= 3, granting.turns
    assert await held_in_all(ledger_engine) == (300 * (DOLLAR // 100),) * 2
    for hold in holds[1:]:
        keeper.release(hold)
    returns: list[int] = []
    give_back_all = leases.give_back_all
    monkeypatch.setattr(
        leases, "give_back_all", lambda conn, ids: returns.append(len(ids)) or give_back_all(conn, ids)
    )
    await keeper.close()
    assert returns == [256, 43]
    assert len(keeper.book) == 1, "a slice with an open hold stays"
    assert await held_in_all(ledger_engine) == (DOLLAR // 100,) * 2
    assert await everything_holds(ledger_engine)


async def test_a_fault_is_told_to_all_who_asked_and_to_nobody_after(ledger_engine, monkeypatch):
    buyers = await several(ledger_engine, 3)
    granting = Granting(monkeypatch, fault=OSError("away"))
    async with a_keeper(ledger_engine) as keeper:
        asked = [asyncio.create_task(keeper.authorise(buyer, Nano(10))) for buyer in buyers]
        await asyncio.sleep(0)
        granting.gate.set()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        failed = [isinstance(outcome, LedgerUnavailable) for outcome in outcomes]
        assert failed[0], "the first was asked for alone, or with the others"
        assert all(isinstance(outcome, LedgerUnavailable | Hold) for outcome in outcomes)
        again = await asyncio.gather(*(keeper.authorise(buyer, Nano(10)) for buyer in buyers))
        for hold in (*again, *(outcome for outcome in outcomes if isinstance(outcome, Hold))):
            keeper.release(hold)
    assert await held_in_all(ledger_engine) == (0, 0)


async def test_a_lease_nobody_waits_for_serves_the_next_request(ledger_engine, ann, monkeypatch):
    granting = Granting(monkeypatch)
    async with a_keeper(ledger_engine) as keeper:
        leaving = asyncio.create_task(keeper.authorise(ann, Nano(10)))
        async with asyncio.timeout(5):
            while not granting.turns:
                await asyncio.sleep(0.01)
        leaving.cancel()
        granting.gate.set()
        async with asyncio.timeout(5):
            while not len(keeper.book):
                await asyncio.sleep(0.01)
        keeper.release(await keeper.authorise(ann, Nano(10)))
        assert keeper.book.free(ann) == DOLLAR // 100
        assert granting.turns == [1], "the second asked nobody"
    assert await held_in_all(ledger_engine) == (0, 0)


async def test_who_still_asks_when_the_keeper_closes_is_told(ledger_engine, monkeypatch):
    one, other, late = await several(ledger_engine, 3)
    granting = Granting(monkeypatch)
    keeper = a_keeper(ledger_engine)
    asked = [asyncio.create_task(keeper.authorise(one, Nano(10)))]
    async with asyncio.timeout(5):
        while not granting.turns:
            await asyncio.sleep(0.01)
    asked.append(asyncio.create_task(keeper.authorise(other, Nano(10))))
    await asyncio.sleep(0)
    await keeper.close()
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(*asked, keeper.authorise(late, Nano(10)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [LedgerUnavailable] * 3
    assert await held_in_all(ledger_engine) == (0, 0)


async def test_giving_several_back_at_once_skips_what_was_reaped(ledger_engine):
    one, other = await several(ledger_engine, 2)
    async with ledger_engine.begin() as conn:
        ids = [await leases.lease(conn, buyer, "w", Nano(7)) for buyer in (one, one, other)]
        assert await leases.give_back(conn, ids[0]) == Nano(7)
        assert await leases.give_back_all(conn, ids) == {ids[1]: Nano(7), ids[2]: Nano(7)}
        assert await leases.give_back_all(conn, ids) == {}
    assert await held_in_all(ledger_engine) == (0, 0)
    assert await everything_holds(ledger_engine)


# ---- the connection breaks around a commit


class Breaking:
    """Breaks the connection once, around the commit that follows a function of the ledger's.

    `before` it is sent, while it is (`lost`: the server rolls back), or after it was done (`unanswered`).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, phase: str) -> None:
        self.has_happened = asyncio.Event()
        self._phase, self._is_next = phase, False
        self._real, self._commit = getattr(module, name), Transaction._Transaction__commit
        monkeypatch.setattr(module, name, self._call)
        end = lambda transaction: self._end(transaction)  # noqa: E731, PLW0108 - a method would not be bound
        monkeypatch.setattr(Transaction, "_Transaction__commit", end)

    async def _call(self, *arguments, **options):
        outcome = await self._real(*arguments, **options)
        self._is_next = not self.has_happened.is_set()
        if self._is_next and self._phase == "before":
            self._break()
        return outcome

    async def _end(self, transaction: Transaction) -> None:
        if not self._is_next or self._phase == "unanswered":
            await self._commit(transaction)
        if self._is_next:
            transaction._connection.terminate()
            self._break()

    def _break(self) -> None:
        self._is_next = False
        self.has_happened.set()
        raise ConnectionResetError("broken by the test")


async def free_but_for(keeper: LeaseKeeper, buyer: int, amount: int) -> Hold:
    """A hold that goes on, so that the slice stays, in a slice with much that is free."""
    hold = await keeper.authorise(buyer, Nano(amount))
    large = await keeper.authorise(buyer, Nano(900_000_000))
    await asyncio.gather(*keeper._refilling.values())
    keeper.release(large)
    return hold


async def lend_last(keeper: LeaseKeeper, buyer: int) -> None:
    await keeper.authorise(buyer, Nano(2 * DOLLAR), minimum=Nano(1))


async def enlarge(keeper: LeaseKeeper, buyer: int) -> None:
    await keeper.authorise(buyer, Nano(950_000_000))


async def refill(keeper: LeaseKeeper, buyer: int) -> None:
    await keeper.authorise(buyer, Nano(keeper.book.free(buyer)))


async def return_excess(keeper: LeaseKeeper, buyer: int) -> None:
    await keeper.tend()


async def in_lease_and_book(engine: AsyncEngine, keeper: LeaseKeeper, buyer: int) -> tuple[int, int]:
    part = keeper.book.slice_of(buyer)
    assert part is not None
    async with engine.connect() as conn:
        amount = await conn.scalar(text("SELECT amount FROM leases WHERE id = :id"), {"id": part.lease_id})
    return int(amount or 0), part.free_nano + part.reserved_nano


@pytest.mark.parametrize("phase", ["before", "lost", "unanswered"])
@pytest.mark.parametrize(
    ("act", "module", "name"),
    [
        (lend_last, overdrafts, "lend"),
        (enlarge, leases, "extend"),
        (refill, leases, "extend"),
        (return_excess, leases, "shrink"),
    ],
)
async def test_a_connection_that_breaks_around_a_commit_loses_no_free_money_and_doubles_none(
    ledger_engine, ann, monkeypatch, act, module, name, phase
):
    keeper = a_keeper(ledger_engine, overdraft=Overdraft())
    await free_but_for(keeper, ann, 1_000)
    breaking = Breaking(monkeypatch, module, name, phase)
    with contextlib.suppress(LedgerUnavailable, SQLAlchemyError, OSError):
        await act(keeper, ann)
    async with asyncio.timeout(5):
        await breaking.has_happened.wait()
    leased, booked = await in_lease_and_book(ledger_engine, keeper, ann)
    assert booked <= leased, "more than the lease covers"
    await keeper.tend()
    leased, booked = await in_lease_and_book(ledger_engine, keeper, ann)
    assert booked == leased, "money that nobody can use"
    await keeper.close()
    assert await everything_holds(ledger_engine)


async def test_what_an_overdraft_that_failed_was_to_return_serves_the_next_request(
    ledger_engine, ann, monkeypatch
):
    keeper = a_keeper(ledger_engine, overdraft=Overdraft())
    await free_but_for(keeper, ann, 1_000)
    for phase in ("before", "lost"):
        Breaking(monkeypatch, overdrafts, "lend", phase)
        with pytest.raises(LedgerUnavailable):
            await lend_last(keeper, ann)
        monkeypatch.undo()
        again = await keeper.authorise(ann, Nano(900_000_000))
        assert again.amount_nano == 900_000_000
        keeper.release(again)
    await keeper.close()


async def test_a_lease_read_again_counts_no_charge_twice(ledger_engine, ann, monkeypatch):
    """One that is posted and not yet settled here has left the lease already, and is reserved still."""
    async with ledger_engine.begin() as conn:
        operator = await ensure_account(conn, accounts.operator_earnings("olga"))
    keeper = a_keeper(ledger_engine, overdraft=Overdraft())
    hold = await free_but_for(keeper, ann, 100_000)
    Breaking(monkeypatch, overdrafts, "lend", "lost")
    with pytest.raises(LedgerUnavailable):
        await lend_last(keeper, ann)
    monkeypatch.undo()
    cost = Nano(60_000)
    charge = Charge(id=uuid7(), buyer=ann, operator=operator, amount=cost, fee=split(cost)[1], model="m")
    async with Poster(ledger_engine, settle=lambda hold, cost: None) as poster:
        await poster.post(charge, hold)
    again = await keeper.authorise(ann, Nano(800_000_000))  # reads the lease
    keeper.settle(hold, cost)
    leased, booked = await in_lease_and_book(ledger_engine, keeper, ann)
    assert booked == leased - cost.n, "too little by its cost until the slice goes back"
    keeper.release(again)
    await keeper.close()
    assert (await anns_balance(ledger_engine)).held.n == 0
    assert await everything_holds(ledger_engine)
