"""Several gateway processes on one socket, replaced under load."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gateway_parts import DOLLAR, HELLO, STREAM, RunningGateway, running_gateway, saying

from marketplace.platform.embedded_nats import EmbeddedNats
from marketplace.platform.processes import die_with_parent, free_port


def _environment(gateway: RunningGateway, port: int) -> dict[str, str]:
    settings = gateway.process.settings
    secrets = {
        "database_url": settings.database_url, "nats_password": settings.nats_password,
        "nats_issuer_seed": settings.nats_issuer_seed, "secret": settings.secret,
    }  # fmt: skip
    plain = {
        "environment": "development", "nats_url": settings.nats_url, "api_port": port,
        "data_dir": settings.data_dir, "chains_file": settings.chains_file,
    }  # fmt: skip
    values = {name: secret.get_secret_value() for name, secret in secrets.items()}
    values |= {name: str(value) for name, value in plain.items()}
    return {**os.environ, **{f"TOLLWAY_{name.upper()}": value for name, value in values.items()}}


class Owner:
    """`tollway serve --workers 2` and what it logs."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self._log = log

    def serving(self) -> list[int]:
        """The workers that have ever served, in order."""
        return [
            int(pid) for pid in re.findall(r'"pid": (\d+), "event": "a worker serves"', self._log.read_text())
        ]

    async def until_served(self, count: int) -> list[int]:
        async with asyncio.timeout(90):
            while len(found := self.serving()) < count:
                assert self.process.returncode is None, self._log.read_text()[-2000:]
                await asyncio.sleep(0.1)
        return found


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]


async def _start(gateway: RunningGateway, port: int, folder: Path) -> Owner:
    log = folder / "workers.log"
    with log.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "marketplace", "serve", "--workers", "2",
            env=_environment(gateway, port), stdout=sink, stderr=sink,
            preexec_fn=die_with_parent(signal.SIGTERM),
        )  # fmt: skip
    return Owner(process, log)


@pytest.mark.slow
async def test_workers_are_replaced_under_load_without_a_failed_request(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> None:
    async with running_gateway(database_url, nats_server, tmp_path) as gateway:
        await gateway.fund(10 * DOLLAR)
        node = await gateway.add_node(saying(["a", "b", "c"], pause_s=0.05))
        port = free_port()
        owner = await _start(gateway, port, tmp_path)
        speaking = asyncio.create_task(_speak(node))
        try:
            first = await owner.until_served(2)
            results: list[str] = []
            over = asyncio.Event()
            connector = aiohttp.TCPConnector(limit=0)
            url = f"http://127.0.0.1:{port}"
            async with aiohttp.ClientSession(url, headers=gateway.headers, connector=connector) as http:
                await _until_routed(http)
                load = [asyncio.create_task(_load(http, at, over, results)) for at in range(8)]
                await asyncio.sleep(1)
                owner.process.send_signal(signal.SIGHUP)
                second = (await owner.until_served(4))[2:]
                async with asyncio.timeout(60):
                    while any(_is_alive(pid) for pid in first):
                        await asyncio.sleep(0.1)
                await asyncio.sleep(1)
                over.set()
                await asyncio.gather(*load)
                os.kill(second[0], signal.SIGKILL)  # one that dies is started again
                await owner.until_served(5)
                metrics = await (await http.get("/metrics")).text()
            assert len(results) > 50
            assert set(results) == {"ok"}, {result for result in results if result != "ok"}
            assert 'tollway_requests_total{status="200"}' in metrics
        finally:
            speaking.cancel()
            owner.process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(owner.process.wait(), 60)
        assert not any(_is_alive(pid) for pid in owner.serving())
        await gateway.assert_proved()


async def _speak(node: Any) -> None:
    """Keep the stub node known to gateways that started after it."""
    for seq in range(1000, 10**6):
        await node.say_status(seq)
        await asyncio.sleep(0.5)


async def _until_routed(http: aiohttp.ClientSession) -> None:
    """Both workers know the node."""
    in_a_row = 0
    async with asyncio.timeout(30):
        while in_a_row < 8:
            async with http.post(
                "/v1/chat/completions", json=HELLO, headers={"Connection": "close"}
            ) as answer:
                in_a_row = in_a_row + 1 if answer.status == 200 else 0
            await asyncio.sleep(0.05)


async def _load(http: aiohttp.ClientSession, at: int, over: asyncio.Event, results: list[str]) -> None:
    """Ask one thing after the other, half of them as streams, over kept connections."""
    while not over.is_set():
        body = STREAM if at % 2 else HELLO
        try:
            async with http.post("/v1/chat/completions", json=body) as answer:
                said = await answer.text()
        except (aiohttp.ClientError, OSError) as e:
            results.append(f"{type(e).__name__}: {e}")
            continue
        is_whole = said.endswith("data: [DONE]\n\n") if at % 2 else "choices" in said
        results.append("ok" if answer.status == 200 and is_whole else f"{answer.status} {said[:200]}")
