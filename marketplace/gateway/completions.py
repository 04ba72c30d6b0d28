"""`POST /v1/completions`: text in, text out, without a chat template.  Pure.

A prompt is text or token ids, or a list of such; every prompt gets `n` choices, numbered prompt by prompt.
Everything else (admission, relaying, billing) is the chat's own: this module only reads another request and
writes another answer.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from msgspec import Meta

from marketplace.gateway.answer import Answer, Choice
from marketplace.gateway.answer_shapes import TextChoiceOut, TextCompletionOut, TextLogprobsOut
from marketplace.gateway.requests import (
    CHOICES_MAX,
    DEPTH_MAX,
    InferenceRequest,
    TokenId,
    decode,
    invalid,
    is_too_deep,
)
from marketplace.metering.counting import TokenCounter
from marketplace.platform.http import Refusal
from node_agent.protocol import ChoiceDelta, TokenLogprob

PATH: Final = b"/v1/completions"
MAX_TOKENS_DEFAULT: Final = 16
"""OpenAI's, and vLLM's."""
Ids = Annotated[list[TokenId], Meta(min_length=1)]


class CompletionRequest(InferenceRequest, kw_only=True, omit_defaults=True):
    """OpenAI's text completion request."""

    kind: ClassVar[str] = "completion"
    prompt_field: ClassVar[str] = "prompt"

    prompt: str | Annotated[list[str | TokenId | Ids], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Meta(ge=1, le=CHOICES_MAX)] | None = None
    """Not more than `n`: what is thrown away would have to be paid."""
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]  # `_check` saw that all are numbers
        return self.prompt  # type: ignore[return-value]

    @property
    def choices(self) -> int:
        return len(self.prompts) * (self.n or 1)

    @property
    def wanted_tokens(self) -> int | None:
        """What the buyer asked for per choice, or OpenAI's default."""
        return self.max_tokens or MAX_TOKENS_DEFAULT

    def prompt_counts(self, counter: TokenCounter, owner: bytes) -> list[int]:
        del owner
        return [
            counter.plain_prompt_tokens(prompt) if isinstance(prompt, str) else len(prompt)
            for prompt in self.prompts
        ]

    def engine_content(self) -> dict[str, Any]:
        return {"prompt": self.prompt}


_decoder: Final = msgspec.json.Decoder(CompletionRequest)


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a text completion request; raises Refusal 413 or 400."""
    request = decode(_decoder, body)
    if is_too_deep([request.response_format, request.structured_outputs]):
        raise Refusal(400, "too_deep", f"JSON nested deeper than {DEPTH_MAX} levels")
    if isinstance(request.prompt, list) and len({type(item) for item in request.prompt}) > 1:
        raise invalid("prompt", "is text, token ids, or a list of texts or of lists of ids")
    if request.choices > CHOICES_MAX:
        raise invalid(
            "prompt", f"asks for {request.choices} choices in all, at most {CHOICES_MAX} are served"
        )
    if request.best_of is not None and request.best_of > (request.n or 1):
        raise invalid("best_of", "is above n; only what is delivered is generated")
    return request


class CompletionAnswer(Answer):
    """A text completion's answer, in OpenAI's older shape."""

    ID_START: ClassVar = "cmpl-"
    WHOLE: ClassVar[Any] = TextCompletionOut
    CHUNK: ClassVar[Any] = TextCompletionOut
    OBJECT: ClassVar = "text_completion"
    CHUNK_OBJECT: ClassVar = "text_completion"

    def __init__(self, *, request_id: str, model: str, created_s: int, choices: int) -> None:
        super().__init__(request_id=request_id, model=model, created_s=created_s, choices=choices)
        self._offsets: dict[int, int] = {}

    def _is_plain(self, delta: ChoiceDelta) -> bool:
        del delta
        return False

    def _choice_out(self, delta: ChoiceDelta) -> TextChoiceOut:
        choice = self._choices[delta.index]
        finish = choice.finish_reason if delta.finish_reason is not None else None
        return TextChoiceOut(
            delta.index, delta.content or "", self._columns(delta.index, delta.logprobs), finish
        )

    def _whole_choice(self, index: int, choice: Choice) -> TextChoiceOut:
        finish = choice.finish_reason or "stop"
        return TextChoiceOut(index, "".join(choice.text), self._columns(index, choice.logprobs), finish)

    def _columns(self, index: int, rows: list[TokenLogprob] | None) -> TextLogprobsOut | None:
        """Give rows as OpenAI's columns; offsets count characters of the answer."""
        if not rows:
            return None
        offset = self._offsets.get(index, 0)
        offsets = []
        for row in rows:
            offsets.append(offset)
            offset += len(row.token)
        self._offsets[index] = offset
        return TextLogprobsOut(
            tokens=[row.token for row in rows],
            token_logprobs=[row.logprob for row in rows],
            top_logprobs=[{top.token: top.logprob for top in row.top} for row in rows],
            text_offset=offsets,
        )
