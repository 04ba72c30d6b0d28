"""Statements against what plain Python says of the same movements."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import accounts, statements, templates
from marketplace.ledger.accounts import Account, ensure_account, read_balance
from marketplace.ledger.charges import Charge
from marketplace.ledger.ids import lowest_at
from marketplace.ledger.money import ZERO, Nano, split
from marketplace.ledger.partitions import detach_month
from marketplace.ledger.poster import Poster
from marketplace.ledger.posting import post_transfer
from marketplace.ledger.rollups import roll_up
from marketplace.ledger.statements import Line, Statement
from marketplace.ledger.templates import Transfer
from marketplace.platform.database import connect

ANN, OLGA, LANE = accounts.buyer("ann"), accounts.operator_earnings("olga"), 7
Moves = dict[Account, dict[UUID, int]]
"""By account and id, what moved."""


class Book:
    """What was posted, in the database and in a dict."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.moves: Moves = {}
        self._count = 0

    def _note(self, identity: UUID, moved: dict[Account, int]) -> None:
        for account, amount in moved.items():
            if amount:
                self.moves.setdefault(account, {})[identity] = amount

    def _id(self, at: datetime) -> UUID:
        self._count += 1
        return UUID(int=lowest_at(at).int | self._count << 16)

    async def transfer(self, transfer: Transfer, at: datetime) -> None:
        identity = self._id(at)
        async with self.engine.begin() as conn:
            assert await post_transfer(conn, transfer, new_id=lambda: identity)
        self._note(identity, {transfer.debit: -transfer.amount.n, transfer.credit: transfer.amount.n})

    async def charge(self, poster: Poster, amount: int, at: datetime) -> None:
        async with self.engine.begin() as conn:
            buyer, operator = await ensure_account(conn, ANN), await ensure_account(conn, OLGA)
        fee = split(Nano(amount))[1]
        identity = self._id(at)
        self._note(identity, {ANN: -amount, OLGA: amount - fee.n, accounts.platform_revenue(LANE): fee.n})
        await poster.post(
            Charge(id=identity, buyer=buyer, operator=operator, amount=Nano(amount), fee=fee, model="m")
        )

    def expected(self, account: Account) -> list[tuple[UUID, int, int]]:
        """(id, what moved, what it left), newest first."""
        left, lines = 0, []
        for identity, amount in sorted(self.moves.get(account, {}).items()):
            left += amount
            lines.append((identity, amount, left))
        return lines[::-1]


def seen(lines: Sequence[Line]) -> list[tuple[UUID, int, int]]:
    return [(line.id, line.amount.n, line.balance.n) for line in lines]


async def a_page(engine: AsyncEngine, account: Account, limit: int, before: UUID | None = None) -> Statement:
    async with engine.connect() as conn:
        found = await statements.page(conn, account, limit=limit, before=before)
    assert found is not None
    return found


async def walked(engine: AsyncEngine, account: Account, limit: int) -> list[tuple[UUID, int, int]]:
    """Every page, each by a question of its own; each begins where the one before it ended."""
    found = [await a_page(engine, account, limit)]
    while (before := found[-1].next_before) is not None:
        found.append(await a_page(engine, account, limit, before))
        assert found[-1].brought_forward.n + sum(line.amount.n for line in found[-1].lines) == (
            found[-2].brought_forward.n
        )
    assert found[-1].brought_forward == ZERO
    return [line for each in found for line in seen(each.lines)]


@pytest.fixture
async def book(engine: AsyncEngine) -> Book:
    """Two years of movements, some at one moment, some not in the daily sums yet, and one of tomorrow's."""
    book, chance = Book(engine), random.Random(3)
    now = datetime.now(UTC)
    ages = sorted((timedelta(hours=chance.randrange(0, 24 * 700, 12)) for _ in range(60)), reverse=True)
    await book.transfer(templates.top_up(person="ann", amount=Nano(10**9), ref="first"), now - ages[0])
    async with Poster(engine, settle=lambda hold, cost: None, lane=LANE) as poster:
        for n in range(0, len(ages), 10):
            deposit = templates.deposit(
                chain="base", person="ann", amount=Nano(1_000 + n * 1_000), ref=f"d{n}"
            )
            await book.transfer(deposit, now - ages[n])
            costs = [0 if chance.random() < 0.2 else chance.randrange(1, 10**6) for _ in range(10)]
            times = [now - age for age in ages[n : n + 10]]
            await asyncio.gather(*map(book.charge, [poster] * 10, costs, times))
            if n == 40:
                async with engine.begin() as conn:
                    await roll_up(conn)
        await book.charge(poster, 77, now + timedelta(days=40))
    return book


async def test_every_line_is_there_once_with_the_balance_it_left(book):
    for account in (ANN, OLGA, accounts.platform_revenue(LANE), accounts.unswept("base")):
        expected = book.expected(account)
        assert await walked(book.engine, account, 1_000) == expected
        assert await walked(book.engine, account, 7) == expected
        async with book.engine.connect() as conn:
            balance = await read_balance(conn, account)
        assert balance is not None
        assert balance.posted.n == expected[0][2]
    newest = await a_page(book.engine, ANN, 1)  # tomorrow's: the next page goes on below it
    assert seen((await a_page(book.engine, ANN, 1, newest.next_before)).lines) == book.expected(ANN)[1:2]


async def test_a_movement_posted_late_is_counted_on_the_pages_after_it(book):
    first = await a_page(book.engine, ANN, 10)
    assert first.next_before is not None
    assert (first.lines[0].kind, first.lines[0].model, first.lines[0].status) == ("charge", "m", 200)
    async with Poster(book.engine, settle=lambda hold, cost: None, lane=LANE) as poster:
        await book.charge(poster, 1_000, datetime.now(UTC) - timedelta(days=200))
    rest = await a_page(book.engine, ANN, 1_000, first.next_before)
    assert seen(rest.lines) == book.expected(ANN)[-len(rest.lines) :]
    assert rest.brought_forward == ZERO
    deposit = next(line for line in rest.lines if line.ref == "d10")
    assert (deposit.kind, deposit.other, deposit.amount.n) == ("deposit", accounts.unswept("base"), 11_000)


async def test_a_statement_ends_where_detached_months_begin(book, database_url):
    async with book.engine.begin() as conn:
        while await roll_up(conn):
            pass
    owner = connect(database_url, role=None)
    async with owner.begin() as conn:
        for month in (1, 2):
            await detach_month(conn, date(2026, month, 1))
    await owner.dispose()
    boundary = lowest_at(datetime(2026, 3, 1, tzinfo=UTC))
    for account in (ANN, OLGA, accounts.platform_revenue(LANE)):
        expected = [line for line in book.expected(account) if line[0] >= boundary]
        older = sum(amount for identity, amount in book.moves[account].items() if identity < boundary)
        found = await a_page(book.engine, account, 1_000)
        assert (seen(found.lines), found.brought_forward.n) == (expected, older)
        beyond = await a_page(book.engine, account, 10, lowest_at(datetime(2026, 2, 9, tzinfo=UTC)))
        assert (beyond.lines, beyond.brought_forward.n, beyond.next_before) == ([], older, None)


async def test_a_page_is_one_moment_of_the_book(book):
    """Spending goes on between its statements; nobody's money appears or vanishes."""
    async with Poster(book.engine, settle=lambda hold, cost: None, lane=LANE) as poster:
        spending = asyncio.create_task(_spend(book, poster))
        for _ in range(20):
            found = await a_page(book.engine, ANN, 1_000)
            assert found.brought_forward == ZERO
        spending.cancel()
        await asyncio.gather(spending, return_exceptions=True)


async def _spend(book: Book, poster: Poster) -> None:
    while True:
        await book.charge(poster, 3, datetime.now(UTC))


async def test_what_was_never_booked_has_no_statement(engine):
    async with engine.connect() as conn:
        assert await statements.page(conn, accounts.buyer("nobody")) is None
        await conn.rollback()
        with pytest.raises(ValueError, match="1 to 1000 rows"):
            await statements.page(conn, ANN, limit=0)
