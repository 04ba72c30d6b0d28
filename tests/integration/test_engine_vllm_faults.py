"""Real vLLM killed in mid-answer, and drained under load: one agent, two engine starts."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import nats
import pytest

from node_agent import protocol
from node_agent.engines import guard
from tests.integration.test_engine_vllm import Gateway, Stack, ids_of, started

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with started(tmp_path_factory.mktemp("node")) as made:
        yield made


@pytest.fixture
async def gateway(stack: Stack) -> AsyncIterator[Gateway]:
    client = await nats.connect(stack.nats_url)
    yield Gateway(client)
    await client.close()


def leader(folder: Path) -> int:
    return int(json.loads((folder / "engines" / "tiny.pid").read_text())["pid"])


async def test_killed_vllm_fails_its_requests_at_once_and_comes_back(gateway: Gateway, stack: Stack) -> None:
    await gateway.status()
    before = leader(stack.folder)
    running = [
        asyncio.create_task(gateway.chat(stream=True, max_tokens=900, temperature=0, ignore_eos=True))
        for _ in range(3)
    ]
    await asyncio.sleep(1.0)
    os.kill(before, signal.SIGKILL)
    async with asyncio.timeout(20):
        answers = await asyncio.gather(*running)
    for frames in answers:
        assert isinstance(frames[-1], protocol.Failed)
        assert frames[-1].code is protocol.FailureCode.ENGINE_DOWN
        assert frames[-1].is_retriable
        assert 0 < len(ids_of(frames)) < 900  # what was delivered stays delivered, and counted
    await gateway.status(is_ready=False)
    await gateway.status(is_ready=True, seconds=400)
    assert leader(stack.folder) != before
    frames = await gateway.chat(stream=True, max_tokens=8, temperature=0, ignore_eos=True)
    assert len(ids_of(frames)) == 8


async def test_drain_under_load_finishes_what_runs_and_leaves_nothing(gateway: Gateway, stack: Stack) -> None:
    await gateway.status(seconds=400)
    running = [
        asyncio.create_task(gateway.chat(stream=i % 2 == 0, max_tokens=200, temperature=0, ignore_eos=True))
        for i in range(8)
    ]
    await asyncio.sleep(0.5)
    engine = leader(stack.folder)
    os.kill(stack.agent.pid, signal.SIGTERM)
    answers = await asyncio.gather(*running)
    assert [len(ids_of(frames)) for frames in answers] == [200] * 8
    assert all(isinstance(frames[-1], protocol.End) for frames in answers)
    assert await asyncio.to_thread(stack.agent.wait, 60) == 0
    assert not guard.is_group_alive(engine)
