"""What the operator's own screen shows: tokens a second now, and what today's requests should earn.

Estimates for a person, from the engine's counts and the prices in the settings. What is owed is the
marketplace's count: `tollway-node earnings`.
"""

from typing import Final

from node_agent.config import Model
from node_agent.journal import Entry
from node_agent.prices import share_nano

DAY_MS: Final = 86_400_000


class Meter:
    """Sums since 00:00 UTC or the agent's start, whichever is later."""

    def __init__(self, now_ms: int) -> None:
        self._day = now_ms // DAY_MS
        self._earned_nano = 0
        self._generated = 0
        self._looked_at: float | None = None

    def note(self, model: Model, entry: Entry) -> None:
        """Take in a finished request; cut ones count too, since delivered tokens are paid."""
        self._turn(entry.time_ms)
        self._earned_nano += share_nano(
            model.price_in,
            model.price_out,
            prompt_tokens=entry.prompt_tokens or 0,
            completion_tokens=entry.completion_tokens or 0,
        )

    def earned_today_nano(self, now_ms: int) -> int:
        self._turn(now_ms)
        return self._earned_nano

    def rate(self, generated: int, seconds: float) -> float:
        """Tokens a second since the last call; `generated` is the total so far, `seconds` a steady clock."""
        before, at, self._generated = self._generated, self._looked_at, generated
        self._looked_at = seconds
        if at is None or seconds <= at:
            return 0.0
        return round(max(0, generated - before) / (seconds - at), 1)

    def _turn(self, now_ms: int) -> None:
        day = now_ms // DAY_MS
        if day != self._day:
            self._day, self._earned_nano = day, 0
