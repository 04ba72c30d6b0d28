"""A serving process's memory in pages of 2 MiB.

A gateway walks through more than a hundred megabytes of small objects, far more than a processor's page table
caches cover at 4 KiB a page; on a virtual machine each miss is walked twice.  Python's allocator asks for
no larger pages, so what it has filled is collapsed into them from time to time (Linux 6.1 and newer;
elsewhere, and where the machine's administrator wants no huge pages, nothing is done).
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Iterator
from mmap import PAGESIZE
from pathlib import Path
from typing import Final, NoReturn

HUGE_BYTES: Final = 2 << 20
PAGES: Final = HUGE_BYTES // PAGESIZE
PAGES_LEAST: Final = PAGES * 3 // 4
"""Of a huge page, in use already: the rest is what its collapse may add to the process's memory."""
EVERY_S: Final = 30
"""Looking for what is new takes 2 ms where there is nothing."""
_SETTING: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS: Final = Path("/proc/self/maps")
_MADV_COLLAPSE: Final = 25
_EACH_LOWEST_BIT: Final = int.from_bytes(b"\1" * PAGES)
"""mincore(2) says in it whether a page is resident; the other bits of a page's byte mean nothing."""


async def keep_collapsed() -> NoReturn:
    """Do it now and then, since a process grows with what it serves; until cancelled."""
    while True:
        await asyncio.to_thread(collapse)
        await asyncio.sleep(EVERY_S)


def collapse() -> int:
    """Put what is densely used of this process's memory into huge pages; gives how many bytes lie in such.

    A page collapsed anew takes 1 to 2 ms, during which other threads go on.
    """
    try:
        if "[never]" in _SETTING.read_text():
            return 0
        maps = _MAPS.read_text()
        libc = ctypes.CDLL(None)
        madvise, mincore = libc.madvise, libc.mincore
    except (OSError, AttributeError):
        return 0
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    is_resident = ctypes.create_string_buffer(PAGES)
    collapsed = 0
    for start in _huge_ranges(maps):
        if mincore(start, HUGE_BYTES, is_resident):
            continue  # unmapped meanwhile
        if (int.from_bytes(is_resident.raw) & _EACH_LOWEST_BIT).bit_count() >= PAGES_LEAST:
            collapsed += HUGE_BYTES * (madvise(start, HUGE_BYTES, _MADV_COLLAPSE) == 0)
    return collapsed


def _huge_ranges(maps: str) -> Iterator[int]:
    """Give where a huge page fits into the private memory that `maps` (proc(5)) lists."""
    for line in maps.splitlines():
        place, mode, _, _, inode, *names = line.split(maxsplit=5)
        if mode != "rw-p" or inode != "0" or names not in ([], ["[heap]"]):
            continue
        start, end = (int(word, 16) for word in place.split("-"))
        first = -(-start // HUGE_BYTES) * HUGE_BYTES
        yield from range(first, end - HUGE_BYTES + 1, HUGE_BYTES)
