"""Turning a node's typed frames into OpenAI's answer.  Pure: bytes out, no I/O.

We write our own JSON and SSE from typed fields, so a node can inject no event, header or `[DONE]`
(A73), and keep what counting needs: every choice's text and token ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import msgspec

from marketplace.metering.counting import Written
from node_agent.protocol import ChoiceDelta, Delta, End, ResponseDigest, TokenLogprob, ToolCallDelta

DONE: Final = b"data: [DONE]\n\n"
encode: Final = msgspec.json.Encoder().encode


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


class _ChoiceOut(msgspec.Struct):
    index: int
    delta: dict[str, Any]
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class _Chunk(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: UsageOut | None = None


@dataclass(slots=True)
class Choice:
    """What one choice has said so far."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    has_all_ids: bool = True
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    delivered: bool = False


FINISH_REASONS: Final = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})


def _logprobs_out(logprobs: list[TokenLogprob] | None) -> dict[str, Any] | None:
    if not logprobs:
        return None
    content = [
        {
            "token": entry.token,
            "logprob": entry.logprob,
            "bytes": entry.bytes,
            "top_logprobs": [
                {"token": top.token, "logprob": top.logprob, "bytes": top.bytes} for top in entry.top
            ],
        }
        for entry in logprobs
    ]
    return {"content": content}


def _tool_calls_out(calls: list[ToolCallDelta]) -> list[dict[str, Any]]:
    out = []
    for call in calls:
        function = {
            name: value
            for name, value in (("name", call.name), ("arguments", call.arguments))
            if value is not None
        }
        entry: dict[str, Any] = {"index": call.index, "function": function}
        if call.id is not None:
            entry |= {"id": call.id, "type": "function"}
        out.append(entry)
    return out


def _whole_calls(calls: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "id": call["id"] or f"call-{at}",
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
        for at, call in sorted(calls.items())
    ]


class ChoiceUnknown(Exception):
    """The node answers a choice nobody asked for."""


class Answer:
    """One chat's answer as it grows; `choices` is how many were asked for (`n`)."""

    ID_START: ClassVar = "chatcmpl-"
    OBJECT: ClassVar = "chat.completion"
    CHUNK: ClassVar = "chat.completion.chunk"

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
            known = choice.tool_calls.setdefault(call.index, {"name": "", "arguments": "", "id": None})
            known["name"] += call.name or ""
            known["arguments"] += call.arguments or ""
            known["id"] = call.id or known["id"]
        if delta.finish_reason is not None:
            self._open -= choice.finish_reason is None
            choice.finish_reason = delta.finish_reason if delta.finish_reason in FINISH_REASONS else "stop"
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
                calls=[call["name"] + call["arguments"] for call in choice.tool_calls.values()],
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
                ToolCallDelta(at, name=call["name"], arguments=call["arguments"])
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
        out: dict[str, Any] = {}
        choice = self._choices[delta.index]
        if not choice.delivered:
            out["role"] = "assistant"
            out["content"] = ""
            choice.delivered = True
        if delta.content is not None:
            out["content"] = delta.content
        if delta.reasoning is not None:
            out["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            out["tool_calls"] = _tool_calls_out(delta.tool_calls)
        finish = choice.finish_reason if delta.finish_reason is not None else None
        return _ChoiceOut(delta.index, out, _logprobs_out(delta.logprobs), finish)

    def _event(self, choices: list[Any], usage: UsageOut | None = None) -> bytes:
        chunk = _Chunk(self.request_id, self.CHUNK, self._created_s, self._model, choices, usage)
        return b"data: " + encode(chunk) + b"\n\n"

    def usage_event(self, usage: UsageOut) -> bytes:
        """Write OpenAI's trailing usage chunk (`stream_options.include_usage`)."""
        return self._event([], usage)

    def completion(self, usage: UsageOut) -> bytes:
        """Write the whole answer as one JSON object."""
        return encode(
            {
                "id": self.request_id,
                "object": self.OBJECT,
                "created": self._created_s,
                "model": self._model,
                "choices": [
                    self._whole_choice(index, self._choices[index]) for index in sorted(self._choices)
                ],
                "usage": usage,
            }
        )

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.tool_calls:
            message["content"] = text or None
            message["tool_calls"] = _whole_calls(choice.tool_calls)
        return {
            "index": index,
            "message": message,
            "logprobs": _logprobs_out(choice.logprobs),
            "finish_reason": choice.finish_reason or "stop",
        }


def error_event(body: dict[str, Any]) -> bytes:
    """Write an error inside a stream that has begun."""
    return b"data: " + encode(body) + b"\n\n"
