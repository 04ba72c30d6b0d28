"""The agent on a real NATS server, with a small engine that speaks (or breaks) OpenAI's protocol."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from pathlib import Path

import aiohttp.web
import msgspec
import nats
import pytest
from nats.aio.client import Client

from node_agent import protocol, relay
from node_agent.config import (
    Config,
    EngineSettings,
    Model,
    add_engine,
    set_price,
    write_first_config,
    write_settings,
)
from node_agent.engines.openai_stream import OpenAIClient
from node_agent.identity import create_identity
from node_agent.service import Service

NODE = protocol.parse_node_id("n1")
SECRET = "canary-7f3a91"  # appears in prompts and answers, must appear nowhere else


class FakeEngine:
    """Answers as vLLM does; `script` overrides the events of a chat."""

    def __init__(self) -> None:
        self.words = ["Hel", "lo", " wor", "ld"]
        self.script: Callable[[aiohttp.web.StreamResponse], object] | None = None
        self.bodies: list[dict] = []
        self.knows_token_ids = True
        self.refusal = ""
        """What it says to every request but a warm-up, if anything."""
        self.gap_seconds = 0.0
        self.started = 0
        self.aborted = asyncio.Event()
        self.written = 0
        self.url = ""

    async def chat(self, request: aiohttp.web.Request) -> aiohttp.web.StreamResponse:
        body = await request.json()
        is_warm_up = body["messages"][0]["content"] == "Say hello."
        if not is_warm_up:
            self.bodies.append(body)
        if "return_token_ids" in body and not self.knows_token_ids:
            message = "Unsupported parameter: return_token_ids"
            return aiohttp.web.json_response({"error": {"message": message}}, status=400)
        if self.refusal and not is_warm_up:
            return aiohttp.web.json_response({"error": {"message": self.refusal}}, status=400)
        response = aiohttp.web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.started += 1
        try:
            if self.script is not None and not is_warm_up:
                await self.script(response)
            else:
                await self.speak(response, body)
        except (ConnectionResetError, asyncio.CancelledError):
            self.aborted.set()
            raise
        return response

    async def speak(self, response: aiohttp.web.StreamResponse, body: dict) -> None:
        ids = body.get("return_token_ids", False)
        first = {
            "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}],
            "usage": usage(5, 0),
        }
        await self.event(response, first | ({"prompt_token_ids": [1, 2, 3, 4, 5]} if ids else {}))
        for i, word in enumerate(self.words):
            is_last = i == len(self.words) - 1
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": "stop" if is_last else None}
            await self.event(
                response,
                {"choices": [choice | ({"token_ids": [100 + i]} if ids else {})], "usage": usage(5, i + 1)},
            )
            await asyncio.sleep(self.gap_seconds)
        last = usage(5, len(self.words)) | {"prompt_tokens_details": {"cached_tokens": 2}}
        await self.event(response, {"choices": [], "usage": last})
        await response.write(b"data: [DONE]\n\n")

    async def event(self, response: aiohttp.web.StreamResponse, content: dict) -> None:
        data = b"data: " + json.dumps(content).encode() + b"\n\n"
        self.written += len(data)
        await response.write(data)


def usage(prompt: int, completion: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": completion}


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    fake = FakeEngine()
    app = aiohttp.web.Application()
    app.router.add_post("/v1/chat/completions", fake.chat)

    async def models(_: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.json_response({"data": [{"id": "engine-name", "max_model_len": 2048}]})

    async def metrics(_: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.Response(text='vllm:num_requests_waiting{model_name="engine-name"} 3.0\n')

    app.router.add_get("/v1/models", models)
    app.router.add_get("/metrics", metrics)
    runner = aiohttp.web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(port: int, log: Path) -> "subprocess.Popen[bytes]":
    binary = Path(sys.executable).with_name("nats-server")
    server = subprocess.Popen([binary, "-a", "127.0.0.1", "-p", str(port), "-l", log])
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            return server
        time.sleep(0.05)
    server.kill()
    server.wait()
    raise TimeoutError(log.read_text())


@pytest.fixture(scope="module")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    port = free_port()
    server = start_server(port, tmp_path_factory.mktemp("nats") / "log")
    yield f"nats://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@pytest.fixture
async def gateway(nats_url: str) -> AsyncIterator[Client]:
    client = await nats.connect(nats_url)
    yield client
    await client.close()


class Agent:
    def __init__(self, service: Service, gateway: Client, folder: Path) -> None:
        self.service = service
        self.gateway = gateway
        self.folder = folder
        self.statuses: list[protocol.Status] = []

    async def until_status(self, is_it: Callable[[protocol.Status], bool]) -> protocol.Status:
        async with asyncio.timeout(10):
            while not (self.statuses and is_it(self.statuses[-1])):
                await asyncio.sleep(0.02)
        return self.statuses[-1]

    async def ask(self, **changes: object) -> "Reply":
        reply = Reply(self.gateway, **changes)
        await reply.send()
        return reply


class Reply:
    """The gateway's end of one request."""

    def __init__(self, gateway: Client, **changes: object) -> None:
        body = {"messages": [{"role": "user", "content": SECRET}], "stream": False, "max_tokens": 9}
        fields = {
            "v": 1,
            "id": f"r{id(self)}",
            "model": "m",
            "body": msgspec.json.encode(body),
            "stream": True,
            "deadline_ms": 20_000,
        }
        self.request = protocol.Request(**(fields | changes))
        self.reader = protocol.ReplyReader(self.request.credit)
        self._gateway = gateway
        self.frames: list[protocol.Frame] = []

    async def send(self) -> None:
        inbox = self._gateway.new_inbox()
        self._replies = await self._gateway.subscribe(inbox)
        await self._gateway.publish(
            protocol.request_subject(NODE), protocol.encode(self.request), reply=inbox
        )

    async def next(self, seconds: float = 10) -> protocol.Frame:
        message = await self._replies.next_msg(seconds)
        self.frames.append(self.reader.feed(message.data))
        return self.frames[-1]

    async def all(self) -> list[protocol.Frame]:
        while not self.reader.is_done:
            await self.next()
        return self.frames

    async def control(self, message: protocol.Control) -> None:
        await self._gateway.publish(protocol.control_subject(NODE), protocol.encode(message))

    @property
    def deltas(self) -> list[protocol.Delta]:
        return [frame for frame in self.frames if isinstance(frame, protocol.Delta)]

    @property
    def text(self) -> str:
        return "".join(choice.content or "" for delta in self.deltas for choice in delta.choices)

    @property
    def end(self) -> protocol.Frame:
        return self.frames[-1]


@pytest.fixture
async def agent(
    engine: FakeEngine, gateway: Client, nats_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Agent]:
    monkeypatch.setattr(protocol, "STATUS_EVERY_MS", 300)
    model = Model(
        name="m",
        input=Decimal("0.10"),
        output=Decimal("0.20"),
        context=2048,
        capacity=4,
        engine_name="engine-name",
    )
    settings = EngineSettings(name="fake", kind="attach", url=engine.url, models=[model])
    config = Config(
        node_id=NODE, api="http://127.0.0.1:1", nats_url=nats_url, engines=[settings], drain_seconds=5
    )
    service = Service(config, create_identity(tmp_path), tmp_path, version="test")
    made = Agent(service, gateway, tmp_path)

    async def on_status(message: nats.aio.msg.Msg) -> None:
        made.statuses.append(protocol.decode_status(message.data))

    await gateway.subscribe(protocol.status_subject(NODE), cb=on_status)
    await gateway.flush()
    running = asyncio.create_task(service.run())
    await made.until_status(lambda status: status.models[0].is_ready)
    yield made
    service.stop()
    service.stop()
    await asyncio.wait_for(running, 10)


async def test_stream_is_told_in_order_with_ids_and_counts(agent: Agent, engine: FakeEngine) -> None:
    engine.gap_seconds = 0.02
    reply = await agent.ask()
    frames = await reply.all()
    assert isinstance(frames[0], protocol.Accepted)
    assert reply.text == "Hello world"
    assert len(reply.deltas) > 1
    assert reply.deltas[0].prompt_token_ids == [1, 2, 3, 4, 5]
    ids = [i for delta in reply.deltas for choice in delta.choices for i in choice.token_ids or ()]
    assert ids == [100, 101, 102, 103]
    assert reply.deltas[-1].completion_tokens == 4
    end = frames[-1]
    assert isinstance(end, protocol.End)
    assert (end.prompt_tokens, end.completion_tokens, end.cached_tokens) == (5, 4, 2)


async def test_tokens_gather_between_the_frames_a_gateway_wants_apart(
    agent: Agent, engine: FakeEngine
) -> None:
    engine.words, engine.gap_seconds = [f"w{i} " for i in range(20)], 0.015
    began = time.monotonic()
    reply = await agent.ask(frame_gap_ms=100)
    await reply.all()
    gaps = (time.monotonic() - began) / 0.1
    spoken = [[c for c in delta.choices if c.content] for delta in reply.deltas]
    spoken = [choices for choices in spoken if choices]
    assert [c.content for choices in spoken for c in choices] == engine.words  # each token by itself still
    assert [c.token_ids for choices in spoken for c in choices] == [[100 + i] for i in range(20)]
    assert len(spoken[0]) == 1  # the first waits for nobody
    assert 2 <= len(spoken) <= gaps + 2
    assert isinstance(reply.end, protocol.End)


async def test_streams_asked_at_different_times_send_their_frames_together(
    agent: Agent, engine: FakeEngine
) -> None:
    gap_s, engine.words, engine.gap_seconds = 0.2, [f"w{i} " for i in range(30)], 0.04

    async def times() -> list[float]:
        reply, came = await agent.ask(frame_gap_ms=200), []
        while not reply.reader.is_done:
            await reply.next()
            came.append(asyncio.get_running_loop().time())
        return [at for at, frame in zip(came, reply.frames, strict=True) if isinstance(frame, protocol.Delta)]

    first = asyncio.create_task(times())
    await asyncio.sleep(gap_s / 2)
    second = await times()
    others = await first
    apart = [min(abs(at - other) for other in others) for at in second[3:-1]]  # once both are under way
    assert len(apart) >= 2
    assert sorted(apart)[len(apart) // 2] < gap_s / 4  # each by its own clock: half a gap


async def test_an_answer_that_has_ended_waits_for_no_tick(
    agent: Agent, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "until_tick", lambda now_s, gap_s: 60.0)
    engine.words, engine.gap_seconds = ["word"], 0.05  # its usage and its end come by themselves
    reply = await agent.ask(frame_gap_ms=48)
    await reply.all()
    assert isinstance(reply.end, protocol.End)
    assert reply.text == "word"


async def test_nobody_who_wants_no_gap_waits_for_one(agent: Agent, engine: FakeEngine) -> None:
    engine.words, engine.gap_seconds = [f"w{i} " for i in range(20)], 0.015
    reply = await agent.ask()
    await reply.all()
    assert len(reply.deltas) > 10


async def test_engine_is_asked_for_ids_and_usage_whatever_the_body_says(
    agent: Agent, engine: FakeEngine
) -> None:
    await (await agent.ask()).all()
    body = engine.bodies[-1]
    assert body["stream"] is True
    assert body["return_token_ids"] is True
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert body["model"] == "engine-name"
    assert body["max_tokens"] == 9


async def test_whole_answer_comes_in_one_delta(agent: Agent, engine: FakeEngine) -> None:
    engine.gap_seconds = 0.02
    reply = await agent.ask(stream=False, credit=1)
    await reply.all()
    (delta,) = reply.deltas
    (choice,) = delta.choices
    assert (choice.role, choice.content, choice.finish_reason) == ("assistant", "Hello world", "stop")
    assert choice.token_ids == [100, 101, 102, 103]
    assert isinstance(reply.end, protocol.End)


async def test_long_whole_answer_is_cut_at_the_frame_limit(agent: Agent, engine: FakeEngine) -> None:
    engine.words = ["x" * 1000] * 600
    reply = await agent.ask(stream=False)
    await reply.all()
    assert reply.text == "x" * 600_000
    assert 3 <= len(reply.deltas) <= 20


async def test_heartbeats_fill_silence(
    agent: Agent, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "HEARTBEAT_MS", 100)
    engine.gap_seconds = 0.25
    reply = await agent.ask(stream=False)
    frames = await reply.all()
    assert sum(isinstance(frame, protocol.Heartbeat) for frame in frames) >= 4
    assert reply.text == "Hello world"


async def test_without_credit_the_engine_is_not_read(agent: Agent, engine: FakeEngine) -> None:
    async def flood(response: aiohttp.web.StreamResponse) -> None:
        for i in range(20_000):
            await engine.event(
                response, {"choices": [{"index": 0, "delta": {"content": f"{i} " + "y" * 500}}]}
            )
        await response.write(b"data: [DONE]\n\n")

    engine.script = flood
    reply = await agent.ask(credit=2)
    await reply.next()
    await reply.next()
    await reply.next()
    with pytest.raises(nats.errors.TimeoutError):
        await reply.next(0.5)
    stopped_at = engine.written
    await asyncio.sleep(0.3)
    assert engine.written == stopped_at < 12_000_000
    reply.reader.grant(4)
    await reply.control(protocol.Credit(reply.request.id, 4))
    await reply.next()
    await reply.next()
    assert len(reply.deltas) == 4
    await reply.control(protocol.Cancel(reply.request.id))
    await reply.all()
    assert isinstance(reply.end, protocol.Failed)
    assert reply.end.code is protocol.FailureCode.CANCELLED


async def test_topping_up_credit_lets_the_whole_answer_through(agent: Agent, engine: FakeEngine) -> None:
    engine.words = [f"w{i} " for i in range(60)]
    engine.gap_seconds = 0.002
    reply = await agent.ask(credit=4)
    while not reply.reader.is_done:
        await reply.next()
        if (up_to := reply.reader.top_up(4)) is not None:
            await reply.control(protocol.Credit(reply.request.id, up_to))
    assert reply.text == "".join(engine.words)


async def test_cancel_aborts_in_the_engine(agent: Agent, engine: FakeEngine) -> None:
    engine.words = ["word "] * 10_000
    engine.gap_seconds = 0.01
    reply = await agent.ask(credit=100_000)
    while not reply.deltas:
        await reply.next()
    await reply.control(protocol.Cancel(reply.request.id))
    async with asyncio.timeout(5):
        await engine.aborted.wait()
    await reply.all()
    assert reply.end.code is protocol.FailureCode.CANCELLED
    assert agent.service._relays == {}


async def test_engine_that_dies_in_mid_stream_fails_the_request(agent: Agent, engine: FakeEngine) -> None:
    async def die(response: aiohttp.web.StreamResponse) -> None:
        await engine.event(response, {"choices": [{"index": 0, "delta": {"content": "half"}}]})
        await asyncio.sleep(0.05)
        response._req.transport.abort()

    engine.script = die
    reply = await agent.ask()
    await reply.all()
    assert reply.text == "half"
    assert reply.end.code is protocol.FailureCode.ENGINE_DOWN
    assert reply.end.is_retriable


@pytest.mark.parametrize(
    "data",
    [
        b"data: {nonsense\n\n",
        b'data: {"choices": 5}\n\n',
        b'data: {"choices": [{"index": 4096, "delta": {"content": "a"}}]}\n\n',
        b'data: {"choices": [{"index": 0, "delta": {"content": "a"}, "token_ids": [-4]}]}\n\n',
        b'data: {"choices": [{"index": 0, "delta": {"content": "\xff\xfe"}}]}\n\n',
        b"data: " + b"[" * 100_000 + b"\n\n",
        b"data: " + b"x" * (3 * 1024 * 1024),
    ],
    ids=["not json", "wrong type", "index", "negative id", "not UTF-8", "deep nesting", "endless event"],
)
async def test_malformed_stream_fails_the_request(agent: Agent, engine: FakeEngine, data: bytes) -> None:
    async def speak(response: aiohttp.web.StreamResponse) -> None:
        await response.write(data)
        await response.write(b"data: [DONE]\n\n")

    engine.script = speak
    reply = await agent.ask()
    await reply.all()
    assert isinstance(reply.end, protocol.Failed)
    assert reply.end.code is protocol.FailureCode.INTERNAL
    assert "engine" in reply.end.message  # and not an error of the agent's own
    assert reply.deltas == []


async def test_stream_without_an_end_mark_fails(agent: Agent, engine: FakeEngine) -> None:
    async def stop_early(response: aiohttp.web.StreamResponse) -> None:
        await engine.event(response, {"choices": [{"index": 0, "delta": {"content": "half"}}]})

    engine.script = stop_early
    reply = await agent.ask()
    await reply.all()
    assert reply.end.code is protocol.FailureCode.ENGINE_DOWN


async def test_error_event_after_200_fails_the_request(agent: Agent, engine: FakeEngine) -> None:
    async def err(response: aiohttp.web.StreamResponse) -> None:
        await engine.event(response, {"error": {"message": "out of memory", "code": 500}})

    engine.script = err
    reply = await agent.ask()
    await reply.all()
    assert reply.end.code is protocol.FailureCode.ENGINE_DOWN
    assert "out of memory" in reply.end.message


async def test_a_refusal_inside_the_stream_is_the_requests_fault_not_the_engines(
    agent: Agent, engine: FakeEngine
) -> None:
    """vLLM answers 200 before it has looked at token ids and grammars."""

    async def refuse(response: aiohttp.web.StreamResponse) -> None:
        message = "Token id 999999 is out of vocabulary"
        await engine.event(response, {"error": {"message": message, "type": "BadRequestError", "code": 400}})
        await response.write(b"data: [DONE]\n\n")

    engine.script = refuse
    reply = await agent.ask()
    await reply.all()
    assert (reply.end.code, reply.end.is_retriable) == (protocol.FailureCode.BAD_REQUEST, False)
    assert "out of vocabulary" in reply.end.message


async def test_endless_stream_is_capped(
    agent: Agent, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "REPLY_BYTES_MAX", 300_000)

    async def flood(response: aiohttp.web.StreamResponse) -> None:
        while True:
            await engine.event(response, {"choices": [{"index": 0, "delta": {"content": "z" * 2000}}]})

    engine.script = flood
    reply = await agent.ask(credit=100_000)
    await reply.all()
    assert isinstance(reply.end, protocol.Failed)
    assert not reply.end.is_retriable
    assert len(reply.text) < 300_000
    async with asyncio.timeout(5):
        await engine.aborted.wait()


async def test_deadline_ends_the_request_and_aborts(agent: Agent, engine: FakeEngine) -> None:
    engine.words = ["word "] * 1000
    engine.gap_seconds = 0.02
    reply = await agent.ask(deadline_ms=300, credit=10_000)
    await reply.all()
    assert reply.end.code is protocol.FailureCode.DEADLINE
    async with asyncio.timeout(5):
        await engine.aborted.wait()


async def test_nonsense_usage_is_dropped(agent: Agent, engine: FakeEngine) -> None:
    async def lie(response: aiohttp.web.StreamResponse) -> None:
        for bad in (b"-5", b"NaN", b"9223372036854775808", b'"7"', b"1e3", b"true"):
            await response.write(
                b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}],'
                b' "usage": {"prompt_tokens": 3, "completion_tokens": ' + bad + b"}}\n\n"
            )
        await response.write(b"data: [DONE]\n\n")

    engine.script = lie
    reply = await agent.ask()
    await reply.all()
    assert reply.text == "aaaaaa"
    assert isinstance(reply.end, protocol.End)
    assert (reply.end.prompt_tokens, reply.end.completion_tokens) == (3, None)


async def test_missing_usage_is_told_as_unknown(agent: Agent, engine: FakeEngine) -> None:
    async def silent(response: aiohttp.web.StreamResponse) -> None:
        await engine.event(response, {"choices": [{"index": 0, "delta": {"content": "a"}}]})
        await response.write(b"data: [DONE]\n\n")

    engine.script = silent
    reply = await agent.ask()
    await reply.all()
    assert isinstance(reply.end, protocol.End)
    assert (reply.end.prompt_tokens, reply.end.completion_tokens) == (None, None)


async def test_running_counts_never_shrink(agent: Agent, engine: FakeEngine) -> None:
    async def wobble(response: aiohttp.web.StreamResponse) -> None:
        for count in (7, 2, 4):
            chunk = {"choices": [{"index": 0, "delta": {"content": "a"}}], "usage": usage(5, count)}
            await engine.event(response, chunk)
            await asyncio.sleep(0.02)
        await response.write(b"data: [DONE]\n\n")

    engine.script = wobble
    reply = await agent.ask()
    await reply.all()
    assert {delta.completion_tokens for delta in reply.deltas} == {7}
    assert reply.end.completion_tokens == 7


@pytest.mark.parametrize("drip", [b"", b"x"], ids=["stall", "slow drip inside one event"])
async def test_an_engine_that_says_nothing_whole_is_given_up(
    agent: Agent, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, drip: bytes
) -> None:
    """Bytes are no sign of life, only events are: a byte now and then would hold a place for ever."""
    monkeypatch.setattr(relay, "IDLE_MS_MAX", 1_000)

    async def stall(response: aiohttp.web.StreamResponse) -> None:
        await engine.event(response, {"choices": [{"index": 0, "delta": {"content": "half"}}]})
        await response.write(b"data: {")
        while True:
            await response.write(drip)
            await asyncio.sleep(0.05)

    engine.script = stall
    reply = await agent.ask()
    async with asyncio.timeout(8):
        await reply.all()
    assert reply.text == "half"
    assert (reply.end.code, reply.end.is_retriable) == (protocol.FailureCode.ENGINE_DOWN, True)
    async with asyncio.timeout(5):
        await engine.aborted.wait()


async def test_a67_oversized_input_never_reaches_an_engine(agent: Agent, engine: FakeEngine) -> None:
    huge = msgspec.json.encode({"messages": [{"role": "user", "content": "x" * protocol.BODY_BYTES_MAX}]})
    deep = b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    for body in (huge, deep, b'{"messages": NaN}', b'"' * 10, b""):
        refused = (await (await agent.ask(body=body)).all())[-1]
        assert (refused.code, refused.is_retriable) == (protocol.FailureCode.BAD_REQUEST, False)
    assert engine.bodies == []


async def test_a_request_sent_twice_is_served_once(agent: Agent, engine: FakeEngine) -> None:
    engine.gap_seconds = 0.2
    first = await agent.ask(id="same")
    await first.next()
    second = await agent.ask(id="same")
    assert (await second.all())[-1].code is protocol.FailureCode.INTERNAL
    await first.all()
    assert first.text == "Hello world"
    assert len(engine.bodies) == 1


async def test_drain_during_load_loses_nothing(agent: Agent, engine: FakeEngine) -> None:
    engine.words = [f"w{i} " for i in range(20)]
    engine.gap_seconds = 0.02
    replies = [await agent.ask(stream=i % 2 == 0) for i in range(4)]
    for reply in replies:
        assert isinstance(await reply.next(), protocol.Accepted)
    agent.service.stop()
    await asyncio.gather(*(reply.all() for reply in replies))
    assert [reply.text for reply in replies] == ["".join(engine.words)] * 4
    assert all(isinstance(reply.end, protocol.End) for reply in replies)


async def test_an_operators_wrong_clock_changes_nothing(
    agent: Agent, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A83: durations are measured on a steady clock, so deadlines hold whatever the time of day says."""
    hour_ms = 3_600_000
    monkeypatch.setattr(agent.service, "_now_ms", lambda: time.time_ns() // 1_000_000 + hour_ms)
    reply = await agent.ask(deadline_ms=5_000)
    await reply.all()
    assert reply.text == "Hello world"
    engine.words, engine.gap_seconds = ["word "] * 1000, 0.02
    cut = await agent.ask(deadline_ms=300, credit=10_000)
    async with asyncio.timeout(3):
        await cut.all()
    assert cut.end.code is protocol.FailureCode.DEADLINE


async def test_the_operators_screen_tells_speed_and_earnings(agent: Agent, engine: FakeEngine) -> None:
    """4 tokens at $0.20 and 5 at $0.10 per million cost 1,300 nano-dollars; 80 % are the operator's."""
    await (await agent.ask()).all()
    async with asyncio.timeout(5):
        while json.loads((agent.folder / "status.json").read_bytes())["earned_today_nano"] == 0:
            await asyncio.sleep(0.05)
    assert json.loads((agent.folder / "status.json").read_bytes())["earned_today_nano"] == 1040


async def test_engine_that_does_not_know_token_ids_is_asked_again_without(
    agent: Agent, engine: FakeEngine
) -> None:
    engine.knows_token_ids = False
    reply = await agent.ask()
    await reply.all()
    assert reply.text == "Hello world"
    assert reply.deltas[0].prompt_token_ids is None
    before = len(engine.bodies)
    await (await agent.ask()).all()
    assert len(engine.bodies) == before + 1  # remembered


async def test_a_buyer_who_has_the_engine_name_an_option_does_not_switch_it_off(
    agent: Agent, engine: FakeEngine
) -> None:
    """vLLM quotes what it refuses, such as a key of `logit_bias`; ids would be lost to all who come after."""
    engine.refusal = "logit_bias contains key(s) that cannot be converted: ['return_token_ids']"
    reply = await agent.ask()
    await reply.all()
    assert reply.end.code is protocol.FailureCode.BAD_REQUEST
    assert "logit_bias" in reply.end.message
    engine.refusal = ""
    reply = await agent.ask()
    await reply.all()
    assert [i for delta in reply.deltas for choice in delta.choices for i in choice.token_ids or ()]
    assert "return_token_ids" in engine.bodies[-1]


async def test_refusals(agent: Agent, engine: FakeEngine) -> None:
    async def code(**changes: object) -> protocol.FailureCode:
        return (await (await agent.ask(**changes)).all())[-1].code

    assert await code(model="other") is protocol.FailureCode.UNKNOWN_MODEL
    assert await code(body=b"[1]") is protocol.FailureCode.BAD_REQUEST
    assert await code(body=b"{") is protocol.FailureCode.BAD_REQUEST
    assert await code(kind="image") is protocol.FailureCode.BAD_REQUEST


async def test_over_capacity_is_refused(agent: Agent, engine: FakeEngine) -> None:
    engine.gap_seconds = 0.5
    replies = [await agent.ask() for _ in range(4)]
    for reply in replies:
        assert isinstance(await reply.next(), protocol.Accepted)
    refused = (await (await agent.ask()).all())[-1]
    assert (refused.code, refused.is_retriable) == (protocol.FailureCode.OVERLOADED, True)
    for reply in replies:
        await reply.control(protocol.Cancel(reply.request.id))
        await reply.all()


async def test_drain_finishes_running_requests_and_refuses_new_ones(agent: Agent, engine: FakeEngine) -> None:
    engine.gap_seconds = 0.3
    running = await agent.ask()
    await running.next()
    agent.service.stop()
    await agent.until_status(lambda status: status.is_draining)
    refused = (await (await agent.ask()).all())[-1]
    assert refused.code is protocol.FailureCode.DRAINING
    await running.all()
    assert running.text == "Hello world"


async def test_status_tells_prices_and_load(agent: Agent, engine: FakeEngine) -> None:
    status = agent.statuses[-1]
    (model,) = status.models
    assert (model.price_in, model.price_out, model.capacity) == (100_000_000, 200_000_000, 4)
    assert model.waiting == 3
    assert (agent.folder / "status.json").exists()


async def test_changed_prices_are_taken_over_and_broken_settings_are_not(
    agent: Agent, engine: FakeEngine
) -> None:
    reply = protocol.EnrollReply(NODE, "nats://127.0.0.1:1")
    write_first_config(agent.folder, reply, api="http://127.0.0.1:1", name="")
    (settings,) = agent.service.config.engines
    add_engine(agent.folder, settings)
    set_price(agent.folder, "m", price_in="0.0007", price_out=None, per="1k")
    status = await agent.until_status(lambda status: status.models[0].price_in == 700_000_000)
    assert status.models[0].price_out == 200_000_000
    (agent.folder / "config.toml").write_text("nonsense")
    seen = status.seq
    status = await agent.until_status(lambda status: status.seq > seen + 1)
    assert status.models[0].price_in == 700_000_000


async def test_agent_returns_when_the_fabric_does(engine: FakeEngine, tmp_path: Path) -> None:
    port = free_port()
    url = f"nats://127.0.0.1:{port}"
    model = Model(name="m", input=Decimal(1), output=Decimal(2), context=2048, engine_name="engine-name")
    settings = EngineSettings(name="fake", kind="attach", url=engine.url, models=[model])
    config = Config(node_id=NODE, api="http://127.0.0.1:1", nats_url=url, engines=[settings])
    service = Service(config, create_identity(tmp_path), tmp_path, version="test")
    running = asyncio.create_task(service.run())
    for _ in range(2):
        server = start_server(port, tmp_path / "nats.log")
        gateway = await nats.connect(url)
        statuses = await gateway.subscribe(protocol.status_subject(NODE))
        while not protocol.decode_status((await statuses.next_msg(15)).data).models[0].is_ready:
            pass
        reply = Reply(gateway)
        await reply.send()
        await reply.all()
        assert reply.text == "Hello world"
        await gateway.close()
        server.kill()
        server.wait()
    service.stop()
    await asyncio.wait_for(running, 15)


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "gathering"])
async def test_a_killed_fabric_ends_what_was_asked_over_it(
    engine: FakeEngine, tmp_path: Path, stream: bool
) -> None:
    """NATS lets nobody answer over a new connection what came over the old: it would be work for nothing."""
    port = free_port()
    model = Model(name="m", input=Decimal(1), output=Decimal(2), context=2048, engine_name="engine-name")
    settings = EngineSettings(name="fake", kind="attach", url=engine.url, models=[model])
    config = Config(
        node_id=NODE, api="http://127.0.0.1:1", nats_url=f"nats://127.0.0.1:{port}", engines=[settings]
    )
    service = Service(config, create_identity(tmp_path), tmp_path, version="test")
    server = start_server(port, tmp_path / "nats.log")
    running = asyncio.create_task(service.run())
    gateway = await nats.connect(config.nats_url, allow_reconnect=False)
    statuses = await gateway.subscribe(protocol.status_subject(NODE))
    while not protocol.decode_status((await statuses.next_msg(15)).data).models[0].is_ready:
        pass
    engine.words, engine.gap_seconds = ["word "] * 10_000, 0.02
    warmed = engine.started
    await Reply(gateway, stream=stream, credit=100_000).send()
    async with asyncio.timeout(10):
        while engine.started == warmed:
            await asyncio.sleep(0.02)
    engine.aborted.clear()
    server.kill()
    server.wait()
    async with asyncio.timeout(10):
        await engine.aborted.wait()
        while service._relays:
            await asyncio.sleep(0.02)
    service.stop()
    await asyncio.wait_for(running, 20)
    await gateway.close()
    entries = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [entry["outcome"] for entry in entries] == [protocol.FailureCode.CANCELLED]


async def test_several_engines_and_models_each_by_its_own_name(
    engine: FakeEngine, gateway: Client, nats_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two names of one engine, and an engine that is down and takes nothing with it."""
    monkeypatch.setattr(protocol, "STATUS_EVERY_MS", 300)

    def offered(name: str) -> Model:
        return Model(name=name, input=Decimal(1), output=Decimal(2), context=2048, engine_name="engine-name")

    engines = [
        EngineSettings(name="up", kind="attach", url=engine.url, models=[offered("a"), offered("b")]),
        EngineSettings(name="down", kind="attach", url="http://127.0.0.1:1", models=[offered("c")]),
    ]
    config = Config(node_id=NODE, api="http://127.0.0.1:1", nats_url=nats_url, engines=engines)
    service = Service(config, create_identity(tmp_path), tmp_path, version="test")
    made = Agent(service, gateway, tmp_path)

    async def on_status(message: nats.aio.msg.Msg) -> None:
        made.statuses.append(protocol.decode_status(message.data))

    await gateway.subscribe(protocol.status_subject(NODE), cb=on_status)
    await gateway.flush()
    running = asyncio.create_task(service.run())
    status = await made.until_status(lambda status: status.models[0].is_ready)
    assert [(model.name, model.is_ready) for model in status.models] == [
        ("a", True),
        ("b", True),
        ("c", False),
    ]
    for name in ("a", "b"):
        reply = await made.ask(model=name)
        await reply.all()
        assert reply.text == "Hello world"
    refused = (await (await made.ask(model="c")).all())[-1]
    assert (refused.code, refused.is_retriable) == (protocol.FailureCode.ENGINE_DOWN, True)
    service.stop()
    await asyncio.wait_for(running, 10)


@pytest.mark.slow
async def test_killed_agent_frees_its_engine_and_its_successor_serves(
    engine: FakeEngine, gateway: Client, nats_url: str, tmp_path: Path
) -> None:
    """kill -9 in mid-answer: the engine's connection goes with the process, no lock and no end frame stay."""
    create_identity(tmp_path)
    write_settings(tmp_path, node_id=NODE, api="http://127.0.0.1:1", nats_url=nats_url)
    model = Model(name="m", input=Decimal(1), output=Decimal(2), context=2048, engine_name="engine-name")
    add_engine(tmp_path, EngineSettings(name="fake", kind="attach", url=engine.url, models=[model]))
    statuses = await gateway.subscribe(protocol.status_subject(NODE))
    command = [sys.executable, "-m", "node_agent.cli", "run", "--data-dir", str(tmp_path)]
    engine.words, engine.gap_seconds = ["word "] * 1000, 0.02
    for is_last in (False, True):
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
        while not protocol.decode_status((await statuses.next_msg(30)).data).models[0].is_ready:
            pass
        engine.aborted.clear()
        reply = Reply(gateway, id=f"killed-{is_last}", credit=10_000)
        await reply.send()
        while not reply.deltas:
            await reply.next()
        process.kill()
        process.wait()
        async with asyncio.timeout(5):
            await engine.aborted.wait()
        with contextlib.suppress(nats.errors.TimeoutError):
            while True:
                await reply.next(0.3)
        assert not reply.reader.is_done
        while statuses.pending_msgs:
            await statuses.next_msg(1)


@pytest.mark.parametrize(
    "asked",
    [{"credit": 100_000}, {"credit": 3}, {"stream": False}],
    ids=["streaming", "out of credit", "gathering"],
)
async def test_an_answer_nobody_listens_to_ends_and_frees_its_place(
    agent: Agent,
    engine: FakeEngine,
    nats_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: dict[str, object],
) -> None:
    """A gateway was killed: it cancels nothing, and the engine must not go on for minutes for nobody."""
    caplog.set_level("INFO", logger="node_agent")
    monkeypatch.setattr(relay, "HEARTBEAT_MS", 300)
    monkeypatch.setattr(protocol, "LISTENERS_ASKED_MS", 200)
    engine.words, engine.gap_seconds = ["word "] * 10_000, 0.02
    doomed, lucky = await nats.connect(nats_url, allow_reconnect=False), await agent.ask(credit=100_000)
    reply = Reply(doomed, **asked)
    await reply.send()
    while type(await reply.next()) is protocol.Accepted:
        pass
    doomed._transport.close()  # as the kernel does for a killed process
    async with asyncio.timeout(10):
        await engine.aborted.wait()
        while len(agent.service._relays) > 1:
            await asyncio.sleep(0.02)
    assert [record.args for record in caplog.records if "nobody listens" in record.msg] == [
        (reply.request.id,)
    ]
    heard = len(lucky.frames)
    while len(lucky.frames) < heard + 20:  # whoever is listened to goes on
        assert isinstance(await lucky.next(), protocol.Accepted | protocol.Delta)
    await lucky.control(protocol.Cancel(lucky.request.id))
    await agent.until_status(lambda status: status.models[0].running == 0)
    await doomed.close()


async def test_an_engine_that_closes_kept_connections_fails_no_request() -> None:
    """It answers one request a connection and drops the next unread, as idle limits do in the worst case."""
    served = []

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"Content-Length: (\d+)", head)[1]))
        content = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        await reader.read(1)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(once, "127.0.0.1", 0)
    client = OpenAIClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "")
    for _ in range(3):
        await client.warm_up("m")
    await client.close()
    server.close()
    await asyncio.gather(*served)
    assert len(served) == 3


async def test_nothing_said_is_written_down(
    agent: Agent, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="node_agent")
    engine.words = [SECRET, " ", SECRET]
    reply = await agent.ask()
    await reply.all()
    assert SECRET in reply.text
    engine.script = lambda response: response.write(b"data: {" + SECRET.encode() + b"\n\n")
    await (await agent.ask()).all()
    await agent.until_status(lambda status: status.served >= 1)
    written = b"".join(path.read_bytes() for path in agent.folder.rglob("*") if path.is_file())
    assert SECRET.encode() not in written
    assert SECRET not in caplog.text
    entries = [json.loads(line) for line in (agent.folder / "journal.jsonl").read_text().splitlines()]
    assert [entry["outcome"] for entry in entries] == ["ok", "internal"]
    assert entries[0]["completion_tokens"] == 3
    assert re.fullmatch(r"r\d+", entries[0]["id"])
