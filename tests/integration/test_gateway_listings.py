"""Statements as people see them, and listings read from a real streaming replica."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_parts import DOLLAR, HELLO, RunningGateway, running_gateway, said, whole
from pydantic import SecretStr
from sqlalchemy import make_url, text
from typer.testing import CliRunner

from marketplace.accounts.people import create_key
from marketplace.cli import app
from marketplace.platform.database import connect, transaction
from marketplace.platform.embedded_nats import EmbeddedNats
from marketplace.platform.embedded_postgres import EmbeddedPostgres
from marketplace.platform.processes import unprivileged_owner

REPLICA = "TOLLWAY_DATABASE_REPLICA_URL"


@pytest.fixture
def standby(postgres_url: str) -> Iterator[tuple[EmbeddedPostgres, str]]:
    """A replica of the run's own server, made as people make one; and its URL."""
    if "TOLLWAY_TEST_DATABASE_URL" in os.environ:
        pytest.skip("a server of somebody else's is not copied")
    primary = make_url(postgres_url)
    with tempfile.TemporaryDirectory(prefix="tollway-replica-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        server = EmbeddedPostgres(folder / "pg", {"fsync": "off"})
        source = f"host={primary.query['host']} user={primary.username} password={primary.password}"
        copy = [
            server.binaries / "pg_basebackup",
            "-d",
            source,
            "-D",
            folder / "pg" / "data",
            "-R",
            "-c",
            "fast",
        ]
        subprocess.run(copy, check=True)
        if owner := unprivileged_owner():
            for path in (folder / "pg").rglob("*"):
                shutil.chown(path, owner.uid, owner.gid)
        server.start()
        try:
            yield (
                server,
                primary.update_query_dict({"host": str(folder / "pg" / "socket")}).render_as_string(False),
            )
        finally:
            server.stop()


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        await running.add_node(whole(said("abc", finish="stop")))
        yield running


def moved(page: dict[str, Any]) -> list[tuple[str, int, int]]:
    return [(line["kind"], line["amount_nano"], line["balance_nano"]) for line in page["data"]]


async def test_a_statement_lists_what_moved_the_balance_and_what_it_left(
    gateway: RunningGateway, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        await served(gateway)
    await gateway.chat({**HELLO, "model": "none"})  # costs nothing: a row of usage, no line here
    rows = (await gateway.get("/api/usage?status=200"))["data"]
    assert len(await gateway.usage()) > len(rows) == 2
    cost = rows[-1]["cost_nano"]
    whole_page = await gateway.get("/api/statement")
    assert moved(whole_page) == [
        ("charge", -cost, 10 * DOLLAR - 2 * cost),
        ("charge", -cost, 10 * DOLLAR - cost),
        ("deposit", 10 * DOLLAR, 10 * DOLLAR),
    ]
    assert whole_page["data"][0]["id"] == rows[0]["id"]
    assert whole_page["data"][0]["prompt_tokens"] == rows[0]["prompt_tokens"]
    assert whole_page["data"][2]["reference"].startswith("base:")
    assert (whole_page["brought_forward_nano"], whole_page["next_before"]) == (0, None)
    walked, before = [], ""
    while before is not None:
        page = await gateway.get(f"/api/statement?limit=1{before and '&before=' + before}")
        walked += page["data"]
        before = page["next_before"]
    assert walked == whole_page["data"]

    async with transaction(gateway.owner) as connection:
        secret = gateway.process.settings.secret
        operator = await create_key(connection, secret, gateway.operator, "o", {"account"})
        inference = await create_key(connection, secret, gateway.operator, "i", {"inference"})
    async with httpx.AsyncClient(base_url=gateway.url) as http:

        async def ask(key: str, query: str) -> httpx.Response:
            return await http.get(f"/api/statement?{query}", headers={"Authorization": f"Bearer {key}"})

        share = rows[-1]["operator_nano"]
        earned = (await ask(operator, "role=operator")).json()
        assert moved(earned) == [("charge", share, 2 * share), ("charge", share, share)]
        assert (await ask(operator, "role=buyer")).json()["data"] == []
        assert (await ask(inference, "")).status_code == 403

    monkeypatch.setenv("TOLLWAY_DATABASE_URL", database_url)
    monkeypatch.setenv("TOLLWAY_SECRET", secret.get_secret_value())
    shown = await _show(f"buyer:{gateway.person}", "--json", "--lines", "2")
    found = json.loads(shown)
    assert [line["id"] for line in found["lines"]] == [line["id"] for line in whole_page["data"][:2]]
    assert (found["posted"], found["brought_forward"]) == (whole_page["balance"], "10.00")
    older = await _show(f"buyer:{gateway.person}", "--before", found["next_before"])
    assert "deposit" in older
    assert "unswept:base" in older


async def _show(*arguments: str) -> str:
    done = await asyncio.to_thread(CliRunner().invoke, app, ["ledger", "show", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


async def served(gateway: RunningGateway) -> str:
    """A request's id, once one is served: a busy machine's first may be refused."""
    async with asyncio.timeout(60):
        while (answer := await gateway.chat(HELLO)).status_code != 200:
            await asyncio.sleep(0.1)
    return str(answer.json()["usage"]["receipt_id"])


async def listed(gateway: RunningGateway) -> list[str]:
    return [row["id"] for row in (await gateway.get("/api/usage?status=200"))["data"]]


async def test_listings_come_from_the_replica_and_money_from_the_book(
    standby: tuple[EmbeddedPostgres, str],
    database_url: str,
    nats_server: EmbeddedNats,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, url = standby
    url = make_url(url).set(database=make_url(database_url).database).render_as_string(False)
    monkeypatch.setenv(REPLICA, url)
    replica = connect(url, role=None, pool_size=1)
    async with running_gateway(database_url, nats_server, tmp_path) as gateway:
        assert gateway.process.settings.database_replica_url == SecretStr(url)
        await gateway.fund(DOLLAR)
        await gateway.add_node(whole(said("abc", finish="stop")))
        first = await served(gateway)
        async with asyncio.timeout(30):
            while await listed(gateway) != [first]:  # the replica follows
                await asyncio.sleep(0.02)

        async with replica.connect() as connection:
            await connection.execute(text("SELECT pg_wal_replay_pause()"))
            paused = text("SELECT pg_get_wal_replay_pause_state() = 'paused'")
            async with asyncio.timeout(30):
                while not await connection.scalar(paused):
                    await asyncio.sleep(0.02)
        since = datetime.now(UTC)
        second = await served(gateway)
        async with httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers) as http:
            for path in ("/api/usage", "/api/usage?format=csv", "/api/stats", "/api/statement"):
                answer = await http.get(path)
                assert answer.status_code == 200, answer.text
                assert datetime.fromisoformat(answer.headers["X-Tollway-As-Of"]) <= since
        assert await listed(gateway) == [first]
        assert (await gateway.get(f"/api/usage/{second}"))["id"] == second  # one request is asked of the book
        cost = (await gateway.get(f"/api/usage/{second}"))["cost_nano"]
        old = await gateway.get("/api/statement")
        balance = await gateway.get("/api/balance")
        assert old["balance_nano"] == DOLLAR - cost
        assert balance["posted"] != old["balance"]

        async with replica.connect() as connection:
            await connection.execute(text("SELECT pg_wal_replay_resume()"))
        async with asyncio.timeout(30):
            while await listed(gateway) != [second, first]:
                await asyncio.sleep(0.02)
        await replica.dispose()
        await asyncio.to_thread(server.stop)
        third = await served(gateway)
        assert await listed(gateway) == [third, second, first]  # the book answers
        async with httpx.AsyncClient(base_url=gateway.url, headers=gateway.headers) as http:
            told = (await http.get("/api/usage")).headers["X-Tollway-As-Of"]
        assert datetime.fromisoformat(told) > since
