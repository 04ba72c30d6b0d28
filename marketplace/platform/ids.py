"""Identifiers.

`uuid7` follows RFC 9562: 48 bits of Unix milliseconds, then random bits, so that ids sort by time and a
month of charges is a range of ids.  Those that one process makes sort in the order they were made.
"""

from __future__ import annotations

import secrets
import threading
import time
from datetime import datetime
from uuid import UUID

_VERSION_7 = 0x7 << 76
_VARIANT = 0b10 << 62
_STEP_BITS = 40


class _Last:
    """What `uuid7` gave last, under its lock: threads make ids too."""

    lock = threading.Lock()
    ms = 0
    bits = 0


def uuid7(unix_ms: int | None = None, random_bits: int | None = None) -> UUID:
    """Make a time-ordered id; both parts can be given so that a simulator is repeatable.

    Given neither, it sorts after what this process made in the same millisecond (RFC 9562, 6.2, method 2):
    what one transaction writes is listed in the order it was written.  A clock that steps back is followed.
    """
    if unix_ms is None and random_bits is None:
        ms, bits = _next()
    else:
        ms = time.time_ns() // 1_000_000 if unix_ms is None else unix_ms
        bits = secrets.randbits(74) if random_bits is None else random_bits
    high, low = bits >> 62, bits & ((1 << 62) - 1)
    return UUID(int=(ms & ((1 << 48) - 1)) << 80 | _VERSION_7 | high << 64 | _VARIANT | low)


def _next() -> tuple[int, int]:
    with _Last.lock:
        ms = time.time_ns() // 1_000_000
        if ms == _Last.ms:
            _Last.bits += 1 + secrets.randbits(_STEP_BITS)
        else:
            _Last.ms, _Last.bits = ms, secrets.randbits(73)  # the highest bit is room for the steps
        return _Last.ms, _Last.bits


def first_uuid7_at(moment: datetime) -> UUID:
    """Give the smallest uuid7 of `moment`'s millisecond: the lower bound of an id range."""
    return uuid7(int(moment.timestamp() * 1000), 0)
