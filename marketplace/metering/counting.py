"""Counting tokens with the model's own tokenizer (R10).

The prompt is counted exactly as the engine builds it: the messages as the engine's template sees them
(`conversation`), the model's chat template in a jinja2 sandbox, then the tokenizer.

A completion's text does not determine its tokens (13 of 20 re-counted equal), so a completion is counted
on the ids the engine sampled, once they are shown to say what was delivered and little that was not
(A57).  Where they do not, the delivered text is encoded again.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from hashlib import blake2b
from typing import Any, Final, NoReturn, TypeVar

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from marketplace.metering.conversation import conversation, knows_developer, tools_for_template, wants_parts
from marketplace.metering.disarming import Disarmer

_T = TypeVar("_T")

REPLACEMENT: Final = "\ufffd"
"""What a decoder prints for a character that was cut in the middle."""
WITHHELD_MAX: Final = 8
"""Unfinished characters at the end that an engine may withhold; a cut one is at most 3 bytes, noise more."""
SPECIAL_MAX: Final = 4
"""Special tokens (which are no text) believed per choice: the end of the turn and a few marks."""
MARKUP_MAX: Final = 128
"""Characters of markup around a reasoning block or a tool call that the engine cuts out of the text."""

PARTS_MAX: Final = 20_000
"""Counts remembered per tokenizer, about 200 bytes each; the oldest go first."""
_PROBES: Final = ("a", " a", "  a", "\n", "\na", "A1", "é", "中", ".")
"""What may follow a mark, to see whether a tokenizer begins anew there."""
_REFUSALS: Final = (
    TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
)  # fmt: skip
"""What a template raises on messages it was not written for."""


class CountedOn(IntEnum):
    """What a completion was counted on."""

    IDS = 0
    """The ids the engine sampled, shown to spell what was delivered."""
    TEXT = 1
    """The delivered text, encoded again: the engine told no ids, or ids that cannot be believed."""


class PromptRefused(Exception):
    """The chat template cannot express these messages; the message says why."""


@dataclass(frozen=True, slots=True)
class Written:
    """One choice, as delivered."""

    ids: Sequence[int]
    text: str
    reasoning: str = ""
    calls: Sequence[str] = ()
    """Each tool call's name and arguments."""
    has_all_ids: bool = True
    """The engine told the ids of every piece."""
    stop_reason: str | int | None = None
    """The stop string or token at which the engine stopped, where it says so."""

    @property
    def everything(self) -> str:
        return self.reasoning + self.text + "".join(self.calls)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Generation(Extension):
    """`{% generation %}` marks what to train on; rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """Give the sandbox chat templates are written for (transformers' own settings).

    No autoescape, since templates make prompts, not pages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
    return environment


class CountedParts:
    """Token counts of the parts of prompts, by digest: what was counted once is not encoded again.

    A prompt is cut after its special tokens, where every tokenizer of the catalogue begins anew; whether this
    one does is tried at the start, and where it does not a prompt is one part.  Parts are remembered for the
    buyer who sent them alone (`owner`, at most 16 bytes, goes into the digest), so that nobody can time what
    others have sent.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._counts: dict[bytes, int] = {}
        marks = [
            token.content
            for token in tokenizer.get_added_tokens_decoder().values()
            if token.special and not (token.normalized or token.rstrip or token.single_word)
        ]
        marks.sort(key=len, reverse=True)
        cut = re.compile("|".join(map(re.escape, marks))) if marks else None
        self._cut = cut if cut is not None and self._begins_anew(marks[0]) else None

    def _begins_anew(self, mark: str) -> bool:
        return all(
            self._encoded(mark + probe) == self._encoded(mark) + self._encoded(probe) for probe in _PROBES
        )

    def _encoded(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def tokens(self, text: str, owner: bytes) -> int:
        """Count a prompt."""
        return sum(self._tokens_of(part, owner) for part in self._parts_of(text))

    def _parts_of(self, text: str) -> Iterator[str]:
        begin = 0
        if self._cut is not None:
            for mark in self._cut.finditer(text):
                yield text[begin : mark.end()]
                begin = mark.end()
        if begin < len(text):
            yield text[begin:]

    def _tokens_of(self, part: str, owner: bytes) -> int:
        digest = blake2b(part.encode("utf-8", "surrogatepass"), digest_size=16, salt=owner).digest()
        found = self._counts.get(digest)
        if found is None:
            found = self._encoded(part)
            if len(self._counts) >= PARTS_MAX:
                with contextlib.suppress(StopIteration, KeyError):  # another thread may have been faster
                    del self._counts[next(iter(self._counts))]
            self._counts[digest] = found
        return found


class TokenCounter:
    """One model's template and tokenizer; safe to share between threads."""

    def __init__(self, *, tokenizer: bytes, chat_template: str, special_tokens: Mapping[str, str]) -> None:
        self._tokenizer = Tokenizer.from_buffer(tokenizer)
        self._tokenizer.no_truncation()  # a file may ask for it; a count must not obey
        self._tokenizer.no_padding()
        environment = _environment()
        self._template = environment.from_string(chat_template)
        self._template.globals = dict(self._template.globals)  # the ChainMap it is costs more than rendering
        self._in_parts = wants_parts(environment, chat_template)
        self._knows_developer = knows_developer(chat_template)
        self._special = dict(special_tokens)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(number for number, token in added.items() if token.special)
        self._parts = CountedParts(self._tokenizer)
        names = [token.content for token in added.values() if token.special]
        ignores_case = self._tokenizer.normalizer is not None  # it may lower what it is given
        self._disarmer = Disarmer(names, self._has_special, ignores_case=ignores_case)

    def disarmed(self, value: _T) -> _T:
        """Give what a buyer wrote, any JSON value, with no text that an engine reads as a control token."""
        return self._disarmer.value(value)

    def _has_special(self, text: str) -> bool:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return any(number in self._special_ids for number in ids)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render the prompt the engine will see; PromptRefused if the template refuses these messages.

        `variables` are what the request says to the template beside messages and tools.
        """
        try:
            return self._template.render(
                messages=conversation(
                    messages, in_parts=self._in_parts, knows_developer=self._knows_developer
                ),
                tools=tools_for_template(tools),
                **{
                    **self._special, **(variables or {}), "documents": None, "add_generation_prompt": True,
                },
            )  # fmt: skip
        except _REFUSALS as e:
            raise PromptRefused(f"the model's chat template refuses these messages: {e}") from e

    def prompt_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Give the token ids of the prompt the engine will see; raises PromptRefused."""
        rendered = self.prompt(messages, tools, variables)
        return list(self._tokenizer.encode(rendered, add_special_tokens=False).ids)

    def prompt_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        *,
        owner: bytes,
    ) -> int:
        """Count what `prompt_ids` would give, remembering the parts of `owner`'s conversations.

        A conversation is sent again with every turn; only what is new of it is encoded.
        """
        return self._parts.tokens(self.prompt(messages, tools, variables), owner)

    def plain_prompt_tokens(self, text: str) -> int:
        """Count a prompt that goes through no template, with the marks its tokenizer adds."""
        return len(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def text_tokens(self, text: str) -> int:
        """Count a text's own tokens: the fallback where no ids can be believed."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def completion_tokens(
        self, written: Written, *, stops: Sequence[str] = (), ignores_end: bool = False
    ) -> tuple[int, CountedOn]:
        """Count one choice's tokens: its ids if they say what was delivered, else its text encoded again.

        `stops` are the buyer's stop strings.  `ignores_end`: he goes on after the end of the turn, or says
        himself which tokens are sampled; only then are many marks and pieces of characters honest.
        """
        if written.has_all_ids and self._is_believable(written, stops, ignores_end=ignores_end):
            return len(written.ids), CountedOn.IDS
        return self.text_tokens(written.everything), CountedOn.TEXT

    def _is_believable(self, written: Written, stops: Sequence[str], *, ignores_end: bool) -> bool:
        specials = sum(map(self._special_ids.__contains__, written.ids))
        if specials > SPECIAL_MAX and not ignores_end:
            return False
        if written.reasoning or written.calls:
            return self._says_in_markup(written)
        return self._says(written, stops, withheld_max=len(written.ids) if ignores_end else WITHHELD_MAX)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _says(self, written: Written, stops: Sequence[str], *, withheld_max: int) -> bool:
        """Tell whether the ids spell the text, give or take what an engine withholds at the end."""
        text, decoded = written.text, self._decode(written.ids)
        if _is_same(decoded, text, withheld_max):
            return True
        stop = written.stop_reason
        if isinstance(stop, int):  # a stop token is sampled, not delivered
            return _is_same(self._decode(written.ids[:-1]), text, withheld_max)
        if stop is None or stop not in stops:
            return False
        # A stop string ends within the last token, which may say more; none of it is delivered.
        before_last = self._decode(written.ids[:-1])
        return _starts(decoded, text + stop) and not _starts(before_last, text + stop)

    def _says_in_markup(self, written: Written) -> bool:
        """Tell whether the ids spell reasoning and text, and not much more than those and the tool calls.

        Engines cut the marks of reasoning and calls out and write a call's arguments anew, so the whole
        cannot be compared; its length can.
        """
        decoded = self._decode(written.ids)
        if written.reasoning.strip() not in decoded or written.text.strip() not in decoded:
            return False
        blocks = len(written.calls) + bool(written.reasoning)
        spacing = sum(len(call) for call in written.calls) // 4
        return len(decoded) <= len(written.everything) + blocks * MARKUP_MAX + spacing


def _is_same(decoded: str, text: str, withheld_max: int) -> bool:
    """Tell whether two texts differ at most in a space that a decoder drops and unfinished characters."""
    if decoded == text:
        return True
    ours, theirs = decoded.rstrip(REPLACEMENT), text.rstrip(REPLACEMENT)
    if max(len(decoded) - len(ours), len(text) - len(theirs)) > withheld_max:
        return False
    return ours.removeprefix(" ") == theirs.removeprefix(" ")


def _starts(decoded: str, text: str) -> bool:
    return decoded.removeprefix(" ").startswith(text.removeprefix(" "))
