"""What enough providers say of a payout at finality.

Money leaves the books, or goes back to its owner, by what these answers say, and one provider that lies or
lags must not decide it alone: a batch called unpaid is paid again.  A single provider is believed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from chain.errors import ChainError, RpcUnavailable
from chain.ports import Landed
from chain.quorum import default_agreement

T = TypeVar("T")

ANSWER_S_MAX: Final = 180
"""A provider may look through two weeks of logs (`evm.payouts.SEARCH_BLOCKS_MAX`), 140 questions."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What one provider sees of a batch."""

    is_past: bool
    """Its finality is past the batch's fence: only then it can know that nothing landed."""
    landed: Landed | None


async def is_spent(asked: Sequence[Awaitable[bool]]) -> bool:
    """Tell whether more than half of all providers call a fence spent.

    A false *no* costs only that the same bytes are sent again.  Raises what one of them failed with if none
    of them answers.
    """
    needed = default_agreement(len(asked))
    said, failures = await _collect(asked, lambda answers: sum(answers) >= needed)
    if not said:
        raise failures[0]
    return sum(said) >= needed


async def landed(asked: Sequence[Awaitable[Sight]], *, is_spent: bool) -> Landed | None:
    """Give the execution that more than half of the providers saw.

    None only if *every one* answers, saw none, and they stand on one side of the fence: who does not answer
    may be the one that saw it.  With `is_spent`, what the caller has seen before, that is the far side.
    RpcUnavailable otherwise; what a single one failed with if none answers.
    """
    needed = default_agreement(len(asked))

    def votes(said: Sequence[Sight]) -> tuple[Landed | None, int]:
        seen = Counter(sight.landed for sight in said if sight.landed is not None)
        return seen.most_common(1)[0] if seen else (None, 0)

    said, failures = await _collect(asked, lambda answers: votes(answers)[1] >= needed)
    most, count = votes(said)
    if count >= needed:
        return most
    if not said:
        raise failures[0]
    sides = {sight.is_past for sight in said}
    if not failures and most is None and (sides == {True} or (sides == {False} and not is_spent)):
        return None
    seen = sum(sight.landed is not None for sight in said)
    raise RpcUnavailable(
        f"{seen} of {len(asked)} providers saw the batch land; {needed} must have seen the same, or all "
        f"be past its fence and none ({len(failures)} do not answer)"
    )


async def sent(tried: Sequence[Awaitable[None]]) -> None:
    """Give bytes to all providers; whatever any of them takes is sent.  Raises the first one's error."""
    said = await asyncio.gather(*(_in_time(one) for one in tried))
    failures = [answer for answer in said if isinstance(answer, ChainError)]
    if len(failures) == len(said):
        raise failures[0]


async def _collect(
    asked: Sequence[Awaitable[T]], is_enough: Callable[[Sequence[T]], bool]
) -> tuple[list[T], list[ChainError]]:
    """Answers and failures, until there are enough answers or all are in."""
    tasks = [asyncio.ensure_future(_in_time(one)) for one in asked]
    waiting, said, failures = set(tasks), list[T](), list[ChainError]()
    try:
        while waiting and not is_enough(said):
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for answer in (task.result() for task in done):
                if isinstance(answer, ChainError):
                    failures.append(answer)
                else:
                    said.append(answer)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    return said, failures


async def _in_time(asked: Awaitable[T]) -> T | ChainError:
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            return await asked
    except ChainError as e:
        return e
    except TimeoutError:
        return RpcUnavailable(f"no answer within {ANSWER_S_MAX} s")
