"""Our side: a whole marketplace on two cores, with stub nodes where operators would be.

Everything is on: keys, limits, leases, routing over 20 nodes of 10 operators, counting on ids, receipts,
charges committed to PostgreSQL before the last byte.  The gateway has one core; PostgreSQL, the nodes and the
load generator have the other; NATS is moved between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
import nkeys
import psutil
from gateway_peers.answers import MODEL, Answer, body, prompt
from gateway_peers.peers import ROOT, NotHadError, Subject
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.accounts.people import create_key, create_person
from marketplace.catalog.models import Tier, TokenizerFiles, add_model
from marketplace.fabric.node_ids import node_id_of
from marketplace.ledger.accounts import ensure_account, operator_earnings
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.ledger.templates import deposit
from marketplace.metering.counting import TokenCounter
from marketplace.platform import database
from marketplace.platform.embedded_nats import EmbeddedNats, load_or_make_credentials
from marketplace.platform.embedded_postgres import EmbeddedPostgres
from marketplace.platform.ids import uuid7
from marketplace.platform.processes import free_port, start_child, stop_child, tail

BUYERS: Final = 256
"""One key each; a buyer may send a hundred requests a second in development, a client here sends fewer."""
NODES: Final = 20
OPERATORS: Final = 10
BALANCE_NANO: Final = 1_000_000_000_000
READY_S_MAX: Final = 60


@dataclass
class Marketplace:
    """The running stack as the benchmark sees it."""

    subject: Subject
    nats: EmbeddedNats
    gateway_pid: int
    owner_url: str
    cast: Cast

    @property
    def nats_pid(self) -> int:
        assert self.nats.pid is not None
        return self.nats.pid

    def move_nats(self, core: int) -> None:
        """Let the NATS server run on this core from now on."""
        for task in Path(f"/proc/{self.nats_pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {core})

    def rss_bytes(self) -> int:
        return int(psutil.Process(self.gateway_pid).memory_info().rss)

    def charges(self) -> int:
        """Rows in the ledger: what was served and paid for."""
        return asyncio.run(self._charges())

    async def _charges(self) -> int:
        engine = database.connect(self.owner_url, role=None, pool_size=1)
        async with engine.connect() as connection:
            count = await connection.scalar(text("SELECT count(*) FROM charges WHERE status = 200"))
        await engine.dispose()
        return int(count or 0)


@dataclass
class Cast:
    """Who takes part."""

    keys: list[str]
    nodes: dict[str, str]
    """Node id → seed."""
    prompt_ids: list[int]


@contextmanager
def marketplace(
    server: EmbeddedPostgres,
    folder: Path,
    files: TokenizerFiles,
    *,
    gateway_core: int | None,
    buyers: int = BUYERS,
    nodes: int = NODES,
) -> Iterator[Marketplace]:
    """Start all but the nodes, give it, stop it.  Without a core, gateway and NATS run where they like."""
    secret = secrets.token_hex(24)
    url = server.url(f"gateway_{secrets.token_hex(4)}")
    cast = asyncio.run(people(url, secret, files, buyers=buyers, nodes=nodes))
    nats = EmbeddedNats(folder / "nats", free_port(), load_or_make_credentials(folder / "credentials"))
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: asyncio.run(database.drop_database(url)))
        with _on_core(gateway_core):  # Go decides at its start how many threads run at once
            nats.start()
        stack.callback(nats.stop)
        port = free_port()
        gateway = _gateway(_environment(folder, url, nats, secret, port), folder, gateway_core)
        stack.callback(lambda: stop_child(gateway, stop_signal=signal.SIGTERM, patience_s=45))
        _wait_ready(port, gateway, folder)
        subject = Subject("Tollway", port, keys=cast.keys, pids=[gateway.pid])
        running = Marketplace(subject, nats, gateway.pid, url, cast)
        subject.pids.append(running.nats_pid)
        yield running


@contextmanager
def stub_nodes(running: Marketplace, folder: Path, answer: Answer, core: int) -> Iterator[None]:
    """Let every node of the cast serve, and wait until the gateway chooses among all of them."""
    nodes = _nodes(running.cast, running.nats, folder, answer, core)
    try:
        _wait_served(running.subject, folder, len(running.cast.nodes))
        yield
    finally:
        stop_child(nodes, stop_signal=signal.SIGTERM, patience_s=5)


@contextmanager
def relay(running: Marketplace, folder: Path, core: int) -> Iterator[Subject]:
    """Start our relay without the marketplace, beside the gateway and on the same fabric."""
    port = free_port()
    configuration = {
        "nats_url": running.nats.url, "password": running.nats.credentials.password, "model": MODEL,
        "nodes": list(running.cast.nodes), "port": port,
    }  # fmt: skip
    path = folder / "relay.json"
    path.write_text(json.dumps(configuration))
    with _on_core(core):
        argv = [sys.executable, str(Path(__file__).parent / "relay.py"), str(path)]
        child = start_child(argv, log=folder / "relay.log", cwd=ROOT)
    try:
        subject = Subject("our relay alone", port, pids=[child.pid, running.nats_pid])
        _wait_served(subject, folder, 0)
        yield subject
    finally:
        stop_child(child, stop_signal=signal.SIGTERM, patience_s=5)


@contextmanager
def _on_core(core: int | None) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# ---- who takes part


async def people(url: str, secret: str, files: TokenizerFiles, *, buyers: int, nodes: int) -> Cast:
    """Make a database with a model, funded buyers and enrolled nodes."""
    await database.create_database(url)
    await asyncio.to_thread(database.migrate, url)
    engine = database.connect(url, role=None, pool_size=1)
    try:
        async with database.transaction(engine) as connection:
            await add_model(connection, name=MODEL, tier=Tier.SMALL, context=8192, files=files)
            keys = [await _buyer(connection, secret) for _ in range(buyers)]
            enrolled = await _operators(connection, nodes)
    finally:
        await engine.dispose()
    counter = TokenCounter(
        tokenizer=files.tokenizer, chat_template=files.chat_template, special_tokens=files.special_tokens
    )
    return Cast(keys, enrolled, list(counter.prompt_ids([{"role": "user", "content": prompt()}], None)))


async def _buyer(connection: AsyncConnection, secret: str) -> str:
    person = await create_person(connection)
    await post_transfer(
        connection,
        deposit(chain="base", person=str(person), amount=Nano(BALANCE_NANO), ref=f"bench:{person}"),
    )
    return await create_key(connection, SecretStr(secret), person, "bench", {"inference"})


async def _operators(connection: AsyncConnection, nodes: int) -> dict[str, str]:
    operators: list[UUID] = []
    for _ in range(OPERATORS):
        operators.append(await create_person(connection, is_operator=True))
        await ensure_account(connection, operator_earnings(str(operators[-1])))
    seeds = {}
    for at in range(nodes):
        seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
        node_id = node_id_of(uuid7())
        await connection.execute(
            text(
                "INSERT INTO nodes (id, operator_id, name, public_key) VALUES (:id, :operator, 'stub', :key)"
            ),
            {
                "id": node_id,
                "operator": operators[at % OPERATORS],
                "key": nkeys.from_seed(bytearray(seed)).public_key.decode().rstrip("="),
            },
        )
        seeds[str(node_id)] = seed.decode()
    return seeds


# ---- the processes


def _environment(folder: Path, url: str, nats: EmbeddedNats, secret: str, port: int) -> dict[str, str]:
    settings = {
        "ENVIRONMENT": "development", "DATA_DIR": str(folder), "DATABASE_URL": url, "NATS_URL": nats.url,
        "NATS_PASSWORD": nats.credentials.password, "NATS_ISSUER_SEED": nats.credentials.issuer_seed,
        "SECRET": secret, "CHAINS_FILE": str(chains_file(folder)), "API_PORT": str(port),
    }  # fmt: skip
    return {**os.environ, **{f"TOLLWAY_{name}": value for name, value in settings.items()}}


def chains_file(folder: Path) -> Path:
    """A gateway knows where its chains are; it asks them nothing while it serves."""
    evm: dict[str, Any] = {
        "rpc": ["http://127.0.0.1:9"], "usdc": "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913",
        "escrow": "0x" + "11" * 20, "forwarder_factory": "0x" + "22" * 20, "multi_send": "0x" + "33" * 20,
        "signers": [], "threshold": 2,
    }  # fmt: skip
    solana = {
        "rpc": ["http://127.0.0.1:9"], "usdc_mint": "EPjFWdd5AufqSSqeM2qN1xzybapC8G4wEGGkZwyTDt1v",
        "multisig": "m", "escrow": "e", "nonce_account": "n", "gas_payer": "g", "signers": [], "threshold": 2,
    }  # fmt: skip
    path = folder / "chains.json"
    path.write_text(
        json.dumps({"ethereum": {**evm, "chain_id": 1}, "base": {**evm, "chain_id": 8453}, "solana": solana})
    )
    return path


def _gateway(environment: dict[str, str], folder: Path, core: int | None) -> subprocess.Popen[bytes]:
    with _on_core(core):
        argv = [sys.executable, "-m", "marketplace", "serve"]
        return start_child(argv, log=folder / "gateway.log", env=environment, cwd=ROOT)


def _nodes(
    cast: Cast, nats: EmbeddedNats, folder: Path, answer: Answer, core: int
) -> subprocess.Popen[bytes]:
    configuration = {
        "nats_url": nats.url, "model": MODEL, "seeds": cast.nodes, "pieces": answer.pieces, "ids": answer.ids,
        "prompt_ids": cast.prompt_ids,
        "prices": {
            node: [(100 + at) * 1_000_000, (150 + at) * 1_000_000] for at, node in enumerate(cast.nodes)
        },
    }  # fmt: skip
    path = folder / "nodes.json"
    path.write_text(json.dumps(configuration))
    argv = ["taskset", "-c", str(core), sys.executable, str(Path(__file__).parent / "nodes.py"), str(path)]
    return start_child(argv, log=folder / "nodes.log", cwd=ROOT)


def _wait_ready(port: int, gateway: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + READY_S_MAX
    while time.monotonic() < deadline and gateway.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise NotHadError(f"the gateway did not start:\n{tail(folder / 'gateway.log')}")


def _wait_served(subject: Subject, folder: Path, nodes: int) -> None:
    """Return when requests are served, with so many nodes to choose from (0: nobody chooses)."""
    deadline, trouble = time.monotonic() + READY_S_MAX, ""
    with httpx.Client(base_url=f"http://127.0.0.1:{subject.port}", trust_env=False, timeout=20) as http:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.ConnectError):
                answer = http.post(
                    "/v1/chat/completions", content=body(is_stream=False),
                    headers={"authorization": f"Bearer {subject.keys[0]}"},
                )  # fmt: skip
                route = answer.headers.get("x-tollway-route", "")
                if answer.status_code == 200 and (not nodes or f"known={nodes}" in route):
                    return
                trouble = f"{answer.status_code} {answer.text[:300]} {route}"
            time.sleep(0.1)
    raise NotHadError(
        f"our gateway does not serve: {trouble}\n{tail(folder / 'gateway.log')}\n{tail(folder / 'nodes.log')}"
    )
