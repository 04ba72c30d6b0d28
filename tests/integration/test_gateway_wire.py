"""The hot route's use of uvicorn's internals, on raw sockets."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fabric_parts import eventually
from gateway_parts import (
    DOLLAR,
    HELLO,
    STREAM,
    Reply,
    RunningGateway,
    StubNode,
    running_gateway,
    said,
    saying,
)

from marketplace.gateway import hot_route
from marketplace.gateway.hot_route import HotRouteProtocol
from marketplace.platform.embedded_nats import EmbeddedNats
from node_agent import protocol
from node_agent.protocol import Accepted, Delta, End, TokenLogprob, TopLogprob


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


def _request(gateway: RunningGateway, body: object, *, version: str = "1.1", extra: str = "") -> bytes:
    content = json.dumps(body).encode()
    return _head(gateway, version=version, extra=f"Content-Length: {len(content)}\r\n{extra}") + content


def _head(gateway: RunningGateway, *, version: str = "1.1", extra: str) -> bytes:
    return (
        f"POST /v1/chat/completions HTTP/{version}\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n"
        f"{extra}\r\n"
    ).encode()


async def _open(gateway: RunningGateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = gateway.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def test_keep_alive_pipelining_and_chunked_bodies(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["ok"], pause_s=0.05))
    content = json.dumps(HELLO).encode()
    chunked = _head(gateway, extra="Transfer-Encoding: chunked\r\n")
    chunked += b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
    other = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = await gateway.raw(_request(gateway, HELLO) + other + chunked + _request(gateway, STREAM) + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 5
    kinds = [answer.index(mark) for mark in (b'"chat.completion"', b'"status":"ok"', b"[DONE]")]
    assert kinds == sorted(kinds)
    assert answer.endswith(b'{"status":"ok"}')


async def test_http_1_0_gets_no_chunks_and_the_end_of_the_connection(gateway: RunningGateway) -> None:
    """nginx speaks 1.0 to what it proxies unless told otherwise."""
    await gateway.add_node(saying(["Hel", "lo"]))
    answer = await gateway.raw(_request(gateway, STREAM, version="1.0"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


async def test_a_body_is_asked_for_with_100_continue(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["ok"]))
    reader, writer = await _open(gateway)
    content = json.dumps(HELLO).encode()
    writer.write(_head(gateway, extra=f"Content-Length: {len(content)}\r\nExpect: 100-continue\r\n"))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(content)
    assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
    writer.close()
    await writer.wait_closed()


async def test_a_body_that_is_too_large_is_refused_before_it_is_read(gateway: RunningGateway) -> None:
    size = 1024 * 1024 + 1
    told = _head(gateway, extra=f"Content-Length: {size}\r\n")
    answer = await gateway.raw(told)  # not a byte of it was sent
    assert b" 413 " in answer.splitlines()[0]
    assert b"body_too_large" in answer
    untold = _head(gateway, extra="Transfer-Encoding: chunked\r\n") + b"%x\r\n" % size + b" " * size
    answer = await gateway.raw(untold)
    assert b" 413 " in answer.splitlines()[0]  # and not lost in a reset


async def test_nonsense_behind_a_request_ends_both(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["a"] * 100, pause_s=0.05))
    answer = await gateway.raw(_request(gateway, HELLO) + b"\x00\x01\r\n\r\n")
    assert b" 400 " in answer.splitlines()[0]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    async with asyncio.timeout(5):
        while len(node.cancelled) < len(node.requests):
            await asyncio.sleep(0.01)
    await gateway.assert_proved()


async def test_without_a_key_no_body_is_waited_for(gateway: RunningGateway) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    assert b" 401 " in (await gateway.raw(head)).splitlines()[0]


async def test_slow_and_oversized_heads_are_refused(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (b"/v1/chat/completions", b"/healthz"):
        large = b"POST " + path + b" HTTP/1.1\r\nX: " + b"x" * 70_000
        assert b" 431 " in (await gateway.raw(large + b"\r\n\r\n")).splitlines()[0]
        assert b" 431 " in (await gateway.raw(large * 8)).splitlines()[0]  # and one that never ends
    monkeypatch.setattr(hot_route, "HEADER_S_MAX", 0.2)
    assert b" 408 " in (await gateway.raw(b"POST /v1/chat/comp")).splitlines()[0]
    assert await gateway.raw(b"") == b""  # who asks nothing is told nothing
    assert await gateway.raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n\r\n\r\n")  # ends, too


async def test_slow_bodies_are_refused(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_route, "BODY_S_MAX", 0.2)
    answer = await gateway.raw(_head(gateway, extra="Content-Length: 100\r\n") + b"{")
    assert b" 408 " in answer.splitlines()[0]
    assert b"body_timeout" in answer
    monkeypatch.setattr(hot_route, "HEADER_S_MAX", 0.2)
    monkeypatch.setattr(hot_route, "REQUEST_S_MAX", 0.2)
    other = b"POST /api/auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    assert b" 408 " in (await gateway.raw(other)).splitlines()[0]


async def test_a_slow_next_request_does_not_tear_the_answer_before_it(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    await gateway.add_node(saying(["a"] * 20, pause_s=0.03))
    monkeypatch.setattr(hot_route, "HEADER_S_MAX", 0.1)
    answer = await gateway.raw(_request(gateway, STREAM) + b"POST /v1/cha")
    assert answer.count(b'"content":"a"') == 20
    assert b"[DONE]" in answer


@pytest.mark.parametrize("pipelined", [False, True])
async def test_leaving_is_noticed_within_a_fifth_of_a_second(
    gateway: RunningGateway, pipelined: bool
) -> None:
    """Told in the node's tokens, one every 20 ms: a machine that is slow is slow for them too."""
    sent = [0]
    node = await gateway.add_node(_steady(300, sent))
    reader, writer = await _open(gateway)
    writer.write(_request(gateway, STREAM) + (_request(gateway, HELLO) if pipelined else b""))
    await reader.readuntil(b'"content":"a"')
    writer.close()
    before = sent[0]
    while gateway.process.fabric.nodes.in_flight:
        await asyncio.sleep(0.001)
    assert sent[0] - before <= 10
    async with asyncio.timeout(20):
        while not node.cancelled:
            await asyncio.sleep(0.005)
    row = await gateway.only_row()  # the request behind it was never begun
    assert row["status"] == 499
    assert 1 <= row["completion_tokens"] < 300
    assert len(node.requests) == 1
    await gateway.assert_proved()


def _steady(parts: int, sent: list[int]) -> Reply:
    """A token every 20 ms, counted in `sent`."""

    async def answer(node: StubNode, request: protocol.Request, reply: str) -> None:
        await node.send(reply, Accepted(0))
        for seq in range(1, parts + 1):
            await node.send(reply, Delta(seq, [said("a", finish="stop" if seq == parts else None)]))
            sent[0] = seq
            await asyncio.sleep(0.02)
        await node.send(reply, End(parts + 1))

    return answer


def _flood(parts: int, sent: list[int]) -> Reply:
    """Deltas of one token and twenty kilobytes, as fast as credit allows."""
    wide = [TokenLogprob("x", 0.0, None, [TopLogprob("y" * 1_000, 0.0)] * 20)]

    async def answer(node: StubNode, request: protocol.Request, reply: str) -> None:
        await node.send(reply, Accepted(0))
        for seq in range(1, parts + 1):
            while seq > node.credit[request.id] and request.id not in node.cancelled:
                await asyncio.sleep(0.005)
            if request.id in node.cancelled:
                return
            finish = "stop" if seq == parts else None
            await node.send(reply, Delta(seq, [said("x", finish=finish, logprobs=wide)]))
            sent[0] = seq
        await node.send(reply, End(parts + 1))

    return answer


async def test_a_slow_buyer_slows_the_node_and_gets_everything(gateway: RunningGateway) -> None:
    sent, parts = [0], 600
    await gateway.add_node(_flood(parts, sent))
    reader, writer = await _open(gateway)
    body = {**STREAM, "max_tokens": parts}
    writer.write(_request(gateway, body, extra="Connection: close\r\n"))
    await asyncio.sleep(0.5)
    while (seen := sent[0]) != (await asyncio.sleep(0.5), sent[0])[1]:
        pass
    assert 0 < seen < parts - protocol.CREDIT_DEFAULT  # what fits into two sockets and a window
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    await writer.wait_closed()
    assert answer.count(b'"content":"x"') == parts
    assert (await gateway.only_row())["completion_tokens"] == parts
    await gateway.assert_proved()


async def test_a_closed_connection_leaves_nothing_for_the_collector(gateway: RunningGateway) -> None:
    """Which comes rarely: buyers who open a connection for each request would have a gateway grow."""
    await gateway.add_node(saying(["ok"], pause_s=0.05))
    gc.collect()
    before = [o for o in gc.get_objects() if isinstance(o, HotRouteProtocol)]  # what is not this test's
    gc.disable()
    try:
        for body in (HELLO, STREAM):
            await gateway.raw(_request(gateway, body, extra="Connection: close\r\n"))
            _, writer = await _open(gateway)
            writer.write(_request(gateway, body) * 2)
            await asyncio.sleep(0.02)
            writer.transport.abort()  # in mid-answer, with another request behind it
            _, writer = await _open(gateway)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.sleep(0.02)
            writer.close()
            await writer.wait_closed()
        del writer
        await eventually(
            lambda: all(o in before for o in gc.get_objects() if isinstance(o, HotRouteProtocol)),
            within_s=20,  # a machine with much to do may still be charging what was cut
        )
    finally:
        gc.enable()


async def test_a_buyer_who_takes_nothing_is_let_go(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot_route, "SEND_S_MAX", 0.3)
    sent = [0]
    node = await gateway.add_node(_flood(600, sent))
    _, writer = await _open(gateway)
    writer.write(_request(gateway, {**STREAM, "max_tokens": 600}))
    async with asyncio.timeout(10):
        while not node.cancelled:
            await asyncio.sleep(0.05)
    assert (await gateway.only_row())["status"] == 499
    writer.transport.abort()
    await gateway.assert_proved()


# ---- the same service without the hot route


async def test_the_route_also_works_over_plain_asgi(gateway: RunningGateway) -> None:
    import httpx

    await gateway.add_node(saying(["Hel", "lo"]))
    transport = httpx.ASGITransport(app=gateway.process.app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://gateway", headers=gateway.headers
    ) as http:
        answer = await http.post("/v1/chat/completions", json=HELLO)
        stream = await http.post("/v1/chat/completions", json=STREAM)
        large = await http.post("/v1/chat/completions", content=b" " * (1024 * 1024 + 1))
        wrong = await http.post("/v1/chat/completions", json=HELLO, headers={"Authorization": "Bearer x"})
    assert answer.json()["choices"][0]["message"]["content"] == "Hello"
    assert stream.text.endswith("data: [DONE]\n\n")
    assert stream.text.count("data: {") == 2
    assert (large.status_code, wrong.status_code) == (413, 401)
    used = [int(reply.headers["x-ratelimit-remaining"]) for reply in (answer, stream, large)]
    assert used == [used[0], used[0] - 1, used[0] - 2]  # counted once each
    assert [row["status"] for row in await gateway.usage()] == [413, 200, 200]


async def test_leaving_is_noticed_over_asgi(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["a"] * 300, pause_s=0.01))
    content = json.dumps(STREAM).encode()
    begun, messages = asyncio.Event(), [{"type": "http.request", "body": content}]

    async def receive() -> dict[str, object]:
        if messages:
            return messages.pop()
        await begun.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        if b'"content":"a"' in bytes(message.get("body", b"")):  # type: ignore[call-overload]
            begun.set()

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
        "headers": [(b"authorization", f"Bearer {gateway.key}".encode())], "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await asyncio.wait_for(gateway.process.app(scope, receive, send), 5)  # type: ignore[arg-type]
    row = await gateway.only_row()
    assert row["status"] == 499
    async with asyncio.timeout(5):
        while not node.cancelled:
            await asyncio.sleep(0.01)


async def test_a_stop_in_mid_stream_cuts_no_request_that_follows(gateway: RunningGateway) -> None:
    """The stream's head has promised to keep the connection; the next answer's takes the promise back."""
    await gateway.add_node(saying(["a", "b", "c"], pause_s=0.05))
    reader, writer = await _open(gateway)
    writer.write(_request(gateway, STREAM))
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"connection: close" not in head
    for connection in list(gateway.server.server_state.connections):
        connection.shutdown()
    assert (await reader.readuntil(b"0\r\n\r\n")).rstrip(b"0\r\n").endswith(b"[DONE]")
    await asyncio.sleep(0.1)
    writer.write(_request(gateway, HELLO))
    answer = await asyncio.wait_for(reader.read(), 5)  # up to the end of the connection
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"connection: close" in answer
    writer.close()


async def test_a_stopping_process_waits_no_longer_than_a_moment_for_a_next_request(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot_route, "IDLE_CLOSE_S", 0.3)
    await gateway.add_node(saying(["a"] * 10, pause_s=0.05))  # longer than the moment
    reader, writer = await _open(gateway)
    writer.write(_request(gateway, STREAM))
    await reader.readuntil(b"\r\n\r\n")
    for connection in list(gateway.server.server_state.connections):
        connection.shutdown()
    rest = await asyncio.wait_for(reader.read(), 5)
    assert b"[DONE]" in rest
    writer.close()
