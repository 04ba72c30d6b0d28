"""What enough providers say of a payout at finality.

Money leaves the books, or goes back to its owner, by what these answers say, and one provider that lies or
lags must not decide it alone: a batch called unpaid is paid again.  A single provider is believed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from chain.errors import ChainError, RpcUnavailable
from chain.ports import Landed
from chain.quorum import default_agreement

T = TypeVar("T")


async def is_spent(asked: Sequence[Awaitable[bool]]) -> bool:
    """Tell whether more than half of the providers call a fence spent.

    RpcUnavailable while too few answer, or too few agree because finality is just moving.
    """
    said = await _said(asked)
    needed = default_agreement(len(asked))
    if sum(said) >= needed:
        return True
    if len(said) - sum(said) >= needed:
        return False
    raise RpcUnavailable(f"{sum(said)} of {len(said)} providers call the fence spent, {needed} are needed")


async def landed(asked: Sequence[Awaitable[Landed | None]]) -> Landed | None:
    """Give the execution that more than half of the providers saw.

    None only if more than half saw none *and nobody saw one*; RpcUnavailable otherwise.
    """
    said = await _said(asked)
    needed = default_agreement(len(asked))
    most, votes = Counter(said).most_common(1)[0]
    if votes >= needed and (most is not None or votes == len(said)):
        return most
    seen = len(said) - said.count(None)
    raise RpcUnavailable(
        f"{seen} of {len(said)} providers saw the batch land, all must or {needed} the same way"
    )


async def _said(asked: Sequence[Awaitable[T]]) -> list[T]:
    if len(asked) == 1:
        return [await asked[0]]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, ChainError):
            raise answer
    failures = [answer for answer in answers if isinstance(answer, ChainError)]
    said = [answer for answer in answers if not isinstance(answer, BaseException)]
    if not said:
        raise failures[0]
    if len(said) < default_agreement(len(asked)):
        raise RpcUnavailable(f"{len(said)} of {len(asked)} providers answer: {failures[0]}")
    return said
