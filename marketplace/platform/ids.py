"""Identifiers.

`uuid7` follows RFC 9562: 48 bits of Unix milliseconds, then random bits, so that ids sort by time and a
month of charges is a range of ids.
"""

from __future__ import annotations

import secrets
import time
from datetime import datetime
from uuid import UUID

_VERSION_7 = 0x7 << 76
_VARIANT = 0b10 << 62


def uuid7(unix_ms: int | None = None, random_bits: int | None = None) -> UUID:
    """Make a time-ordered id; both parts can be given so that a simulator is repeatable."""
    ms = time.time_ns() // 1_000_000 if unix_ms is None else unix_ms
    bits = secrets.randbits(74) if random_bits is None else random_bits
    high, low = bits >> 62, bits & ((1 << 62) - 1)
    return UUID(int=(ms & ((1 << 48) - 1)) << 80 | _VERSION_7 | high << 64 | _VARIANT | low)


def first_uuid7_at(moment: datetime) -> UUID:
    """Give the smallest uuid7 of `moment`'s millisecond: the lower bound of an id range."""
    return uuid7(int(moment.timestamp() * 1000), 0)
