"""What this node served, on the operator's own disk: one JSON object per finished request.

Ids, counts, times and outcomes; never a prompt, never a completion. The operator compares it with
what the marketplace says he earned. When the file is full it moves aside; the oldest goes.
"""

import io
import os
from pathlib import Path
from typing import Final

import msgspec

JOURNAL_FILE: Final = "journal.jsonl"
FILE_BYTES_MAX: Final = 8 * 1024 * 1024
FILES_KEPT: Final = 4


class Entry(msgspec.Struct, frozen=True):
    """One finished request. `outcome` is "ok" or a failure code; counts are the engine's, None if untold."""

    time_ms: int
    id: str
    model: str
    outcome: str
    is_stream: bool
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    first_token_ms: int | None
    total_ms: int


class Journal:
    """Append-only. Call `close` at the end."""

    def __init__(self, folder: Path, *, file_bytes_max: int = FILE_BYTES_MAX) -> None:
        self._path = folder / JOURNAL_FILE
        self._bytes_max = file_bytes_max
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = _open_private(self._path)

    def write(self, entry: Entry) -> None:
        """Append `entry` in one write, so that lines never mix."""
        line = msgspec.json.encode(entry) + b"\n"
        if os.fstat(self._file.fileno()).st_size + len(line) > self._bytes_max:
            self._rotate()
        self._file.write(line)

    def close(self) -> None:
        self._file.close()

    def _rotate(self) -> None:
        self._file.close()
        for age in range(FILES_KEPT - 1, 0, -1):
            older = self._path.with_name(f"{JOURNAL_FILE}.{age}")
            newer = self._path if age == 1 else self._path.with_name(f"{JOURNAL_FILE}.{age - 1}")
            if newer.exists():
                newer.replace(older)
        self._file = _open_private(self._path)


def _open_private(path: Path) -> io.FileIO:
    return io.FileIO(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")
