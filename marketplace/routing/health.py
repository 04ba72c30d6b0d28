"""How a node has been doing lately, in this gateway's experience.

Successes and failures are counted in ten buckets of 30 s, so a node that failed is tried again once its
failures are five minutes old; fewer than `SAMPLES_MIN` requests say nothing.  Every failure also costs
half of what is left of the node's standing (penalty), which recovers by half every 20 s.
"""

from __future__ import annotations

from typing import Final

BUCKET_MS: Final = 30_000
BUCKETS: Final = 10
SAMPLES_MIN: Final = 10
PENALTY_HALF_LIFE_MS: Final = 20_000
LATENCY_SHARE: Final = 0.2
"""Of the newest measurement in the smoothed latency."""


class Health:
    """Counts of one node and model. Times are monotonic milliseconds."""

    __slots__ = (
        "_failed",
        "_failed_in_all",
        "_latency_ms",
        "_newest",
        "_penalty",
        "_penalty_at_ms",
        "_succeeded",
        "_succeeded_in_all",
    )

    def __init__(self) -> None:
        self._succeeded = [0] * BUCKETS
        self._failed = [0] * BUCKETS
        self._succeeded_in_all = 0
        self._failed_in_all = 0
        self._newest = 0
        self._penalty = 0.0
        self._penalty_at_ms = 0
        self._latency_ms: float | None = None

    @property
    def latency_ms(self) -> int | None:
        return None if self._latency_ms is None else round(self._latency_ms)

    def succeeded(self, now_ms: int, first_token_ms: int | None) -> None:
        self._succeeded[self._bucket(now_ms)] += 1
        self._succeeded_in_all += 1
        if first_token_ms is None:
            return
        if self._latency_ms is None:
            self._latency_ms = float(first_token_ms)
        else:
            self._latency_ms += LATENCY_SHARE * (first_token_ms - self._latency_ms)

    def failed(self, now_ms: int) -> None:
        self._failed[self._bucket(now_ms)] += 1
        self._failed_in_all += 1
        before = self._penalty_now(now_ms)
        self._penalty = before + (1 - before) / 2
        self._penalty_at_ms = now_ms

    def success_permille(self, now_ms: int) -> int | None:
        """Give successes per thousand of the last five minutes, None with too few to tell."""
        self._bucket(now_ms)
        requests = self._failed_in_all + self._succeeded_in_all
        return None if requests < SAMPLES_MIN else 1000 * self._succeeded_in_all // requests

    def penalty_permille(self, now_ms: int) -> int:
        return round(1000 * self._penalty_now(now_ms))

    def _penalty_now(self, now_ms: int) -> float:
        age_ms = max(0, now_ms - self._penalty_at_ms)
        return float(self._penalty * 0.5 ** (age_ms / PENALTY_HALF_LIFE_MS)) if self._penalty else 0.0

    def _bucket(self, now_ms: int) -> int:
        """Give the current bucket, emptying those that time has passed over."""
        current = now_ms // BUCKET_MS
        if current > self._newest:
            for passed in range(max(self._newest + 1, current - BUCKETS + 1), current + 1):
                place = passed % BUCKETS
                self._succeeded_in_all -= self._succeeded[place]
                self._failed_in_all -= self._failed[place]
                self._succeeded[place] = self._failed[place] = 0
            self._newest = current
        return self._newest % BUCKETS
