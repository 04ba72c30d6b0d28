"""The one prompt and the one answer that every gateway relays in the benchmark.

64 tokens of plain English, one token a chunk; the words need no escaping in JSON, so that the load
generator can compare what arrives byte by byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

MODEL: Final = "stub"
TOKENS: Final = 64
_PROMPT: Final = (
    "You are asked to explain in plain words, to somebody who has never seen one, how a marketplace for "
    "computing time works: who offers, who buys, how a price comes about and how both sides can be sure "
    "that what was promised was delivered. Two short paragraphs will do."
)
_TEXT: Final = (
    "A marketplace for computing time brings together people who own machines and people who need work "
    "done. The owner says what an hour costs and keeps the machine ready while the buyer sends a question "
    "and pays for each word of the answer. Both can count the words because every one of them has a number "
    "that either side can look up later and nobody can change a number once it was written down"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer's pieces, one token each, with their ids."""

    pieces: list[str]
    ids: list[int]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def answer_of(tokenizer_file: Path) -> Answer:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    ids = tokenizer.encode(_TEXT, add_special_tokens=False).ids[:TOKENS]
    pieces = [tokenizer.decode([token]) for token in ids]
    answer = Answer(pieces, ids)
    assert answer.text == tokenizer.decode(ids), "a token that is not a whole piece of text"
    assert len(ids) == TOKENS
    return answer


def prompt(pace_ms: int = 0) -> str:
    """As many tokens at any pace: three digits."""
    return f"{_PROMPT} pace_ms={pace_ms:03}"


def body(*, is_stream: bool, pace_ms: int = 0, model: str = MODEL) -> bytes:
    """A buyer's request; the stub reads the pace in the prompt, which every gateway passes on."""
    fields: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt(pace_ms)}],
        "max_tokens": TOKENS,
        "temperature": 0.7,
    }
    if is_stream:
        fields["stream"] = True
    return json.dumps(fields, separators=(",", ":")).encode()


def http_request(port: int, path: str, content: bytes, headers: Iterable[tuple[str, str]]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"host: 127.0.0.1:{port}", "content-type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers]
    lines.append(f"content-length: {len(content)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + content


def write_blobs(path: Path, blobs: Iterable[bytes]) -> None:
    path.write_bytes(b"".join(len(blob).to_bytes(4, "little") + blob for blob in blobs))


def plain_json(answer: Answer) -> bytes:
    """The stub engine's whole answer, in OpenAI's words."""
    return json.dumps(
        {
            "id": "chatcmpl-0123456789abcdef0123456789abcdef",
            "object": "chat.completion",
            "created": 1_790_000_000,
            "model": MODEL,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": answer.text},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": _usage(),
        },
        separators=(",", ":"),
    ).encode()


def stream_events(answer: Answer, *, as_vllm: bool = False) -> list[bytes]:
    """The stub engine's stream: an event per token, the usage, `[DONE]`.

    `as_vllm`: with token ids and running usage, as vLLM writes when an agent asks it.
    """
    events = []
    for at, piece in enumerate(answer.pieces):
        choice: dict[str, Any] = {
            "index": 0, "delta": _delta(at, piece), "logprobs": None, "finish_reason": _finish(at),
        }  # fmt: skip
        if as_vllm:
            events.append(_event([{**choice, "token_ids": [answer.ids[at]]}], usage=_usage(at + 1)))
        else:
            events.append(_event([choice]))
    return [*events, _event([], usage=_usage()) + b"data: [DONE]\n\n"]


def _delta(at: int, piece: str) -> dict[str, str]:
    return {"role": "assistant", "content": piece} if at == 0 else {"content": piece}


def _finish(at: int) -> str | None:
    return "stop" if at == TOKENS - 1 else None


def _usage(completion: int = TOKENS) -> dict[str, int]:
    return {"prompt_tokens": 70, "completion_tokens": completion, "total_tokens": 70 + completion}


def _event(choices: list[dict[str, Any]], **fields: Any) -> bytes:
    chunk = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1_790_000_000,
        "model": MODEL,
        "choices": choices,
        **fields,
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
