"""The served OpenAPI, held to its word: every documented operation, a few examples each, the same every time.

No answer is a 500, and every answer that a schema describes has its shape; what `/v1` and `/api/keys` answer,
they document.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from gateway_parts import DOLLAR, RunningGateway, running_gateway, saying
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from marketplace.platform.embedded_nats import EmbeddedNats

EXAMPLES = 2
OURS = ("/v1/", "/api/keys")
LEFT_OUT = {"/api/auth/logout"}
"""It would end the session that the rest is asked with; it has tests of its own."""


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        await running.add_node(saying(["ok"]))
        yield running


def _try(operation: Any, url: str, headers: dict[str, str]) -> list[str]:
    """Ask one operation a few times; gives what is wrong, one line each."""
    wrong: list[str] = []

    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        answer = case.call(base_url=url, headers=headers, timeout=20)
        if answer.status_code == 500:
            wrong.append(f"{operation.label}: 500 for {case.as_curl_command()[:500]}")
            return
        checks: list[CheckFunction] = [response_schema_conformance]
        if operation.path.startswith(OURS):
            checks.append(status_code_conformance)
        try:
            case.validate_response(answer, checks=checks)
        except Exception as e:  # all of them are told together
            wrong.append(f"{operation.label} {answer.status_code}: {str(e)[:500]}")

    ask()
    return wrong


async def test_every_documented_operation_keeps_its_word(gateway: RunningGateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        described = (await http.get("/openapi.json")).json()
    schema = schemathesis.openapi.from_dict(described)
    wrong: list[str] = []
    asked = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path in LEFT_OUT:
            continue
        asked += 1
        wrong += await asyncio.to_thread(_try, operation, gateway.url, gateway.headers)
    assert asked > 30
    assert wrong == []
