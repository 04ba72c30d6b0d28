"""One provider that lies or lags decides nothing about a payout."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any

import pytest

from chain.errors import ChainError, RpcUnavailable, WrongChain
from chain.payout_quorum import is_spent, landed
from chain.ports import Landed

PAID = Landed(tx="0x1", height=7, block_hash="0xb", is_success=True)
ELSEWHERE = Landed(tx="0x1", height=8, block_hash="0xc", is_success=True)
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
        ([True, True, False], True),
        ([True, False, False], False),
        ([True, True, DOWN], True),
        ([False, False, DOWN], False),
        ([True, False], None),
        ([True, False, DOWN], None),
        ([True, DOWN, DOWN], None),
        ([True, True, False, False], None),
    ],
)
async def test_a_fence_is_spent_when_more_than_half_say_so(answers: list[Any], expected: bool | None) -> None:
    if expected is None:
        with pytest.raises(RpcUnavailable):
            await is_spent(asked(answers))
    else:
        assert await is_spent(asked(answers)) is expected


@pytest.mark.parametrize(
    "answers",
    [
        [PAID],
        [PAID, PAID],
        [PAID, PAID, None],
        [PAID, PAID, DOWN],
        [None, PAID, PAID],
        [ELSEWHERE, PAID, PAID],
    ],
)
async def test_what_more_than_half_saw_has_landed(answers: list[Any]) -> None:
    assert await landed(asked(answers)) == PAID


@pytest.mark.parametrize("answers", [[None], [None, None], [None, None, DOWN], [None, None, None]])
async def test_what_nobody_saw_has_not_landed(answers: list[Any]) -> None:
    assert await landed(asked(answers)) is None


@pytest.mark.parametrize(
    "answers",
    [
        [None, PAID],
        [None, None, PAID],
        [None, None, None, PAID],
        [PAID, ELSEWHERE],
        [PAID, ELSEWHERE, None],
        [PAID, DOWN, DOWN],
        [None, DOWN, DOWN],
    ],
)
async def test_nothing_is_said_while_anybody_saw_it_land_and_too_few_agree(answers: list[Any]) -> None:
    with pytest.raises(RpcUnavailable):
        await landed(asked(answers))


async def test_of_providers_that_all_fail_the_first_failure_is_told() -> None:
    with pytest.raises(WrongChain):
        await landed(asked([WrongChain("another"), DOWN]))
    with pytest.raises(ChainError):
        await is_spent(asked([DOWN]))


async def test_a_fault_of_ours_is_not_a_providers() -> None:
    with pytest.raises(TypeError):
        await landed(asked([PAID, PAID, TypeError("ours")]))
