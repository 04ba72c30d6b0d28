"""What buyers may ask for: text completions, parameters, aliases, quotes, preferences."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateway_parts import (
    DOLLAR,
    HELLO,
    MODEL,
    PRICE_IN,
    PRICE_OUT,
    STREAM,
    RunningGateway,
    running_gateway,
    said,
    saying,
    sending,
    whole,
)
from letters import letters_tokenizer, prompt_tokens, tokenizer_files

from marketplace.catalog.aliases import set_alias
from marketplace.catalog.models import Tier, add_model
from marketplace.ledger.accounts import buyer as buyer_account
from marketplace.ledger.accounts import ensure_account
from marketplace.ledger.money import Nano, cost
from marketplace.ledger.overdrafts import set_limit
from marketplace.platform.database import transaction
from marketplace.platform.embedded_nats import EmbeddedNats
from marketplace.routing.choice import Sort
from marketplace.routing.replay import DecisionLog, Policy, read_log, replay
from node_agent import protocol
from node_agent.protocol import TokenLogprob, TopLogprob


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


def _tokens(text: str) -> int:
    return len(letters_tokenizer().encode(text, add_special_tokens=True).ids)


async def test_text_completions_through_the_official_client(gateway: RunningGateway) -> None:
    rows = [TokenLogprob("Hel", -0.5, None, [TopLogprob("Hel", -0.5)]), TokenLogprob("lo", -0.25)]
    node = await gateway.add_node(whole(said("Hello", finish="stop", logprobs=rows)))
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key) as client:
        answer = await client.completions.create(
            model=MODEL, prompt="Once", max_tokens=9, logprobs=1, temperature=0
        )
        node.answer = saying(["He", "llo"])
        stream = await client.completions.create(model=MODEL, prompt="Once", max_tokens=9, stream=True)
        chunks = [chunk async for chunk in stream]
    choice = answer.choices[0]
    assert (answer.object, choice.text, choice.finish_reason) == ("text_completion", "Hello", "stop")
    assert choice.logprobs is not None
    assert (choice.logprobs.tokens, choice.logprobs.text_offset) == (["Hel", "lo"], [0, 3])
    assert (choice.logprobs.token_logprobs, choice.logprobs.top_logprobs) == (
        [-0.5, -0.25],
        [{"Hel": -0.5}, {}],
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == _tokens("Once")
    request = node.requests[0]
    assert request.kind == "completion"
    sent = json.loads(request.body)
    salt = sent.pop("cache_salt")
    assert sent == {"prompt": "Once", "max_tokens": 9, "logprobs": 1, "temperature": 0}
    assert len(salt) == 32
    billed = {row["cost_nano"] for row in await gateway.usage()}
    assert billed == {cost(tokens_in=_tokens("Once"), tokens_out=5, price_in=PRICE_IN, price_out=PRICE_OUT).n}
    await gateway.assert_proved()


async def test_several_prompts_are_all_answered_and_billed(gateway: RunningGateway) -> None:
    node = await gateway.add_node(whole(said("abc", finish="stop"), said("de", index=1, finish="stop")))
    body = {"model": MODEL, "prompt": ["One", "Three"], "max_tokens": 9}
    answer = await gateway.post("/v1/completions", body)
    assert [choice["text"] for choice in answer.json()["choices"]] == ["abc", "de"]
    usage = answer.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (_tokens("One") + _tokens("Three"), 5)
    node.answer = saying(["ok"])
    ids = await gateway.post("/v1/completions", {**body, "prompt": [1, 2, 3]})
    assert ids.json()["usage"]["prompt_tokens"] == 3
    for wrong, param in (
        ({"prompt": []}, "prompt"), ({"prompt": ["a", 1]}, "prompt"), ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": "a", "n": 2, "best_of": 3}, "best_of"), ({"echo": True}, "echo"),
        ({"prompt": ["a"] * 9, "n": 2}, "prompt"), ({"suffix": "x"}, "suffix"),
        ({"logprobs": 99}, "logprobs"),
    ):  # fmt: skip
        refused = await gateway.post("/v1/completions", {**body, **wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), wrong


async def test_sampling_parameters_reach_the_engine_and_the_template(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["ok"]))
    parameters: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "presence_penalty": 0.1,
        "frequency_penalty": 0.2, "repetition_penalty": 1.1, "stop": ["x"], "stop_token_ids": [7],
        "include_stop_str_in_output": True, "min_tokens": 1, "ignore_eos": True, "bad_words": ["bad"],
        "allowed_token_ids": [1, 2], "skip_special_tokens": False, "spaces_between_special_tokens": False,
        "seed": 7, "logit_bias": {"5": 1}, "logprobs": True, "top_logprobs": 2, "logprob_token_ids": [3],
        "repetition_detection": {"max_pattern_size": 4, "min_count": 3},
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
        "structured_outputs": {"regex": "a+"}, "reasoning_effort": "low", "thinking_token_budget": 9,
        "chat_template_kwargs": {"enable_thinking": False}, "parallel_tool_calls": False,
        "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto", "n": 1,
    }  # fmt: skip
    answer = await gateway.chat({**HELLO, **parameters})
    assert answer.status_code == 200, answer.text
    sent = json.loads(node.requests[0].body)
    assert {name: sent[name] for name in parameters} == parameters
    reserved = await gateway.chat({**HELLO, "chat_template_kwargs": {"messages": "mine"}})
    assert (reserved.status_code, reserved.json()["error"]["param"]) == (400, "chat_template_kwargs.messages")


async def test_an_alias_falls_back_to_a_model_that_can_be_served(gateway: RunningGateway) -> None:
    async with transaction(gateway.owner) as connection:
        await add_model(connection, name="absent", tier=Tier.SMALL, context=4096, files=tokenizer_files())
        await set_alias(connection, "fast", ["absent", MODEL])
        await set_alias(connection, "gone", ["absent"])
    await gateway.process.shelf.refresh()
    await gateway.add_node(saying(["ok"]))
    answer = await gateway.chat({**HELLO, "model": "fast"})
    assert (answer.status_code, answer.json()["model"]) == (200, MODEL)
    assert (await gateway.only_row())["model"] == MODEL
    assert (await gateway.chat({**HELLO, "model": "gone"})).status_code == 503
    assert (await gateway.chat({**HELLO, "model": "neither"})).status_code == 404
    aliases = (await gateway.get("/v1/aliases"))["data"]
    assert aliases[0] == {"alias": "fast", "models": ["absent", MODEL]}
    assert (await gateway.get("/v1/models/fast"))["id"] == "absent"


async def _alias(gateway: RunningGateway, *models: str) -> None:
    """The alias "fast" of models that exist."""
    async with transaction(gateway.owner) as connection:
        for name in {*models} - {MODEL}:
            await add_model(connection, name=name, tier=Tier.SMALL, context=4096, files=tokenizer_files())
        await set_alias(connection, "fast", models)
    await gateway.process.shelf.refresh()


BREAKS = sending(protocol.Accepted(0), protocol.Failed(1, protocol.FailureCode.ENGINE_DOWN, "", True))


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
async def test_an_alias_falls_back_when_a_models_nodes_fail(gateway: RunningGateway, is_stream: bool) -> None:
    await _alias(gateway, "first", MODEL)
    dear = 100 * PRICE_OUT
    broken = [await gateway.add_node(BREAKS, model="first", price_out=dear) for _ in range(3)]
    good = await gateway.add_node(saying(["ok"]))
    answer = await gateway.chat({**HELLO, "model": "fast", "stream": is_stream})
    assert answer.status_code == 200
    assert answer.headers["x-tollway-node"] == good.node_id
    assert '"ok"' in answer.text
    assert f'"model":"{MODEL}"' in answer.text
    assert sum(len(node.requests) for node in broken) == 2, "the last of three tries is the next model's"
    row = await gateway.only_row()
    expected = cost(
        tokens_in=row["prompt_tokens"],
        tokens_out=row["completion_tokens"],
        price_in=PRICE_IN,
        price_out=PRICE_OUT,
    )
    assert (row["model"], row["status"], row["cost_nano"]) == (MODEL, 200, expected.n)
    assert sum(part.reserved_nano for part in gateway.process.keeper.book) == 0, "the first hold is gone too"
    await gateway.assert_proved()


async def test_an_alias_asks_three_nodes_in_all(gateway: RunningGateway) -> None:
    await _alias(gateway, "first", "second", MODEL)
    nodes = {
        name: [await gateway.add_node(BREAKS, model=name) for _ in range(3)] for name in ("first", "second")
    }
    spared = await gateway.add_node(saying(["ok"]))
    answer = await gateway.chat({**HELLO, "model": "fast"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "nodes_failed")
    asked = {name: sum(len(node.requests) for node in several) for name, several in nodes.items()}
    assert asked == {"first": 2, "second": 1}
    assert spared.requests == []
    assert (await gateway.only_row())["cost_nano"] == 0


async def test_who_allows_no_fallback_gets_no_other_model_after_a_failure(gateway: RunningGateway) -> None:
    await _alias(gateway, "first", MODEL)
    broken = await gateway.add_node(BREAKS, model="first")
    spared = await gateway.add_node(saying(["ok"]))
    body = {**HELLO, "model": "fast", "provider": {"allow_fallbacks": False}}
    answer = await gateway.chat(body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "nodes_failed")
    assert (len(broken.requests), spared.requests) == (1, [])


async def test_a_fallback_takes_the_limits_of_one_request(gateway: RunningGateway) -> None:
    """All of the minute's tokens and the only place are taken for the first model, and again for the next."""
    await _alias(gateway, "first", MODEL)
    broken = await gateway.add_node(BREAKS, model="first")
    good = await gateway.add_node(saying(["ok"]))
    made = await gateway.post(
        "/api/keys",
        {"name": "k", "tokens_per_minute": prompt_tokens("Hi") + 100, "parallel_requests": 1},
    )
    headers = {"Authorization": f"Bearer {made.json()['key']}"}
    answer = await gateway.chat({**HELLO, "model": "fast", "max_tokens": 100}, **headers)
    assert answer.status_code == 200, answer.text
    assert "x-tollway-max-tokens" not in answer.headers
    assert (len(broken.requests), len(good.requests)) == (1, 1)
    again = await gateway.chat({**HELLO, "max_tokens": 50}, **headers)
    assert again.status_code == 200, "what was not used came back once"


async def test_a_quote_is_the_hold_and_costs_nothing(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying(["ok"]))
    quoted = (await gateway.post("/v1/quote", {**HELLO, "max_tokens": 300, "n": 2})).json()
    prompt = prompt_tokens("Hi")
    worst = cost(tokens_in=prompt, tokens_out=600, price_in=PRICE_IN, price_out=PRICE_OUT)
    expected = cost(tokens_in=prompt, tokens_out=512, price_in=PRICE_IN, price_out=PRICE_OUT)
    assert (quoted["worst_cost_nano"], quoted["expected_cost_nano"]) == (worst.n, expected.n)
    assert (quoted["prompt_tokens"], quoted["nodes"]) == (prompt, [node.node_id])
    text = (await gateway.post("/v1/quote", {"model": MODEL, "prompt": "Once"})).json()
    assert (text["prompt_tokens"], text["max_tokens"]) == (_tokens("Once"), 16)
    assert (await gateway.post("/v1/quote", {**HELLO, "max_tokens": 10**6})).status_code == 400
    assert (await gateway.post("/v1/quote", b"nonsense")).status_code == 400
    assert node.requests == []
    assert await gateway.usage() == []


async def test_a_models_name_that_no_row_could_hold_is_refused(gateway: RunningGateway) -> None:
    name = "a\x00b"
    for path, body in (
        ("/v1/chat/completions", HELLO),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/quote", HELLO),
        ("/v1/quote", {"prompt": "Hi"}),
    ):
        refused = await gateway.post(path, {**body, "model": name})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_value", "model"), path


async def test_the_hold_is_at_the_dearest_price_that_may_be_charged(gateway: RunningGateway) -> None:
    """Whichever node answers in the end, the hold covers it; who forbids a second pays for no fallback."""
    cheap = await gateway.add_node(saying(["ok"]), price_in=PRICE_IN // 10, price_out=PRICE_OUT // 10)
    await gateway.add_node(saying(["ok"]))
    prompt, body = prompt_tokens("Hi"), {**HELLO, "max_tokens": 100, "provider": {"sort": "price"}}
    dear = cost(tokens_in=prompt, tokens_out=100, price_in=PRICE_IN, price_out=PRICE_OUT).n
    alone = cost(tokens_in=prompt, tokens_out=100, price_in=PRICE_IN // 10, price_out=PRICE_OUT // 10).n
    quoted = (await gateway.post("/v1/quote", body)).json()
    assert (quoted["worst_cost_nano"], quoted["nodes"][0]) == (dear, cheap.node_id)
    no_second = {**body, "provider": {"sort": "price", "allow_fallbacks": False}}
    assert (await gateway.post("/v1/quote", no_second)).json()["worst_cost_nano"] == alone

    async with transaction(gateway.owner) as connection:  # no overdraft for this buyer
        await set_limit(
            connection, await ensure_account(connection, buyer_account(str(gateway.person))), Nano(0)
        )
    await gateway.leave(cost(tokens_in=prompt, tokens_out=40, price_in=PRICE_IN, price_out=PRICE_OUT).n)
    answer = await gateway.chat(body)
    assert answer.headers["x-tollway-max-tokens"] == "40; wanted=100"
    assert answer.headers["x-tollway-node"] == cheap.node_id
    billed = cost(tokens_in=prompt, tokens_out=2, price_in=PRICE_IN // 10, price_out=PRICE_OUT // 10).n
    assert answer.json()["usage"]["cost_nano"] == billed
    assert "x-tollway-max-tokens" not in (await gateway.chat(no_second)).headers
    await gateway.assert_proved()


async def test_the_buyers_preferences_are_honoured(gateway: RunningGateway) -> None:
    cheap = await gateway.add_node(saying(["cheap"]), price_in=1_000, price_out=1_000)
    dear = await gateway.add_node(saying(["dear"]))

    async def served(**provider: Any) -> str:
        answer = await gateway.chat({**HELLO, "provider": provider})
        return answer.headers.get("x-tollway-node", str(answer.status_code))

    assert await served(sort="price") == cheap.node_id
    assert await served(operator=dear.node_id) == dear.node_id
    assert await served(order=[dear.node_id], allow_fallbacks=False) == dear.node_id
    assert await served(ignore=[cheap.node_id]) == dear.node_id
    assert await served(only=[dear.node_id], sort="throughput") == dear.node_id
    assert await served(max_price={"prompt": "0.5", "completion": 1.5}) == cheap.node_id
    assert await served(max_price={"completion": 0.0000001}) == "503"
    assert await served(max_price={"prompt": "NaN"}) == "400"


async def test_only_streams_measure_the_first_token(gateway: RunningGateway) -> None:
    """Who does not stream gets everything at once: that is no first token."""
    await gateway.add_node(saying(["ok"]))
    registry = gateway.process.fabric.registry
    assert (await gateway.chat(HELLO)).status_code == 200
    assert registry.views(MODEL)[0].latency_ms is None
    assert (await gateway.chat(STREAM)).status_code == 200
    assert registry.views(MODEL)[0].latency_ms is not None


async def test_recorded_decisions_replay_and_hold_no_content(gateway: RunningGateway, tmp_path: Path) -> None:
    await gateway.add_node(saying(["ok"]), price_in=1_000, price_out=1_000)
    await gateway.add_node(saying(["ok"]))
    log = tmp_path / "decisions.jsonl"
    gateway.process.chat._decisions = DecisionLog(log)
    body = {**HELLO, "messages": [{"role": "user", "content": "canary-content"}], "user": "canary-user"}
    for _ in range(20):
        assert (await gateway.chat(body)).status_code == 200
    gateway.process.chat._decisions.close()
    assert "canary" not in log.read_text()
    assert str(gateway.person) not in log.read_text()
    as_recorded, by_price = replay(read_log(log), [Policy("recorded"), Policy("price", Sort.PRICE)])
    assert (as_recorded.decisions, as_recorded.agrees_permille) == (20, 1000)
    assert by_price.busiest_permille == 1000
    assert by_price.cost_nano_mean < as_recorded.cost_nano_mean


async def test_over_asgi_text_completions_work_too(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["ok"]))
    transport = httpx.ASGITransport(gateway.process.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://t", headers=gateway.headers) as http:
        answer = await http.post("/v1/completions", json={"model": MODEL, "prompt": "Once"})
    assert answer.json()["choices"][0]["text"] == "ok"
