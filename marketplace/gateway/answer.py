"""Turning a node's typed frames into OpenAI's answer.  Pure: bytes out, no I/O.

We write our own JSON and SSE from typed fields, so a node can inject no event, header or `[DONE]`
(A73), and keep what counting needs: every choice's text and token ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, cast, get_args

import msgspec

from marketplace.gateway.answer_shapes import (
    ChatChoiceOut,
    ChatChunkChoiceOut,
    ChatChunkOut,
    ChatCompletionOut,
    DeltaOut,
    FinishReason,
    FunctionDeltaOut,
    FunctionOut,
    LogprobOut,
    LogprobsOut,
    MessageOut,
    ToolCallDeltaOut,
    ToolCallOut,
    TopLogprobOut,
    UsageOut,
)
from marketplace.metering.counting import Written
from node_agent.protocol import ChoiceDelta, Delta, End, ResponseDigest, TokenLogprob, ToolCallDelta

DONE: Final = b"data: [DONE]\n\n"
encode: Final = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Call:
    """What came of one tool call so far, piece by piece: texts that grow would be copied with each."""

    names: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    id: str | None = None

    @property
    def name(self) -> str:
        return "".join(self.names)

    @property
    def arguments(self) -> str:
        return "".join(self.parts)


@dataclass(slots=True)
class Choice:
    """What one choice has said so far."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tool_calls: dict[int, Call] = field(default_factory=dict)
    has_all_ids: bool = True
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    delivered: bool = False


FINISH_REASONS: Final = frozenset(get_args(FinishReason))


def _logprobs_out(logprobs: list[TokenLogprob] | None) -> LogprobsOut | None:
    if not logprobs:
        return None
    return LogprobsOut([
        LogprobOut(
            entry.token, entry.logprob, entry.bytes,
            [TopLogprobOut(top.token, top.logprob, top.bytes) for top in entry.top],
        )
        for entry in logprobs
    ])  # fmt: skip


def _call_deltas_out(calls: list[ToolCallDelta]) -> list[ToolCallDeltaOut]:
    return [
        ToolCallDeltaOut(
            call.index,
            FunctionDeltaOut(call.name, call.arguments),
            id=call.id,
            type=None if call.id is None else "function",
        )
        for call in calls
    ]


def _calls_out(calls: dict[int, Call]) -> list[ToolCallOut]:
    return [
        ToolCallOut(call.id or f"call-{at}", "function", FunctionOut(call.name, call.arguments))
        for at, call in sorted(calls.items())
    ]


class ChoiceUnknown(Exception):
    """The node answers a choice nobody asked for."""


class Answer:
    """One chat's answer as it grows; `choices` is how many were asked for (`n`)."""

    ID_START: ClassVar = "chatcmpl-"
    WHOLE: ClassVar[Any] = ChatCompletionOut
    CHUNK: ClassVar[Any] = ChatChunkOut
    OBJECT: ClassVar = "chat.completion"
    CHUNK_OBJECT: ClassVar = "chat.completion.chunk"

    def __init__(self, *, request_id: str, model: str, created_s: int, choices: int) -> None:
        self.request_id = request_id
        self._asked = choices
        self._model = model
        self._created_s = created_s
        self._choices: dict[int, Choice] = {}
        self._open = choices
        """How many have not ended."""
        self._plain_start = b""
        self.prompt_reported: int | None = None
        self.completion_reported: int | None = None
        self.has_begun = False
        """A part of the answer came from the node."""

    def take(self, frame: Delta) -> None:
        """Add a frame's content to the record; ChoiceUnknown, before anything is added, for a stray one."""
        for delta in frame.choices:
            if delta.index >= self._asked:
                raise ChoiceUnknown
        self.has_begun = self.has_begun or bool(frame.choices)
        self._note_counts(frame)
        for delta in frame.choices:
            self._take_choice(delta)

    def take_plain(self, frame: Delta) -> bytes:
        """`take` and `chunk` in one for a frame of nothing but text of choices the buyer has begun to read.

        Nearly all are such; of any other nothing is taken, and b"" is given.
        """
        if self.is_whole or not frame.choices or not all(map(self._is_plain, frame.choices)):
            return b""
        events = []
        for delta in frame.choices:
            choice, content = self._choices[delta.index], delta.content
            if content:
                choice.text.append(content)
            if delta.token_ids:
                choice.ids.extend(delta.token_ids)
            elif content:
                choice.has_all_ids = False
            events.append(self._plain_event(delta))
        self._note_counts(frame)
        return b"".join(events)

    def finish(self, frame: End) -> None:
        """Note the node's final counts."""
        self._note_counts(frame)

    def _note_counts(self, frame: Delta | End) -> None:
        if frame.prompt_tokens is not None:
            self.prompt_reported = frame.prompt_tokens
        if frame.completion_tokens is not None:
            self.completion_reported = frame.completion_tokens

    def _take_choice(self, delta: ChoiceDelta) -> None:
        choice = self._choices.get(delta.index)
        if choice is None:
            choice = self._choices[delta.index] = Choice()
        if delta.content:
            choice.text.append(delta.content)
        if delta.reasoning:
            choice.reasoning.append(delta.reasoning)
        if delta.token_ids:
            choice.ids.extend(delta.token_ids)
        elif delta.content or delta.reasoning or delta.tool_calls:
            choice.has_all_ids = False
        if delta.logprobs:
            choice.logprobs.extend(delta.logprobs)
        for call in delta.tool_calls or ():
            known = choice.tool_calls.get(call.index)
            if known is None:
                known = choice.tool_calls[call.index] = Call()
            if call.name:
                known.names.append(call.name)
            if call.arguments:
                known.parts.append(call.arguments)
            known.id = call.id or known.id
        if delta.finish_reason is not None:
            self._open -= choice.finish_reason is None
            is_known = delta.finish_reason in FINISH_REASONS
            choice.finish_reason = cast("FinishReason", delta.finish_reason) if is_known else "stop"
            choice.stop_reason = delta.stop_reason

    @property
    def is_whole(self) -> bool:
        """Every choice asked for has ended."""
        return not self._open

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended, for the usage row."""
        first = self._choices.get(0)
        return None if first is None else first.finish_reason

    def written(self) -> list[Written]:
        """Give what each choice said, to be counted."""
        return [
            Written(
                ids=choice.ids,
                text="".join(choice.text),
                reasoning="".join(choice.reasoning),
                calls=[call.name + call.arguments for call in choice.tool_calls.values()],
                has_all_ids=choice.has_all_ids,
                stop_reason=choice.stop_reason,
            )
            for choice in self._choices.values()
        ]

    def response_sha256(self) -> bytes:
        """Hash what was said, as receipts do."""
        digest = ResponseDigest()
        for index, choice in self._choices.items():
            calls = [
                ToolCallDelta(at, name=call.name, arguments=call.arguments)
                for at, call in choice.tool_calls.items()
            ]
            said, thought = "".join(choice.text), "".join(choice.reasoning)
            digest.add(ChoiceDelta(index, content=said, reasoning=thought, tool_calls=calls))
        return digest.digest()

    def chunk(self, frame: Delta, usage: UsageOut | None = None) -> bytes:
        """Write a frame as SSE events: one per engine event, the usage on the last."""
        if not frame.choices:
            return b""
        last = frame.choices[-1]
        return b"".join([
            self._plain_event(delta)
            if (usage is None or delta is not last) and self._is_plain(delta)
            else self._event([self._choice_out(delta)], usage if delta is last else None)
            for delta in frame.choices
        ])  # fmt: skip

    def _is_plain(self, delta: ChoiceDelta) -> bool:
        """Tell whether an event is nothing but text, of a choice that has begun."""
        choice = self._choices.get(delta.index)
        return (
            choice is not None and choice.delivered and delta.content is not None
            and delta.finish_reason is None
            and not (delta.reasoning or delta.tool_calls or delta.logprobs)
        )  # fmt: skip

    def _plain_event(self, delta: ChoiceDelta) -> bytes:
        """Write an event that `_is_plain` without building it."""
        if not self._plain_start:
            whole = self._event([])
            self._plain_start = whole[: whole.rindex(b"]")] + b'{"index":'
        return b'%b%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}]}\n\n' % (
            self._plain_start, delta.index, encode(delta.content),
        )  # fmt: skip

    @property
    def tokens_told(self) -> int:
        """How many token ids have come, over all choices."""
        return sum(len(choice.ids) for choice in self._choices.values())

    def _choice_out(self, delta: ChoiceDelta) -> Any:
        """Give one event's choice; the subclass of text completions gives its own."""
        out = DeltaOut()
        choice = self._choices[delta.index]
        if not choice.delivered:
            out.role, out.content = "assistant", ""
            choice.delivered = True
        if delta.content is not None:
            out.content = delta.content
        out.reasoning_content = delta.reasoning
        if delta.tool_calls:
            out.tool_calls = _call_deltas_out(delta.tool_calls)
        finish = choice.finish_reason if delta.finish_reason is not None else None
        return ChatChunkChoiceOut(delta.index, out, _logprobs_out(delta.logprobs), finish)

    def _event(self, choices: list[Any], usage: UsageOut | None = None) -> bytes:
        chunk = self.CHUNK(self.request_id, self.CHUNK_OBJECT, self._created_s, self._model, choices, usage)
        return b"data: " + encode(chunk) + b"\n\n"

    def usage_event(self, usage: UsageOut) -> bytes:
        """Write OpenAI's trailing usage chunk (`stream_options.include_usage`)."""
        return self._event([], usage)

    def completion(self, usage: UsageOut) -> bytes:
        """Write the whole answer as one JSON object."""
        choices = [self._whole_choice(index, self._choices[index]) for index in sorted(self._choices)]
        return encode(self.WHOLE(self.request_id, self.OBJECT, self._created_s, self._model, choices, usage))

    def _whole_choice(self, index: int, choice: Choice) -> Any:
        text = "".join(choice.text)
        message = MessageOut("assistant", text, "".join(choice.reasoning) or None)
        if choice.tool_calls:
            message.content, message.tool_calls = text or None, _calls_out(choice.tool_calls)
        finish = choice.finish_reason or "stop"
        return ChatChoiceOut(index, message, _logprobs_out(choice.logprobs), finish)


def error_event(body: dict[str, Any]) -> bytes:
    """Write an error inside a stream that has begun."""
    return b"data: " + encode(body) + b"\n\n"
