"""What this node served, on the operator's own disk: one JSON object per finished request.

Ids, counts, times, outcomes and hashes; never a prompt, never a completion. The operator compares it with
what the marketplace says he earned, the node with what a receipt states. When the file is full it moves
aside; the oldest goes.
"""

import io
import os
from collections.abc import Collection
from pathlib import Path
from typing import Final

import msgspec

from node_agent.protocol import NOT_DECODED

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
    response_sha256: str = ""
    """Of what was sent, as receipts hash it (`protocol.ResponseDigest`); hex."""


class RotatingFile:
    """Lines, appended for the owner's eyes only; FILES_KEPT files at most. Call `close` at the end."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        self._path = path
        self._bytes_max = bytes_max
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = _open_private(path)

    def write(self, line: bytes) -> None:
        """Append `line` in one write, so that lines never mix."""
        if os.fstat(self._file.fileno()).st_size + len(line) > self._bytes_max:
            self._rotate()
        self._file.write(line)

    def close(self) -> None:
        self._file.close()

    def _rotate(self) -> None:
        self._file.close()
        for age in range(FILES_KEPT - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{age}")
            newer = self._path if age == 1 else self._path.with_name(f"{self._path.name}.{age - 1}")
            if newer.exists():
                newer.replace(older)
        self._file = _open_private(self._path)


class Journal:
    """Append-only. Call `close` at the end."""

    def __init__(self, folder: Path, *, file_bytes_max: int = FILE_BYTES_MAX) -> None:
        self._file = RotatingFile(folder / JOURNAL_FILE, file_bytes_max)

    def write(self, entry: Entry) -> None:
        self._file.write(msgspec.json.encode(entry) + b"\n")

    def close(self) -> None:
        self._file.close()


def find_entries(folder: Path, ids: Collection[str]) -> dict[str, Entry]:
    """Look requests up in the journal in `folder`, newest file first."""
    decoder = msgspec.json.Decoder(Entry)
    found: dict[str, Entry] = {}
    for path in (
        folder / name for name in (JOURNAL_FILE, *(f"{JOURNAL_FILE}.{n}" for n in range(1, FILES_KEPT)))
    ):
        if len(found) == len(ids) or not path.exists():
            continue
        with path.open("rb") as file:
            for line in file:
                try:
                    entry = decoder.decode(line)
                except NOT_DECODED:
                    continue  # a line cut by a crash
                if entry.id in ids:
                    found[entry.id] = entry
    return found


def _open_private(path: Path) -> io.FileIO:
    return io.FileIO(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")
