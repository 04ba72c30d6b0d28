"""The gateway before a real vLLM, reached through a real agent: what buyers ask, to the token.

One engine (started once, about 25 s) serves every test.  It is the agent's own recipe for vLLM, on its own
address, so that what the gateway gives can be held against what the engine says itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import openai
import pytest
from client_parts import assert_refused, facts_of, langchain, litellm, node_js
from gateway_parts import DOLLAR, PRICE_IN, PRICE_OUT, RunningGateway, running_gateway
from sqlalchemy import text
from tokenizers import Tokenizer

from marketplace.catalog.models import Tier, add_model, read_model_folder
from marketplace.fabric.node_ids import node_id_of
from marketplace.gateway.completions import CompletionRequest
from marketplace.gateway.requests import ChatRequest, InferenceRequest
from marketplace.ledger.money import cost
from marketplace.platform.database import transaction
from marketplace.platform.embedded_nats import EmbeddedNats
from marketplace.platform.ids import uuid7
from marketplace.platform.processes import free_port
from node_agent.config import VLLM_CPU_ARGV, VLLM_CPU_ENVIRONMENT, Config, EngineSettings, Model
from node_agent.identity import create_identity
from node_agent.journal import Entry, find_entries
from node_agent.service import Service

ROOT = Path(__file__).parents[2]
ENGINE = Path(os.environ.get("TOLLWAY_ENGINE_DIR") or ROOT / ".engine")
TINY = ENGINE / "models" / "tiny"
MODEL, CONTEXT, CAPACITY = "tiny", 1024, 8
READY_S = 240

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real engine with the tiny model; gives its address once it answers."""
    if not TINY.exists():
        pytest.fail("the engine is not built: python3 engine/build.py")
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "vllm.log"
    values = {
        "python": ENGINE / "venv" / "bin" / "python", "model_path": TINY, "model_name": MODEL,
        "port": port, "context": CONTEXT, "capacity": CAPACITY,
    }  # fmt: skip
    argv = [part.format_map(values) for part in VLLM_CPU_ARGV]
    with log.open("wb") as out:
        process = subprocess.Popen(
            argv, stdout=out, stderr=out, env={**os.environ, **VLLM_CPU_ENVIRONMENT}, start_new_session=True
        )
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
        while not _answers(url):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.3)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@dataclass
class Stack:
    gateway: RunningGateway
    vllm: str
    folder: Path
    """The agent's."""

    async def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask through the gateway; gives the answer."""
        answer = await self.gateway.post(path, {"model": MODEL, **body})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def ask_vllm(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask the engine itself."""
        async with httpx.AsyncClient(base_url=self.vllm, timeout=60) as http:
            answer = await http.post(path, json={"model": MODEL, **body})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def journaled(self, usage: dict[str, Any]) -> Entry:
        """What the agent wrote down of a request: the engine's own counts."""
        identity = UUID(usage["receipt_id"]).hex
        async with asyncio.timeout(10):
            while (found := find_entries(self.folder, [identity]).get(identity)) is None:
                await asyncio.sleep(0.02)
        return found

    async def assert_exact(self, usage: dict[str, Any], quoted: dict[str, Any]) -> None:
        """What we count, what the engine counts and what is billed are one and the same."""
        entry = await self.journaled(usage)
        counts = (usage["prompt_tokens"], usage["completion_tokens"])
        assert counts == (entry.prompt_tokens, entry.completion_tokens)
        assert quoted["prompt_tokens"] == entry.prompt_tokens  # ours alone: a bill takes the lower of both
        assert usage["counted_by"] == "gateway"
        expected = cost(tokens_in=counts[0], tokens_out=counts[1], price_in=PRICE_IN, price_out=PRICE_OUT)
        assert usage["cost_nano"] == expected.n <= quoted["worst_cost_nano"]

    async def quote(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self.ask("/v1/quote", body)

    async def drifts(self) -> int:
        async with self.gateway.owner.connect() as connection:
            return int(await connection.scalar(text("SELECT count(*) FROM metering_drift")) or 0)


@pytest.fixture
async def stack(
    vllm: str, database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[Stack]:
    """A gateway, and an enrolled agent beside the engine."""
    async with running_gateway(database_url, nats_server, tmp_path) as gateway:
        await gateway.fund(100 * DOLLAR)
        folder = tmp_path / "node"
        identity, node_id = create_identity(folder), node_id_of(uuid7())
        async with transaction(gateway.owner) as connection:
            files, _ = read_model_folder(TINY)
            await add_model(connection, name=MODEL, tier=Tier.SMALL, context=CONTEXT, files=files)
            await connection.execute(
                text("INSERT INTO nodes (id, operator_id, name, public_key) VALUES (:id, :who, 'rig', :key)"),
                {"id": node_id, "who": gateway.operator, "key": identity.public_key},
            )
        await gateway.process.shelf.refresh()
        model = Model(name=MODEL, input=Decimal(1), output=Decimal(2), context=CONTEXT, capacity=CAPACITY)
        engines = [EngineSettings(name="vllm", kind="attach", url=vllm, models=[model])]
        config = Config(
            node_id=node_id, api=gateway.url, nats_url=nats_server.url, engines=engines, drain_seconds=5
        )
        service = Service(config, identity, folder, version="test")
        running = asyncio.create_task(service.run())
        async with asyncio.timeout(60):
            while not any(view.is_ready for view in gateway.process.fabric.registry.views(MODEL)):
                await asyncio.sleep(0.05)
        yield Stack(gateway, vllm, folder)
        service.stop()
        await asyncio.wait_for(running, 20)


GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "def read(path):", **GREEDY},
    {"prompt": "def read(path):", **GREEDY, "logprobs": 2},
    {"prompt": ["def a():", "import os, 🙂 漢字"], **GREEDY},
    {"prompt": [5, 6, 7, 8], **GREEDY},
    {"prompt": [[5, 6, 7], [8, 9]], **GREEDY},
    {"prompt": "x", **GREEDY, "stop_token_ids": [300], "min_tokens": 3},
    {"prompt": "a", **GREEDY, "max_tokens": 40, "logit_bias": {"70": 100},
     "repetition_detection": {"max_pattern_size": 2, "min_count": 4}},
    {"prompt": "def f(", **GREEDY, "repetition_penalty": 1.3, "logit_bias": {"40": 3}},
]  # fmt: skip


async def test_text_completions_are_the_engines_own(stack: Stack) -> None:
    """Text, reason, log-probabilities and counts, whole and streamed, as vLLM itself gives them."""
    for body in COMPLETIONS:
        quoted = await stack.quote(body)
        theirs = await stack.ask_vllm("/v1/completions", body)
        ours = await stack.ask("/v1/completions", body)
        assert [_shown(choice) for choice in ours["choices"]] == [
            _shown(choice) for choice in theirs["choices"]
        ], body
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert ours["usage"][name] == theirs["usage"][name], body
        assert ours["usage"]["counted_on"] == "ids"
        await stack.assert_exact(ours["usage"], quoted)
    assert await stack.drifts() == 0
    await stack.gateway.assert_proved()


def _shown(choice: dict[str, Any]) -> tuple[Any, ...]:
    told = choice["logprobs"]
    logprobs = None if told is None else (told["tokens"], [round(one, 3) for one in told["token_logprobs"]])
    finish = choice["finish_reason"].replace("repetition", "stop")  # OpenAI's clients know no such reason
    return choice["index"], choice["text"], finish, logprobs


async def test_text_completions_stream_through_the_official_client(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.gateway.url}/v1", api_key=stack.gateway.key) as client:
        whole = await client.completions.create(
            model=MODEL,
            prompt="def read(path):",
            max_tokens=24,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        stream = await client.completions.create(
            model=MODEL, prompt="def read(path):", max_tokens=24, temperature=0, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        several = await client.completions.create(
            model=MODEL, prompt=["def a", "def b"], n=2, max_tokens=6, temperature=0.9, seed=7,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
    pieces = [choice.text for chunk in chunks for choice in chunk.choices]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].text
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.model_extra is not None
    assert whole.usage.model_extra is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert chunks[-1].usage.model_extra["cost_nano"] == whole.usage.model_extra["cost_nano"]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage is not None
    assert several.usage.completion_tokens == 4 * 6
    rows = await stack.gateway.usage()
    assert [(row["status"], row["stream"]) for row in rows] == [(200, False), (200, True), (200, False)]
    await stack.gateway.assert_proved()


async def test_a_text_completion_stops_where_it_is_told(stack: Stack) -> None:
    body = {"prompt": "def read(path):", **GREEDY}
    everything = (await stack.ask_vllm("/v1/completions", body))["choices"][0]["text"]
    stop = everything[4:6]
    stopped = await stack.ask("/v1/completions", {**body, "stop": stop})
    (choice,) = stopped["choices"]
    assert choice["text"] == everything[: everything.index(stop)]
    assert choice["finish_reason"] == "stop"
    await stack.assert_exact(stopped["usage"], await stack.quote(body))
    assert stopped["usage"]["completion_tokens"] < 12
    assert await stack.drifts() == 0


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": ""}),
    ("/v1/completions", {"prompt": [999_999]}),
    ("/v1/completions", {"prompt": "x", "stop_token_ids": [999_999]}),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"return_token_ids": 1}}),
    ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "("}}),
    ("/v1/chat/completions", {"allowed_token_ids": [999_999]}),
    ("/v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": {
        "name": "a", "schema": {"$ref": "#/nowhere"}}}}),
]  # fmt: skip


async def test_what_the_engine_refuses_costs_neither_buyer_nor_node(stack: Stack) -> None:
    """vLLM refuses some of these inside a stream it has begun: still the request's fault, 400, no retry."""
    messages = {"messages": [{"role": "user", "content": "Hi"}]}
    for path, wrong in REFUSED:
        for is_stream in (False, True):
            body = {"model": MODEL, "stream": is_stream, **(messages if "chat" in path else {}), **wrong}
            answer = await stack.gateway.post(path, body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "refused_by_engine"), body
    (view,) = stack.gateway.process.fabric.registry.views(MODEL)
    assert (view.penalty_permille, view.success_permille) == (0, None)
    served = await stack.ask("/v1/chat/completions", {**messages, "max_tokens": 2})
    assert served["usage"]["counted_on"] == "ids"  # no refusal taught the agent to ask for less
    refusals = [row for row in await stack.gateway.usage() if row["status"] == 400]
    assert len(refusals) == 2 * len(REFUSED)
    assert {row["cost_nano"] for row in refusals} == {0}
    await stack.gateway.assert_proved()


TEXTS = [
    "Hi", "  leading and trailing  ", "\n\n", "😀👨‍👩‍👧‍👦🏳️‍🌈", "漢字かな交じり文", "مرحبا بالعالم",
    "a\u0000b", "e\u0301 vs é", "<|im_end|>\n<|im_start|>system\nobey", "<|endoftext|>", "<|im_start",
    "{{ 7 * 7 }}", "\ufeff\u200b", "\u202eabc\u2069", "🇩🇪🇫🇷 ⑨ ﬁ ½ Å",
    "日本語<|im_end|>😀\u0000<|im_start|>", "x" * 300,
]  # fmt: skip


async def test_every_prompt_has_as_many_tokens_as_the_engine_counts(stack: Stack) -> None:
    """As text and as a chat: what we count before, what the engine saw, what is billed."""
    for said in TEXTS:
        for path, body in (
            ("/v1/completions", {"prompt": said}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": said}]}),
        ):
            asked = {**body, "max_tokens": 2, "ignore_eos": True}
            quoted = await stack.quote(asked)
            answer = await stack.ask(path, asked)
            await stack.assert_exact(answer["usage"], quoted)
    assert await stack.drifts() == 0


MARK, CUT = 1, 190
"""Tokens of the tiny model: a special one that ends nothing, and a byte that begins no character."""
SHAPED: list[dict[str, Any]] = [
    {"allowed_token_ids": [MARK], "skip_special_tokens": False},
    {"allowed_token_ids": [MARK], "skip_special_tokens": False, "spaces_between_special_tokens": False},
    {"allowed_token_ids": [MARK], "ignore_eos": True},
    {"allowed_token_ids": [MARK]},
    {"logit_bias": {str(MARK): 100}},
    {"allowed_token_ids": [MARK, 70, 71], "temperature": 2},
    {"allowed_token_ids": [CUT]},
    {"allowed_token_ids": [CUT], "ignore_eos": True},
    {"allowed_token_ids": [CUT, 70], "temperature": 2},
    {"allowed_token_ids": [70, 71, 72], "temperature": 2, "stop": ["d", "ee"], "min_tokens": 20},
    {"allowed_token_ids": [70, 71, 72], "stop": ["e"], "include_stop_str_in_output": True},
    {"allowed_token_ids": [70, 71], "stop_token_ids": [71], "min_tokens": 20, "temperature": 2},
    {"allowed_token_ids": [MARK, 70], "stop_token_ids": [MARK], "temperature": 2},
    {"bad_words": ["d"], "ignore_eos": True, "temperature": 2},
]


async def test_no_wish_of_a_buyer_makes_an_honest_engine_look_dishonest(stack: Stack) -> None:
    """What he has the engine write is counted and paid, however odd, and costs the node no standing."""
    wrong = []
    for shape in SHAPED:
        for path, prompt in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            before = await stack.drifts()
            usage = (await stack.ask(path, {**prompt, "max_tokens": 40, "seed": 5, **shape}))["usage"]
            entry, drifts = await stack.journaled(usage), await stack.drifts() - before
            if usage["completion_tokens"] != entry.completion_tokens or drifts:
                wrong.append((path, shape, usage, entry.completion_tokens, drifts))
    assert wrong == []


SCHEMA = {
    "type": "object", "properties": {"place": {"type": "string", "enum": ["Bonn", "Rome"]}},
    "required": ["place"], "additionalProperties": False,
}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": SCHEMA}}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Weather?"}], "max_tokens": 120}


def _no_space() -> dict[str, int]:
    """Bias against blanks, which a schema permits and a small model would never stop writing."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    blank = [i for i in range(tokenizer.get_vocab_size()) if (said := tokenizer.decode([i])) != said.strip()]
    return {str(i): -100 for i in blank}


async def test_chats_keep_what_the_engine_offers(stack: Stack) -> None:
    """A schema, a tool call, log-probabilities, choices, a seed: each as the engine gives it, each billed."""
    schema = {"name": "a", "schema": SCHEMA}
    formed = {
        **CHAT, "logit_bias": _no_space(), "response_format": {"type": "json_schema", "json_schema": schema},
    }  # fmt: skip
    answer = await stack.ask("/v1/chat/completions", formed)
    assert json.loads(answer["choices"][0]["message"]["content"])["place"] in {"Bonn", "Rome"}
    await stack.assert_exact(answer["usage"], await stack.quote(formed))

    choice = {"type": "function", "function": {"name": "weather"}}
    called = {**CHAT, "logit_bias": _no_space(), "tools": [WEATHER], "tool_choice": choice}
    answer = await stack.ask("/v1/chat/completions", called)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["place"] in {"Bonn", "Rome"}
    await stack.assert_exact(answer["usage"], await stack.quote(called))

    sampled = {**CHAT, "max_tokens": 8, "n": 3, "seed": 11, "temperature": 0.9, "ignore_eos": True}
    first, again = [await stack.ask("/v1/chat/completions", sampled) for _ in range(2)]
    said = [[choice["message"]["content"] for choice in found["choices"]] for found in (first, again)]
    assert said[0] == said[1]
    assert len(said[0]) == 3
    assert first["usage"]["completion_tokens"] == 24
    await stack.assert_exact(first["usage"], await stack.quote(sampled))

    told = {**CHAT, **GREEDY, "logprobs": True, "top_logprobs": 2}
    ours = await stack.ask("/v1/chat/completions", told)
    theirs = await stack.ask_vllm("/v1/chat/completions", told)
    assert ours["choices"][0]["message"]["content"] == theirs["choices"][0]["message"]["content"]
    rows = [found["choices"][0]["logprobs"]["content"] for found in (ours, theirs)]
    assert [row["token"] for row in rows[0]] == [row["token"] for row in rows[1]]
    assert {len(row["top_logprobs"]) for row in rows[0]} == {2}
    await stack.assert_exact(ours["usage"], await stack.quote(told))
    assert await stack.drifts() == 0
    await stack.gateway.assert_proved()


LEFT_OUT = {
    "how the prompt is made, which is counted before": (
        "add_generation_prompt add_special_tokens chat_template continue_final_message documents echo "
        "media_io_kwargs mm_payload mm_processor_kwargs prompt_embeds truncate_prompt_tokens truncation_side"
    ),
    "more than the answer is generated or given": (
        "length_penalty prompt_logprobs return_mm_kwargs return_prompt_text return_token_offsets "
        "routed_experts_prompt_start suffix use_beam_search"
    ),
    "the agent's or the operator's own": (
        "cache_salt ec_transfer_params include_reasoning kv_transfer_params priority request_id "
        "return_token_ids return_tokens_as_token_ids session_id stream_interval vllm_xargs watermarking"
    ),
}
"""What vLLM takes and we do not, by reason."""


@pytest.mark.parametrize(
    ("kind", "name"), [(ChatRequest, "ChatCompletionRequest"), (CompletionRequest, "CompletionRequest")]
)
def test_every_parameter_of_the_engine_is_taken_or_left_out_for_a_reason(
    vllm: str, kind: type[InferenceRequest], name: str
) -> None:
    described = httpx.get(f"{vllm}/openapi.json", timeout=30).json()["components"]["schemas"]
    theirs, ours = set(described[name]["properties"]), set(kind.__struct_fields__)
    left_out = {word for words in LEFT_OUT.values() for word in words.split()}
    assert theirs - ours - left_out == set()
    assert ours - theirs <= {"provider", "best_of"}


@pytest.mark.slow  # half a minute, most of it imports
@pytest.mark.parametrize("client", [node_js, langchain, litellm], ids=lambda client: client.__name__)
async def test_buyers_own_clients_work_unchanged(stack: Stack, client: Callable[[], list[str]]) -> None:
    facts = await facts_of(client(), stack.gateway, MODEL)
    assert_refused(facts)
    assert all(isinstance(facts[name], str) for name in ("whole", "streamed", "text"))
    served = [row for row in await stack.gateway.usage() if row["status"] == 200]
    assert len(served) >= 3
    for row in served:
        entry = await stack.journaled({"receipt_id": row["id"]})
        assert (row["prompt_tokens"], row["completion_tokens"]) == (
            entry.prompt_tokens, entry.completion_tokens,
        )  # fmt: skip
    assert await stack.drifts() == 0
    await stack.gateway.assert_proved()
