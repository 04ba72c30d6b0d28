"""Counting tokens with the model's own tokenizer (R10).

The prompt is counted exactly as the engine builds it: the model's chat template, rendered in a jinja2
sandbox, then the tokenizer.  Seen equal to vLLM's own ids on 20 of 20 requests with emoji, Arabic, CJK,
NUL and special-token text.  A completion's text does not determine its tokens (13 of 20 equal), so a
completion is counted on the ids the engine sampled, once they are shown to say what was delivered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

REPLACEMENT: Final = "\ufffd"
"""What a decoder prints for a character that was cut in the middle."""


class PromptRefused(Exception):
    """The chat template cannot express these messages; the message says why."""


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _environment() -> ImmutableSandboxedEnvironment:
    """Give the sandbox chat templates are written for; no autoescape, since they make prompts, not pages."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
    return environment


class TokenCounter:
    """One model's template and tokenizer; safe to share between threads."""

    def __init__(self, *, tokenizer: bytes, chat_template: str, special_tokens: Mapping[str, str]) -> None:
        self._tokenizer = Tokenizer.from_buffer(tokenizer)
        self._template = _environment().from_string(chat_template)
        self._special = dict(special_tokens)

    def prompt_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Give the token ids of the prompt the engine will see."""
        try:
            prompt = self._template.render(
                messages=messages, tools=tools, add_generation_prompt=True, **self._special
            )
        except (TemplateError, TypeError, ValueError, KeyError, RecursionError) as e:
            raise PromptRefused(f"the model's chat template refuses these messages: {e}") from e
        return list(self._tokenizer.encode(prompt, add_special_tokens=False).ids)

    def text_tokens(self, text: str) -> int:
        """Count a text's own tokens: the fallback where no ids are known."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def say_the_same(self, ids: Sequence[int], text: str, *, is_cut_at_stop: bool = False) -> bool:
        """Tell whether `ids` are a way to write `text`, so that their number may be billed.

        Special tokens are not text.  An unfinished character at the end is printed as U+FFFD by one side
        and withheld by the other.  A stop string is sampled but not delivered, so where the engine stopped
        at one the text may be shorter by less than the last few tokens.
        """
        decoded = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        if decoded == text or decoded.rstrip(REPLACEMENT) == text.rstrip(REPLACEMENT):
            return True
        return is_cut_at_stop and decoded.startswith(text)
