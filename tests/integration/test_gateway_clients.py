"""Buyers' own clients, unchanged, against a running gateway: Node's openai, LangChain, LiteLLM.

Python's openai is used throughout `test_gateway_http.py` and `test_gateway_surface.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway_parts import DOLLAR, MODEL, RunningGateway, StubNode, running_gateway, saying

from marketplace.platform.embedded_nats import EmbeddedNats

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "tests" / "clients"
QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LANGSMITH_TRACING": "false",
    "TIKTOKEN_CACHE_DIR": "/nonexistent",
}  # fmt: skip
"""They would otherwise ask the internet for prices and tokenizers."""


async def _facts(gateway: RunningGateway, *argv: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        *argv, f"{gateway.url}/v1", gateway.key, MODEL,
        cwd=ROOT, env={**os.environ, **QUIET}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(), 100)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, err.decode()[-2000:]
    facts: dict[str, Any] = json.loads(out.decode().splitlines()[-1])
    return facts


async def _speak(node: StubNode) -> None:
    """Keep the node in the gateway's mind for as long as slow imports take."""
    for seq in range(1000, 10**6):
        await node.say_status(seq)
        await asyncio.sleep(1)


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        speaking = asyncio.create_task(_speak(await running.add_node(saying(["Hello", " there"]))))
        yield running
        speaking.cancel()


def _assert_served(facts: dict[str, Any]) -> None:
    assert [facts[name] for name in ("whole", "streamed", "text")] == ["Hello there"] * 3
    name, status = facts["refused"][:2]
    assert (name.removeprefix("OpenAIModel"), status) == ("NotFoundError", 404)  # LangChain has a subclass


async def _served(gateway: RunningGateway) -> int:
    await gateway.assert_proved()
    return sum(row["status"] == 200 for row in await gateway.usage())


async def test_nodes_official_client_works_unchanged(gateway: RunningGateway) -> None:
    node_js = shutil.which("node")
    if node_js is None or not (ROOT / "node_modules" / "openai").exists():
        pytest.fail("Node and its openai package are part of `make setup`")
    facts = await _facts(gateway, node_js, str(CLIENTS / "openai_client.mjs"))
    _assert_served(facts)
    assert facts["models"] == [facts["one"]] == [MODEL]
    assert facts["cost"] == facts["streamed_cost"]
    assert await _served(gateway) == 3


@pytest.mark.slow  # as above: fifteen seconds of imports
async def test_langchain_works_unchanged(gateway: RunningGateway) -> None:
    facts = await _facts(gateway, sys.executable, str(CLIENTS / "langchain_client.py"))
    _assert_served(facts)
    assert facts["batch"] == ["Hello there"] * 2
    assert facts["tokens"] == facts["streamed_tokens"]
    assert await _served(gateway) == 5


@pytest.mark.slow  # its import alone takes seconds
async def test_litellm_works_unchanged(gateway: RunningGateway) -> None:
    facts = await _facts(gateway, sys.executable, str(CLIENTS / "litellm_client.py"))
    _assert_served(facts)
    assert await _served(gateway) == 3
