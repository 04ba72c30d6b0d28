"""Spot checks and canaries without engines: what is judged, how much waits, what an engine may say."""

from __future__ import annotations

import json
import random
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.platform.clock import SystemClock
from marketplace.platform.settings import ReferenceEngine
from marketplace.reputation.canaries import question
from marketplace.reputation.checks import BODY_BYTES_MAX, TEXT_CHARACTERS_MAX, WAITING_MAX, Checks, scorable
from marketplace.reputation.errors import ReferenceUnavailable
from marketplace.reputation.reference import Reference
from node_agent.protocol import ChoiceDelta, Delta, End, NodeId, Request, ToolCallDelta

ASKED = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "cache_salt": "s"}


def request(body: object = ASKED, *, model: str = "m", kind: str = "chat") -> Request:
    return Request(1, "r", model, json.dumps(body).encode(), stream=True, deadline_ms=1, kind=kind)


def checks(permille: int = 1000, chance: float = 0.0) -> Checks:
    nobody = cast("Any", None)
    return Checks(
        cast("AsyncEngine", None), SystemClock(), {"m": nobody}, permille=permille, chance=lambda: chance
    )


@pytest.mark.parametrize(
    "body",
    [
        b"\xff", b"[]", b"{}", b'{"messages": 5}', b'{"messages": [], "tools": [1]}',
        b'{"messages": [], "presence_penalty": 0.5}', b'{"messages": [], "temperature": "hot"}',
        b'{"messages": [], "pad": "%b"}' % (b"x" * BODY_BYTES_MAX),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_not_sampled(body: bytes) -> None:
    assert scorable(body) is None


def test_a_share_of_the_right_requests_is_sampled() -> None:
    node = NodeId("n-1")
    assert checks().watch(node, request()) is not None
    assert checks(permille=10, chance=0.5).watch(node, request()) is None
    assert checks(permille=0).watch(node, request()) is None
    assert checks().watch(node, request(model="other")) is None
    assert checks().watch(node, request(kind="completion")) is None


def test_only_so_many_and_so_much_waits() -> None:
    """A burst, an endless answer, a tool call, a broken answer: memory stays what it is."""
    sampled = checks()

    def answer(*frames: Delta, is_whole: bool = True) -> None:
        take = sampled.watch(NodeId("n-1"), request())
        if take is None:
            return
        for frame in frames:
            take(frame)
        if is_whole:
            take(End(9))

    answer(Delta(1, [ChoiceDelta(content="no end")]), is_whole=False)
    answer(Delta(1, [ChoiceDelta(content="a", tool_calls=[ToolCallDelta(0)])]))
    answer(Delta(1, [ChoiceDelta(content="b", reasoning="hm")]))
    answer()
    assert sampled._waiting.qsize() == 0
    answer(*[Delta(seq, [ChoiceDelta(content="x" * 1_000)]) for seq in range(1, 100)])
    sample = sampled._waiting.get_nowait()
    assert len(sample.text) == TEXT_CHARACTERS_MAX
    assert sample.characters < TEXT_CHARACTERS_MAX + 1_000
    for _ in range(WAITING_MAX * 2):
        answer(Delta(1, [ChoiceDelta(content="x")]))
    assert sampled._waiting.qsize() == WAITING_MAX


def test_canaries_vary_and_can_be_judged() -> None:
    chance = random.Random(1)
    made = [question(chance) for _ in range(200)]
    assert len({json.dumps(one) for one in made}) > 190
    assert all(scorable(json.dumps(one).encode()) for one in made)


async def test_an_engine_that_answers_in_pieces_too_long_or_nonsense() -> None:
    """vLLM's log-probabilities come in many pieces (a bug once: only the first was read)."""
    size, status, word = 3_000_000, 200, b"x"

    async def serve(request: web.Request) -> web.StreamResponse:
        if request.path == "/tokenize":
            return web.json_response({"tokens": [1, 2]}, status=status)
        response = web.StreamResponse()
        await response.prepare(request)
        entries = [None, *[{"2": {"logprob": -1.0}, "1": {"logprob": -0.5}}] * 3]
        told = {"pad": "", "choices": [{"prompt_logprobs": entries}]}
        head, tail = json.dumps(told).encode().split(b'""', 1)
        await response.write(head + b'"')
        for _ in range(size // 100_000):
            await response.write(word * 100_000)
        await response.write(b'"' + tail)
        return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", serve)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with aiohttp.ClientSession() as http:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            reference = Reference(http, ReferenceEngine(url=url), "m")
            found = await reference.likelihood([{"role": "user", "content": "Hi"}], "answer")
            assert (found.tokens, found.mean_milli) == (2, -750)
            size = 20_000_000
            with pytest.raises(ReferenceUnavailable, match="more than"):
                await reference.likelihood([], "answer")
            size, word = 100_000, b'"'
            with pytest.raises(ReferenceUnavailable, match="JSON"):
                await reference.likelihood([], "answer")
            status = 503
            with pytest.raises(ReferenceUnavailable, match="503"):
                await reference.likelihood([], "answer")
            await runner.cleanup()
            with pytest.raises(ReferenceUnavailable):
                await reference.likelihood([], "answer")
    finally:
        await runner.cleanup()
