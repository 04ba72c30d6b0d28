"""Buyers' own clients, unchanged, against a running gateway: Node's openai, LangChain, LiteLLM.

Python's openai is used throughout `test_gateway_http.py` and `test_gateway_surface.py`.  All of them meet a
real engine in `tests/e2e/test_gateway_on_vllm.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from client_parts import assert_refused, facts_of, langchain, litellm, node_js
from gateway_parts import DOLLAR, MODEL, RunningGateway, StubNode, running_gateway, saying

from marketplace.platform.embedded_nats import EmbeddedNats


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
    assert_refused(facts)


async def _served(gateway: RunningGateway) -> int:
    await gateway.assert_proved()
    return sum(row["status"] == 200 for row in await gateway.usage())


async def test_nodes_official_client_works_unchanged(gateway: RunningGateway) -> None:
    facts = await facts_of(node_js(), gateway, MODEL)
    _assert_served(facts)
    assert facts["models"] == [facts["one"]] == [MODEL]
    assert facts["cost"] == facts["streamed_cost"]
    assert await _served(gateway) == 3


@pytest.mark.slow  # as above: fifteen seconds of imports
async def test_langchain_works_unchanged(gateway: RunningGateway) -> None:
    facts = await facts_of(langchain(), gateway, MODEL)
    _assert_served(facts)
    assert facts["batch"] == ["Hello there"] * 2
    assert facts["tokens"] == facts["streamed_tokens"]
    assert await _served(gateway) == 5


@pytest.mark.slow  # its import alone takes seconds
async def test_litellm_works_unchanged(gateway: RunningGateway) -> None:
    facts = await facts_of(litellm(), gateway, MODEL)
    _assert_served(facts)
    assert await _served(gateway) == 3
