"""Decisions kept, and asked again under other policies.

A decision log holds one question a line as JSON: the nodes as seen, the buyer's wishes, the shape of the
request, the chance drawn.  It holds no content, no buyer and no key.  Replaying a log under the policy that
wrote it gives the same decisions; under another it shows who would have been asked, at what price and speed.

    tollway route replay decisions.jsonl --policy recorded --policy price --policy 60/20/20
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final

import msgspec

from marketplace.routing.choice import (
    NodeView,
    Preferences,
    Question,
    Sort,
    Weights,
    choose,
)
from node_agent.protocol import NodeId

LOG_BYTES_MAX: Final = 256 * 1024 * 1024
"""Then the log is full; whoever wants more moves it away and starts again."""
LINE_BYTES_MAX: Final = 4 * 1024 * 1024


class Recorded(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a log: a question and who was chosen."""

    now_ms: int
    random: float
    prompt_tokens: int
    completion_tokens: int
    context_min: int
    views: list[NodeView]
    chosen: list[str]
    warm: str | None = None
    operator: str | None = None
    price_in_max: int | None = None
    price_out_max: int | None = None
    only: list[str] = []
    ignore: list[str] = []
    order: list[str] = []
    sort: Sort = Sort.BALANCED
    allow_fallbacks: bool = True
    weights: tuple[int, int, int] = (40, 35, 25)


def recorded(question: Question, chosen: Iterable[NodeView]) -> Recorded:
    """Give what a log keeps of a decision."""
    wish, weights = question.preferences, question.weights
    return Recorded(
        now_ms=question.now_ms,
        random=question.random,
        prompt_tokens=question.prompt_tokens,
        completion_tokens=question.completion_tokens,
        context_min=question.context_min,
        views=list(question.views),
        chosen=[view.node_id for view in chosen],
        warm=question.warm,
        operator=wish.operator,
        price_in_max=wish.price_in_max,
        price_out_max=wish.price_out_max,
        only=sorted(wish.only),
        ignore=sorted(wish.ignore),
        order=list(wish.order),
        sort=wish.sort,
        allow_fallbacks=wish.allow_fallbacks,
        weights=(weights.latency, weights.load, weights.price),
    )


def question_of(line: Recorded, *, sort: Sort | None = None, weights: Weights | None = None) -> Question:
    """Give the question again, under the recorded policy or another; the buyer's limits stay his."""
    return Question(
        line.views,
        line.now_ms,
        line.random,
        prompt_tokens=line.prompt_tokens,
        completion_tokens=line.completion_tokens,
        context_min=line.context_min,
        preferences=Preferences(
            operator=line.operator,
            price_in_max=line.price_in_max,
            price_out_max=line.price_out_max,
            only=frozenset(line.only),
            ignore=frozenset(line.ignore),
            order=tuple(line.order),
            sort=line.sort if sort is None else sort,
            allow_fallbacks=line.allow_fallbacks,
        ),
        weights=Weights(*line.weights) if weights is None else weights,
        warm=None if line.warm is None else NodeId(line.warm),
    )


class Policy(msgspec.Struct, frozen=True):
    """A way to decide; both None: as recorded."""

    name: str
    sort: Sort | None = None
    weights: Weights | None = None


def parse_policy(text: str) -> Policy:
    """Read `recorded`, a sort (`price`, `latency`, …) or weights (`latency/load/price`, such as 60/20/20).

    >>> parse_policy("60/20/20").weights
    Weights(latency=60, load=20, price=20)
    """
    if text == "recorded":
        return Policy(text)
    if "/" in text:
        try:
            latency, load, price = (int(part) for part in text.split("/"))
            return Policy(text, Sort.BALANCED, Weights(latency, load, price))
        except ValueError as e:
            raise ValueError(f"{text!r}: weights are three numbers, such as 40/35/25") from e
    try:
        return Policy(text, Sort(text))
    except ValueError as e:
        raise ValueError(
            f"{text!r} is no policy: recorded, {', '.join(Sort)} or weights such as 40/35/25"
        ) from e


class Outcome(msgspec.Struct, frozen=True):
    """What a policy would have done with a log.  Means are over the decisions that found somebody."""

    policy: str
    decisions: int
    unserved: int
    agrees_permille: int
    """How often the first node is the recorded one."""
    cost_nano_mean: int
    """Of a request of the expected shape at the first node's price."""
    latency_ms_mean: int | None
    busiest_permille: int
    """The share of the node asked most."""
    nodes: dict[str, int]


def replay(lines: Iterable[Recorded], policies: Iterable[Policy]) -> list[Outcome]:
    """Decide every line again under each policy."""
    kept = list(lines)
    return [_outcome(kept, policy) for policy in policies]


def _outcome(lines: list[Recorded], policy: Policy) -> Outcome:
    asked: Counter[str] = Counter()
    agreeing, cost, latencies = 0, 0, []
    for line in lines:
        question = question_of(line, sort=policy.sort, weights=policy.weights)
        decision = choose(question)
        first = decision.candidates[0] if decision.candidates else None
        agreeing += (first.node_id if first else None) == (line.chosen[0] if line.chosen else None)
        if first is None:
            continue
        asked[first.node_id] += 1
        cost += (line.prompt_tokens * first.price_in + line.completion_tokens * first.price_out) // 1_000_000
        if first.latency_ms is not None:
            latencies.append(first.latency_ms)
    served = asked.total()
    return Outcome(
        policy=policy.name,
        decisions=len(lines),
        unserved=len(lines) - served,
        agrees_permille=1000 * agreeing // len(lines) if lines else 1000,
        cost_nano_mean=cost // served if served else 0,
        latency_ms_mean=sum(latencies) // len(latencies) if latencies else None,
        busiest_permille=1000 * max(asked.values(), default=0) // served if served else 0,
        nodes=dict(asked.most_common()),
    )


_decoder: Final = msgspec.json.Decoder(Recorded)


def read_log(path: Path) -> Iterator[Recorded]:
    """Read a log line by line; ValueError names the first bad line."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES_MAX), b""), start=1):
            try:
                yield _decoder.decode(line)
            except msgspec.MsgspecError as e:
                if not line.endswith(b"\n"):
                    return  # the writer was stopped in the middle of its last line
                raise ValueError(f"{path}:{number} is no decision: {e}") from e


class DecisionLog:
    """Writes every `every`-th decision to a file, up to LOG_BYTES_MAX; closed at the process's end."""

    def __init__(self, path: Path, *, every: int = 1) -> None:
        self._every = every
        self._seen = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("ab", buffering=io.DEFAULT_BUFFER_SIZE * 8)
        self._room = LOG_BYTES_MAX - self._file.tell()

    def note(self, question: Question, chosen: Iterable[NodeView]) -> None:
        """Keep a decision, if it is its turn."""
        self._seen += 1
        if self._seen % self._every or self._room <= 0:
            return
        line = msgspec.json.encode(recorded(question, chosen)) + b"\n"
        self._room -= len(line)
        self._file.write(line)

    def close(self) -> None:
        """Write what is still in memory."""
        self._file.close()
