"""OpenAI's answers, field by field: what buyers are written, and what the served OpenAPI says they are."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class UsageOut(msgspec.Struct, omit_defaults=True):
    """OpenAI's usage object, and what the request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cost: str
    """Dollars, a decimal string."""
    cost_nano: int
    receipt_id: str
    counted_by: str
    counted_on: str
    """`ids` the engine sampled, or the delivered `text` encoded again."""


# ---- parts of chats


class TopLogprobOut(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class LogprobOut(TopLogprobOut):
    top_logprobs: list[TopLogprobOut]


class LogprobsOut(msgspec.Struct):
    content: list[LogprobOut]


class FunctionOut(msgspec.Struct):
    name: str
    arguments: str


class ToolCallOut(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: FunctionOut


class MessageOut(msgspec.Struct, omit_defaults=True):
    """What one choice says; `content` is null where it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallOut] | None = None


class ChatChoiceOut(msgspec.Struct):
    index: int
    message: MessageOut
    logprobs: LogprobsOut | None
    finish_reason: FinishReason


class ChatCompletionOut(msgspec.Struct):
    """A whole answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoiceOut]
    usage: UsageOut


# ---- parts of streamed chats


class FunctionDeltaOut(msgspec.Struct, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallDeltaOut(msgspec.Struct, omit_defaults=True):
    """A part of a call; `id` and `type` come with its first."""

    index: int
    function: FunctionDeltaOut
    id: str | None = None
    type: Literal["function"] | None = None


class DeltaOut(msgspec.Struct, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDeltaOut] | None = None


class ChatChunkChoiceOut(msgspec.Struct):
    index: int
    delta: DeltaOut
    logprobs: LogprobsOut | None
    finish_reason: FinishReason | None


class ChatChunkOut(msgspec.Struct, omit_defaults=True):
    """An event of a streamed chat; `usage` is on the last."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoiceOut]
    usage: UsageOut | None = None


# ---- text completions


class TextLogprobsOut(msgspec.Struct):
    """OpenAI's older shape: columns, one entry a token; offsets count characters of the answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoiceOut(msgspec.Struct):
    index: int
    text: str
    logprobs: TextLogprobsOut | None
    finish_reason: FinishReason | None
    """Null while the choice goes on (in streams)."""


class TextCompletionOut(msgspec.Struct, omit_defaults=True):
    """An answer of `POST /v1/completions`, or an event of its stream; `usage` is on the last."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoiceOut]
    usage: UsageOut | None = None
