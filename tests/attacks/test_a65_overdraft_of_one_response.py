"""A65, R12 literally: a balance ends below zero by at most the cost of one response, however many run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from gateway_parts import HELLO, PRICE_IN, PRICE_OUT, RunningGateway, running_gateway, saying
from letters import prompt_tokens

from marketplace.ledger.accounts import buyer, read_balance
from marketplace.ledger.money import cost
from marketplace.platform.embedded_nats import EmbeddedNats

PRICE = cost(tokens_in=prompt_tokens("Hi"), tokens_out=40, price_in=PRICE_IN, price_out=PRICE_OUT).n
ASKING = {**HELLO, "max_tokens": 40}


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.add_node(saying(["x" * 40]))
        yield running


async def available(gateway: RunningGateway) -> int:
    async with gateway.owner.connect() as connection:
        account = await read_balance(connection, buyer(str(gateway.person)))
    assert account is not None
    return account.available.n


async def ask(gateway: RunningGateway) -> httpx.Response:
    """As a client does, come back after a 503: on a busy machine keys may not have been checked of late."""
    while True:
        answer = await gateway.chat(ASKING)
        if answer.status_code != 503:
            return answer
        await asyncio.sleep(0.2)


async def test_a65_the_last_response_completes_and_no_second_one_begins(gateway: RunningGateway) -> None:
    await gateway.fund(1_000_000)
    await gateway.leave(PRICE // 2)
    lowest = 0

    async def watch() -> None:
        nonlocal lowest
        while True:
            lowest = min(lowest, await available(gateway))
            await asyncio.sleep(0.02)

    assert (await gateway.get("/api/balance"))["available_nano"] == PRICE // 2
    watching = asyncio.create_task(watch())
    try:
        answers = await asyncio.gather(*(ask(gateway) for _ in range(30)))
    finally:
        watching.cancel()
    assert sorted(answer.status_code for answer in answers) == [200] + 29 * [402]
    served = [answer for answer in answers if answer.status_code == 200]
    assert served[0].json()["choices"][0]["message"]["content"] == "x" * 40  # whole, not cut to the balance
    assert "x-tollway-max-tokens" not in served[0].headers
    assert (await ask(gateway)).status_code == 402
    assert -PRICE < min(lowest, await available(gateway)) < 0
    await gateway.assert_proved()


async def test_a65_at_zero_nothing_is_lent(gateway: RunningGateway) -> None:
    await gateway.fund(1_000_000)
    await gateway.leave(0)
    assert (await ask(gateway)).status_code == 402
    assert await available(gateway) == 0
