"""A59, A60: an operator who serves another model than he sells, or writes more than anybody needs.

A real gateway, ledger and NATS; the reference engine speaks vLLM's routes and knows one language.
The same with real engines: tests/integration/test_reputation_vllm.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import httpx
import pytest
from gateway_parts import DOLLAR, HELLO, MODEL, RunningGateway, running_gateway, saying
from reputation_parts import FOREIGN, FakeReference, fake_reference
from sqlalchemy import text

from marketplace.accounts.people import create_key, create_person
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction
from marketplace.platform.embedded_nats import EmbeddedNats
from marketplace.reputation import facts
from marketplace.reputation.assess import assess
from marketplace.reputation.canaries import Canaries
from marketplace.reputation.checks import Checks
from marketplace.reputation.errors import CanaryRefused
from marketplace.reputation.reference import Reference
from marketplace.reputation.service import ReputationService
from marketplace.reputation.standing import Policy
from marketplace.settlement import people

HONEST = ["An honest ", "answer of the model's."]
SWAPPED = [FOREIGN * 30, FOREIGN * 10]
SECRET_WORDS = "canary-9f3b1c in the prompt"


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


@pytest.fixture
async def reference() -> AsyncIterator[FakeReference]:
    async with fake_reference() as running:
        yield running


@asynccontextmanager
async def spot_checks(gateway: RunningGateway, reference: FakeReference) -> AsyncIterator[ReputationService]:
    """Every answer of this gateway is read again."""
    process = gateway.process
    settings = process.settings.model_copy(
        update={"reference_engines": {MODEL: reference.settings}, "spot_check_permille": 1000}
    )
    service = ReputationService(settings, process.engine, process.clock, process.fabric)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def another_operator(gateway: RunningGateway) -> UUID:
    async with transaction(gateway.owner) as connection:
        return await create_person(connection, display_name="other", is_operator=True)


async def rows(gateway: RunningGateway) -> list[Any]:
    async with transaction(gateway.process.engine) as connection:
        found = await connection.execute(text("SELECT * FROM reputation_checks ORDER BY id"))
        return list(found.all())


async def checked(gateway: RunningGateway, times: int) -> list[Any]:
    async with asyncio.timeout(5):
        while len(found := await rows(gateway)) < times:
            await asyncio.sleep(0.02)
    return found


async def is_paid(gateway: RunningGateway, person: UUID) -> bool:
    async with transaction(gateway.process.engine) as connection:
        return person not in await people.bad_standings(connection, [person])


async def standing(gateway: RunningGateway, operator: UUID) -> dict[str, Any]:
    """What the operator reads."""
    secret = gateway.process.settings.secret
    async with transaction(gateway.owner) as connection:
        key = await create_key(connection, secret, operator, "own", {"account"})
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        headers = {"Authorization": f"Bearer {key}"}
        answer = await http.get("/api/operator/standing", headers=headers)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


class Later(SystemClock):
    """The machine's clock, when today's charges have settled."""

    def now(self) -> Any:
        return super().now() + timedelta(minutes=15)


async def test_a59_a_swapped_model_is_caught_held_and_asked_no_more(
    gateway: RunningGateway, reference: FakeReference
) -> None:
    cheat = gateway.operator
    swapped = await gateway.add_node(saying(SWAPPED))
    gateway.operator = honest = await another_operator(gateway)
    await gateway.add_node(saying(HONEST))
    async with spot_checks(gateway, reference):
        for at in range(16):
            body = {**HELLO, "messages": [{"role": "user", "content": SECRET_WORDS}], "stream": at % 2 == 0}
            assert (await gateway.chat(body)).status_code == 200
        found = await checked(gateway, 16)
        doubted = {row.node_id for row in found if row.is_suspicious}
        assert doubted == {swapped.node_id}
        assert {row.node_id for row in found if not row.is_suspicious} == {gateway.nodes[1].node_id}
        assert await assess(gateway.process.engine, gateway.process.clock) == [cheat]
        assert not await is_paid(gateway, cheat)
        assert await is_paid(gateway, honest)

        async with asyncio.timeout(5):
            while len(gateway.process.fabric.registry.views(MODEL)) > 1:
                await asyncio.sleep(0.05)
        before = len(swapped.requests)
        for _ in range(5):
            assert (await gateway.chat(HELLO)).status_code == 200
        assert len(swapped.requests) == before
    told = await standing(gateway, cheat)
    assert told["standing"] == "held"
    assert [(f["kind"], f["severity"]) for f in told["findings"]] == [("model", "strike")]
    assert swapped.node_id in told["reason"]
    assert (await standing(gateway, honest))["standing"] == "good"
    await assert_nowhere(gateway, SECRET_WORDS, FOREIGN * 10)
    await gateway.assert_proved()


async def assert_nowhere(gateway: RunningGateway, *words: str) -> None:
    """No table holds prompt or answer (the reference got them, and the reference is ours)."""
    async with transaction(gateway.owner) as connection:
        tables = (
            await connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"))
        ).all()
        for table in tables:
            for word in words:
                found = await connection.scalar(
                    text(f'SELECT count(*) FROM "{table}" AS t WHERE t::text LIKE :like'),
                    {"like": f"%{word}%"},
                )
                assert found == 0, (table, word)


async def test_a59_answers_the_buyer_shaped_are_no_evidence(
    gateway: RunningGateway, reference: FakeReference
) -> None:
    await gateway.add_node(saying(SWAPPED))
    shapes: list[dict[str, Any]] = [
        {"temperature": 1.4},
        {"n": 2},
        {"response_format": {"type": "json_object"}},
        {"logit_bias": {"5": 10}},
        {"frequency_penalty": 1},
    ]
    async with spot_checks(gateway, reference):
        for shape in shapes:
            await gateway.chat({**HELLO, **shape})
        await gateway.chat(HELLO)
        await checked(gateway, 1)
        await asyncio.sleep(0.1)
    assert len(await rows(gateway)) == 1
    assert len(reference.seen) == 2


async def test_a59_a_reference_that_fails_blames_nobody(
    gateway: RunningGateway, reference: FakeReference
) -> None:
    reference.status = 500
    await gateway.add_node(saying(SWAPPED))
    async with spot_checks(gateway, reference):
        assert (await gateway.chat(HELLO)).status_code == 200
        async with asyncio.timeout(5):
            while not reference.seen:
                await asyncio.sleep(0.02)
        reference.status = 200
        assert (await gateway.chat(HELLO)).status_code == 200
        assert len(await checked(gateway, 1)) == 1


async def test_a59_canaries_look_like_traffic_and_are_paid_for(
    gateway: RunningGateway, reference: FakeReference
) -> None:
    swapped = await gateway.add_node(saying(SWAPPED))
    await gateway.chat({**HELLO, "temperature": 0.7})
    process = gateway.process
    async with aiohttp.ClientSession() as http:
        engine = Reference(http, reference.settings, MODEL)
        checks = Checks(process.engine, process.clock, {MODEL: engine}, permille=0)
        canaries = Canaries(http, checks, api=gateway.url, key=gateway.key)
        assert await canaries.send([]) is None
        for _ in range(3):
            assert await canaries.send([(swapped.node_id, MODEL)]) == swapped.node_id
        async with transaction(gateway.owner) as connection:
            poor = await create_person(connection, display_name="nobody paid in")
            key = await create_key(connection, process.settings.secret, poor, "canaries", {"inference"})
        for each, status in ((key, 402), (key[:-1] + "!", 401)):  # said aloud: nobody would be looked at
            with pytest.raises(CanaryRefused, match=str(status)):
                await Canaries(http, checks, api=gateway.url, key=each).send([(swapped.node_id, MODEL)])
    found = await rows(gateway)
    assert [(row.kind, row.is_suspicious) for row in found] == [("canary", True)] * 3
    usual, *canary = swapped.requests
    assert {frozenset(_fields(r)) for r in canary} == {frozenset(_fields(usual))}
    assert [row["cost_nano"] > 0 for row in await gateway.usage()] == [True] * 4
    assert await assess(process.engine, process.clock) == [gateway.operator]


def _fields(request: Any) -> list[str]:
    return sorted(json.loads(request.body))


async def test_a60_filler_shows_against_what_others_write(gateway: RunningGateway) -> None:
    """Many times the words of everybody else, again and again, is a strike; the buyer saw and paid them."""
    padded, honest = gateway.operator, await another_operator(gateway)
    await gateway.add_node(saying(["ok " * 16]))
    gateway.operator = honest
    await gateway.add_node(saying(["ok"]))
    nodes = [node.node_id for node in gateway.nodes]
    async with transaction(gateway.process.engine) as connection:
        await facts.set_policy(
            connection, Policy(length_samples_min=20), actor="person:root", reason="a small market",
            now=gateway.process.clock.now(),
        )  # fmt: skip
    for node in nodes * 20:
        assert (await gateway.chat({**HELLO, "provider": {"only": [node]}})).status_code == 200
    assert await assess(gateway.process.engine, Later()) == [padded]
    told = await standing(gateway, padded)
    assert [(f["kind"], f["severity"]) for f in told["findings"]] == [("length", "strike")]
    assert told["nodes"][0]["mean_completion_tokens"] == 48
    assert (await standing(gateway, honest))["standing"] == "good"
    assert not await is_paid(gateway, padded)
