"""Pages and totals of charges against what plain Python says of the same charges."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import accounts, templates, usage
from marketplace.ledger.accounts import ensure_account
from marketplace.ledger.charges import Charge
from marketplace.ledger.ids import lowest_at
from marketplace.ledger.money import Nano, split
from marketplace.ledger.poster import Poster
from marketplace.ledger.posting import post_transfer
from marketplace.ledger.rollups import roll_up
from marketplace.ledger.usage import Selection, Totals

NOW = datetime(2026, 9, 20, 12, tzinfo=UTC)
KEYS, NODES = [UUID(int=n + 1) for n in range(2)], [UUID(int=n + 11) for n in range(2)]


@pytest.fixture
async def people(engine: AsyncEngine) -> dict[str, int]:
    async with engine.begin() as conn:
        await post_transfer(conn, templates.top_up(person="ann", amount=Nano(10**12), ref="t"))
        await post_transfer(conn, templates.top_up(person="bob", amount=Nano(10**12), ref="u"))
        names = [accounts.buyer("ann"), accounts.buyer("bob"), accounts.operator_earnings("olga")]
        return {name.owner: await ensure_account(conn, name) for name in names}


def some_charges(people: dict[str, int], count: int) -> list[Charge]:
    """Over two years, some older than the first month's partition, dense at midnight."""
    chance = random.Random(count)
    made = []
    for n in range(count):
        at = NOW - timedelta(hours=chance.randrange(0, 24 * 700, 12), milliseconds=chance.choice([0, 1]))
        failed = chance.random() < 0.2
        cost = Nano(0 if failed else chance.randrange(1, 10**6))
        made.append(
            Charge(
                id=UUID(int=lowest_at(at).int | n << 16), buyer=people[chance.choice(["ann", "ann", "bob"])],
                operator=people["olga"], amount=cost, fee=split(cost)[1], model=chance.choice("mno"),
                key_id=chance.choice(KEYS), node=chance.choice(NODES), tok_in=n, tok_out=2 * n,
                status=chance.choice([429, 500]) if failed else 200,
            )
        )  # fmt: skip
    return sorted(made, key=lambda charge: charge.id.int, reverse=True)


async def post(engine: AsyncEngine, charges: list[Charge]) -> None:
    async with Poster(engine, settle=lambda hold, cost: None) as poster:
        for first in range(0, len(charges), 5):
            await asyncio.gather(*(poster.post(charge) for charge in charges[first : first + 5]))


def is_in(charge: Charge, s: Selection) -> bool:
    return (
        s.buyer in {None, charge.buyer}
        and s.operator in {None, charge.operator}
        and s.model in {None, charge.model}
        and s.key_id in {None, charge.key_id}
        and s.node in {None, charge.node}
        and s.status in {None, charge.status}
        and (not s.only_failed or charge.status != 200)
        and (s.since is None or charge.id >= lowest_at(s.since))
        and (s.until is None or charge.id < lowest_at(s.until))
    )


def selections(people: dict[str, int]) -> list[Selection]:
    ann, olga = people["ann"], people["olga"]
    midnight, noon = datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 8, 7, 12, tzinfo=UTC)
    return [
        Selection(buyer=ann),
        Selection(buyer=people["bob"], model="m"),
        Selection(operator=olga),
        Selection(operator=olga, only_failed=True),
        Selection(operator=olga, node=NODES[0], model="n"),
        Selection(buyer=ann, key_id=KEYS[1]),
        Selection(buyer=ann, status=500),
        Selection(buyer=ann, status=200),
        Selection(buyer=ann, since=midnight, until=noon),
        Selection(buyer=ann, since=noon, until=noon + timedelta(hours=3)),
        Selection(buyer=ann, since=noon, until=midnight),
        Selection(buyer=ann, model="o", until=midnight),
        Selection(operator=olga, since=datetime(1950, 1, 1, tzinfo=UTC), until=noon),
    ]


async def test_every_page_and_total_is_what_the_charges_say(engine, people):
    charges = some_charges(people, 300)
    await post(engine, charges[100:])
    async with engine.begin() as conn:
        await roll_up(conn, batches_max=25)  # some in the daily sums, some waiting, some not posted yet
    await post(engine, charges[:100])
    async with engine.connect() as conn:
        for selection in selections(people):
            wanted = [charge for charge in charges if is_in(charge, selection)]
            found: list[Charge] = []
            while True:
                page = await usage.page(conn, selection, limit=37, before=found[-1].id if found else None)
                found += page
                if len(page) < 37:
                    break
            assert found == wanted
            assert await usage.totals(conn, selection) == Totals(
                len(wanted),
                sum(charge.tok_in for charge in wanted),
                sum(charge.tok_out for charge in wanted),
                Nano(sum(charge.amount.n for charge in wanted)),
                Nano(sum(charge.fee.n for charge in wanted)),
            )


async def test_a_page_of_a_busy_month_asks_that_month_alone(engine, people):
    """The statement's bounds, so that it is planned for one partition (bench/ledger.py has the times)."""
    in_august = datetime(2026, 8, 20, tzinfo=UTC)
    charges = [
        Charge(id=UUID(int=lowest_at(in_august).int + n), buyer=people["ann"], model="m") for n in range(5)
    ]
    await post(engine, charges)
    asked: list[tuple[UUID, UUID]] = []

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def listen(connection, cursor, statement, parameters, context, executemany):
        if "LIMIT" in statement:
            asked.append(tuple(value for value in parameters if isinstance(value, UUID)))

    async with engine.connect() as conn:
        before = lowest_at(in_august + timedelta(hours=1))
        assert len(await usage.page(conn, Selection(buyer=people["ann"]), limit=5, before=before)) == 5
    assert asked == [(lowest_at(datetime(2026, 8, 1, tzinfo=UTC)), before)]
