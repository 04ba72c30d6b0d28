"""What a gateway tells Prometheus about itself."""

from __future__ import annotations

from functools import cache
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

REQUESTS: Final = Counter("tollway_requests_total", "Chat requests by outcome", ["status"])
SECONDS: Final = Histogram(
    "tollway_request_seconds",
    "Whole chat requests, the node's time included",
    buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 600),
)
ADDED_SECONDS: Final = Histogram(
    "tollway_added_seconds",
    "Time we add to a request, by stage",
    ["stage"],
    buckets=(0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1),
)
IN_FLIGHT: Final = Gauge(
    "tollway_requests_in_flight", "Chat requests being served", multiprocess_mode="livesum"
)
TOKENS: Final = Counter("tollway_tokens_total", "Billed tokens", ["direction"])
CHARGED_NANO: Final = Counter("tollway_charged_nano_total", "Billed nano-dollars")
WAITING_CHARGES: Final = Gauge(
    "tollway_charges_waiting", "Charges accepted and not yet durable", multiprocess_mode="livesum"
)
DRIFT: Final = Counter("tollway_drift_total", "Requests whose node counted otherwise than we did")

# The hot path's own children: finding one by its label costs more than counting.
ADMISSION_SECONDS: Final = ADDED_SECONDS.labels(stage="admission")
CHARGE_SECONDS: Final = ADDED_SECONDS.labels(stage="charge")
TOKENS_IN: Final = TOKENS.labels(direction="in")
TOKENS_OUT: Final = TOKENS.labels(direction="out")


@cache
def requests(status: int) -> Counter:
    """Give the counter of requests that ended so; there are a few dozen statuses."""
    return REQUESTS.labels(status=str(status))
