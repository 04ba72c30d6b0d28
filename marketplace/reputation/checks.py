"""Reading answers again: a sampled share of the real ones at once, and the canaries'.

A spot check sees an answer as it passes (`fabric.node_client.Witness`), keeps prompt and text in memory until
the reference engine has read them, and then forgets both; what is stored is numbers.  Few wait at once and
what comes on top is not checked: a check must never cost a buyer anything.

Checked are answers whose text the model alone decided: one choice, no tools, no forced shape, no biases, and
a temperature of at most 1, above which honest text looks foreign.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import msgspec
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.fabric.node_client import FrameCallback
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.reputation import assess
from marketplace.reputation.errors import ReferenceUnavailable, Unscorable
from marketplace.reputation.likelihood import Likelihood
from marketplace.reputation.reference import Reference
from node_agent.protocol import Delta, End, Frame, NodeId, Request

_log = logging.getLogger(__name__)

WAITING_MAX: Final = 16
BODY_BYTES_MAX: Final = 64 * 1024
TEXT_CHARACTERS_MAX: Final = 8_192
TEMPERATURE_MAX: Final = 1.0
_SHAPING: Final = (
    "tools", "functions", "tool_choice", "response_format", "logit_bias", "bad_words", "min_tokens",
    "ignore_eos", "structured_outputs", "allowed_token_ids",
)  # fmt: skip
"""Fields under which the text is not the model's alone."""
_NEUTRAL: Final = {
    "n": (None, 1), "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1), "length_penalty": (None, 1),
}  # fmt: skip

_ADD: Final = text("""
    INSERT INTO reputation_checks
        (at, node_id, model, kind, tokens, mean_milli, surprise_milli, is_suspicious)
    SELECT :now, nodes.id, :model, :kind, :tokens, :mean, :surprise, :is_suspicious
    FROM nodes WHERE nodes.id = :node
""")


@dataclass(slots=True)
class Sample:
    """One answer that is to be read again; lives in memory only."""

    node: NodeId
    model: str
    messages: Sequence[Mapping[str, Any]]
    kind: str = "spot"
    parts: list[str] = field(default_factory=list)
    characters: int = 0

    @property
    def text(self) -> str:
        return "".join(self.parts)[:TEXT_CHARACTERS_MAX]


def scorable(body: bytes) -> list[dict[str, Any]] | None:
    """Give a request's messages if its answer can be judged, else None.

    >>> scorable(b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5}')
    [{'role': 'user', 'content': 'Hi'}]
    >>> scorable(b'{"messages": [], "temperature": 1.5}')
    """
    if len(body) > BODY_BYTES_MAX:
        return None
    try:
        request = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    messages = request.get("messages") if isinstance(request, dict) else None
    if not isinstance(messages, list) or any(request.get(name) for name in _SHAPING):
        return None
    if any(request.get(name) not in neutral for name, neutral in _NEUTRAL.items()):
        return None
    temperature = request.get("temperature", 1)
    return messages if isinstance(temperature, int | float) and temperature <= TEMPERATURE_MAX else None


class Checks:
    """Samples answers and has them read again; one per process."""

    def __init__(
        self,
        engine: AsyncEngine,
        clock: Clock,
        references: Mapping[str, Reference],
        *,
        permille: int,
        chance: Callable[[], float] | None = None,
    ) -> None:
        """`references`: by model; `permille`: the share of answers that are read again."""
        self._engine = engine
        self._clock = clock
        self._references = references
        self._permille = permille
        self._chance = chance or random.SystemRandom().random
        self._waiting: asyncio.Queue[Sample] = asyncio.Queue(WAITING_MAX)

    # -- as answers pass (`Witness`)

    def watch(self, node: NodeId, request: Request) -> FrameCallback | None:
        """Sample this answer, perhaps."""
        if request.model not in self._references or request.kind != "chat":
            return None
        if self._chance() * 1000 >= self._permille or self._waiting.full():
            return None
        messages = scorable(request.body)
        if messages is None:
            return None
        sample = Sample(node, request.model, messages)
        return lambda frame: self._take(sample, frame)

    def _take(self, sample: Sample, frame: Frame) -> None:
        if isinstance(frame, Delta):
            for choice in frame.choices:
                if choice.reasoning or choice.tool_calls:
                    sample.messages = ()  # markup the engine cut out: not to be judged
                if choice.content and sample.characters < TEXT_CHARACTERS_MAX:
                    sample.parts.append(choice.content)
                    sample.characters += len(choice.content)
        elif isinstance(frame, End) and sample.messages and sample.parts and not self._waiting.full():
            self._waiting.put_nowait(sample)

    # -- afterwards

    async def run(self) -> None:
        """Check what waits until cancelled."""
        while True:
            sample = await self._waiting.get()
            try:
                await self.check(sample)
            except Unscorable as error:
                _log.debug("an answer cannot be judged: %s", error)
            except (ReferenceUnavailable, SQLAlchemyError, OSError) as error:
                _log.warning("an answer stays unchecked: %s", type(error).__name__)

    async def check(self, sample: Sample) -> Likelihood:
        """Have the sample read and keep the numbers; raises ReferenceUnavailable, Unscorable."""
        found = await self._references[sample.model].likelihood(sample.messages, sample.text)
        policy = await assess.policy_of(self._engine)
        if found.tokens < policy.tokens_min:
            raise Unscorable(f"{found.tokens} tokens")
        await self._record(sample, found, is_suspicious=found.is_suspicious(policy), now=self._clock.now())
        return found

    async def _record(self, sample: Sample, found: Likelihood, *, is_suspicious: bool, now: datetime) -> None:
        async with transaction(self._engine) as connection:
            await connection.execute(
                _ADD,
                {
                    "now": now, "node": sample.node, "model": sample.model, "kind": sample.kind,
                    "tokens": found.tokens, "mean": found.mean_milli, "surprise": found.surprise_milli,
                    "is_suspicious": is_suspicious,
                },
            )  # fmt: skip
