"""Limits that hold over all processes together, without a round trip per request.

The database keeps, for each subject and rule, how many units it handed out lately; a process takes a *part*
of the ceiling (a few units, good for a second or ten) and lets requests through from memory.  What a busy
subject needs next is fetched before it runs out, all subjects in one statement; what a part does not use
goes back.  For who was here lately, the next request's units are kept at hand, so that he does not wait for
the database either.

The law: in no stretch of `window_ms` does anybody get more than the ceiling, over all processes, since a unit
counts from the moment it is handed out until a window after the last moment at which it can be used.  The
error is therefore on one side only: up to an eighth of the ceiling may lie unused in each other process while
its part lasts, a killed process's part counts as used until its window has passed, and a window is longer
than asked by the life of a part (at most 1 s on a minute, 10 s on a day) and a 120th of itself.

A window of 0 limits what is held at once (parallel requests): units are handed out for ten seconds and
renewed while they are held, so those of a killed process come back by themselves.  What is held is counted
whatever the ceiling is now: after it was lowered, nobody gets more until enough was given back.  (Two things
it does not survive: a database that is away for longer than a part lasts, and one that dies with the last
fraction of a second of its commits, which do not wait for the disk.)

AllotmentsUnavailable    the database had to be asked and gave no answer
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Final, NamedTuple

from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.platform.own_session import FAULTS, OwnSession

_log = logging.getLogger(__name__)

PART_MS: Final = 1_000
LONG_PART_MS: Final = 10_000
"""Where the window is longer than a minute, or units are held."""
MINUTE_MS: Final = 60_000
PARTS: Final = 8
"""A process takes at most an eighth of a ceiling beyond what already waits for it."""
KEEP_S: Final = 0.25
ASK_S_MAX: Final = 2.0
BATCH_MAX: Final = 500
IDLE_S: Final = 60.0
SWEEP_S: Final = 3_600.0
WARM_S: Final = 30.0
"""So long after its last request a subject's next one finds its units in memory."""
WARM_MAX: Final = 25
"""Fetched for that each time, every `KEEP_S`: enough for 50, at 2 % of a core of the database's."""

_TAKE: Final = """
    SELECT place, granted, remaining, mark, reset_ms
    FROM take_allotments($1, $2, $3, $4, $5, $6, $7, $8, $9) ORDER BY place"""
_SWEEP: Final = "DELETE FROM allotments WHERE touched_at < now() - INTERVAL '2 days'"


class AllotmentsUnavailable(Exception):
    """The database had to be asked and gave no answer."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """At most `units` in any `window_ms`; with a window of 0, at most `units` held at once."""

    rule: str
    units: int
    window_ms: int

    @property
    def life_ms(self) -> int:
        """How long a part of it may be used."""
        return PART_MS if 0 < self.window_ms <= MINUTE_MS else LONG_PART_MS


class Grant(NamedTuple):
    """Units taken; give back those that were not used."""

    counter: _Counter
    mark: int
    units: int


class Refused(NamedTuple):
    """Not enough is left; `wait_s` until there may be."""

    wait_s: int


@dataclass(slots=True)
class _Part:
    """Units in this process; `until` in seconds, monotonic."""

    mark: int
    left: int
    until: float
    given_up: int = 0
    """Of what is held at once: no longer used here, and counted as ours until the database answers."""


@dataclass(slots=True)
class _Waiter:
    units: int
    least: int
    future: asyncio.Future[Grant | Refused]


@dataclass(slots=True, eq=False)
class _Counter:
    """What this process knows of one subject's use of one rule."""

    subject: str
    ceiling: Ceiling
    parts: deque[_Part] = field(default_factory=deque)
    waiters: list[_Waiter] = field(default_factory=list)
    taken_since: int = 0
    """Units let through since the database was last asked: how much is needed next."""
    usual: int = 0
    """Units last asked for at once."""
    held: int = 0
    remaining: int = 0
    """Of the whole ceiling, not handed out to any process, when the database last said."""
    reset_at: float = 0.0
    refused_until: float = 0.0
    refused_units: int = 0
    is_over: bool = False
    """More is held over all processes than the ceiling allows now: nothing given back is used again."""
    is_asked: bool = False
    used_at: float = 0.0

    @property
    def is_held(self) -> bool:
        return self.ceiling.window_ms == 0

    def left(self) -> int:
        """How many units may still be had, as far as this process knows."""
        return self.remaining + sum(part.left for part in self.parts)


class _Asked(NamedTuple):
    counter: _Counter
    want: int
    least: int
    give_mark: int
    give_units: int
    waiters: int = 0
    """How many waiters are asked for, the first ones; who came later waits for the next answer."""
    is_return: bool = False
    ceiling: int = 0


class Allotments:
    """The parts of one process, from `start` to `stop`.  `monotonic` gives seconds."""

    def __init__(self, engine: AsyncEngine, monotonic: Callable[[], float]) -> None:
        self._session = OwnSession(engine)
        self._monotonic = monotonic
        self._counters: dict[tuple[str, str], _Counter] = {}
        self._wanted: set[_Counter] = set()
        self._returned: dict[tuple[_Counter, int], int] = {}
        self._wake = asyncio.Event()
        self._swept_at = monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._ask_on(), name="allotments"),
            asyncio.create_task(self._keep(), name="allotments-keep"),
        ]

    async def stop(self) -> None:
        """Give back what is not used."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for counter in self._counters.values():
            for part in counter.parts:
                part.until = 0.0
                if counter.is_held:
                    self._return(counter, part.mark, counter.held + part.left + part.given_up)
            counter.held = 0
            self._drop_expired(counter, self._monotonic())
        with contextlib.suppress(AllotmentsUnavailable):
            await self._ask([])
        await self._session.close()

    # ---- taking

    def take_now(self, subject: str, ceiling: Ceiling, units: int = 1) -> Grant | None:
        """Take from memory; None if the database has to be asked."""
        counter = self._counters.get((subject, ceiling.rule))
        if counter is None:
            counter = self._counters[(subject, ceiling.rule)] = _Counter(subject, ceiling)
        now = counter.used_at = self._monotonic()
        is_lowered = ceiling.units < counter.ceiling.units
        counter.ceiling, counter.usual = ceiling, units
        if is_lowered:
            self._lower(counter, now)
        grant = self._take_from_parts(counter, units, now)
        if (
            grant is not None
            and not counter.is_asked
            and counter.remaining > 0
            and not counter.is_held
            and sum(part.left for part in counter.parts) < counter.taken_since
        ):
            self._want(counter)  # busy: fetch what is needed next
        return grant

    async def take(
        self, subject: str, ceiling: Ceiling, units: int = 1, *, least: int | None = None
    ) -> Grant | Refused:
        """Take `units`, or as many as there are if those are at least `least`.

        Raises AllotmentsUnavailable where the database had to be asked and gave no answer.
        """
        grant = self.take_now(subject, ceiling, units)
        if grant is not None:
            return grant
        counter = self._counters[(subject, ceiling.rule)]
        least = units if least is None else least
        now = self._monotonic()
        if now < counter.refused_until and least >= counter.refused_units:
            return Refused(ceil(counter.reset_at - now))
        waiter = _Waiter(units, least, asyncio.get_running_loop().create_future())
        counter.waiters.append(waiter)
        self._want(counter)
        return await waiter.future

    def give_back(self, grant: Grant, units: int) -> None:
        """These units of a grant were not used (or are no longer held)."""
        if units <= 0:
            return
        counter = grant.counter
        if counter.is_held:
            counter.held -= units
            if counter.parts and counter.is_over:
                counter.parts[-1].given_up += units
            elif counter.parts:
                counter.parts[-1].left += units
            return
        now = self._monotonic()
        for part in counter.parts:
            if part.mark == grant.mark and part.until > now:
                part.left += units
                return
        self._return(counter, grant.mark, units)

    def left(self, subject: str, ceiling: Ceiling) -> tuple[int, int]:
        """Give (units left, seconds until more come back), as far as this process knows."""
        counter = self._counters.get((subject, ceiling.rule))
        if counter is None:
            return ceiling.units, ceil(ceiling.window_ms / 1000)
        wait_s = ceil(max(0.0, counter.reset_at - self._monotonic()))
        return max(0, min(counter.left(), ceiling.units)), max(1, wait_s)

    def _lower(self, counter: _Counter, now: float) -> None:
        """What was taken under the ceiling of before is not used any more."""
        if not counter.is_held:
            for part in counter.parts:
                part.until = now
            return
        for part in counter.parts:
            part.given_up, part.left = part.given_up + part.left, 0
        counter.is_over = True  # unless the database says otherwise
        if counter.parts and not counter.is_asked:
            self._want(counter)

    def _return(self, counter: _Counter, mark: int, units: int) -> None:
        if units > 0:
            self._returned[counter, mark] = self._returned.get((counter, mark), 0) + units

    def _take_from_parts(self, counter: _Counter, units: int, now: float) -> Grant | None:
        if counter.parts and counter.parts[0].until <= now:
            self._drop_expired(counter, now)
        for part in counter.parts:
            if part.left >= units and (not counter.is_held or counter.held + units <= counter.ceiling.units):
                part.left -= units
                counter.taken_since += units
                if counter.is_held:
                    counter.held += units
                return Grant(counter, part.mark, units)
        return None

    def _drop_expired(self, counter: _Counter, now: float) -> None:
        kept: deque[_Part] = deque()
        for part in counter.parts:
            if part.until > now:
                kept.append(part)
            elif not counter.is_held:
                self._return(counter, part.mark, part.left)
        counter.parts = kept

    # ---- asking the database

    def _want(self, counter: _Counter) -> None:
        counter.is_asked = True
        self._wanted.add(counter)
        self._wake.set()

    async def _ask_on(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            wanted = sorted(self._wanted, key=lambda counter: (counter.subject, counter.ceiling.rule))
            self._wanted.clear()
            for start in range(0, max(1, len(wanted)), BATCH_MAX):
                with contextlib.suppress(AllotmentsUnavailable):  # told to those who wait
                    await self._ask(wanted[start : start + BATCH_MAX])
            if self._monotonic() - self._swept_at >= SWEEP_S:
                await self._sweep()

    async def _sweep(self) -> None:
        self._swept_at = self._monotonic()
        try:
            async with asyncio.timeout(ASK_S_MAX):
                await self._session.fetch(_SWEEP)
        except FAULTS as e:
            _log.warning("old allotments stay for now: %s", type(e).__name__)

    async def _ask(self, wanted: Sequence[_Counter]) -> None:
        asked = [self._asked(counter) for counter in wanted]
        returned, self._returned = self._returned, {}
        asked += [
            _Asked(counter, 0, 0, mark, units, is_return=True) for (counter, mark), units in returned.items()
        ]
        if not asked:
            return
        # In one order over all processes: no deadlocks.  What comes back first can be taken again at once.
        asked.sort(key=lambda ask: (ask.counter.subject, ask.counter.ceiling.rule, not ask.is_return))
        began = self._monotonic()
        try:
            async with asyncio.timeout(ASK_S_MAX):
                rows = await self._session.fetch(_TAKE, *_arrays(asked))
        except BaseException as e:
            if not self._session.was_sent:  # given back twice, it would free what is others'
                for (counter, mark), units in returned.items():
                    self._return(counter, mark, units)
            if not isinstance(e, FAULTS):
                raise
            for ask in asked:
                self._fail(ask, AllotmentsUnavailable(type(e).__name__))
            raise AllotmentsUnavailable(type(e).__name__) from e
        for ask, row in zip(asked, rows, strict=True):
            if not ask.is_return:
                self._granted(ask, row["granted"], row["remaining"], row["mark"], row["reset_ms"], began)

    def _asked(self, counter: _Counter) -> _Asked:
        ceiling = counter.ceiling
        waiting, waiters = sum(waiter.units for waiter in counter.waiters), len(counter.waiters)
        least = min((waiter.least for waiter in counter.waiters), default=0)
        spare = min(max(counter.usual, 2 * counter.taken_since), ceiling.units // PARTS)
        counter.taken_since = 0
        if not counter.is_held:
            return _Asked(counter, max(waiting, spare), least, 0, 0, waiters)
        # What is held moves into the new part in the same statement, so nobody can take it in between.
        wanted, mark, units, least = max(waiting, spare), 0, 0, counter.held
        if counter.parts:
            part = counter.parts[0]
            # Until the answer no more is used than is asked for, less what those who wait are to get.  Not
            # undone by a fault, after which the database may have taken it back: the next ask gives it back.
            is_good = part.until > self._monotonic() and not counter.is_over
            kept = min(part.left, wanted - waiting) if is_good else 0
            part.given_up += part.left - kept
            part.left = kept
            mark, units = part.mark, counter.held + part.left + part.given_up
            least += kept
        want = counter.held + wanted
        return _Asked(counter, want, least, mark, units, waiters, ceiling=ceiling.units)

    def _granted(
        self, ask: _Asked, granted: int, remaining: int, mark: int, reset_ms: int, began: float
    ) -> None:
        counter = ask.counter
        counter.is_asked = False
        counter.remaining = max(0, remaining)
        counter.reset_at = began + reset_ms / 1000
        until = began + counter.ceiling.life_ms / 1000
        if counter.is_held:
            counter.is_over = remaining < 0
            if granted:
                spare = max(0, granted - counter.held)
                left, given_up = (0, spare) if counter.is_over else (spare, 0)
                counter.parts = deque([_Part(mark, left, until, given_up)])
            elif ask.give_units:
                counter.parts.clear()
        elif granted:
            counter.parts.append(_Part(mark, granted, until))
        now = self._monotonic()
        if counter.is_held and counter.ceiling.units < ask.ceiling:  # lowered meanwhile
            self._lower(counter, now)
        waiters, counter.waiters = counter.waiters, []
        for place, waiter in enumerate(waiters):
            if waiter.future.done():
                continue
            units = waiter.units
            if units > waiter.least:
                units = max(waiter.least, min(units, max((part.left for part in counter.parts), default=0)))
            # Who waits asked before `began`, and counts from then, however long the answer took.
            grant = self._take_from_parts(counter, units, began)
            if grant is None and place >= ask.waiters:  # came while the database was asked, not for him
                counter.waiters.append(waiter)
            elif grant is None:
                counter.refused_until, counter.refused_units = now + KEEP_S, waiter.least
                waiter.future.set_result(Refused(max(1, ceil(reset_ms / 1000))))
            else:
                waiter.future.set_result(grant)
        if counter.waiters:
            self._want(counter)

    def _fail(self, ask: _Asked, error: AllotmentsUnavailable) -> None:
        counter = ask.counter
        counter.is_asked = False
        told, counter.waiters = counter.waiters[: ask.waiters], counter.waiters[ask.waiters :]
        for waiter in told:
            if not waiter.future.done():
                waiter.future.set_exception(error)
        if counter.waiters:
            self._want(counter)

    # ---- keeping

    async def _keep(self) -> None:
        """Have given back what expired, have renewed what is held, forget who has gone."""
        while True:
            await asyncio.sleep(KEEP_S)
            now = self._monotonic()
            warm = 0
            for key, counter in list(self._counters.items()):
                self._keep_one(key, counter, now)
                if warm < WARM_MAX and self._cools(counter, now):
                    warm += 1
                    self._want(counter)
            if self._returned or now - self._swept_at >= SWEEP_S:
                self._wake.set()

    def _keep_one(self, key: tuple[str, str], counter: _Counter, now: float) -> None:
        if counter.is_held and not counter.is_asked and not counter.waiters:
            self._give_up_idle(counter)
        if counter.is_held and counter.held:
            if not counter.is_asked and (
                not counter.parts or counter.parts[0].until - now < counter.ceiling.life_ms / 1500
            ):
                self._want(counter)
            return
        self._drop_expired(counter, now)
        if now - counter.used_at > IDLE_S and not counter.parts and not counter.waiters and not counter.held:
            del self._counters[key]

    def _give_up_idle(self, counter: _Counter) -> None:
        """Let others have what is not used here; while something is held, more of it may be needed soon."""
        for part in counter.parts:
            spare = counter.ceiling.units // PARTS
            idle = 0 if counter.held else max(0, part.left - spare)
            part.left -= idle
            self._return(counter, part.mark, idle + part.given_up)
            part.given_up = 0

    def _cools(self, counter: _Counter, now: float) -> bool:
        """Its next request would have to wait for the database, and is likely to come."""
        return (
            not counter.is_held
            and not counter.is_asked
            and now - counter.used_at <= WARM_S
            and 0 < counter.usual <= min(counter.ceiling.units // PARTS, counter.remaining)
            and all(part.left < counter.usual or part.until - now < 2 * KEEP_S for part in counter.parts)
        )


def _arrays(asked: Sequence[_Asked]) -> list[list[object]]:
    """Give `take_allotments` its arguments, in their order."""
    return [
        [ask.counter.subject for ask in asked],
        [ask.counter.ceiling.rule for ask in asked],
        [ask.counter.ceiling.units for ask in asked],
        [ask.counter.ceiling.window_ms for ask in asked],
        [ask.counter.ceiling.life_ms for ask in asked],
        [ask.want for ask in asked],
        [ask.least for ask in asked],
        [ask.give_mark for ask in asked],
        [ask.give_units for ask in asked],
    ]
