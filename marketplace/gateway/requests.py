"""Reading a request for inference: limits first, then types, then meaning.

Fields outside the request's type are dropped; those in it go to the node as they came, except the ones that
are ours (`model`, `stream`, `provider`, `user`).  The engine's body is built anew.  A key given twice is
refused, since two readers may disagree on which counts.  Errors name the field, in OpenAI's words.
"""

from __future__ import annotations

import re
from decimal import Decimal
from functools import cache
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol, TypeVar

import msgspec
from msgspec import Meta

from marketplace.ledger.money import NANO_PER_DOLLAR
from marketplace.metering.counting import TokenCounter
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
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
StopString = Annotated[str, Meta(min_length=1, max_length=1000)]
Name = Annotated[str, Meta(max_length=200)]
Names = Annotated[list[Name], Meta(max_length=64)]
Price = Annotated[int, Meta(ge=0, le=protocol.PRICE_MAX)]
Scalar = Annotated[str, Meta(max_length=1000)] | int | float | bool | None


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class PriceCeiling(msgspec.Struct, forbid_unknown_fields=True):
    """Dollars per million tokens, as decimal numbers or strings; what is absent has no ceiling."""

    prompt: Decimal | None = None
    completion: Decimal | None = None


class ProviderPreferences(msgspec.Struct, forbid_unknown_fields=True):
    """How to choose among operators, per request.  Names are operator or node ids."""

    sort: Literal["price", "latency", "throughput", "load"] | None = None
    """What matters most; absent: the marketplace's own score."""
    operator: Name | None = None
    """Preferred: chosen whenever it may serve."""
    only: Names | None = None
    ignore: Names | None = None
    order: Names | None = None
    """Tried in this order, before all others."""
    max_price: PriceCeiling | None = None
    max_price_in: Price | None = None
    """Nano-dollars per million tokens."""
    max_price_out: Price | None = None
    allow_fallbacks: bool = True
    """False: only `operator` and `order`; where neither is given, one node and no second after a failure."""


class RepetitionDetection(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """When an engine ends an answer that only repeats itself: a pattern of so many tokens, so many times."""

    max_pattern_size: Annotated[int, Meta(ge=0, le=1024)] = 0
    min_pattern_size: Annotated[int, Meta(ge=0, le=1024)] = 0
    min_count: Annotated[int, Meta(ge=0, le=1024)] = 0


class InferenceRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What chats and text completions share; the sampling fields are those vLLM takes."""

    kind: ClassVar[str]
    prompt_field: ClassVar[str]

    model: Annotated[str, Meta(min_length=1, max_length=200)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
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
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None
    ignore_eos: bool | None = None
    bad_words: Annotated[list[StopString], Meta(max_length=256)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=4096)] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None
    ) = None
    logprob_token_ids: Annotated[list[TokenId], Meta(max_length=20)] | None = None
    thinking_token_budget: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None
    repetition_detection: RepetitionDetection | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    @property
    def choices(self) -> int:
        """How many answers are asked for in all."""
        return self.n or 1

    @property
    def is_stream(self) -> bool:
        return bool(self.stream)

    @property
    def wanted_tokens(self) -> int | None:
        """The buyer's own limit per choice, if he gave one."""
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        """The buyer's stop strings."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def disarm(self, counter: TokenCounter) -> None:
        """Take control tokens out of what the buyer wrote, where a template adds its own; by default none."""

    def prompt_counts(self, counter: TokenCounter, owner: bytes) -> list[int]:
        """Count each prompt's tokens as the engine will; raises PromptRefused. `owner` names the buyer."""
        raise NotImplementedError

    def engine_content(self) -> dict[str, Any]:
        """Give the engine's fields that are the prompt itself."""
        raise NotImplementedError


class ChatRequest(InferenceRequest, kw_only=True, omit_defaults=True):
    """OpenAI's chat completion request."""

    kind: ClassVar[str] = "chat"
    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: Annotated[dict[Name, Scalar], Meta(max_length=32)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """The buyer's own limit per choice, if he gave one (the newer name wins)."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the request says to the model's template beside messages and tools, as vLLM has it."""
        found: dict[str, Any] = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            found.setdefault("enable_thinking", self.reasoning_effort != "none")
            found["reasoning_effort"] = self.reasoning_effort
        return found

    def disarm(self, counter: TokenCounter) -> None:
        self.messages = counter.disarmed(self.messages)
        self.tools = counter.disarmed(self.tools)
        self.chat_template_kwargs = counter.disarmed(self.chat_template_kwargs)

    def prompt_counts(self, counter: TokenCounter, owner: bytes) -> list[int]:
        messages = known_messages(self)
        return [counter.prompt_tokens(messages, self.tools, self.template_variables, owner=owner)]

    def engine_content(self) -> dict[str, Any]:
        return {"messages": known_messages(self)}


OURS: Final = frozenset(
    {
        "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "user", "provider",
        "echo", "best_of", "suffix",
    }
)  # fmt: skip
TEMPLATE_NAMES: Final = frozenset(
    {
        "messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt",
        "continue_final_message", "truncation", "padding", "max_length", "return_tensors", "return_dict",
        "tokenizer_kwargs", "return_assistant_tokens_mask", "conversation", "self",
    }
)  # fmt: skip
"""What `chat_template_kwargs` may not set: the engine gives these another meaning."""

_chat_decoder: Final = msgspec.json.Decoder(ChatRequest)
_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encoder: Final = msgspec.json.Encoder()
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CONTAINERS: Final = (dict, list)
"""A tuple, since `dict | list` would be built anew, and looked through more slowly, for each value."""
Asked = TypeVar("Asked", bound=InferenceRequest)
Asked_co = TypeVar("Asked_co", bound=InferenceRequest, covariant=True)


class Decoder(Protocol[Asked_co]):
    """msgspec's, for one kind of request."""

    def decode(self, body: bytes, /) -> Asked_co: ...


def is_too_deep(values: list[Any]) -> bool:
    """Measure nesting without recursion, stopping as soon as DEPTH_MAX is passed."""
    deepest, level = 0, [value for value in values if isinstance(value, _CONTAINERS)]
    while level and deepest <= DEPTH_MAX:
        deepest += 1
        inner: list[object] = []
        for item in level:
            inner.extend(item.values() if isinstance(item, dict) else item)
        level = [item for item in inner if isinstance(item, _CONTAINERS)]
    return deepest >= DEPTH_MAX


def decode(decoder: Decoder[Asked], body: bytes) -> Asked:
    """Read a request's types; raises Refusal 413 or 400."""
    if len(body) > BODY_BYTES_MAX:
        raise Refusal(
            413, "body_too_large", f"the body has {len(body)} bytes, at most {BODY_BYTES_MAX} are taken"
        )
    try:
        request = decoder.decode(body)
        _refuse_repeated_keys(body)
    except msgspec.ValidationError as e:
        message, _, where = str(e).partition(" - at `$.")
        param = where.rstrip("`") or None
        raise Refusal(400, "invalid_value", f"{param or 'body'}: {message}", param=param) from e
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as e:
        raise Refusal(400, "invalid_json", f"the body is not the JSON we take: {e}") from e
    if _CONTROL.search(request.model):  # it goes on record, also where it is refused, and no row takes a NUL
        raise invalid("model", "has a control character")
    _check_provider(request.provider)
    if request.min_tokens is not None and request.min_tokens > (request.wanted_tokens or request.min_tokens):
        raise invalid("min_tokens", "is above max_tokens")
    return request


def _refuse_repeated_keys(body: bytes) -> None:
    """Refuse an object that names a key twice (A70): a reader behind us might believe the other one.

    Outside its members' values an object's only quotes are its keys', two each; a key that contains a quote
    is refused with them.
    """
    members = _members.decode(body)
    inside = sum(bytes(value).count(b'"') for value in members.values())
    if body.count(b'"') - inside != 2 * len(members):
        raise Refusal(400, "repeated_key", "a key is given twice, or has a quote in it")


def _check_provider(wish: ProviderPreferences | None) -> None:
    """Turn a ceiling in dollars into nano-dollars, the lower of the two ways to say it."""
    if wish is None or wish.max_price is None:
        return
    for name, field in (("prompt", "max_price_in"), ("completion", "max_price_out")):
        ceiling: Decimal | None = getattr(wish.max_price, name)
        if ceiling is None:
            continue
        if not ceiling.is_finite() or not 0 <= ceiling <= protocol.PRICE_MAX // NANO_PER_DOLLAR:
            raise invalid(f"provider.max_price.{name}", "is dollars per million tokens")
        nano = int(ceiling * NANO_PER_DOLLAR)
        other: int | None = getattr(wish, field)
        setattr(wish, field, nano if other is None else min(nano, other))


def parse_chat(body: bytes) -> ChatRequest:
    """Read a chat request; raises Refusal 413 or 400."""
    request = decode(_chat_decoder, body)
    if is_too_deep(
        [
            request.messages, request.tools, request.response_format, request.structured_outputs,
            request.tool_choice,
        ]
    ):  # fmt: skip
        raise Refusal(400, "too_deep", f"JSON nested deeper than {DEPTH_MAX} levels")
    _check(request)
    return request


def invalid(param: str, message: str) -> Refusal:
    return Refusal(400, "invalid_value", f"{param}: {message}", param=param)


def _check(request: ChatRequest) -> None:
    for name in request.chat_template_kwargs or ():
        if name in TEMPLATE_NAMES or not name.isidentifier():
            raise invalid(f"chat_template_kwargs.{name[:64]}", "is not for a request to set")
    for at, tool in enumerate(request.tools or ()):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(f"tools[{at}].function", "a tool is a function with a name")
    for at, message in enumerate(request.messages):
        _check_message(message, f"messages[{at}]")


def _check_message(message: dict[str, Any], where: str) -> None:
    for name, kind in (("name", str), ("tool_call_id", str), ("reasoning", str), ("reasoning_content", str)):
        if not isinstance(message.get(name), kind | None):
            raise invalid(f"{where}.{name}", "is text")
    if not isinstance(message.get("role"), str):
        raise invalid(f"{where}.role", "each message needs a role")
    content = message.get("content")
    if not isinstance(content, str | list | None):
        raise invalid(f"{where}.content", "content is text, a list of parts or null")
    if isinstance(content, list):
        _check_parts(content, f"{where}.content")
    calls = message.get("tool_calls")
    if not isinstance(calls, list | None):
        raise invalid(f"{where}.tool_calls", "is a list")
    for call in calls or ():
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(f"{where}.tool_calls", "a tool call has a function with a name")


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


@cache
def _engine_fields(kind: type[InferenceRequest]) -> tuple[str, ...]:
    return tuple(name for name in kind.__struct_fields__ if name not in OURS | {kind.prompt_field})


def engine_body(request: InferenceRequest, *, max_tokens: int, cache_salt: str) -> bytes:
    """Build the engine's JSON anew, from known fields only; Refusal 413 if it is more than a node takes.

    `cache_salt` keeps one buyer's cached prefixes out of another's reach (A74).
    """
    names = _engine_fields(type(request))
    body: dict[str, Any] = {name: value for name in names if (value := getattr(request, name)) is not None}
    body |= request.engine_content()
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
