"""Parts for tests of the gateway: a small real tokenizer, a node that answers as told, a running gateway."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import nats
import uvicorn
from letters import letters_tokenizer, tokenizer_files
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.accounts.people import create_key, create_person
from marketplace.app import Gateway
from marketplace.catalog.models import Tier, add_model
from marketplace.fabric.node_ids import node_id_of
from marketplace.gateway.hot_route import protocol_for
from marketplace.ledger.accounts import PROMO, buyer, read_balance
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.ledger.reconcile import prove
from marketplace.ledger.templates import correction, deposit
from marketplace.platform.database import connect, transaction
from marketplace.platform.embedded_nats import EmbeddedNats
from marketplace.platform.ids import uuid7
from marketplace.platform.processes import free_port
from marketplace.platform.settings import Environment, Settings
from node_agent import protocol

MODEL = "letters"
DOLLAR = 1_000_000_000
HELLO: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}
STREAM = {**HELLO, "stream": True}
SECRET = "s" * 40
PRICE_IN, PRICE_OUT = 1_000_000_000, 2_000_000_000


def _public_key() -> str:
    """A key no other node has; a stub connects as the marketplace's own user and signs nothing."""
    return "U" + base64.b32encode(secrets.token_bytes(35)).decode()[:55]


Reply = Callable[["StubNode", protocol.Request, str], Awaitable[None]]


@dataclass
class StubNode:
    """A node that speaks the protocol and answers as its test says."""

    node_id: protocol.NodeId
    answer: Reply
    price_in: int = PRICE_IN
    price_out: int = PRICE_OUT
    context: int = 4096
    model: str = MODEL
    requests: list[protocol.Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    connection: Any = None
    answering: set[asyncio.Future[None]] = field(default_factory=set)
    credit: dict[str, int] = field(default_factory=dict)
    """How many deltas each request may send, as granted by now."""

    async def start(self, server: EmbeddedNats) -> None:
        self.connection = await nats.connect(
            server.url, user="marketplace", password=server.credentials.password
        )
        await self.connection.subscribe(protocol.request_subject(self.node_id), cb=self._on_request)
        await self.connection.subscribe(protocol.control_subject(self.node_id), cb=self._on_control)

    async def _on_request(self, message: Any) -> None:
        request = protocol.decode_request(message.data)
        self.requests.append(request)
        self.credit[request.id] = request.credit
        task = asyncio.ensure_future(self.answer(self, request, message.reply))
        self.answering.add(task)
        task.add_done_callback(self.answering.discard)

    async def _on_control(self, message: Any) -> None:
        control = protocol.decode_control(message.data)
        if isinstance(control, protocol.Cancel):
            self.cancelled.append(control.id)
        else:
            self.credit[control.id] = max(control.up_to, self.credit[control.id])

    async def send(self, reply: str, frame: protocol.Frame) -> None:
        await self.connection.publish(reply, protocol.encode(frame))

    async def say_status(self, seq: int) -> None:
        model = protocol.ModelStatus(self.model, self.context, self.price_in, self.price_out, capacity=64)
        status = protocol.Status(1, self.node_id, seq, 0, "test", is_draining=False, models=[model])
        await self.connection.publish(protocol.status_subject(self.node_id), protocol.encode(status))
        await self.connection.flush()


def saying(
    parts: Sequence[str], *, reported: int | None = None, with_ids: bool = True, pause_s: float = 0
) -> Reply:
    """An honest answer in these parts; `reported` makes the operator's count dishonest."""

    async def answer(node: StubNode, request: protocol.Request, reply: str) -> None:
        tokenizer = letters_tokenizer()
        await node.send(reply, protocol.Accepted(0))
        seq, total = 1, 0
        for at, part in enumerate(parts):
            ids = tokenizer.encode(part, add_special_tokens=False).ids
            total += len(ids)
            choice = protocol.ChoiceDelta(
                content=part,
                token_ids=ids if with_ids else None,
                finish_reason="stop" if at == len(parts) - 1 else None,
            )
            await node.send(reply, protocol.Delta(seq, [choice], completion_tokens=reported or total))
            seq += 1
            if pause_s:
                await asyncio.sleep(pause_s)
        await node.send(reply, protocol.End(seq, completion_tokens=reported or total))

    return answer


def sending(*frames: protocol.Frame, pause_s: float = 0) -> Reply:
    """These frames, whatever they say."""

    async def answer(node: StubNode, request: protocol.Request, reply: str) -> None:
        for frame in frames:
            await node.send(reply, frame)
            if pause_s:
                await asyncio.sleep(pause_s)

    return answer


def said(text: str, *, index: int = 0, finish: str | None = None, **fields: Any) -> protocol.ChoiceDelta:
    """A piece of a choice with the ids that spell it."""
    ids = letters_tokenizer().encode(text, add_special_tokens=False).ids
    return protocol.ChoiceDelta(
        index=index, finish_reason=finish, **{"content": text, "token_ids": ids, **fields}
    )


def whole(*choices: protocol.ChoiceDelta, prompt: int | None = None, completion: int | None = None) -> Reply:
    """An answer in one delta, ended as it should be."""
    return sending(
        protocol.Accepted(0),
        protocol.Delta(1, list(choices)),
        protocol.End(2, prompt_tokens=prompt, completion_tokens=completion),
    )


@dataclass
class RunningGateway:
    url: str
    process: Gateway
    key: str
    person: UUID
    operator: UUID
    owner: AsyncEngine
    nats: EmbeddedNats
    server: uvicorn.Server
    nodes: list[StubNode] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    async def add_node(
        self,
        answer: Reply,
        *,
        price_in: int = PRICE_IN,
        price_out: int = PRICE_OUT,
        context: int = 4096,
        model: str = MODEL,
    ) -> StubNode:
        """Enrol a node of the operator, connect it and wait until the gateway would choose it."""
        identity = uuid7()
        node = StubNode(node_id_of(identity), answer, price_in, price_out, context, model)
        async with self.owner.begin() as connection:
            await connection.execute(
                text(
                    "INSERT INTO nodes (id, operator_id, name, public_key) "
                    "VALUES (:id, :operator, 'stub', :key)"
                ),
                {"id": node.node_id, "operator": self.operator, "key": _public_key()},
            )
        await node.start(self.nats)
        self.nodes.append(node)
        for seq in range(100):
            await node.say_status(seq)
            views = self.process.fabric.registry.views(model)
            if any(view.node_id == node.node_id for view in views):
                return node
            await asyncio.sleep(0.05)
        raise AssertionError("the gateway does not see the node")

    async def chat(self, body: object, **headers: str) -> httpx.Response:
        """One request to the chat route."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with httpx.AsyncClient(base_url=self.url, timeout=30) as http:
            for _ in range(10):
                answer = await http.post(
                    "/v1/chat/completions", content=content, headers={**self.headers, **headers}
                )
                if "credentials_unavailable" not in answer.text:
                    break
                await asyncio.sleep(0.5)  # a machine that stood still for 4 s (K2)
            return answer

    async def post(self, path: str, body: object) -> httpx.Response:
        """One request to any path."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=30) as http:
            return await http.post(path, content=content, headers={"Content-Type": "application/json"})

    async def get(self, path: str) -> Any:
        async with httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=30) as http:
            answer = await http.get(path)
            assert answer.status_code == 200, answer.text
            return answer.json()

    async def usage(self) -> list[dict[str, Any]]:
        """The buyer's usage rows, newest first."""
        rows: list[dict[str, Any]] = (await self.get("/api/usage"))["data"]
        return rows

    async def only_row(self) -> dict[str, Any]:
        """The one usage row there is, waited for."""
        async with asyncio.timeout(5):
            while not (rows := await self.usage()):
                await asyncio.sleep(0.02)
        (row,) = rows
        return row

    async def assert_proved(self) -> None:
        """Nothing stays held (what ended just now is waited for), and every invariant of the ledger holds."""
        async with asyncio.timeout(20):
            while any(part.reserved_nano for part in self.process.keeper.book):
                await asyncio.sleep(0.01)
        async with self.owner.connect() as connection:
            failed = [check async for check in prove(connection) if not check.ok]
        assert not failed, failed

    async def raw(self, data: bytes, *, until_closed: bool = True) -> bytes:
        """What the gateway answers to these bytes, up to the connection's end."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        answer = await asyncio.wait_for(reader.read(), 10) if until_closed else b""
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return answer

    async def fund(self, nano: int) -> None:
        """Deposit for the buyer, through the ledger."""
        async with transaction(self.process.engine) as connection:
            await post_transfer(
                connection,
                deposit(chain="base", person=str(self.person), amount=Nano(nano), ref=f"base:{uuid7()}"),
            )

    async def set_context(self, tokens: int) -> None:
        """Let the catalogue's model take so many tokens."""
        async with transaction(self.owner) as connection:
            await add_model(connection, name=MODEL, tier=Tier.SMALL, context=tokens, files=tokenizer_files())
        await self.process.shelf.refresh()

    async def leave(self, nano: int) -> None:
        """Take the buyer's balance down to this."""
        async with transaction(self.process.engine) as connection:
            account = buyer(str(self.person))
            balance = await read_balance(connection, account)
            assert balance is not None
            amount = Nano(balance.posted.n - nano)
            await post_transfer(
                connection, correction(debit=account, credit=PROMO, amount=amount, ref="leave", note="test")
            )


def chains_json(folder: Path) -> Path:
    evm = {
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


@asynccontextmanager
async def running_gateway(
    database_url: str, server: EmbeddedNats, folder: Path
) -> AsyncIterator[RunningGateway]:
    """A real gateway on a real port, with one buyer, one operator and the model `letters`."""
    settings = Settings(
        environment=Environment.DEVELOPMENT,
        data_dir=folder,
        database_url=SecretStr(database_url),
        nats_url=server.url,
        nats_password=SecretStr(server.credentials.password),
        nats_issuer_seed=SecretStr(server.credentials.issuer_seed),
        secret=SecretStr(SECRET),
        chains_file=chains_json(folder),
        api_port=free_port(),
    )
    owner = connect(database_url, role=None, pool_size=2)
    async with transaction(owner) as connection:
        person = await create_person(connection, display_name="buyer")
        operator = await create_person(connection, display_name="operator", is_operator=True)
        key = await create_key(connection, settings.secret, person, "test", {"inference", "account"})
        await add_model(connection, name=MODEL, tier=Tier.SMALL, context=4096, files=tokenizer_files())
    try:
        async with _serving(settings) as (process, http):
            url = f"http://127.0.0.1:{settings.api_port}"
            running = RunningGateway(url, process, key, person, operator, owner, server, http)
            try:
                yield running
            finally:
                for node in running.nodes:
                    await node.connection.close()
    finally:
        await owner.dispose()


@asynccontextmanager
async def another_gateway(beside: RunningGateway) -> AsyncIterator[RunningGateway]:
    """One more over the same database, server and nodes, once it would choose each of them."""
    settings = beside.process.settings.model_copy(update={"api_port": free_port()})
    async with _serving(settings) as (process, http):

        def unseen() -> set[str]:
            views = process.fabric.registry.views(MODEL)
            return {node.node_id for node in beside.nodes} - {view.node_id for view in views}

        async with asyncio.timeout(10):
            seq = 1_000
            while unseen():
                for node in beside.nodes:
                    await node.say_status(seq := seq + 1)
                await asyncio.sleep(0.05)
        url = f"http://127.0.0.1:{settings.api_port}"
        yield replace(beside, url=url, process=process, server=http)


@asynccontextmanager
async def _serving(settings: Settings) -> AsyncIterator[tuple[Gateway, uvicorn.Server]]:
    process = Gateway(settings)
    async with process.running():
        config = uvicorn.Config(
            process.app, host="127.0.0.1", port=settings.api_port, http=protocol_for(process.chat.serve),
            ws="none", lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=2,
        )  # fmt: skip
        http = uvicorn.Server(config)
        http.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        serving = asyncio.create_task(http.serve())
        while not http.started:
            await asyncio.sleep(0.01)
        try:
            yield process, http
        finally:
            http.should_exit = True
            await serving
