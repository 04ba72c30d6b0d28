"""The whole operator's side with the real vLLM: `tollway-node run` spawns it for the tiny model.

One engine start (about 50 s) serves every test here; the last one kills the agent.
"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import nats
import psutil
import pytest
from tokenizers import Tokenizer

from node_agent import protocol
from node_agent.cli import app
from node_agent.config import write_first_config
from node_agent.identity import create_identity

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
ENGINE = Path(os.environ.get("TOLLWAY_ENGINE_DIR") or ROOT / ".engine")
TINY = ENGINE / "models" / "tiny"
NODE = protocol.parse_node_id("vllm-test")
CANARY = "canary_vllm_2d7f"


class Stack:
    def __init__(self, port: int, agent: "subprocess.Popen[bytes]", folder: Path) -> None:
        self.port = port
        self.nats_url = f"nats://127.0.0.1:{port}"
        self.nats = start_nats(port, folder)
        self.agent = agent
        self.folder = folder


def start_nats(port: int, folder: Path) -> "subprocess.Popen[bytes]":
    binary = Path(sys.executable).with_name("nats-server")
    return subprocess.Popen([binary, "-a", "127.0.0.1", "-p", str(port), "-l", folder / "nats.log"])


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with started(tmp_path_factory.mktemp("node")) as made:
        yield made


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Stack]:
    """A NATS server and `tollway-node run` with a spawned vLLM, ended together."""
    from typer.testing import CliRunner

    if not TINY.exists():
        pytest.fail("the engine is not built: python3 engine/build.py")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    create_identity(folder)
    enrolled = protocol.EnrollReply(NODE, f"nats://127.0.0.1:{port}")
    write_first_config(folder, enrolled, api="http://127.0.0.1:1", name="test")
    added = CliRunner().invoke(
        app,
        [
            *("models", "add", "tiny", "--recipe", "vllm-cpu", "--model-path", str(TINY)),
            *("--python", str(ENGINE / "venv/bin/python"), "--input", "1", "--output", "2"),
            *("--context", "1024", "--data-dir", str(folder)),
        ],
    )
    assert added.exit_code == 0, added.output
    with (folder / "agent.log").open("wb") as log:
        command = [sys.executable, "-m", "node_agent.cli", "run", "--data-dir", folder]
        agent = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    stack = Stack(port, agent, folder)
    yield stack
    agent.kill()
    agent.wait()
    stack.nats.terminate()
    stack.nats.wait()


class Gateway:
    """One request at a time, as the gateway sees it."""

    def __init__(self, client: nats.aio.client.Client) -> None:
        self.client = client

    async def status(self, *, is_ready: bool = True, seconds: float = 200) -> protocol.Status:
        subscription = await self.client.subscribe(protocol.status_subject(NODE))
        async with asyncio.timeout(seconds):
            while True:
                status = protocol.decode_status((await subscription.next_msg(seconds)).data)
                if status.models[0].is_ready == is_ready:
                    await subscription.unsubscribe()
                    return status

    async def chat(
        self, *, stream: bool, cancel_after: int = 1 << 30, **body: object
    ) -> list[protocol.Frame]:
        body = {"messages": [{"role": "user", "content": "def read(path): 🙂"}]} | body
        identity = os.urandom(8).hex()
        request = protocol.Request(
            1, identity, "tiny", msgspec.json.encode(body), stream, 60_000, credit=10_000
        )
        inbox = self.client.new_inbox()
        replies = await self.client.subscribe(inbox)
        await self.client.publish(protocol.request_subject(NODE), protocol.encode(request), reply=inbox)
        reader, frames = protocol.ReplyReader(request.credit), []
        while not reader.is_done:
            frames.append(reader.feed((await replies.next_msg(30)).data))
            if sum(isinstance(frame, protocol.Delta) for frame in frames) == cancel_after:
                cancel = protocol.encode(protocol.Cancel(identity))
                await self.client.publish(protocol.control_subject(NODE), cancel)
                await self.client.flush()  # else it waits behind the frames that are here already
                cancel_after = 0
        await replies.unsubscribe()
        return frames


@pytest.fixture
async def gateway(stack: Stack) -> Iterator[Gateway]:
    client = await nats.connect(stack.nats_url)
    yield Gateway(client)
    await client.close()


def ids_of(frames: list[protocol.Frame]) -> list[int]:
    deltas = [frame for frame in frames if isinstance(frame, protocol.Delta)]
    return [i for delta in deltas for choice in delta.choices for i in choice.token_ids or ()]


def text_of(frames: list[protocol.Frame]) -> str:
    deltas = [frame for frame in frames if isinstance(frame, protocol.Delta)]
    return "".join(choice.content or "" for delta in deltas for choice in delta.choices)


async def test_becomes_ready_and_streams_ids_that_spell_the_text(gateway: Gateway) -> None:
    status = await gateway.status()
    assert status.models[0].capacity == 16
    frames = await gateway.chat(stream=True, max_tokens=24, temperature=0, ignore_eos=True)
    assert isinstance(frames[0], protocol.Accepted)
    end = frames[-1]
    assert isinstance(end, protocol.End)
    assert end.completion_tokens == len(ids_of(frames)) == 24
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    spelled = tokenizer.decode(ids_of(frames), skip_special_tokens=True)
    assert spelled.rstrip("\ufffd") == text_of(frames).rstrip("\ufffd")
    prompt = "<|im_start|>user\ndef read(path): 🙂<|im_end|>\n<|im_start|>assistant\n"
    first = next(frame for frame in frames if isinstance(frame, protocol.Delta))
    assert first.prompt_token_ids == tokenizer.encode(prompt).ids
    assert end.prompt_tokens == len(first.prompt_token_ids)


async def test_a_stream_comes_in_parts(gateway: Gateway) -> None:
    """Long enough that not even a starved agent, which sends together what came together, gets it in one."""
    await gateway.status()
    frames = await gateway.chat(stream=True, max_tokens=800, temperature=0, ignore_eos=True)
    assert sum(isinstance(frame, protocol.Delta) for frame in frames) > 1


async def test_whole_answer_equals_the_streamed_one(gateway: Gateway) -> None:
    await gateway.status()
    asked = {"max_tokens": 16, "temperature": 0, "ignore_eos": True, "logprobs": True, "top_logprobs": 2}
    streamed = await gateway.chat(stream=True, **asked)
    whole = await gateway.chat(stream=False, **asked)
    assert len(whole) == 3
    assert (ids_of(whole), text_of(whole)) == (ids_of(streamed), text_of(streamed))
    (choice,) = whole[1].choices
    assert choice.finish_reason == "length"
    assert len(choice.logprobs) == 16
    assert len(choice.logprobs[0].top) == 2


async def test_engines_refusal_reaches_the_buyer(gateway: Gateway) -> None:
    await gateway.status()
    frames = await gateway.chat(stream=True, max_tokens=5000)
    assert frames[-1].code is protocol.FailureCode.BAD_REQUEST
    assert "1024" in frames[-1].message


async def test_cancel_aborts_in_vllm(gateway: Gateway, stack: Stack) -> None:
    await gateway.status()
    asked = {"max_tokens": 900, "n": 32, "ignore_eos": True}
    for _ in range(5):  # a starved agent sends together what came together, perhaps all of it at once
        frames = await gateway.chat(stream=True, cancel_after=1, **asked)
        if not isinstance(frames[-1], protocol.End):
            break
    assert frames[-1].code is protocol.FailureCode.CANCELLED
    assert len(ids_of(frames)) < 32 * 900
    until = time.monotonic() + 5
    while (await gateway.status()).models[0].running > 0:
        assert time.monotonic() < until, "vLLM still works on the cancelled request"


async def test_nothing_said_is_written_by_agent_or_vllm(gateway: Gateway, stack: Stack) -> None:
    await gateway.status()
    said = [{"role": "user", "content": f"def {CANARY}(): pass"}]
    await gateway.chat(stream=True, max_tokens=4, messages=said)
    await gateway.chat(stream=True, max_tokens=5000, messages=said)
    await gateway.chat(stream=True, max_tokens=4, messages=said, temperature="hot " + CANARY)
    written = {path.name: path.read_bytes() for path in stack.folder.rglob("*") if path.is_file()}
    assert {"tiny.log", "agent.log", "journal.jsonl"} <= set(written)
    assert [name for name, content in written.items() if CANARY.encode() in content] == []


async def test_killed_agent_leaves_no_engine_process(gateway: Gateway, stack: Stack) -> None:
    await gateway.status()
    leader = json.loads((stack.folder / "engines" / "tiny.pid").read_text())["pid"]
    family = [psutil.Process(leader), *psutil.Process(leader).children(recursive=True)]
    assert len(family) >= 3
    stack.agent.kill()
    until = time.monotonic() + 20
    while any(is_alive(process) for process in family):
        assert time.monotonic() < until, [process for process in family if is_alive(process)]
        await asyncio.sleep(0.2)


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
