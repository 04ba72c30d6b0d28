"""Memory in huge pages, on this very process."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from marketplace.platform import huge_pages
from marketplace.platform.huge_pages import HUGE_BYTES, collapse

MAPS = """\
55f0a4086000-55f0a6355000 rw-p 00000000 00:00 0                          [heap]
7f2a64000000-7f2a66246000 rw-p 00000000 00:00 0
7f2a66246000-7f2a68000000 ---p 00000000 00:00 0
7f2a70641000-7f2a707f0000 rw-p 00000000 00:00 0
7f2a76600000-7f2a76e50000 r--p 00000000 fe:00 131 /usr/lib/a library.so
7f2a77e50000-7f2a78e50000 rw-p 00850000 fe:00 131 /usr/lib/a library.so
7f2a78e50000-7f2a7ae50000 rw-s 00000000 00:05 9 /dev/shm/shared
7ffc4c2d6000-7ffc4c9f7000 rw-p 00000000 00:00 0                          [stack]
"""


def test_only_private_memory_of_no_file_counts_and_only_where_a_whole_huge_page_fits() -> None:
    starts = list(huge_pages._huge_ranges(MAPS))
    heap = range(0x55F0A4200000, 0x55F0A6200000, HUGE_BYTES)
    assert starts == [*heap, *range(0x7F2A64000000, 0x7F2A66200000, HUGE_BYTES)]


def _huge_kib(address: int) -> int:
    """What the kernel says of the mapping that holds this address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if "-" in name and " " in name:
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            found = start <= address < end
        elif found and name == "AnonHugePages":
            return int(rest.split()[0])
    raise AssertionError("no such mapping")


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    """Enough for four huge pages wherever it begins, and none of them so far.

    Not to be dumped, and so never one mapping with its neighbours, which `_huge_kib` would count too.
    """
    if huge_pages._SETTING.is_file() and "[always]" in huge_pages._SETTING.read_text():
        pytest.skip("this machine gives huge pages unasked")
    with mmap.mmap(-1, 5 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as region:
        region.madvise(mmap.MADV_DONTDUMP)
        yield region


def _fill(memory: mmap.mmap, *, every: int) -> int:
    for at in range(0, len(memory), every * mmap.PAGESIZE):
        memory[at] = 1
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_memory_in_use_comes_to_lie_in_huge_pages_and_keeps_its_content(memory: mmap.mmap) -> None:
    address = _fill(memory, every=1)
    before = bytes(memory)
    assert _huge_kib(address) == 0
    if not collapse():
        pytest.skip("this kernel collapses nothing")
    assert _huge_kib(address) >= 4 * HUGE_BYTES // 1024
    assert bytes(memory) == before


def test_memory_that_is_hardly_used_stays_as_small_as_it_is(memory: mmap.mmap) -> None:
    address = _fill(memory, every=2)
    collapse()
    assert _huge_kib(address) == 0


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_an_administrator_who_wants_none_is_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: mmap.mmap, setting: str | None
) -> None:
    file = tmp_path / "enabled"
    if setting is not None:  # else a kernel without any
        file.write_text(setting)
    monkeypatch.setattr(huge_pages, "_SETTING", file)
    address = _fill(memory, every=1)
    assert collapse() == 0
    assert _huge_kib(address) == 0
