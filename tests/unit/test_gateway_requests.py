"""Reading chat requests, and what of them goes on to a node."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketplace.gateway.completions import parse_completion
from marketplace.gateway.openapi import schema_of
from marketplace.gateway.requests import BODY_BYTES_MAX, ChatRequest, engine_body, parse_chat
from marketplace.platform.http import Refusal

PLAIN: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def parse(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({**PLAIN, **fields}).encode())


def refusal(**fields: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse(**fields)
    return caught.value


def test_the_newer_name_of_the_limit_wins() -> None:
    assert parse(max_tokens=5).wanted_tokens == 5
    assert parse(max_tokens=5, max_completion_tokens=7).wanted_tokens == 7
    assert parse().wanted_tokens is None


def test_stops_are_a_list_either_way() -> None:
    assert parse().stops == []
    assert parse(stop="x").stops == ["x"]
    assert parse(stop=["x", "y"]).stops == ["x", "y"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "stop[0]"),
        ({"seed": 2**70}, "seed"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"provider": {"sort": "vibes"}}, "provider.sort"),
        ({"provider": {"unknown": 1}}, "provider"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "name": 1}]}, "messages[0].name"),
        ({"messages": [{"role": "tool", "tool_call_id": 1}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"tools": [{"type": "function", "function": {"name": 1}}]}, "tools[0].function"),
    ],
)
def test_an_error_names_its_field(fields: dict[str, Any], param: str) -> None:
    refused = refusal(**fields)
    assert (refused.status, refused.param) == (400, param)
    assert param in refused.message


@pytest.mark.parametrize("name", ["a\x00b", "m\n", "\x1b[2J", "\x7f", "\x9b"])
def test_a_models_name_has_no_control_character(name: str) -> None:
    for read, rest in ((parse_chat, PLAIN), (parse_completion, {"prompt": "Hi"})):
        with pytest.raises(Refusal) as caught:
            read(json.dumps({**rest, "model": name}).encode())
        assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_value", "model")
    assert parse(model="org/Modèl-7B:é").model == "org/Modèl-7B:é"


def test_depth_and_size_are_bounded() -> None:
    deep: Any = "x"
    for _ in range(70):
        deep = {"a": deep}
    for field in ("response_format", "tool_choice"):
        assert refusal(**{field: deep}).code == "too_deep"
    assert refusal(messages=[{"role": "user", "content": "Hi", "x": deep}]).code == "too_deep"
    with pytest.raises(Refusal) as caught:
        parse_chat(b" " * (BODY_BYTES_MAX + 1))
    assert caught.value.status == 413
    large = parse(messages=[{"role": "user", "content": "x" * (BODY_BYTES_MAX - 1_000)}])
    with pytest.raises(Refusal) as caught:  # within our limit, beyond a node's
        engine_body(large, max_tokens=1, cache_salt="s")
    assert caught.value.status == 413


def test_only_known_fields_reach_the_engine() -> None:
    request = parse(
        user="ann", stream=True, stream_options={"include_usage": True}, provider={"sort": "price"},
        temperature=0.5, n=2, metadata={"secret": 1}, best_of=9, echo=True, prompt_logprobs=5,
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {}}], "x": 1},
            {"role": "assistant", "content": None, "tool_calls": []},
        ],
    )  # fmt: skip
    body = json.loads(engine_body(request, max_tokens=9, cache_salt="salt"))
    assert body == {
        "temperature": 0.5,
        "n": 2,
        "max_tokens": 9,
        "cache_salt": "salt",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": None, "tool_calls": []},
        ],
    }


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
    | st.fixed_dictionaries(
        {"model": st.text(), "messages": st.lists(st.dictionaries(st.text(), st.text() | st.integers()))},
        optional={"n": st.integers(), "stop": st.lists(st.text()), "tools": st.lists(st.none())},
    )
)  # fmt: skip
def test_any_json_is_taken_or_refused(value: Any) -> None:
    status = 200
    try:
        request = parse_chat(json.dumps(value).encode())
        assert engine_body(request, max_tokens=1, cache_salt="s")
    except Refusal as refused:
        status = refused.status
    assert status in {200, 400}


def test_the_schema_says_what_is_taken() -> None:
    schema = schema_of(ChatRequest)
    count = {"type": "integer", "minimum": 1, "maximum": 16}
    assert set(schema["required"]) == {"model", "messages"}
    assert set(schema["properties"]) == set(ChatRequest.__struct_fields__)
    assert schema["properties"]["n"] == {"anyOf": [count, {"type": "null"}], "default": None}
    assert "$ref" not in json.dumps(schema)
