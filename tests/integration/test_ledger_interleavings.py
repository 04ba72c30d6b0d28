"""Two sessions around every lock, in a fixed order: the first has done its work and not committed; the second
comes and is seen waiting for the first; the first commits, or rolls back; then the second goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from marketplace.ledger import accounts, holds, leases, overdrafts, templates
from marketplace.ledger.accounts import TransferKind, ensure_account, read_balance
from marketplace.ledger.charges import Charge
from marketplace.ledger.errors import InsufficientFunds, ReversalRefused
from marketplace.ledger.ids import uuid7
from marketplace.ledger.lease_book import Hold, Slice
from marketplace.ledger.lease_keeper import LeaseKeeper
from marketplace.ledger.money import ZERO, Nano
from marketplace.ledger.overdrafts import Overdraft
from marketplace.ledger.poster import Poster
from marketplace.ledger.posting import find_transfer, post_transfer

ALL = Nano(1_000_000)
HALF = Nano(500_000)
Act = Callable[[AsyncConnection], Awaitable[object]]


@dataclass(frozen=True)
class Book:
    engine: AsyncEngine
    buyer: int
    operator: int
    lease_id: UUID
    """A lease of half the buyer's money, long expired."""
    earnings_id: UUID
    """The transfer that gave the operator what he has."""


EARNED = templates.correction(
    debit=accounts.LOSS, credit=accounts.operator_earnings("olga"), amount=ALL, ref="earned", note="test"
)


@pytest.fixture
async def book(engine: AsyncEngine) -> Book:
    async with engine.begin() as conn:
        await post_transfer(conn, templates.top_up(person="ann", amount=ALL, ref="t"))
        await post_transfer(conn, EARNED)
        found = await find_transfer(conn, TransferKind.CORRECTION, "earned")
        assert found is not None
        buyer = await ensure_account(conn, accounts.buyer("ann"))
        operator = await ensure_account(conn, accounts.operator_earnings("olga"))
        lease_id = await leases.lease(conn, buyer, "dead", HALF)
        await conn.execute(text("UPDATE leases SET expires = now() - interval '1 minute'"))
    return Book(engine, buyer, operator, lease_id, found.id)


async def pid_of(conn: AsyncConnection) -> int:
    return int(await conn.scalar(text("SELECT pg_backend_pid()")) or 0)


async def interleaved(
    book: Book, first: Act, second: Awaitable[object], *, commits: bool
) -> tuple[bool, object]:
    """(whether the second had to wait for the first, what it gave back or raised)."""
    async with book.engine.connect() as conn, book.engine.connect() as watcher:
        pid, transaction = await pid_of(conn), conn.get_transaction()
        assert transaction is not None
        await first(conn)
        running = asyncio.ensure_future(second)
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE :pid = ANY(pg_blocking_pids(pid))"
        async with asyncio.timeout(20):
            while not (is_waiting := bool(await watcher.scalar(text(waiting), {"pid": pid}))):
                if running.done():
                    break
                await watcher.rollback()  # a transaction sees the sessions of its first look
                await asyncio.sleep(0.01)
        await (transaction.commit() if commits else transaction.rollback())
        outcome = (await asyncio.gather(running, return_exceptions=True))[0]
    return is_waiting, outcome


async def alone(book: Book, act: Act) -> object:
    async with book.engine.begin() as conn:
        return await act(conn)


async def state(book: Book) -> tuple[int, int]:
    """(posted, held) of the buyer; held is what leases and holds say (L5)."""
    async with book.engine.connect() as conn:
        balance = await read_balance(conn, accounts.buyer("ann"))
        parts = """SELECT (SELECT coalesce(sum(amount), 0) FROM leases)
                        + (SELECT coalesce(sum(amount), 0) FROM holds WHERE account = :buyer)"""
        derived = await conn.scalar(text(parts), {"buyer": book.buyer})
    assert balance is not None
    assert balance.held.n == derived
    return balance.posted.n, balance.held.n


def take(book: Book, amount: Nano) -> Act:
    return lambda conn: leases.lease(conn, book.buyer, "w", amount)


def extend(book: Book) -> Act:
    return lambda conn: leases.extend(conn, book.lease_id, book.buyer, minimum=HALF, wanted=HALF, cap=ZERO)


def withdraw(book: Book) -> Act:
    return lambda conn: holds.hold(conn, accounts.operator_earnings("olga"), ALL, reason="withdrawal")


def hold_back(book: Book) -> Act:
    return lambda conn: holds.hold(conn, accounts.buyer("ann"), HALF, reason="case")


def reap(book: Book) -> Act:
    return leases.reap


def give_back(book: Book) -> Act:
    return lambda conn: leases.give_back(conn, book.lease_id)


def shrink(book: Book) -> Act:
    return lambda conn: leases.shrink(conn, book.lease_id, Nano(1))


def reverse(book: Book) -> Act:
    back = templates.reversal(of=book.earnings_id, original=EARNED, amount=Nano(600_000), ref=uuid4().hex)
    return lambda conn: post_transfer(conn, back)


def deposit(book: Book) -> Act:
    return lambda conn: post_transfer(
        conn, templates.deposit(chain="base", person="ann", amount=HALF, ref="d")
    )


def lend(book: Book) -> Act:
    return lambda conn: overdrafts.lend(
        conn, book.buyer, "w", minimum=ALL, wanted=ALL, terms=Overdraft(ALL, ALL)
    )


BOTH_ENDS = pytest.mark.parametrize(
    "commits", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["commits", "rolls_back"]
)
Make = Callable[[Book], Act]
CASES: list[tuple[str, Make, Make, object, object]] = [
    # Name, first, second, what the second gets if the first commits, and if not (a type, or a value).
    ("lease and lease", lambda b: take(b, HALF), lambda b: take(b, HALF), InsufficientFunds, UUID),
    ("lease and refill", lambda b: take(b, HALF), extend, InsufficientFunds, leases.Granted),
    ("refill and lease", extend, lambda b: take(b, HALF), InsufficientFunds, UUID),
    ("refill and refill", extend, extend, InsufficientFunds, leases.Granted),
    ("lease and hold", lambda b: take(b, HALF), hold_back, InsufficientFunds, UUID),
    ("hold and lease", hold_back, lambda b: take(b, HALF), InsufficientFunds, UUID),
    ("reap and refill", reap, extend, None, leases.Granted),
    ("reap and return", reap, give_back, None, HALF),
    ("reap and shrink", reap, shrink, False, True),
    ("return and lease", give_back, lambda b: take(b, ALL), UUID, InsufficientFunds),
    ("return and return", give_back, give_back, None, HALF),
    ("withdrawal and withdrawal", withdraw, withdraw, InsufficientFunds, UUID),
    ("reversal and reversal", reverse, reverse, ReversalRefused, True),
    ("reversal and withdrawal", reverse, withdraw, InsufficientFunds, UUID),
    ("withdrawal and reversal", withdraw, reverse, InsufficientFunds, True),
    ("deposit and the same deposit", deposit, deposit, False, True),
    ("deposit and lease", deposit, lambda b: take(b, ALL), UUID, InsufficientFunds),
    ("overdraft and lease", lend, lambda b: take(b, HALF), InsufficientFunds, UUID),
    ("lease and overdraft", lambda b: take(b, HALF), lend, InsufficientFunds, leases.Granted),
    ("overdraft and overdraft", lend, lend, InsufficientFunds, leases.Granted),
]


@BOTH_ENDS
@pytest.mark.parametrize(
    ("first", "second", "after", "without"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
async def test_who_comes_second_waits_and_sees_what_the_first_did(
    book, first, second, after, without, commits
):
    wanted = after if commits else without
    was_waiting, outcome = await interleaved(book, first(book), alone(book, second(book)), commits=commits)
    assert was_waiting
    assert isinstance(outcome, wanted) if isinstance(wanted, type) else outcome == wanted, outcome
    posted, held = await state(book)
    assert 0 <= posted <= ALL.n + HALF.n
    assert held <= posted + ALL.n  # what an overdraft may add


@pytest.mark.parametrize("act", [extend, give_back, shrink])
async def test_the_reaper_passes_by_a_lease_that_somebody_works_on(book, act):
    was_waiting, outcome = await interleaved(book, act(book), alone(book, reap(book)), commits=True)
    assert (was_waiting, outcome) == (False, 0)
    await state(book)


@BOTH_ENDS
@pytest.mark.parametrize(
    ("first", "left"),
    [
        # What the charge of a quarter leaves posted; a lease gone takes it from the balance.
        (reap, 750_000), (shrink, 750_000), (give_back, 750_000), (lambda b: take(b, HALF), 750_000),
        (extend, 750_000), (deposit, 750_000),
    ],
    ids=["reap", "shrink", "return", "lease", "refill", "deposit"],
)  # fmt: skip
async def test_a_batch_waits_for_who_moves_its_lease_or_balance_and_takes_the_same(
    book, first, left, commits
):
    part = Slice(book.lease_id, book.buyer, 0, reserved_nano=250_000)
    charge = Charge(
        id=uuid7(),
        buyer=book.buyer,
        operator=book.operator,
        amount=Nano(250_000),
        fee=Nano(50_000),
        model="m",
    )
    async with Poster(book.engine, settle=lambda hold, cost: None) as poster:
        posting = poster.post(charge, Hold(part, 250_000))
        was_waiting, outcome = await interleaved(book, first(book), posting, commits=commits)
    assert (was_waiting, outcome) == (True, True)
    posted, held = await state(book)
    assert posted == left + (HALF.n if first is deposit and commits else 0)
    assert 0 <= held <= posted


async def test_who_returns_a_slice_to_lend_and_who_lends_without_one_never_wait_for_each_other(
    book, monkeypatch
):
    """Turn, lease, balance: with the turn after the others, PostgreSQL would end one of the two."""
    owner = LeaseKeeper(book.engine, worker="owner", overdraft=Overdraft())
    other = LeaseKeeper(book.engine, worker="other", overdraft=Overdraft())
    owner.release(await owner.authorise(book.buyer, Nano(200_000)))
    is_about_to_lend, has_shrunk = asyncio.Event(), asyncio.Event()
    shrink, lend = leases.shrink, overdrafts.lend

    async def shrink_and_wait(conn: AsyncConnection, lease_id: UUID, amount: Nano) -> bool:
        is_shrunk = await shrink(conn, lease_id, amount)
        has_shrunk.set()
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE :pid = ANY(pg_blocking_pids(pid))"
        pid = await pid_of(conn)
        async with asyncio.timeout(20), book.engine.connect() as watcher:
            while not await watcher.scalar(text(waiting), {"pid": pid}):
                await watcher.rollback()
                await asyncio.sleep(0.01)
        return is_shrunk

    async def lend_after(conn: AsyncConnection, buyer: int, worker: str, **terms: Any) -> leases.Granted:
        if worker == "other":
            is_about_to_lend.set()
            await has_shrunk.wait()
        return await lend(conn, buyer, worker, **terms)

    monkeypatch.setattr(leases, "shrink", shrink_and_wait)
    monkeypatch.setattr(overdrafts, "lend", lend_after)
    last = asyncio.create_task(other.authorise(book.buyer, Nano(2 * ALL.n), minimum=Nano(1)))
    async with asyncio.timeout(30):
        await is_about_to_lend.wait()
        asked = [owner.authorise(book.buyer, Nano(2 * ALL.n), minimum=Nano(1)), last]
        first, second = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(first, Hold), first
    assert isinstance(second, InsufficientFunds), second
    owner.release(first)
    await owner.close()
    await state(book)
