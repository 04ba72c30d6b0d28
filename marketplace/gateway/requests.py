"""Reading a chat request: limits first, then types, then meaning.

Fields outside `ChatRequest` are dropped; those in it go to the node as they came, except the ones that are
ours (`model`, `stream`, `provider`, `user`).  The engine's body is built anew, so of a key given twice the
last one counts, for us and for the engine alike.  Errors name the field, in OpenAI's words.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from marketplace.platform.http import Refusal
from node_agent import protocol

BODY_BYTES_MAX: Final = 1024 * 1024
"""A67."""
DEPTH_MAX: Final = 64
MESSAGES_MAX: Final = 4096
CHOICES_MAX: Final = 16
STOPS_MAX: Final = 16

Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Tokens = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=1000)]
Names = Annotated[list[Annotated[str, Meta(max_length=200)]], Meta(max_length=64)]


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class ProviderPreferences(msgspec.Struct, forbid_unknown_fields=True):
    """How to choose among operators, per request."""

    sort: Literal["price", "latency", "load"] | None = None
    """What matters most; absent: the marketplace's own score."""
    only: Names | None = None
    """Operator or node ids, as in the two that follow."""
    ignore: Names | None = None
    order: Names | None = None
    max_price_in: Annotated[int, Meta(ge=0, le=protocol.PRICE_MAX)] | None = None
    """Nano-dollars per million tokens."""
    max_price_out: Annotated[int, Meta(ge=0, le=protocol.PRICE_MAX)] | None = None
    allow_fallbacks: bool = True


class ChatRequest(msgspec.Struct, omit_defaults=True):
    """The request fields we know; the sampling ones are those vLLM takes."""

    model: Annotated[str, Meta(min_length=1, max_length=200)]
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MESSAGES_MAX)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    n: Annotated[int, Meta(ge=1, le=CHOICES_MAX)] | None = None
    user: str | None = None
    provider: ProviderPreferences | None = None
    # passed on to the engine
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 20)] | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=STOPS_MAX)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 31)]], Meta(max_length=64)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def is_stream(self) -> bool:
        return bool(self.stream)

    @property
    def wanted_tokens(self) -> int | None:
        """The buyer's own limit per choice, if he gave one (the newer name wins)."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        """The buyer's stop strings."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


OURS: Final = frozenset(
    {"model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "user", "provider"}
)
ENGINE_FIELDS: Final = tuple(name for name in ChatRequest.__struct_fields__ if name not in OURS)

_decoder: Final = msgspec.json.Decoder(ChatRequest)
_encoder: Final = msgspec.json.Encoder()


def _depth(value: object) -> int:
    """Measure nesting without recursion, stopping as soon as the limit is passed."""
    deepest, level = 0, [value]
    while level and deepest <= DEPTH_MAX:
        deepest += 1
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = [item for item in inner if isinstance(item, dict | list)]
    return deepest


def parse_chat(body: bytes) -> ChatRequest:
    """Read a chat request; raises Refusal 413 or 400."""
    if len(body) > BODY_BYTES_MAX:
        raise Refusal(
            413, "body_too_large", f"the body has {len(body)} bytes, at most {BODY_BYTES_MAX} are taken"
        )
    try:
        request = _decoder.decode(body)
    except msgspec.ValidationError as e:
        message, _, where = str(e).partition(" - at `$.")
        param = where.rstrip("`") or None
        raise Refusal(400, "invalid_value", f"{param or 'body'}: {message}", param=param) from e
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as e:
        raise Refusal(400, "invalid_json", f"the body is not the JSON we take: {e}") from e
    if _depth([request.messages, request.tools, request.response_format, request.tool_choice]) > DEPTH_MAX:
        raise Refusal(400, "too_deep", f"JSON nested deeper than {DEPTH_MAX} levels")
    _check(request)
    return request


def _invalid(param: str, message: str) -> Refusal:
    return Refusal(400, "invalid_value", f"{param}: {message}", param=param)


def _check(request: ChatRequest) -> None:
    if request.min_tokens is not None and request.min_tokens > (request.wanted_tokens or request.min_tokens):
        raise _invalid("min_tokens", "is above max_tokens")
    for at, tool in enumerate(request.tools or ()):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _invalid(f"tools[{at}].function", "a tool is a function with a name")
    for at, message in enumerate(request.messages):
        _check_message(message, f"messages[{at}]")


def _check_message(message: dict[str, Any], where: str) -> None:
    for name, kind in (("name", str), ("tool_call_id", str), ("reasoning", str), ("reasoning_content", str)):
        if not isinstance(message.get(name), kind | None):
            raise _invalid(f"{where}.{name}", "is text")
    if not isinstance(message.get("role"), str):
        raise _invalid(f"{where}.role", "each message needs a role")
    content = message.get("content")
    if not isinstance(content, str | list | None):
        raise _invalid(f"{where}.content", "content is text, a list of parts or null")
    if isinstance(content, list):
        _check_parts(content, f"{where}.content")
    calls = message.get("tool_calls")
    if not isinstance(calls, list | None):
        raise _invalid(f"{where}.tool_calls", "is a list")
    for call in calls or ():
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _invalid(f"{where}.tool_calls", "a tool call has a function with a name")


def _check_parts(parts: list[Any], where: str) -> None:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refusal(400, "unsupported_content", "only text parts are served", param=where)


MESSAGE_FIELDS: Final = (
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content", "tools",
)  # fmt: skip
"""What of a message reaches the model's template, in vLLM."""


def known_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """Give the messages reduced to the fields an engine looks at."""
    return [_known(message) for message in request.messages]


def _known(message: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {name: message[name] for name in MESSAGE_FIELDS if name in message}
    if isinstance(content := known.get("content"), list):
        known["content"] = [{"type": "text", "text": part["text"]} for part in content]
    return known


def engine_body(request: ChatRequest, *, max_tokens: int, cache_salt: str) -> bytes:
    """Build the engine's JSON anew, from known fields only; Refusal 413 if it is more than a node takes.

    `cache_salt` keeps one buyer's cached prefixes out of another's reach (A74).
    """
    body: dict[str, Any] = {
        name: value for name in ENGINE_FIELDS if (value := getattr(request, name)) is not None
    }
    body["messages"] = known_messages(request)
    body["max_tokens"] = max_tokens
    body["cache_salt"] = cache_salt
    encoded = _encoder.encode(body)
    if len(encoded) > protocol.BODY_BYTES_MAX:
        raise Refusal(
            413,
            "body_too_large",
            f"the request has {len(encoded)} bytes, at most {protocol.BODY_BYTES_MAX} reach a node",
        )
    return encoded
