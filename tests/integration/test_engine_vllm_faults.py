"""Real vLLM: it, its gateway and its fabric killed in mid-answer; drained under load. Two engine starts."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import nats
import nats.errors
import pytest

from node_agent import protocol
from node_agent.engines import guard
from node_agent.journal import Entry, find_entries
from tests.integration.test_engine_vllm import NODE, ROOT, Gateway, Stack, ids_of, start_nats, started

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
    await asyncio.sleep(0.2)  # a fast machine writes all of it in a second
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


ASKING = """
import asyncio, sys
import nats
from node_agent import protocol

async def ask(url, node, request_id):
    client = await nats.connect(url)
    inbox = client.new_inbox()
    replies = await client.subscribe(inbox)
    said = b'[{"role": "user", "content": "x"}]'
    body = b'{"messages": %b, "max_tokens": 900, "n": 128, "ignore_eos": true}' % said
    request = protocol.Request(1, request_id, "tiny", body, sys.argv[4] == "stream", 60_000, credit=100_000)
    await client.publish(protocol.request_subject(node), protocol.encode(request), reply=inbox)
    await replies.next_msg(30)
    print("accepted", flush=True)
    await asyncio.sleep(600)

asyncio.run(ask(*sys.argv[1:4]))
"""


@contextlib.asynccontextmanager
async def asking(stack: Stack, request_id: str, how: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A gateway's process with a long answer under way: 128 choices of 900 tokens, 16 at once."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ASKING, stack.nats_url, NODE, request_id, how,
        cwd=ROOT, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"accepted\n"
        await asyncio.sleep(0.5)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def outcome_of(stack: Stack, request_id: str) -> Entry:
    async with asyncio.timeout(30):
        while (entry := find_entries(stack.folder, [request_id]).get(request_id)) is None:
            await asyncio.sleep(0.1)
    return entry


@pytest.mark.parametrize("how", ["stream", "whole"])
async def test_a_killed_gateway_leaves_vllm_idle(gateway: Gateway, stack: Stack, how: str) -> None:
    await gateway.status(seconds=400)
    async with asking(stack, f"killed-{how}", how) as process:
        process.kill()
    entry = await outcome_of(stack, f"killed-{how}")
    assert entry.outcome == protocol.FailureCode.CANCELLED
    assert (entry.completion_tokens or 0) < 128 * 900
    async with asyncio.timeout(20):
        while (await gateway.status()).models[0].running:
            pass


async def test_a_killed_fabric_leaves_vllm_idle_and_its_successor_is_served(stack: Stack) -> None:
    async with asking(stack, "cut", "stream"):
        stack.nats.kill()
        stack.nats.wait()
        assert (await outcome_of(stack, "cut")).outcome == protocol.FailureCode.CANCELLED
    stack.nats = start_nats(stack.port, stack.folder)
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(OSError, nats.errors.Error):
                client = await nats.connect(stack.nats_url, allow_reconnect=False)
                break
    gateway = Gateway(client)
    assert (await gateway.status(seconds=60)).models[0].running == 0
    frames = await gateway.chat(stream=True, max_tokens=8, temperature=0, ignore_eos=True)
    assert len(ids_of(frames)) == 8
    await client.close()


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
