"""How a node has been doing lately, in this gateway's experience.

Successes and failures are counted in ten buckets of 30 s, so a node that failed is tried again once its
failures are five minutes old; fewer than `SAMPLES_MIN` requests say nothing.  Every failure also costs
half of what is left of the node's standing (penalty), which recovers by half every 20 s.

A node that fails too often is not asked (the breaker is open), except that `PROBE_AFTER_MS` after its last
failure one request at a time may try it (half-open); `PROBES_TO_RECOVER` successes in a row and what was
before counts no more (closed).
"""

from __future__ import annotations

from typing import Final

BUCKET_MS: Final = 30_000
BUCKETS: Final = 10
SAMPLES_MIN: Final = 10
PENALTY_HALF_LIFE_MS: Final = 20_000
LATENCY_SHARE: Final = 0.2
"""Of the newest measurement in the smoothed latency and speed."""
SUCCESS_PERMILLE_MIN: Final = 900
"""R21."""
PROBE_AFTER_MS: Final = 10_000
PROBES_TO_RECOVER: Final = 3


class Health:
    """Counts of one node and model. Times are monotonic milliseconds."""

    __slots__ = (
        "_failed",
        "_failed_in_all",
        "_last_failed_ms",
        "_latency_ms",
        "_newest",
        "_penalty",
        "_penalty_at_ms",
        "_row",
        "_speed",
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
        self._speed: float | None = None
        self._row = 0
        self._last_failed_ms = 0

    @property
    def latency_ms(self) -> int | None:
        return None if self._latency_ms is None else round(self._latency_ms)

    @property
    def tokens_per_s(self) -> int | None:
        """How fast one stream is written, once it has begun; None until measured."""
        return None if self._speed is None else round(self._speed)

    def succeeded(self, now_ms: int, first_token_ms: int | None, tokens_per_s: int | None = None) -> None:
        is_failing = self.is_failing(now_ms)
        self._row += 1
        if is_failing and self._row >= PROBES_TO_RECOVER:
            self._forget()
        self._succeeded[self._bucket(now_ms)] += 1
        self._succeeded_in_all += 1
        if first_token_ms is not None:
            self._latency_ms = _smoothed(self._latency_ms, first_token_ms)
        if tokens_per_s is not None:
            self._speed = _smoothed(self._speed, tokens_per_s)

    def failed(self, now_ms: int) -> None:
        self._failed[self._bucket(now_ms)] += 1
        self._failed_in_all += 1
        before = self._penalty_now(now_ms)
        self._penalty = before + (1 - before) / 2
        self._penalty_at_ms = self._last_failed_ms = now_ms
        self._row = 0

    def success_permille(self, now_ms: int) -> int | None:
        """Give successes per thousand of the last five minutes, None with too few to tell."""
        self._bucket(now_ms)
        requests = self._failed_in_all + self._succeeded_in_all
        return None if requests < SAMPLES_MIN else 1000 * self._succeeded_in_all // requests

    def is_failing(self, now_ms: int) -> bool:
        """Too few of the last five minutes' requests succeeded."""
        permille = self.success_permille(now_ms)
        return permille is not None and permille < SUCCESS_PERMILLE_MIN

    def is_probe_due(self, now_ms: int) -> bool:
        """It is failing, and one request may find out whether it still does."""
        return self.is_failing(now_ms) and now_ms - self._last_failed_ms >= PROBE_AFTER_MS

    def _forget(self) -> None:
        self._succeeded = [0] * BUCKETS
        self._failed = [0] * BUCKETS
        self._succeeded_in_all = self._failed_in_all = 0

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


def _smoothed(known: float | None, newest: int) -> float:
    return float(newest) if known is None else known + LATENCY_SHARE * (newest - known)
