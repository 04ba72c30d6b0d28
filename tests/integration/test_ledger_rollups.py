from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from marketplace.ledger import accounts, templates, usage
from marketplace.ledger.accounts import ensure_account
from marketplace.ledger.charges import Charge
from marketplace.ledger.ids import lowest_at, uuid7
from marketplace.ledger.money import Nano, split
from marketplace.ledger.partitions import detach_month, ensure_partitions
from marketplace.ledger.poster import Poster
from marketplace.ledger.posting import post_transfer
from marketplace.ledger.reconcile import prove
from marketplace.ledger.rollups import roll_up
from marketplace.platform.database import connect

JANUARY, FEBRUARY = datetime(2026, 1, 5, 23, 59, 59, tzinfo=UTC), datetime(2026, 2, 1, 0, 0, 1, tzinfo=UTC)


@pytest.fixture
async def owner_engine(database_url):
    engine = connect(database_url, role=None)
    yield engine
    await engine.dispose()


@pytest.fixture
async def people(engine):
    async with engine.begin() as conn:
        await post_transfer(conn, templates.top_up(person="ann", amount=Nano(10**9), ref="t"))
        buyer = await ensure_account(conn, accounts.buyer("ann"))
        return buyer, await ensure_account(conn, accounts.operator_earnings("olga"))


def a_charge(people: tuple[int, int], cost: int, at: datetime | None = None, **others: object) -> Charge:
    identity = uuid7() if at is None else UUID(int=lowest_at(at).int | uuid4().int >> 64)
    fee = split(Nano(cost))[1]
    return Charge(
        id=identity, buyer=people[0], operator=people[1], amount=Nano(cost), fee=fee,
        **{"model": "m", "tok_in": 3, "tok_out": 5} | others,
    )  # fmt: skip


async def broken(engine) -> list[str]:
    async with engine.connect() as conn:
        return [check.name async for check in prove(conn) if not check.ok]


def nothing_held(hold: object, cost: object) -> None:
    assert hold is None, cost


async def test_days_are_summed_once_and_prove_compares_them(engine, people):
    async with Poster(engine, settle=nothing_held) as poster:
        for cost in (100, 200):
            await poster.post(a_charge(people, cost, JANUARY))
        await poster.post(a_charge(people, 0, JANUARY + timedelta(seconds=1), status=500))
        async with engine.begin() as conn:
            assert await roll_up(conn, batches_max=2) == 2
            assert await roll_up(conn) == 1
            assert await roll_up(conn) == 0
        await poster.post(a_charge(people, 1_000, JANUARY))  # late: its day was summed before
        assert await broken(engine) == []
        async with engine.begin() as conn:
            assert await roll_up(conn) == 1
    async with engine.connect() as conn:
        first, last = date(2026, 1, 1), date(2026, 1, 31)
        fifth, sixth = await usage.daily(conn, buyer=people[0], first=first, last=last)
        assert await usage.daily(conn, operator=people[1], first=first, last=last) == [fifth, sixth]
    assert (fifth.day, fifth.failed, fifth.totals.requests) == (date(2026, 1, 5), 0, 3)
    assert (fifth.totals.amount.n, fifth.totals.fee.n, fifth.totals.tok_out) == (1_300, 260, 15)
    assert (sixth.day, sixth.failed, sixth.totals.requests) == (date(2026, 1, 6), 1, 1)
    assert await broken(engine) == []
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE usage_daily SET fee = fee + 1 WHERE day = '2026-01-05'"))
    assert await broken(engine) == ["L5 daily sums by day", "L5 daily sums by buyer"]


async def test_a_month_is_detached_in_order_and_the_book_still_proves_itself(engine, owner_engine, people):
    async with Poster(engine, settle=nothing_held) as poster:
        for at in (JANUARY, FEBRUARY, None):
            await poster.post(a_charge(people, 500, at))
    with pytest.raises(DBAPIError, match="not in the daily sums"):
        async with owner_engine.begin() as conn:
            await detach_month(conn, date(2026, 1, 1))
    async with engine.begin() as conn:
        await roll_up(conn)
    for month, why in ((date(2026, 2, 1), "the oldest month"), (datetime.now(UTC).date(), "too recent")):
        with pytest.raises(DBAPIError, match=why):
            async with owner_engine.begin() as conn:
                await detach_month(conn, month)
    with pytest.raises(DBAPIError, match="permission denied"):
        async with engine.begin() as conn:
            await detach_month(conn, date(2026, 1, 1))
    async with owner_engine.begin() as conn:
        assert await detach_month(conn, date(2026, 1, 1)) == "charges_2026_01"
        await conn.execute(text("DROP TABLE charges_2026_01"))
    async with engine.begin() as conn:
        assert await ensure_partitions(conn) == 0  # not made again
        assert len(await usage.page(conn, usage.Selection(buyer=people[0]))) == 2
    assert await broken(engine) == []
