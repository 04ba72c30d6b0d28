"""The circuit breaker: a failing node is left alone, then tried by one request at a time, then trusted."""

from __future__ import annotations

from marketplace.routing.health import PROBE_AFTER_MS, PROBES_TO_RECOVER, Health
from marketplace.routing.registry import Outcome, Registry
from node_agent import protocol
from node_agent.protocol import NodeId

NODE = NodeId("n1")


def _failing(at_ms: int) -> Health:
    health = Health()
    for _ in range(8):
        health.succeeded(at_ms, 100)
    for _ in range(4):
        health.failed(at_ms)
    return health


def test_a_failing_node_is_probed_after_ten_seconds_and_recovers_by_three_in_a_row() -> None:
    health = _failing(1_000)
    assert health.is_failing(1_000)
    assert not health.is_probe_due(1_000 + PROBE_AFTER_MS - 1)
    assert health.is_probe_due(1_000 + PROBE_AFTER_MS)
    now = 1_000 + PROBE_AFTER_MS
    for _ in range(PROBES_TO_RECOVER - 1):
        health.succeeded(now, 100)
    assert health.is_failing(now)
    health.succeeded(now, 100)
    assert not health.is_failing(now)
    assert health.success_permille(now) is None  # what was before counts no more


def test_a_probe_that_fails_opens_the_breaker_again() -> None:
    health = _failing(0)
    for _ in range(PROBES_TO_RECOVER - 1):
        health.succeeded(PROBE_AFTER_MS, 100)
    health.failed(PROBE_AFTER_MS)
    assert not health.is_probe_due(2 * PROBE_AFTER_MS - 1)
    health.succeeded(2 * PROBE_AFTER_MS, 100)  # the row begins anew
    assert health.is_failing(2 * PROBE_AFTER_MS)


def test_one_request_at_a_time_probes() -> None:
    now = [1_000_000]
    registry = Registry(lambda: now[0])
    registry.add(NODE, "operator")
    model = protocol.ModelStatus("m", 4096, 1, 1, capacity=8)

    def hear() -> None:
        status = protocol.Status(1, NODE, 0, 0, "test", is_draining=False, models=[model])
        registry.hear(b"status.n1", protocol.encode(status))

    hear()
    registry.set_price(NODE, "m", 1, 1, 1)
    for _ in range(12):
        registry.begin(NODE, "m")
        registry.finish(NODE, "m", Outcome.FAILED)
    assert not registry.views("m")[0].is_probe_due
    now[0] += PROBE_AFTER_MS
    hear()
    assert registry.views("m")[0].is_probe_due
    registry.begin(NODE, "m")
    assert not registry.views("m")[0].is_probe_due
    registry.finish(NODE, "m", Outcome.NEUTRAL)
    assert registry.views("m")[0].is_probe_due
