"""What people see of their usage: every row, one row, CSV, sums."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from gateway_parts import (
    DOLLAR,
    HELLO,
    MODEL,
    PRICE_IN,
    PRICE_OUT,
    STREAM,
    RunningGateway,
    StubNode,
    running_gateway,
    said,
    saying,
    sending,
    whole,
)
from letters import prompt_tokens
from sqlalchemy import text

from marketplace.accounts.people import create_key, create_person
from marketplace.fabric.node_ids import node_id_of
from marketplace.gateway.receipts_sealer import drop_old_attempts
from marketplace.gateway.receipts_writer import Attempt
from marketplace.gateway.usage_rollup import roll_up_keys
from marketplace.ledger.money import Nano, cost, dollars
from marketplace.ledger.rollups import roll_up
from marketplace.platform.database import transaction
from marketplace.platform.embedded_nats import EmbeddedNats
from marketplace.platform.ids import uuid7
from node_agent import protocol
from node_agent.protocol import Accepted, Delta, Failed, FailureCode


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


SEVEN = {
    "timestamp", "model", "prompt_tokens", "completion_tokens", "cost", "cost_nano", "prompt_cost_nano",
    "completion_cost_nano", "node", "latency_ms", "status", "balance_impact", "balance_impact_nano",
}  # fmt: skip


def _assert_complete(row: dict[str, Any], *, began: datetime, status: int, tokens_out: int) -> None:
    """R17's seven fields and R50's impact, consistent with one another."""
    assert row.keys() >= SEVEN
    assert began - timedelta(seconds=1) <= datetime.fromisoformat(row["timestamp"]) <= datetime.now(UTC)
    assert (row["model"], row["status"], row["completion_tokens"]) == (MODEL, status, tokens_out)
    tokens_in = prompt_tokens("Hi") if tokens_out else 0
    assert row["prompt_tokens"] == tokens_in
    charged = cost(tokens_in=tokens_in, tokens_out=tokens_out, price_in=PRICE_IN, price_out=PRICE_OUT)
    assert (row["cost_nano"], row["cost"]) == (charged.n, dollars(charged))
    assert row["prompt_cost_nano"] + row["completion_cost_nano"] == charged.n
    assert row["prompt_cost_nano"] == tokens_in * PRICE_IN // 1_000_000
    assert row["operator_nano"] + row["platform_nano"] == charged.n
    assert row["balance_impact_nano"] == -charged.n
    assert row["balance_impact"] == dollars(Nano(-charged.n))
    assert 0 <= row["latency_ms"] < 30_000


async def test_success_has_every_field(gateway: RunningGateway) -> None:
    began = datetime.now(UTC)
    node = await gateway.add_node(saying(["Hello", " there"]))
    await gateway.chat(HELLO)
    row = await gateway.only_row()
    _assert_complete(row, began=began, status=200, tokens_out=11)
    assert row["node_id"] == node.node_id
    assert row["operator"] == str(gateway.operator)
    assert (row["price_in"], row["price_out"]) == ("1.00", "2.00")


async def test_an_error_in_mid_stream_has_every_field(gateway: RunningGateway) -> None:
    async def dies(node: StubNode, request: protocol.Request, reply: str) -> None:
        await node.send(reply, Accepted(0))
        await node.send(reply, Delta(1, [said("abc")]))
        await node.send(reply, Failed(2, FailureCode.ENGINE_DOWN, "gone", is_retriable=True))

    began = datetime.now(UTC)
    node = await gateway.add_node(dies)
    await gateway.chat(STREAM)
    row = await gateway.only_row()
    _assert_complete(row, began=began, status=502, tokens_out=3)
    assert row["node_id"] == node.node_id


async def test_a_disconnect_has_every_field(gateway: RunningGateway) -> None:
    began = datetime.now(UTC)
    node = await gateway.add_node(saying(["a"] * 40, pause_s=0.05))
    async with (
        httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers) as http,
        http.stream("POST", "/v1/chat/completions", content=json.dumps(STREAM)) as answer,
    ):
        async for _ in answer.aiter_lines():
            break
    row = await gateway.only_row()
    assert 1 <= row["completion_tokens"] < 40
    _assert_complete(row, began=began, status=499, tokens_out=row["completion_tokens"])
    assert row["node_id"] == node.node_id


async def test_no_money_has_every_field(gateway: RunningGateway) -> None:
    began = datetime.now(UTC)
    await gateway.add_node(saying(["Hello"]))
    await gateway.leave(0)
    assert (await gateway.chat(HELLO)).status_code == 402
    row = await gateway.only_row()
    _assert_complete(row, began=began, status=402, tokens_out=0)
    assert (row["node"], row["operator"], row["finish_reason"]) == (None, None, "insufficient_funds")


async def test_one_request_is_shown_to_its_two_sides_only(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["Hello"], with_ids=False))
    receipt = (await gateway.chat(HELLO)).json()["usage"]["receipt_id"]
    mine = await gateway.get(f"/api/usage/{receipt}")
    assert (mine["counted_on"], mine["receipt"]) == ("text", f"/api/receipts/{receipt}")
    async with transaction(gateway.owner) as connection:
        secret = gateway.process.settings.secret
        operator = await create_key(connection, secret, gateway.operator, "o", {"account"})
        stranger_id = await create_person(connection, display_name="stranger")
        stranger = await create_key(connection, secret, stranger_id, "s", {"account"})
    async with httpx.AsyncClient(base_url=gateway.url) as http:

        async def ask(key: str, path: str) -> httpx.Response:
            return await http.get(path, headers={"Authorization": f"Bearer {key}"})

        served = (await ask(operator, f"/api/usage/{receipt}?role=operator")).json()
        assert served["balance_impact_nano"] == mine["operator_nano"]
        assert served["key_id"] is None  # an operator never learns of a buyer's keys
        for key, role in ((stranger, "buyer"), (stranger, "operator"), (operator, "buyer")):
            answer = await ask(key, f"/api/usage/{receipt}?role={role}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "request_not_found")
        assert (await ask(stranger, f"/api/usage/{uuid7()}")).status_code == 404
        assert (await ask(stranger, "/api/usage")).json() == {"data": [], "next_before": None}


async def _attempts(gateway: RunningGateway, request_id: str, count: int) -> list[dict[str, Any]]:
    """What is on record of a request's failed attempts, waited for."""
    async with asyncio.timeout(5):
        while len(found := (await gateway.get(f"/api/usage/{request_id}"))["failed_attempts"]) < count:
            await asyncio.sleep(0.02)
    assert len(found) == count
    return list(found)


async def test_v8_every_node_that_saw_a_prompt_is_on_record(gateway: RunningGateway) -> None:
    """Also those that did not answer, to the buyer alone; not one that nobody was connected for."""
    full = sending(Failed(0, FailureCode.OVERLOADED, "the operator's words", is_retriable=True))
    torn = sending(Accepted(0), Delta(1, [said("half")]), Delta(3, [said("lost")]))
    first = await gateway.add_node(full, price_out=1)
    answer = await gateway.chat({**HELLO, "provider": {"sort": "price"}})
    assert answer.json()["error"]["code"] == "nodes_failed"
    (attempt,) = await _attempts(gateway, answer.headers["x-tollway-request-id"], 1)
    assert attempt == {
        "attempt": 1, "node_id": first.node_id, "operator": str(gateway.operator), "model": MODEL,
        "reason": "failed: overloaded",
    }  # fmt: skip
    # Who takes over from a gateway that died asks under the same id, and may ask another node first.
    request_id, other = UUID(answer.headers["x-tollway-request-id"]), uuid7()
    gateway.process.receipts.failed(Attempt(request_id, 1, other, MODEL, "silent: accept"))
    both = await _attempts(gateway, str(request_id), 2)
    assert {attempt["node_id"] for attempt in both} == {first.node_id, node_id_of(other)}
    await first.connection.close()
    second = await gateway.add_node(torn, price_out=2)
    third = await gateway.add_node(saying(["fine"]))
    answer = await gateway.chat({**HELLO, "provider": {"order": [first.node_id, second.node_id]}})
    assert answer.headers["x-tollway-node"] == third.node_id
    request_id = answer.json()["usage"]["receipt_id"]
    (attempt,) = await _attempts(gateway, request_id, 1)
    assert (attempt["node_id"], attempt["reason"]) == (second.node_id, "broke the protocol")
    assert (await gateway.get(f"/api/usage/{request_id}"))["node_id"] == third.node_id
    async with transaction(gateway.owner) as connection:
        operator = await create_key(
            connection, gateway.process.settings.secret, gateway.operator, "o", {"account"}
        )
    async with httpx.AsyncClient(
        base_url=gateway.url, headers={"Authorization": f"Bearer {operator}"}
    ) as http:
        served = await http.get(f"/api/usage/{request_id}?role=operator")
    assert served.json()["failed_attempts"] == []


async def test_old_failed_attempts_are_forgotten_as_hashes_are(gateway: RunningGateway) -> None:
    engine, ages = gateway.process.engine, {uuid7(): days for days in (0, 399, 401)}
    async with transaction(gateway.owner) as connection:
        for identity, days in ages.items():
            await connection.execute(
                text(
                    "INSERT INTO failed_attempts (id, attempt, node, model, reason, at) "
                    "VALUES (:id, 1, :id, 'm', 'r', now() - :days * INTERVAL '1 day')"
                ),
                {"id": identity, "days": days},
            )
    assert await drop_old_attempts(engine) == 1
    async with engine.connect() as connection:
        left = await connection.scalars(text("SELECT id FROM failed_attempts"))
    assert {*left} == {identity for identity, days in ages.items() if days < 400}


async def test_pages_filters_and_csv_agree(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await gateway.add_node(whole(said("abc", finish="stop")))
    for _ in range(5):
        await gateway.chat(HELLO)
    await gateway.chat({**HELLO, "model": "=cmd|' /C calc'!A0"})
    everything = await gateway.usage()
    assert len(everything) == 6
    walked: list[dict[str, Any]] = []
    page: dict[str, Any] = {"next_before": None}
    while True:
        before = f"&before={page['next_before']}" if page["next_before"] else ""
        page = await gateway.get(f"/api/usage?limit=2{before}")
        walked += page["data"]
        if page["next_before"] is None:
            break
    assert walked == everything
    served = (await gateway.get(f"/api/usage?node={everything[-1]['node']}&status=200&model={MODEL}"))["data"]
    assert len(served) == 5
    assert {row["node_id"] for row in served} == {node.node_id}
    assert (await gateway.get("/api/usage?until=2026-01-01T00:00:00Z"))["data"] == []

    monkeypatch.setattr("marketplace.ledger.usage.PAGE_ROWS_MAX", 4)  # so that a page's seam is crossed
    async with httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers) as http:
        answer = await http.get("/api/usage?format=csv&limit=1")
        assert answer.headers["content-type"].startswith("text/csv")
        naive = await http.get("/api/usage?since=2026-01-01T00:00:00")
        assert (naive.status_code, naive.json()["error"]["code"]) == (400, "invalid_request")
    lines = list(csv.DictReader(io.StringIO(answer.text)))
    assert [line["id"] for line in lines] == [row["id"] for row in everything]
    assert [line["cost_nano"] for line in lines] == [str(row["cost_nano"]) for row in everything]
    assert lines[0]["model"].startswith("'=")  # no spreadsheet runs what a buyer typed
    assert lines[-1]["balance_impact_nano"].startswith("-")


async def test_statistics_add_up_by_day_model_and_key(gateway: RunningGateway) -> None:
    await gateway.add_node(whole(said("abc", finish="stop")))
    async with transaction(gateway.owner) as connection:
        other = await create_key(
            connection, gateway.process.settings.secret, gateway.person, "other", {"inference"}
        )
    for _ in range(3):
        await gateway.chat(HELLO)
    await gateway.process.keys.refresh()
    assert (await gateway.chat(HELLO, Authorization=f"Bearer {other}")).status_code == 200
    await gateway.chat({**HELLO, "model": "none"})
    rows = await gateway.usage()
    for _ in range(2):  # the second finds nothing new
        async with transaction(gateway.process.engine) as connection:
            await roll_up(connection)
        await roll_up_keys(gateway.process.engine)
    found = await gateway.get("/api/stats")
    charged = sum(row["cost_nano"] for row in rows)
    expected = {
        "requests": 5, "failed": 1, "prompt_tokens": 4 * prompt_tokens("Hi"), "completion_tokens": 12,
        "cost": dollars(Nano(charged)), "cost_nano": charged,
    }  # fmt: skip
    assert found["totals"] == expected
    assert found["by_day"] == [{**expected, "day": datetime.now(UTC).date().isoformat()}]
    assert {(each["model"], each["requests"], each["failed"]) for each in found["by_model"]} == {
        (MODEL, 4, 0), ("none", 1, 1),
    }  # fmt: skip
    assert [(each["requests"], each["failed"]) for each in found["by_key"]] == [(4, 1), (1, 0)]
    assert sum(each["cost_nano"] for each in found["by_key"]) == charged
    assert (await gateway.get("/api/stats?first=2026-01-01&last=2026-01-31"))["by_day"] == []
    async with httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers) as http:
        for query in ("first=2026-02-01&last=2026-01-01", "first=2020-01-01&last=2026-01-01"):
            assert (await http.get(f"/api/stats?{query}")).status_code == 400
