"""Canaries: requests of our own that look like anybody's, to nodes we choose (A59).

They are bought with an ordinary key of an ordinary account that the platform funds, over the public API,
so nothing on their way, in the ledger or at the node tells them apart; the operator is paid for them like for
any.  Their answers are always read again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final

import aiohttp
import msgspec
from prometheus_client import Counter

from marketplace.reputation.checks import Checks, Sample
from marketplace.reputation.errors import CanaryRefused, ReferenceUnavailable
from marketplace.reputation.reference import read_whole
from node_agent.protocol import NodeId

DEADLINE_S: Final = 120
REFUSED_STATUSES: Final = frozenset({401, 402, 403})
"""With which the marketplace speaks of the account; whatever else goes wrong may be the node's doing."""
ANSWER_BYTES_MAX: Final = 1024 * 1024

CANARIES: Final = Counter("tollway_canaries_total", "Canary requests, by what came of them", ["outcome"])

_ASKED: Final = (
    "Explain {thing} to a {reader}.",
    "Write a short story about {thing}.",
    "What should a {reader} know about {thing}?",
    "Give me {number} tips about {thing}.",
    "Summarise the history of {thing} in {number} sentences.",
    "I am a {reader}. How do I get better at {thing}?",
    "Write an e-mail to a {reader} about {thing}.",
    "List {number} common mistakes with {thing} and how to avoid them.",
)
_THINGS: Final = (
    "bread", "bicycles", "sorting algorithms", "the French Revolution", "houseplants", "interest rates",
    "football", "sleep", "volcanoes", "photography", "unit tests", "chess openings", "solar power", "jazz",
    "public speaking", "gravity", "online shops", "vaccines", "cooking rice", "negotiation",
)  # fmt: skip
_READERS: Final = (
    "child",
    "beginner",
    "manager",
    "student",
    "colleague",
    "teacher",
    "new neighbour",
    "nurse",
)


def question(chance: random.Random) -> dict[str, Any]:
    """Make up a request: one of some ten thousand, with the settings people use."""
    words = chance.choice(_ASKED).format(
        thing=chance.choice(_THINGS), reader=chance.choice(_READERS), number=chance.randint(3, 9)
    )
    return {
        "messages": [{"role": "user", "content": words}],
        "max_tokens": chance.choice((64, 100, 128, 150, 200, 256)),
        "temperature": chance.choice((0, 0.2, 0.3, 0.5, 0.7, 0.7, 0.8, 1)),
    }


class Canaries:
    """Buys canary requests; one at a time."""

    def __init__(self, http: aiohttp.ClientSession, checks: Checks, *, api: str, key: str) -> None:
        """`api`: the public API's address; `key`: of the platform's own buyer."""
        self._http = http
        self._checks = checks
        self._url = f"{api.rstrip('/')}/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {key}"}
        self._chance = random.SystemRandom()

    async def send(self, offers: Sequence[tuple[NodeId, str]]) -> NodeId | None:
        """Ask one of `offers` (node and model) and check the answer; None if there was nobody or none.

        Raises CanaryRefused, ReferenceUnavailable, Unscorable.
        """
        if not offers:
            return None
        node, model = self._chance.choice(offers)
        asked = question(self._chance)
        text = await self._ask({"model": model, **asked, "provider": {"only": [node]}})
        if not text:
            return None
        await self._checks.check(Sample(node, model, asked["messages"], "canary", [text]))
        return node

    async def _ask(self, body: dict[str, Any]) -> str | None:
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
        try:
            async with self._http.post(
                self._url, json=body, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as answer:
                if answer.status in REFUSED_STATUSES:
                    CANARIES.labels("refused").inc()
                    words = f"the canaries' account is refused ({answer.status}): see to its money and key"
                    raise CanaryRefused(words)
                CANARIES.labels("answered" if answer.status == 200 else "unanswered").inc()
                if answer.status != 200:
                    return None  # a failing node shows in its success rate
                data = await read_whole(answer, ANSWER_BYTES_MAX)
            text = msgspec.json.decode(data)["choices"][0]["message"]["content"]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ReferenceUnavailable(f"the API does not answer: {type(error).__name__}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError):
            return None
        return text if isinstance(text, str) else None
