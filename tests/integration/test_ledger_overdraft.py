from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import accounts, leases, overdrafts, templates
from marketplace.ledger.accounts import Balance, TransferKind, ensure_account, read_balance
from marketplace.ledger.charges import Charge
from marketplace.ledger.errors import AmountTooLarge, ChargeRefused, InsufficientFunds
from marketplace.ledger.holds import hold, release_all
from marketplace.ledger.ids import uuid7
from marketplace.ledger.lease_keeper import LeaseKeeper
from marketplace.ledger.money import NANO_MAX, Nano, split
from marketplace.ledger.overdrafts import Overdraft
from marketplace.ledger.poster import Poster
from marketplace.ledger.posting import find_transfer, post_transfer, post_transfers
from marketplace.ledger.reconcile import prove

CENT = 10_000_000
DOLLAR = 100 * CENT


async def a_buyer(engine: AsyncEngine, balance: int, person: str = "ann") -> int:
    async with engine.begin() as conn:
        await post_transfer(conn, templates.top_up(person=person, amount=Nano(balance), ref=f"t-{person}"))
        return await ensure_account(conn, accounts.buyer(person))


async def stripe_has_money(engine: AsyncEngine) -> None:
    async with engine.begin() as conn:
        await post_transfers(
            conn,
            [
                templates.top_up(person="zoe", amount=Nano(20 * DOLLAR), ref="t-zoe"),
                templates.top_up_available(amount=Nano(20 * DOLLAR), ref="t-zoe"),
            ],
        )


async def an_operator(engine: AsyncEngine) -> int:
    async with engine.begin() as conn:
        return await ensure_account(conn, accounts.operator_earnings("olga"))


async def balance_of(engine: AsyncEngine, person: str = "ann") -> Balance:
    async with engine.connect() as conn:
        balance = await read_balance(conn, accounts.buyer(person))
    assert balance is not None
    return balance


async def broken(engine: AsyncEngine) -> list[str]:
    async with engine.connect() as conn:
        return [check.name async for check in prove(conn) if not check.ok]


def a_keeper(engine: AsyncEngine, terms: Overdraft | None = None, **options: object) -> LeaseKeeper:
    return LeaseKeeper(engine, worker=f"w-{uuid4()}", overdraft=terms or Overdraft(), **options)


def a_charge(buyer: int, operator: int, cost: int) -> Charge:
    fee = split(Nano(cost))[1]
    return Charge(id=uuid7(), buyer=buyer, operator=operator, amount=Nano(cost), fee=fee, model="m")


async def test_when_the_money_runs_out_one_request_completes_and_no_second_begins(engine):
    buyer, operator = await a_buyer(engine, CENT), await an_operator(engine)
    async with a_keeper(engine) as keeper, Poster(engine, settle=keeper.settle) as poster:
        last = await keeper.authorise(buyer, Nano(5 * CENT), minimum=Nano(1))
        assert last.amount_nano == 5 * CENT
        assert (await balance_of(engine)).available.n == -4 * CENT
        with pytest.raises(InsufficientFunds):
            await keeper.authorise(buyer, Nano(1))
        assert await poster.post(a_charge(buyer, operator, 3 * CENT), last) is True
        keeper.release(last)
        async with asyncio.timeout(5):
            while (await balance_of(engine)).held.n:
                await asyncio.sleep(0.02)
        assert (await balance_of(engine)).posted.n == -2 * CENT
        with pytest.raises(InsufficientFunds):  # what it left of its hold serves nobody else
            await keeper.authorise(buyer, Nano(1))
        assert await broken(engine) == []
        async with engine.begin() as conn:
            assert await overdrafts.drawn(conn) == Nano(2 * CENT)
            await post_transfer(conn, templates.top_up(person="ann", amount=Nano(DOLLAR), ref="again"))
        assert (await keeper.authorise(buyer, Nano(98 * CENT))).amount_nano == 98 * CENT
    assert await broken(engine) == []


async def test_an_overdraft_is_not_spendable_in_any_other_way(engine):
    buyer = await a_buyer(engine, CENT)
    async with a_keeper(engine) as keeper:
        last = await keeper.authorise(buyer, Nano(5 * CENT))
        keeper.release(last)
    assert ((await balance_of(engine)).available.n, (await balance_of(engine)).held.n) == (CENT, 0)
    async with engine.begin() as conn:
        with pytest.raises(InsufficientFunds):
            await hold(conn, accounts.buyer("ann"), Nano(CENT + 1), reason="r")
        refund = templates.card_refund(person="ann", amount=Nano(CENT + 1), ref="re")
        with pytest.raises(InsufficientFunds):
            await post_transfer(conn, refund)


async def test_a_limit_of_ones_own_and_the_platforms_cap_bound_what_is_lent(engine):
    ann, bob, cyd = [await a_buyer(engine, CENT, person) for person in ("ann", "bob", "cyd")]
    terms = Overdraft(limit=Nano(10 * CENT), platform_cap=Nano(12 * CENT))
    async with engine.begin() as conn:
        await overdrafts.set_limit(conn, bob, Nano(0))
    async with a_keeper(engine, terms) as keeper:
        first = await keeper.authorise(ann, Nano(50 * CENT), minimum=Nano(1))
        assert first.amount_nano == 11 * CENT  # what she had, and the limit
        assert (await keeper.authorise(bob, Nano(50 * CENT), minimum=Nano(1))).amount_nano == CENT
        assert (await keeper.authorise(cyd, Nano(50 * CENT), minimum=Nano(1))).amount_nano == 3 * CENT
        async with engine.connect() as conn:
            assert await overdrafts.drawn(conn) == terms.platform_cap


async def test_a_thousand_parallel_requests_end_above_minus_one_response(engine):
    """Eight gateways, a buyer with a cent, requests that cost up to five cents each (A65, V4)."""
    buyer, operator = await a_buyer(engine, CENT), await an_operator(engine)
    keepers = [a_keeper(engine) for _ in range(8)]
    lowest, served = 0, 0
    async with Poster(engine, settle=keepers[0].settle) as poster:

        async def request(n: int) -> None:
            nonlocal served
            keeper, bound = keepers[n % 8], 5 * CENT - n
            try:
                taken = await keeper.authorise(buyer, Nano(bound), minimum=Nano(1))
            except InsufficientFunds:
                return
            cost = max(1, taken.amount_nano // (1 + n % 40))
            await poster.post(a_charge(buyer, operator, cost), taken)
            keepers[n % 8].settle(taken, Nano(cost))
            keeper.release(taken)
            served += 1

        async def watch() -> None:
            nonlocal lowest
            while True:
                lowest = min(lowest, (await balance_of(engine)).available.n)
                await asyncio.sleep(0.01)

        watching = asyncio.create_task(watch())
        async with asyncio.timeout(100):
            await asyncio.gather(*(request(n) for n in range(1_000)))
        for keeper in keepers:
            await keeper.close()
        watching.cancel()
    after = await balance_of(engine)
    assert served >= 1
    assert after.held.n == 0
    assert -5 * CENT < min(lowest, after.posted.n) <= 0
    assert await broken(engine) == []


async def test_a_dispute_breaks_the_floor_in_the_open_and_its_reversal_mends_it(engine):
    buyer = await a_buyer(engine, 5 * DOLLAR)
    await stripe_has_money(engine)
    async with engine.begin() as conn:
        await post_transfer(conn, templates.card_refund(person="ann", amount=Nano(3 * DOLLAR), ref="spent"))
        paid = templates.top_up(person="ann", amount=Nano(5 * DOLLAR), ref="t-ann")
        found = await find_transfer(conn, TransferKind.TOP_UP, "t-ann")
        assert found is not None
        silent = templates.reversal(of=found.id, original=paid, amount=Nano(5 * DOLLAR), ref="rev")
        with pytest.raises(InsufficientFunds):
            await post_transfer(conn, silent)
        taken = templates.dispute(person="ann", amount=Nano(5 * DOLLAR), ref="dp_1")
        assert await post_transfer(conn, taken) is True
        assert await post_transfer(conn, taken) is False
    after = await balance_of(engine)
    assert (after.posted.n, after.floor) == (-3 * DOLLAR, Nano(-3 * DOLLAR))
    assert await broken(engine) == []
    async with a_keeper(engine) as keeper:
        with pytest.raises(InsufficientFunds):
            await keeper.authorise(buyer, Nano(1), minimum=Nano(1))
    async with engine.begin() as conn:
        await post_transfer(conn, templates.dispute_won(person="ann", amount=Nano(5 * DOLLAR), ref="dp_1"))
        with pytest.raises(InsufficientFunds):  # the lowered floor is not credit
            await post_transfer(
                conn, templates.card_refund(person="ann", amount=Nano(2 * DOLLAR + 1), ref="more")
            )
    assert (await balance_of(engine)).available.n == 2 * DOLLAR
    assert await broken(engine) == []


async def test_prove_finds_a_floor_that_nobody_permitted(engine, database_url):
    await a_buyer(engine, DOLLAR)
    async with engine.begin() as conn:
        sneaky = "UPDATE balances SET floor = -5000, posted = posted - 1000000005 WHERE floor = 0"
        await conn.execute(text(sneaky))
    assert "V4 overdrafts" in await broken(engine)


async def test_many_transfers_and_releases_in_one_call_are_as_many_single_ones(engine):
    await stripe_has_money(engine)
    async with engine.begin() as conn:
        gifts = [templates.coupon(person=f"p-{n}", amount=Nano(1_000), ref=f"c-{n}") for n in range(300)]
        assert await post_transfers(conn, [*gifts, gifts[0]]) == [True] * 300 + [False]
        assert await post_transfers(conn, gifts) == [False] * 300
        ids = [await hold(conn, accounts.buyer(f"p-{n % 3}"), Nano(100), reason="r") for n in range(9)]
        assert await release_all(conn, [*ids, uuid4()]) == dict.fromkeys(ids, Nano(100))
        assert await release_all(conn, ids) == {}
        spend = templates.card_refund(person="p-0", amount=Nano(1_000), ref="s-1")
        twice = templates.card_refund(person="p-0", amount=Nano(1), ref="s-2")
        with pytest.raises(InsufficientFunds):
            await post_transfers(conn, [spend, twice])  # all or nothing
        assert await post_transfer(conn, spend) is True
    assert await broken(engine) == []


async def test_who_has_nothing_left_is_lent_nothing(engine):
    """Whatever a gateway believes: another may have taken the last of it meanwhile."""
    buyer = await a_buyer(engine, 100)
    async with engine.begin() as conn:
        await leases.lease(conn, buyer, "another", Nano(100))
        with pytest.raises(InsufficientFunds):
            await overdrafts.lend(conn, buyer, "w", minimum=Nano(1), wanted=Nano(10), terms=Overdraft())


async def test_balances_stop_at_the_edges_of_64_bits(engine):
    buyer, operator = await a_buyer(engine, NANO_MAX), await an_operator(engine)
    async with engine.begin() as conn:
        for more in (1, NANO_MAX):
            gift = templates.coupon(person="ann", amount=Nano(more), ref=f"more-{more}")
            with pytest.raises(AmountTooLarge):
                await post_transfer(conn, gift)
    async with a_keeper(engine) as keeper, Poster(engine, settle=keeper.settle) as poster:
        taken = await keeper.authorise(buyer, Nano(NANO_MAX))
        assert await poster.post(a_charge(buyer, operator, NANO_MAX), taken) is True
    async with engine.begin() as conn:
        again = templates.coupon(person="bob", amount=Nano(NANO_MAX), ref="again")
        bob = await ensure_account(conn, accounts.buyer("bob"))
        await post_transfer(conn, again)
    async with a_keeper(engine) as keeper, Poster(engine, settle=keeper.settle) as poster:
        with pytest.raises(ChargeRefused):  # the operator's earnings would leave 64 bits
            await poster.post(a_charge(bob, operator, NANO_MAX))
    assert await broken(engine) == []
