"""The real agent process on a fabric behind TLS: it comes in by the right authority and by no other way."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fabric_parts import NodeKey, Prices, enrolled, eventually, fabric_settings, make_tls
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.platform.embedded_nats import EmbeddedNats, load_or_make_credentials
from marketplace.platform.nats_configuration import Tls
from marketplace.platform.processes import free_port
from marketplace.routing.service import FabricService
from node_agent.config import CONFIG_FILE, write_settings
from node_agent.doctor import examine
from node_agent.files import write_private
from node_agent.identity import KEY_FILE
from node_agent.service import STATUS_FILE

ROOT = Path(__file__).parents[2]


class Fabric:
    """One nats-server behind TLS and the marketplace's side of it."""

    def __init__(self, server: EmbeddedNats, service: FabricService, tls: Tls) -> None:
        self.server, self.service, self.tls = server, service, tls


@pytest.fixture
async def fabric(database_url: str, engine: AsyncEngine, tmp_path: Path) -> AsyncIterator[Fabric]:
    tls, credentials = make_tls(tmp_path / "tls"), load_or_make_credentials(tmp_path / "secrets")
    server = EmbeddedNats(tmp_path / "nats", free_port(), credentials, tls=tls)
    server.start()
    service = FabricService(fabric_settings(server, database_url, nats_ca_file=tls.ca), engine, Prices())
    try:
        await service.start()
        yield Fabric(server, service, tls)
    finally:
        await service.stop()
        server.stop()


@asynccontextmanager
async def agent(folder: Path) -> AsyncIterator[Path]:
    """`tollway-node run --json` as its operator would have it; gives its log."""
    log = folder / "log"
    with log.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "node_agent.cli", "run", "--json", "--data-dir", folder,
            cwd=ROOT, stderr=sink,
        )  # fmt: skip
    try:
        yield log
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0, log.read_text()


def _lines(log: Path) -> list[str]:
    return [json.loads(line)["message"] for line in log.read_text().splitlines()]


async def _until_said(log: Path, words: str) -> str:
    async with asyncio.timeout(30):
        while not (found := [line for line in _lines(log) if words in line]):
            await asyncio.sleep(0.05)
    return found[0]


async def test_the_agent_comes_in_by_the_right_authority_and_by_no_other_way(
    fabric: Fabric, engine: AsyncEngine, tmp_path: Path
) -> None:
    key, node = NodeKey(), tmp_path / "node"
    node_id = await enrolled(engine, key)
    write_private(node / KEY_FILE, key.seed.encode() + b"\n")
    url = fabric.server.url
    assert url.startswith("tls://")

    def settings(nats_url: str, ca: Path | None) -> None:
        write_settings(node, node_id=node_id, api="http://127.0.0.1:1", nats_url=nats_url)
        if ca is not None:
            path = node / CONFIG_FILE
            path.write_text(f'nats_ca = "{ca}"\n' + path.read_text())

    def is_here() -> bool:
        return node_id in fabric.service.registry.heard_within(60_000)

    other = make_tls(tmp_path / "other").ca
    for ca in (other, None):
        settings(url, ca)
        async with agent(node) as log:
            await _until_said(log, "certificate verify failed")
        assert not is_here()
        (told,) = [finding for finding in await examine(node, None) if finding.check == "fabric"]
        assert (told.state, "nats_ca" in told.advice) == ("failed", True), told
    settings(url, fabric.tls.ca)
    async with agent(node) as log:
        await _until_said(log, f"connected to {url}")
        await eventually(is_here, within_s=20)
        told = json.loads((node / STATUS_FILE).read_bytes())
        assert told["is_connected"] is True
    assert not any("certificate" in line for line in _lines(log))


async def test_an_unreadable_authority_is_one_sentence(tmp_path: Path) -> None:
    """What the operator mistyped is said in the agent's log; it neither dies nor goes in unchecked."""
    write_private(tmp_path / KEY_FILE, NodeKey().seed.encode() + b"\n")
    write_settings(tmp_path, node_id="n1", api="http://127.0.0.1:1", nats_url="tls://127.0.0.1:1")
    path = tmp_path / CONFIG_FILE
    path.write_text('nats_ca = "nowhere.pem"\n' + path.read_text())
    async with agent(tmp_path) as log:
        await _until_said(log, "nats_ca 'nowhere.pem' cannot be used")
    assert "Traceback" not in log.read_text()
