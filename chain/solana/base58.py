"""Base58 (Bitcoin's alphabet), for byte strings of any length."""

from __future__ import annotations

from typing import Final

ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_VALUE: Final = {c: i for i, c in enumerate(ALPHABET)}
TEXT_MAX: Final = 4096
"""The decoder is quadratic; nothing of ours is longer than a 1,232-byte transaction (1,683 characters)."""


def encode(data: bytes) -> str:
    """Write `data` in base58; each leading zero byte becomes a leading ``1``."""
    number = int.from_bytes(data)
    digits: list[str] = []
    while number:
        number, rest = divmod(number, 58)
        digits.append(ALPHABET[rest])
    zeros = len(data) - len(data.lstrip(b"\0"))
    return "1" * zeros + "".join(reversed(digits))


def decode(text: str) -> bytes:
    """Read base58; ValueError for a foreign character or an over-long text."""
    if len(text) > TEXT_MAX:
        raise ValueError(f"base58 text of {len(text)} characters is over {TEXT_MAX}")
    number = 0
    for c in text:
        if c not in _VALUE:
            raise ValueError(f"{c!r} is not a base58 character")
        number = number * 58 + _VALUE[c]
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8)
