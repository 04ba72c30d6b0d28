"""UUIDs of version 7 (RFC 9562): the first 48 bits are milliseconds, so ids sort by time.

A charge's id is its request's id, its idempotency key, its place in the listing and its partition.
The ledger takes ids from its callers; `uuid7` is the default where a caller has no opinion.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

NewId = Callable[[], UUID]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def uuid7() -> UUID:
    """A new id at the wall clock's millisecond."""
    return _at(time.time_ns() // 1_000_000, int.from_bytes(os.urandom(10), "big"))


def lowest_at(moment: datetime) -> UUID:
    """The bound that sorts before every id made at `moment` or later; `moment` is aware."""
    return UUID(int=max(0, _ms(moment)) << 80)


def made_at(identity: UUID) -> datetime:
    """When an id of version 7 was made, to the millisecond.

    >>> made_at(UUID("017f22e2-79b0-7cc3-98c4-dc0c0c07398f")).isoformat()
    '2022-02-22T19:22:22+00:00'
    """
    return _EPOCH + timedelta(milliseconds=identity.int >> 80)


def _ms(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def _at(unix_ms: int, random: int) -> UUID:
    value = (unix_ms & 0xFFFF_FFFF_FFFF) << 80 | random & ((1 << 80) - 1)
    value = value & ~(0xF << 76) | 0x7 << 76  # version
    return UUID(int=value & ~(0x3 << 62) | 0x2 << 62)  # variant
