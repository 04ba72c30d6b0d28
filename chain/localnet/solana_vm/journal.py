"""The node's memory on disk: an append-only file of checksummed records.

A record is written with one `write` before its effect is answered to a client, so a process killed
with -9 loses nothing it told anyone (a power cut may: there is no fsync, this is a development node).
A torn last record, the mark of a kill during a write, is cut off; damage anywhere else refuses to open.

Record: length (4 bytes, little-endian), CRC-32 of the payload (4 bytes), payload (MessagePack).
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, Self

import msgspec

_HEADER: Final = struct.Struct("<II")


class JournalError(Exception):
    """The data folder cannot be used as it is."""


class JournalBusy(JournalError):
    """Another process has this data folder open."""


class JournalDamaged(JournalError):
    """A record before the last one does not match its checksum."""


class StoredAccount(msgspec.Struct, frozen=True, array_like=True):
    """One account's state after a change; `lamports` 0 means it no longer exists."""

    key: bytes
    lamports: int
    data: bytes
    owner: bytes
    executable: bool


class Genesis(msgspec.Struct, frozen=True, tag="genesis"):
    """First record: the identity of this chain."""

    hash: str
    time_s: int


class BlockClosed(msgspec.Struct, frozen=True, tag="block"):
    """A slot that became a block."""

    slot: int
    hash: str
    time_s: int


class Executed(msgspec.Struct, frozen=True, tag="transaction"):
    """A transaction that was committed (perhaps with an error), its outcome and the accounts it left."""

    slot: int
    raw: bytes
    meta: bytes
    accounts: list[StoredAccount]


class AccountsSet(msgspec.Struct, frozen=True, tag="set"):
    """Accounts written from outside, by a development method."""

    slot: int
    accounts: list[StoredAccount]


class Forked(msgspec.Struct, frozen=True, tag="fork"):
    """Everything after `last_kept` was dropped; the next open slot is `slot`."""

    last_kept: int
    slot: int


Record = Genesis | BlockClosed | Executed | AccountsSet | Forked


class Journal:
    """An open journal.  `records()` once, then `append()`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(self._fd)
            raise JournalBusy(f"{path} is in use by another process") from e
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def records(self) -> Iterator[Record]:
        """Give every whole record in order, then cut off a torn end so that `append` follows the last one."""
        size = os.fstat(self._fd).st_size
        good = 0
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            while good < size:
                payload = self._read_one(file.read(_HEADER.size), file, left=size - good)
                if payload is None:
                    break
                yield self._decoder.decode(payload)
                good += _HEADER.size + len(payload)
        os.ftruncate(self._fd, good)
        os.lseek(self._fd, 0, os.SEEK_END)

    def _read_one(self, header: bytes, file: BinaryIO, *, left: int) -> bytes | None:
        if len(header) < _HEADER.size:
            return None
        length, checksum = _HEADER.unpack(header)
        if length > left - _HEADER.size:
            return None
        payload = file.read(length)
        if zlib.crc32(payload) == checksum:
            return payload
        if length == left - _HEADER.size:
            return None
        raise JournalDamaged(
            f"{self._path}: a record does not match its checksum; remove the folder to start over"
        )

    def append(self, record: Record) -> None:
        """Add one record; OSError (a full disk) means nothing was added that a reader would accept."""
        payload = self._encoder.encode(record)
        whole = _HEADER.pack(len(payload), zlib.crc32(payload)) + payload
        at = os.lseek(self._fd, 0, os.SEEK_CUR)
        written = os.write(self._fd, whole)
        if written != len(whole):
            os.ftruncate(self._fd, at)
            os.lseek(self._fd, at, os.SEEK_SET)
            raise OSError(28, f"{self._path}: no space left for the journal")

    def close(self) -> None:
        """Close the file and release the folder."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
