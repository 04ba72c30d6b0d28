"""One provider that lies or lags decides nothing about a payout."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

import pytest

from chain import payout_quorum
from chain.errors import ChainError, RpcUnavailable, UnknownResult, WrongChain
from chain.payout_quorum import Sight, is_spent, landed, sent
from chain.ports import Landed

PAID = Sight(True, Landed(tx="0x1", height=7, block_hash="0xb", is_success=True))
ELSEWHERE = Sight(True, Landed(tx="0x1", height=8, block_hash="0xc", is_success=True))
NOTHING = Sight(True, None)
BEHIND = Sight(False, None)
DOWN = RpcUnavailable("down")


def asked(answers: Sequence[Any]) -> list[Awaitable[Any]]:
    async def say(answer: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return [say(answer) for answer in answers]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([True], True),
        ([False], False),
        ([True, True, False], True),
        ([True, False, False], False),
        ([True, True, DOWN], True),
        ([True, False], False),
        ([True, False, DOWN], False),
        ([True, DOWN, DOWN], False),
        ([True, True, False, False], False),
    ],
)
async def test_a_fence_is_spent_when_more_than_half_of_all_say_so(answers: list[Any], expected: bool) -> None:
    assert await is_spent(asked(answers)) is expected


@pytest.mark.parametrize(
    "answers",
    [
        [PAID],
        [PAID, PAID],
        [PAID, PAID, NOTHING],
        [PAID, PAID, DOWN],
        [BEHIND, PAID, PAID],
        [ELSEWHERE, PAID, PAID],
    ],
)
async def test_what_more_than_half_saw_has_landed(answers: list[Any]) -> None:
    assert await landed(asked(answers), is_spent=False) == PAID.landed


@pytest.mark.parametrize(
    "answers", [[NOTHING], [BEHIND], [NOTHING, NOTHING], [NOTHING] * 3, [BEHIND, BEHIND, BEHIND]]
)
async def test_what_all_looked_for_and_nobody_saw_has_not_landed(answers: list[Any]) -> None:
    assert await landed(asked(answers), is_spent=False) is None


@pytest.mark.parametrize(
    "answers",
    [
        [NOTHING, PAID],
        [NOTHING, NOTHING, PAID],
        [NOTHING, NOTHING, NOTHING, PAID],
        [PAID, ELSEWHERE],
        [PAID, ELSEWHERE, NOTHING],
        [PAID, DOWN, DOWN],
        [NOTHING, DOWN, DOWN],
        [NOTHING, NOTHING, DOWN],  # who is down may be the one that saw it
        [NOTHING, NOTHING, BEHIND],  # who is behind cannot know
    ],
)
async def test_nothing_is_said_while_anybody_may_have_seen_it_land(answers: list[Any]) -> None:
    with pytest.raises(RpcUnavailable):
        await landed(asked(answers), is_spent=False)


async def test_who_shows_a_spent_fence_unspent_knows_nothing() -> None:
    with pytest.raises(RpcUnavailable):
        await landed(asked([BEHIND]), is_spent=True)
    assert await landed(asked([NOTHING]), is_spent=True) is None


async def test_of_providers_that_all_fail_a_failure_is_told() -> None:
    with pytest.raises(WrongChain):
        await landed(asked([WrongChain("another")]), is_spent=False)
    with pytest.raises(ChainError):
        await is_spent(asked([DOWN, DOWN]))


async def test_a_fault_of_ours_is_not_a_providers() -> None:
    with pytest.raises(TypeError):
        await landed(asked([TypeError("ours"), PAID, PAID]), is_spent=False)


async def test_one_that_never_answers_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never() -> Any:
        await asyncio.sleep(3600)

    async with asyncio.timeout(5):
        assert await landed([never(), *asked([PAID, PAID])], is_spent=False) == PAID.landed
        assert await is_spent([never(), *asked([True, True])])
        monkeypatch.setattr(payout_quorum, "ANSWER_S_MAX", 0.05)
        with pytest.raises(RpcUnavailable):
            await landed([never(), *asked([NOTHING, NOTHING])], is_spent=False)


async def test_what_any_provider_takes_is_sent() -> None:
    await sent(asked([UnknownResult("the first"), None, DOWN]))
    with pytest.raises(UnknownResult, match="the first"):
        await sent(asked([UnknownResult("the first"), DOWN]))
