"""The memory of a process that serves.

The collector runs rarer, and without what was there before the first request.

Reference counting frees what a request leaves; the collector only looks for cycles.  With Python's own
thresholds it took 16 % of a gateway's CPU (perf, 256 clients), most of it walking modules and classes that
never go away.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from typing import Final

YOUNG_OBJECTS: Final = 50_000
"""New objects (net) before a collection of the young ones; a few requests' worth, not a fraction of one."""
GENERATIONS: Final = (20, 50)
"""Collections of one generation before the next older one is looked at too."""


def collect_rarely() -> None:
    """Set what exists aside for good and collect the rest less often; once, when all code is imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *GENERATIONS)


def give_back() -> None:
    """Give freed memory back to the system; after something large, as glibc keeps it (elsewhere: nothing).

    Reading a tokenizer of 49,000 words leaves 15 MB behind.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
