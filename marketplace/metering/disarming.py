"""Taking the power out of special-token text in what buyers write.  Pure.

An engine reads `<|im_start|>` in a message as the control token of that name, so a quoted document could
open a turn of its own.  Chat APIs offer no way to say "only text", so the text itself is changed, for our
count and for the engine alike: an invisible joiner goes in after the name's first character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

JOINERS: Final = ("\u2060", "\u200b", " ")
"""Word joiner, zero-width space, space: the first that the tokenizer does not swallow is used."""
_T = TypeVar("_T")


def pattern_of(names: Iterable[str]) -> str:
    """Write what matches the longest of these names at each place, as alternatives would, longest first.

    A tree of their beginnings: a text full of what 256 names begin with is compared with it once, not 256
    times at each place.
    """
    distinct = sorted(set(names))
    first, last = distinct[0], distinct[-1]
    differs = (at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    start = first[: next(differs, None)]
    ends: dict[str, list[str]] = {}
    for name in distinct:
        if rest := name[len(start) :]:
            ends.setdefault(rest[0], []).append(rest)
    if not ends:
        return re.escape(start)
    branches = "|".join(map(pattern_of, ends.values()))
    return f"{re.escape(start)}(?:{branches})" + ("?" if first == start else "")


def _lower(name: str) -> str:
    """In small letters, so that names that differ only by case share a branch; of as many characters."""
    return "".join(small if len(small := letter.lower()) == 1 else letter for letter in name)


class Disarmer:
    """Changes special-token text of one tokenizer; `has_special` tells whether a text makes such a token."""

    def __init__(
        self, names: Iterable[str], has_special: Callable[[str], bool], *, ignores_case: bool = False
    ) -> None:
        marks = {name for name in names if len(name) > 1}
        flags = re.IGNORECASE if ignores_case else re.NOFLAG
        spelled = map(_lower, marks) if ignores_case else marks
        self._pattern = re.compile(pattern_of(spelled), flags) if marks else None
        self._joiner = next(
            (
                joiner
                for joiner in JOINERS
                if not any(has_special(name[0] + joiner + name[1:]) for name in marks)
            ),
            JOINERS[-1],
        )

    def text(self, text: str) -> str:
        """Give a text no part of which is a special token; most texts as they are."""
        pattern = self._pattern
        while pattern is not None and pattern.search(text):
            text = pattern.sub(lambda found: found[0][0] + self._joiner + found[0][1:], text)
        return text

    def value(self, value: _T) -> _T:
        """Give a JSON value in which every text is disarmed, names of fields included."""
        disarmed: _T = self._value(value)
        return disarmed

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {
                key if key.isidentifier() else self.text(key): self._value(inner)
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return self._parts([self._value(inner) for inner in value])
        return value

    def _parts(self, values: list[Any]) -> list[Any]:
        """Keep the parts of a content apart: a template may write them without anything between."""
        texts = [
            part["text"] for part in values if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
        if len(texts) < 2 or self.text(whole := "".join(texts)) == whole:
            return values
        return [
            {**part, "text": self._joiner + part["text"]}
            if isinstance(part, dict) and isinstance(part.get("text"), str)
            else part
            for part in values
        ]
