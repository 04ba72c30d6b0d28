"""Running buyers' own clients as they are, each in a process of its own, against a gateway."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from gateway_parts import RunningGateway

ROOT = Path(__file__).parents[1]
CLIENTS = ROOT / "tests" / "clients"
QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LANGSMITH_TRACING": "false",
    "TIKTOKEN_CACHE_DIR": "/nonexistent",
}  # fmt: skip
"""They would otherwise ask the internet for prices and tokenizers."""


def node_js() -> list[str]:
    """Node's official client."""
    found = shutil.which("node")
    if found is None or not (ROOT / "node_modules" / "openai").exists():
        pytest.fail("Node and its openai package are part of `make setup`")
    return [found, str(CLIENTS / "openai_client.mjs")]


def langchain() -> list[str]:
    return [sys.executable, str(CLIENTS / "langchain_client.py")]


def litellm() -> list[str]:
    return [sys.executable, str(CLIENTS / "litellm_client.py")]


async def facts_of(client: list[str], gateway: RunningGateway, model: str) -> dict[str, Any]:
    """Let a client ask for `model`; gives what it found."""
    process = await asyncio.create_subprocess_exec(
        *client, f"{gateway.url}/v1", gateway.key, model,
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


def assert_refused(facts: dict[str, Any]) -> None:
    """The client knows what a model that does not exist is."""
    name, status = facts["refused"][:2]
    assert (name.removeprefix("OpenAIModel"), status) == ("NotFoundError", 404)  # LangChain has a subclass
