"""The agent ends what it began, also where a library loses the first request to stop."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from node_agent import service


async def test_a_task_that_loses_a_cancellation_is_ended_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "CANCEL_AGAIN_SECONDS", 0.01)

    async def connect_for_ever() -> None:
        with contextlib.suppress(asyncio.CancelledError):  # as Python 3.11's wait_for may
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    task = asyncio.create_task(connect_for_ever())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await service.end_task(task)
    assert task.cancelled()


async def test_a_task_that_has_failed_is_only_looked_at() -> None:
    async def fail() -> None:
        raise OSError

    task = asyncio.create_task(fail())
    await asyncio.wait({task})
    await service.end_task(task)
    assert isinstance(task.exception(), OSError)
