"""Limits shared by processes: several `Allotments` over one database are to it what processes are."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.platform import allotments
from marketplace.platform.allotments import (
    MINUTE_MS,
    PART_MS,
    Allotments,
    AllotmentsUnavailable,
    Ceiling,
    Grant,
    Refused,
)
from marketplace.platform.own_session import OwnSession

PARALLEL = Ceiling("parallel", 64, 0)
HELD_MS = 4_000
"""How long what is held may go without a renewal: ten seconds in the product, and longer than a busy machine
keeps a test from going on."""


@asynccontextmanager
async def processes(engine: AsyncEngine, count: int) -> AsyncIterator[list[Allotments]]:
    running = [Allotments(engine, time.monotonic) for _ in range(count)]
    for one in running:
        await one.start()
    try:
        yield running
    finally:
        for one in running:
            await one.stop()


async def _units(engine: AsyncEngine, subject: str) -> int:
    async with engine.connect() as connection:
        query = text(
            "SELECT coalesce(sum(u), 0) FROM allotments, unnest(units) AS u WHERE subject = :subject"
        )
        return int(await connection.scalar(query, {"subject": subject}) or 0)


async def test_who_waited_for_a_slow_database_is_not_refused(engine: AsyncEngine) -> None:
    ticks = itertools.count(0.0, 2 * PART_MS / 1000)  # every look at the clock, a part's life has passed
    slow = Allotments(engine, lambda: next(ticks))
    await slow.start()
    try:
        assert isinstance(await slow.take("eve", Ceiling("requests", 60, MINUTE_MS)), Grant)
    finally:
        await slow.stop()


async def test_who_comes_while_the_database_is_asked_waits_for_the_next_answer(engine: AsyncEngine) -> None:
    ceiling = Ceiling("requests", 60, MINUTE_MS)
    async with processes(engine, 1) as (one,), engine.connect() as other:
        assert isinstance(await one.take("eve", ceiling), Grant)
        await other.execute(text("SELECT 1 FROM allotments WHERE subject = 'eve' FOR UPDATE"))
        takers = [asyncio.create_task(one.take("eve", ceiling)) for _ in range(8)]
        await asyncio.sleep(0.2)  # these are being asked for, and the answer waits for `other`
        takers += [asyncio.create_task(one.take("eve", ceiling)) for _ in range(40)]
        await asyncio.sleep(0.1)
        await other.rollback()
        answers = await asyncio.gather(*takers)
        assert [type(answer) for answer in answers] == [Grant] * 48


async def test_four_processes_let_exactly_the_ceiling_through(engine: AsyncEngine) -> None:
    ceiling = Ceiling("requests", 60, MINUTE_MS)
    async with processes(engine, 4) as running:
        answers = await asyncio.gather(*(running[at % 4].take("ann", ceiling) for at in range(200)))
        let_through = sum(isinstance(answer, Grant) for answer in answers)
        await asyncio.sleep(PART_MS / 1000 + 0.6)  # parts that lay unused are back
        for one in running:
            while isinstance(await one.take("ann", ceiling), Grant):
                let_through += 1
        assert let_through == 60
        refused = await running[0].take("ann", ceiling)
        assert isinstance(refused, Refused)
        assert 1 <= refused.wait_s <= 62
        assert isinstance(await running[1].take("bob", ceiling), Grant)  # to each his own


async def test_a_busy_subject_is_served_from_memory(engine: AsyncEngine) -> None:
    ceiling = Ceiling("requests", 100_000, MINUTE_MS)
    async with processes(engine, 1) as (one,):
        from_memory = 0
        for _ in range(300):
            if one.take_now("ann", ceiling) is not None:
                from_memory += 1
            else:
                await one.take("ann", ceiling)
            await asyncio.sleep(0.001)
        assert from_memory > 250


async def test_who_was_here_lately_does_not_wait_for_the_database(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allotments, "WARM_S", 3 * PART_MS / 1000)
    ceiling, scarce = Ceiling("requests", 60, MINUTE_MS), Ceiling("scarce", allotments.PARTS - 1, MINUTE_MS)
    async with processes(engine, 1) as (one,):
        assert isinstance(await one.take("ann", ceiling), Grant)
        assert isinstance(await one.take("ann", scarce), Grant)
        await asyncio.sleep(2 * PART_MS / 1000)  # the parts of then have ended
        assert one.take_now("ann", ceiling) is not None
        assert one.take_now("ann", scarce) is None  # one of seven may be what another process needs
        await asyncio.sleep(5 * PART_MS / 1000)
        # Looked at before he asks again: from then on the next unit is kept at hand once more.
        assert await _units(engine, "ann") == 3  # what was only kept at hand has gone back
        assert one.take_now("ann", ceiling) is None


async def test_a_window_frees_what_left_it_and_not_before(engine: AsyncEngine) -> None:
    ceiling = Ceiling("requests", 3, 600)
    async with processes(engine, 2) as running:
        begun = time.monotonic()
        times = []
        while len(times) < 7:
            if isinstance(await running[len(times) % 2].take("ann", ceiling), Grant):
                times.append(time.monotonic() - begun)
            await asyncio.sleep(0.02)
        for first, fourth in zip(times, times[3:], strict=False):
            assert fourth - first >= 0.6


async def test_what_is_given_back_can_be_taken_elsewhere(engine: AsyncEngine) -> None:
    ceiling = Ceiling("tokens", 1_000, MINUTE_MS)
    async with processes(engine, 2) as (one, other):
        grant = await one.take("ann", ceiling, 900)
        assert isinstance(grant, Grant)
        assert isinstance(await other.take("ann", ceiling, 200), Refused)
        partly = await other.take("ann", ceiling, 200, least=50)
        assert isinstance(partly, Grant)
        assert partly.units == 100
        one.give_back(grant, 850)
        await asyncio.sleep(PART_MS / 1000 + 0.6)
        assert isinstance(await other.take("ann", ceiling, 800), Grant)
    assert await _units(engine, "ann") == 950


async def test_what_is_held_is_limited_over_processes_and_comes_back(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marketplace.platform.allotments.LONG_PART_MS", HELD_MS)
    ceiling = Ceiling("parallel", 4, 0)
    async with processes(engine, 2) as (one, other):
        held = [await one.take("ann", ceiling) for _ in range(3)]
        assert all(isinstance(grant, Grant) for grant in held)
        last = await other.take("ann", ceiling)
        assert isinstance(last, Grant)
        assert isinstance(await one.take("ann", ceiling), Refused)
        await asyncio.sleep(HELD_MS / 1000 + 1)  # longer than a part lasts: both have renewed
        assert isinstance(await one.take("ann", ceiling), Refused)
        other.give_back(last, 1)
        killed = Allotments(engine, time.monotonic)  # takes one and is never heard of again
        await killed.start()
        async with asyncio.timeout(HELD_MS / 1000 + 1):  # what was given back is let go with the next renewal
            while not isinstance(await killed.take("ann", ceiling), Grant):
                await asyncio.sleep(0.1)
        for task in killed._tasks:
            task.cancel()
        await killed._session.close()
        assert isinstance(await other.take("ann", ceiling), Refused)
        await asyncio.sleep(HELD_MS / 1000 + 1)
        assert isinstance(await other.take("ann", ceiling), Grant)


async def _one_held_of_many(one: Allotments) -> Grant:
    """He held many at once just now, and what he does not hold any more is still at hand."""
    grants = [await one.take("ann", PARALLEL) for _ in range(40)]
    assert all(isinstance(grant, Grant) for grant in grants)
    for grant in grants[1:]:
        one.give_back(grant, 1)
    assert sum(part.left for part in _held(one).parts) >= 39
    return grants[0]


def _held(one: Allotments) -> allotments._Counter:
    return one._counters["ann", "parallel"]


async def _renewed(one: Allotments) -> None:
    async with asyncio.timeout(10):
        while _held(one).is_asked:
            await asyncio.sleep(0.005)


async def _all_there_are(one: Allotments) -> int:
    count = 0
    while isinstance(await one.take("ann", PARALLEL), Grant):
        count += 1
    return count


async def test_who_takes_while_what_is_held_is_renewed_takes_no_more_than_is_asked_for(
    engine: AsyncEngine,
) -> None:
    async with processes(engine, 2) as (one, other), engine.connect() as delaying:
        await _one_held_of_many(one)
        await delaying.execute(text("SELECT 1 FROM allotments WHERE subject = 'ann' FOR UPDATE"))
        one._want(_held(one))
        await asyncio.sleep(0.1)  # it is being asked for, and the answer waits for `delaying`
        while one.take_now("ann", PARALLEL) is not None:
            pass
        await delaying.rollback()
        await _renewed(one)
        taken = await _all_there_are(other)
        assert _held(one).held + taken == PARALLEL.units


@pytest.mark.parametrize("is_done", [False, True], ids=["not done", "done"])
async def test_a_renewal_without_an_answer_uses_nothing_twice_and_loses_nothing(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, is_done: bool
) -> None:
    monkeypatch.setattr("marketplace.platform.allotments.LONG_PART_MS", HELD_MS)
    async with processes(engine, 2) as (one, other):
        await _one_held_of_many(one)
        fetch = one._session.fetch

        async def broken(statement: str, *values: object) -> object:
            monkeypatch.setattr(one._session, "fetch", fetch)
            if is_done:
                await fetch(statement, *values)
            raise OSError("broken by the test")

        monkeypatch.setattr(one._session, "fetch", broken)
        one._want(_held(one))
        await _renewed(one)
        while one.take_now("ann", PARALLEL) is not None:
            pass
        assert _held(one).held + await _all_there_are(other) <= PARALLEL.units
        if is_done:  # what that asked for is counted until its time has passed
            await asyncio.sleep(HELD_MS / 1000 + 1)
        else:
            one._want(_held(one))
            await _renewed(one)
            await asyncio.sleep(allotments.KEEP_S)  # who was refused asks the database again after this
        await _all_there_are(other)
        await _all_there_are(one)
        assert _held(one).held + _held(other).held == PARALLEL.units


async def test_a_lowered_ceiling_counts_what_is_held(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marketplace.platform.allotments.LONG_PART_MS", HELD_MS)
    before, after = Ceiling("parallel", 6, 0), Ceiling("parallel", 4, 0)
    async with processes(engine, 3) as (one, two, third):
        mine = [await one.take("ann", before) for _ in range(3)]
        theirs = [await two.take("ann", before) for _ in range(3)]
        for process in (one, two):  # each hears of the new ceiling with the next request
            assert isinstance(await process.take("ann", after), Refused)
        await asyncio.sleep(HELD_MS / 1000 + 1)  # longer than a part lasts: both have renewed
        assert isinstance(await third.take("ann", after), Refused)
        for process, grant in [(one, mine[0]), (one, mine[1]), (one, mine[2]), (two, theirs[0])]:
            assert isinstance(grant, Grant)
            process.give_back(grant, 1)
        async with asyncio.timeout(HELD_MS / 1000 + 1):
            for _ in range(2):
                while not isinstance(await third.take("ann", after), Grant):
                    await asyncio.sleep(0.1)
        assert isinstance(await third.take("ann", after), Refused)


async def test_a_lowered_ceiling_holds_for_what_was_at_hand_before(engine: AsyncEngine) -> None:
    before, after = Ceiling("parallel", 64, 0), Ceiling("parallel", 4, 0)
    async with processes(engine, 3) as running:
        for process in running:
            grants = [await process.take("ann", before) for _ in range(8)]
            for grant in grants[1:]:
                assert isinstance(grant, Grant)
                process.give_back(grant, 1)
        assert all(sum(part.left for part in _held(process).parts) for process in running)
        held, until = 3, time.monotonic() + 3
        while time.monotonic() < until:
            for process in running:
                held += isinstance(await process.take("ann", after), Grant)
            await asyncio.sleep(0.05)
        assert held == 4


async def test_a_busy_buyer_comes_down_to_a_lowered_ceiling(engine: AsyncEngine) -> None:
    before, after = Ceiling("parallel", 16, 0), Ceiling("parallel", 8, 0)
    async with processes(engine, 2) as running:
        held = [(one, await one.take("ann", before)) for one in running for _ in range(7)]
        assert all(isinstance(grant, Grant) for _, grant in held)
        async with asyncio.timeout(HELD_MS / 1000 + 10):
            while len(held) > 8:
                process, grant = held.pop(0)
                assert isinstance(grant, Grant)
                process.give_back(grant, 1)
                taken = await process.take("ann", after)
                held += [(process, taken)] if isinstance(taken, Grant) else []
                await asyncio.sleep(0.02)
        for _ in range(200):  # and stays there
            if len(held) == 8:
                process, grant = held.pop(0)
                assert isinstance(grant, Grant)
                process.give_back(grant, 1)
            for process in running:
                taken = await process.take("ann", after)
                held += [(process, taken)] if isinstance(taken, Grant) else []
            assert len(held) <= 8
            await asyncio.sleep(0.02)


async def test_what_comes_back_while_the_database_is_asked_comes_under_a_lowered_ceiling_too(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eighty clients of one buyer, a database that takes its time, and a limit lowered under them."""
    ceiling, held, most, dice = Ceiling("parallel", 128, 0), 0, 0, random.Random(1)
    fetch = OwnSession.fetch

    async def slowly(session: OwnSession, statement: str, *values: object) -> object:
        await asyncio.sleep(0.025)
        answer = await fetch(session, statement, *values)
        await asyncio.sleep(0.025)
        return answer

    monkeypatch.setattr(OwnSession, "fetch", slowly)

    async def client(process: Allotments) -> None:
        nonlocal held
        while True:
            grant = await process.take("ann", ceiling)
            if isinstance(grant, Grant):
                held += 1
                await asyncio.sleep(0.05 + dice.random() / 10)
                held -= 1
                process.give_back(grant, 1)
            else:
                await asyncio.sleep(0.005)

    async with processes(engine, 2) as running:
        clients = [asyncio.create_task(client(running[at % 2])) for at in range(80)]
        await asyncio.sleep(1)
        ceiling = Ceiling("parallel", 50, 0)
        await asyncio.sleep(2)
        for _ in range(100):
            most = max(most, held)
            await asyncio.sleep(0.01)
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        assert 0 < most <= 50


async def test_what_nobody_holds_any_more_is_soon_anothers(engine: AsyncEngine) -> None:
    ceiling = Ceiling("parallel", 1, 0)
    async with processes(engine, 2) as (one, other):
        grant = await one.take("ann", ceiling)
        assert isinstance(grant, Grant)
        assert isinstance(await other.take("ann", ceiling), Refused)
        one.give_back(grant, 1)
        async with asyncio.timeout(3):  # a part lasts ten seconds
            while not isinstance(await other.take("ann", ceiling), Grant):
                await asyncio.sleep(0.05)


async def test_a_stopped_process_leaves_what_it_held_to_others(engine: AsyncEngine) -> None:
    ceiling = Ceiling("parallel", 2, 0)
    async with processes(engine, 1) as (other,):
        stopped = Allotments(engine, time.monotonic)
        await stopped.start()
        for _ in range(2):
            assert isinstance(await stopped.take("ann", ceiling), Grant)
        await stopped.stop()
        assert isinstance(await other.take("ann", ceiling), Grant)


@pytest.mark.parametrize("how", ["refused", "hangs"])
async def test_what_comes_back_while_the_database_cannot_be_reached_is_given_back_later(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    ceiling = Ceiling("spend", 1_000, 86_400_000)
    async with processes(engine, 1) as (one,):
        grant = await one.take("ann", ceiling, 900)
        assert isinstance(grant, Grant)
        one._counters["ann", "spend"].parts.clear()  # its part has ended
        await one._session.close()
        monkeypatch.setattr(OwnSession, "_connect", refused if how == "refused" else hangs)
        one.give_back(grant, 850)
        others = asyncio.create_task(ask_on(one))
        await asyncio.sleep(2.5 if how == "hangs" else 1)
        monkeypatch.undo()
        await asyncio.sleep(2.5 if how == "hangs" else 1)
        others.cancel()
        assert await _units(engine, "ann") == 50


async def ask_on(one: Allotments) -> None:
    """Other people's requests meanwhile."""
    for number in itertools.count():
        try:
            await one.take(f"bob-{number}", Ceiling("requests", 60, MINUTE_MS))
        except AllotmentsUnavailable:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)


async def hangs(_: OwnSession) -> None:
    await asyncio.sleep(3600)


async def refused(_: OwnSession) -> None:
    raise ConnectionRefusedError("broken by the test")


async def test_who_waits_for_one_to_be_held_loses_it_to_nobody_who_comes_later(engine: AsyncEngine) -> None:
    ceiling = Ceiling("parallel", allotments.PARTS, 0)
    async with processes(engine, 1) as (one,), engine.connect() as delaying:
        held = [await one.take("ann", ceiling) for _ in range(3)]
        while (more := one.take_now("ann", ceiling)) is not None:
            held.append(more)
        await delaying.execute(text("SELECT 1 FROM allotments WHERE subject = 'ann' FOR UPDATE"))
        first = asyncio.create_task(one.take("ann", ceiling))
        await asyncio.sleep(0)
        assert isinstance(held[0], Grant)
        one.give_back(held[0], 1)  # before it is asked for
        await asyncio.sleep(0.1)
        assert one.take_now("ann", ceiling) is None
        second = asyncio.create_task(one.take("ann", ceiling))
        await asyncio.sleep(0)
        await delaying.rollback()
        assert isinstance(await first, Grant)
        assert isinstance(await second, Grant)


async def test_a_lowered_ceiling_holds_at_once(engine: AsyncEngine) -> None:
    async with processes(engine, 1) as (one,):
        for _ in range(10):
            assert isinstance(await one.take("ann", Ceiling("requests", 60, MINUTE_MS)), Grant)
        await asyncio.sleep(PART_MS / 1000)
        assert isinstance(await one.take("ann", Ceiling("requests", 5, MINUTE_MS)), Refused)


async def test_without_the_database_nobody_is_let_through(engine: AsyncEngine) -> None:
    async with processes(engine, 1) as (one,):
        await one.take("ann", Ceiling("requests", 60, MINUTE_MS))
        async with engine.begin() as connection:
            await connection.execute(text("LOCK TABLE allotments IN ACCESS EXCLUSIVE MODE"))
            with pytest.raises(AllotmentsUnavailable):
                await one.take("bob", Ceiling("requests", 60, MINUTE_MS))
