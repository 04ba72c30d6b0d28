"""Ids that sort by time."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from uuid import UUID

from marketplace.platform.ids import first_uuid7_at, uuid7


def test_what_one_process_makes_sorts_in_the_order_it_was_made():
    made = [uuid7() for _ in range(20_000)]
    assert made == sorted(made)
    of_a_millisecond = len({identity.int >> 80 for identity in made})
    assert of_a_millisecond < len(made), "none of them shared a millisecond: this shows nothing"


def test_threads_never_make_the_same():
    made: list[UUID] = []
    threads = [
        threading.Thread(target=lambda: made.extend([uuid7() for _ in range(5_000)])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 20_000
    assert {(identity.version, identity.variant) for identity in made} == {(7, "specified in RFC 4122")}


def test_a_simulator_gets_what_it_asks_for():
    moment = datetime(2026, 11, 22, 3, 4, 5, 678_000, tzinfo=UTC)
    ms = int(moment.timestamp() * 1000)
    assert uuid7(ms, 5) == uuid7(ms, 5)
    assert first_uuid7_at(moment) == uuid7(ms, 0) < uuid7(ms)
    assert uuid7(ms, (1 << 74) - 1) < first_uuid7_at(datetime.fromtimestamp((ms + 1) / 1000, UTC))
