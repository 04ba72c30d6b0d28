"""What buyers read of the gateway is what it takes, refuses and says: fields, codes, headers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from marketplace.gateway.completions import CompletionRequest
from marketplace.gateway.requests import ChatRequest, ProviderPreferences, RepetitionDetection

ROOT = Path(__file__).parents[2]
API = (ROOT / "docs" / "api.md").read_text()
SOURCES = [
    *(ROOT / "marketplace" / "gateway").glob("*.py"),
    *(ROOT / "marketplace" / "platform").glob("*.py"),
]


def _words() -> set[str]:
    """What stands in code marks, word by word."""
    prose = re.sub(r"^```.*?^```", "", API, flags=re.DOTALL | re.MULTILINE)
    return {word for marked in re.findall(r"`([^`]+)`", prose) for word in re.findall(r"[\w-]+", marked)}


def _codes() -> Iterator[str]:
    for path in SOURCES:
        text = path.read_text()
        yield from re.findall(r'(?:Refusal|CannotServeNow)\(\s*\d{3},\s*"([a-z_]+)"', text)
        yield from re.findall(r'\bcode="([a-z_]+)"', text)


def test_every_refusal_is_listed_by_its_code() -> None:
    found = set(_codes()) - {"buyer_left"}  # nobody is there to be told
    assert len(found) > 35  # else the pattern no longer finds them
    assert found - _words() == set()


@pytest.mark.parametrize(
    "kind",
    [ChatRequest, CompletionRequest, ProviderPreferences, RepetitionDetection],
    ids=lambda k: k.__name__,
)
def test_every_field_of_a_request_is_described(kind: type[msgspec.Struct]) -> None:
    assert set(kind.__struct_fields__) - _words() == set()


def test_every_header_of_an_answer_is_described() -> None:
    sent = {
        name
        for path in SOURCES
        for name in re.findall(r'b"(x-(?:tollway|ratelimit)-[a-z-]+)"', path.read_text())
    }
    assert len(sent) >= 7
    described = {word.lower() for word in _words()}
    described |= {f"x-ratelimit{word}" for word in described if word.startswith("-")}
    assert sent - described == set()
