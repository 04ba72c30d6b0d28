"""What a gateway tells whoever runs it: how long it took, stage by stage, and whether it can serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from gateway_parts import DOLLAR, HELLO, STREAM, RunningGateway, running_gateway, saying
from letters import prompt_tokens
from prometheus_client.parser import text_string_to_metric_families

from marketplace.platform.embedded_nats import EmbeddedNats

STAGES = ("admission", "charge")


@pytest.fixture
async def gateway(
    database_url: str, own_nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, own_nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


async def _metrics(gateway: RunningGateway) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels."""
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        text = (await http.get("/metrics")).text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_count_what_was_served_and_the_time_we_added(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["a", "b"], pause_s=0.3))
    before = await _metrics(gateway)
    for body in (HELLO, STREAM, {**HELLO, "model": "none"}):
        await gateway.chat(body)
    after = await _metrics(gateway)

    def grown(*sample: str) -> float:
        return after.get(sample, 0) - before.get(sample, 0)

    assert [grown("tollway_requests_total", status) for status in ("200", "404")] == [2, 1]
    assert [grown("tollway_added_seconds_count", stage) for stage in STAGES] == [2, 2]
    added = sum(grown("tollway_added_seconds_sum", stage) for stage in STAGES)
    assert 0 < added < 0.6 < grown("tollway_request_seconds_sum")  # the node's own time is not ours
    assert grown("tollway_tokens_total", "in") == 2 * prompt_tokens("Hi")
    assert grown("tollway_tokens_total", "out") == 4
    billed = sum(row["cost_nano"] for row in await gateway.usage())
    assert grown("tollway_charged_nano_total") == billed
    assert after["tollway_requests_in_flight",] == 0


async def test_readiness_names_what_is_missing_and_comes_back(
    gateway: RunningGateway, own_nats_server: EmbeddedNats
) -> None:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=10) as http:

        async def until(status: int) -> httpx.Response:
            async with asyncio.timeout(20):
                while (answer := await http.get("/readyz")).status_code != status:
                    await asyncio.sleep(0.1)
            return answer

        assert (await until(200)).json() == {"ready": True, "reasons": []}
        own_nats_server.stop()
        assert (await until(503)).json() == {"ready": False, "reasons": ["no connection to NATS"]}
        assert (await http.get("/healthz")).status_code == 200  # alive: restarting it would help nobody
        own_nats_server.start()
        await until(200)
