"""Spot checks with real engines: one node serves the model it sells, one another under its name."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr

from marketplace.platform.processes import free_port
from marketplace.platform.settings import ReferenceEngine
from marketplace.reputation.canaries import question
from marketplace.reputation.likelihood import Likelihood
from marketplace.reputation.reference import Reference
from marketplace.reputation.standing import NodeFacts, Policy, Severity, State, judge

ROOT = Path(__file__).parents[2]
ENGINE = Path(os.environ.get("TOLLWAY_ENGINE_DIR") or ROOT / ".engine")
SOLD, SWAPPED = ENGINE / "models" / "SmolLM2-135M-Instruct", ENGINE / "models" / "tiny"
NAME, KEY = "smollm2", "engine-key"
READY_S = 300

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


@asynccontextmanager
async def vllm(model: Path, log: Path) -> AsyncIterator[str]:
    """A real engine that calls `model` NAME; gives its address once it answers."""
    if not model.exists():
        pytest.fail("the engine is not built: python3 engine/build.py")
    port = free_port()
    argv = [
        str(ENGINE / "venv/bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY,
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8",
    ]  # fmt: skip
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
        async with aiohttp.ClientSession() as http:
            while time.monotonic() < until:
                assert process.poll() is None, log.read_text()[-2000:]
                try:
                    async with http.get(f"{url}/health") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientError:
                    await asyncio.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def answer(http: aiohttp.ClientSession, url: str, asked: dict[str, Any]) -> str:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with http.post(
        f"{url}/v1/chat/completions", json={"model": NAME, **asked}, headers=headers
    ) as found:
        body = await found.json()
        assert found.status == 200, body
        return str(body["choices"][0]["message"]["content"])


async def test_a59_real_engines_a_swapped_model_is_caught_and_the_sold_one_is_not(tmp_path: Path) -> None:
    """Twelve answers of each, with the settings canaries use; the cheat is held, the honest node is not."""
    chance, policy = random.Random(7), Policy()
    asked = [{**question(chance), "max_tokens": 64} for _ in range(12)]
    read: dict[str, list[Likelihood]] = {"honest": [], "swapped": []}
    async with (
        vllm(SOLD, tmp_path / "sold.log") as sold,
        vllm(SWAPPED, tmp_path / "swapped.log") as swapped,
        aiohttp.ClientSession() as http,
    ):
        reference = Reference(http, ReferenceEngine(url=sold, key=SecretStr(KEY)), NAME)
        for who, url in (("honest", sold), ("swapped", swapped)):
            for one in asked:
                text = await answer(http, url, one)
                read[who].append(await reference.likelihood(one["messages"], text))
    for who, found in read.items():
        print(who, sorted(one.surprise_milli for one in found))
    judged = {
        who: judge(
            [
                NodeFacts(
                    who, NAME, checks=len(found), suspicious=sum(one.is_suspicious(policy) for one in found)
                )
            ],
            policy,
        )
        for who, found in read.items()
    }
    assert judged["swapped"].state is State.HELD, read
    assert [finding.severity for finding in judged["swapped"].findings] == [Severity.STRIKE]
    assert judged["honest"].state is not State.HELD, read
    assert max(one.surprise_milli for one in read["swapped"]) < min(
        one.surprise_milli for one in read["honest"]
    )
