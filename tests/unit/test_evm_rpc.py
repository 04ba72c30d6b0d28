"""A provider that misbehaves: each way is an error type, none is a wrong answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from chain.errors import Malformed, Reverted, RpcUnavailable
from chain.evm.rpc import BATCH_MAX, Call, JsonRpc, NodeError, data, quantity

Provide = Callable[[Callable[[object], web.Response]], Awaitable[JsonRpc]]


@pytest.fixture
async def provide() -> AsyncIterator[Provide]:
    """Start a provider that answers as told; gives the client of it."""
    opened: list[JsonRpc | TestServer] = []

    async def start(answer: Callable[[object], web.Response]) -> JsonRpc:
        async def handle(request: web.Request) -> web.Response:
            return answer(json.loads(await request.text()))

        application = web.Application()
        application.router.add_post("/", handle)
        server = TestServer(application, host="127.0.0.1")
        await server.start_server()
        client = JsonRpc(str(server.make_url("/")), timeout_s=2, answer_bytes_max=10_000)
        opened.extend((client, server))
        return client

    yield start
    for each in opened:
        await (each.aclose() if isinstance(each, JsonRpc) else each.close())


def results(body: object, value: object = "0x1") -> list[dict[str, object]]:
    assert isinstance(body, list)
    return [{"jsonrpc": "2.0", "id": each["id"], "result": value} for each in body]


async def test_answers_come_in_the_order_of_the_calls(provide: Provide) -> None:
    def backwards(body: object) -> web.Response:
        assert isinstance(body, list)
        return web.json_response([{"id": b["id"], "result": b["method"]} for b in reversed(body)])

    rpc = await provide(backwards)
    answers = await rpc.batch([Call(f"m{i}") for i in range(5)])
    assert [a.value(str) for a in answers] == [f"m{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda _: web.Response(status=500, text="[]"), RpcUnavailable),
        (lambda _: web.Response(status=302, headers={"Location": "http://127.0.0.1:9/"}), RpcUnavailable),
        (lambda _: web.Response(body=b"x" * 20_000), RpcUnavailable),
        (lambda _: web.Response(text="<html>"), Malformed),
        (lambda _: web.json_response([]), Malformed),
        (lambda body: web.json_response(results(body)[:1]), Malformed),
        (lambda body: web.json_response(results(body)[:1] * 2), Malformed),
        (lambda body: web.json_response([r | {"id": 10**9} for r in results(body)]), Malformed),
        (lambda _: web.json_response({"id": None, "error": {"code": -32005, "message": "slow"}}), NodeError),
    ],
    ids=["500", "redirect", "huge", "html", "empty", "one missing", "one twice", "foreign ids", "limited"],
)
async def test_a_bad_batch_is_an_error(
    provide: Provide, answer: Callable[[object], web.Response], error: type[Exception]
) -> None:
    rpc = await provide(answer)
    with pytest.raises(error):
        await rpc.batch([Call("a"), Call("b")])


async def test_one_failed_call_leaves_the_others(provide: Provide) -> None:
    def mixed(body: object) -> web.Response:
        good, reverted, broken = results(body)
        words = "08c379a0" + "20".rjust(64, "0") + "5".rjust(64, "0") + b"nope!".hex().ljust(64, "0")
        del reverted["result"], broken["result"]
        reverted["error"] = {"code": 3, "message": "execution reverted", "data": "0x" + words}
        broken["error"] = {"code": -32000, "message": "header not found"}
        return web.json_response([good, reverted, broken])

    rpc = await provide(mixed)
    good, reverted, broken = await rpc.batch([Call("a"), Call("b"), Call("c")])
    assert good.value(str) == "0x1"
    with pytest.raises(Reverted, match=r"^nope!$"):
        reverted.value(str)
    with pytest.raises(NodeError, match="header not found"):
        broken.value(str)
    with pytest.raises(Malformed):
        good.value(int)


async def test_a_closed_port_is_unavailable() -> None:
    async with JsonRpc("http://127.0.0.1:9", timeout_s=2) as rpc:
        with pytest.raises(RpcUnavailable):
            await rpc.call("eth_chainId", shape=str)


async def test_a_batch_is_bounded(provide: Provide) -> None:
    rpc = await provide(lambda body: web.json_response(results(body)))
    for size in (0, BATCH_MAX + 1):
        with pytest.raises(ValueError, match="a batch has"):
            await rpc.batch([Call("a")] * size)


@pytest.mark.parametrize("text", ["", "0x", "1", "0xg", "0x" + "f" * 65, "-0x1", "0x1\n", "٠x1"])
def test_what_is_no_quantity_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        quantity(text)


@pytest.mark.parametrize("text", ["", "0", "0x0", "0xzz", "0x00\n"])
def test_what_is_no_data_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        data(text)
