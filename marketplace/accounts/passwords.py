"""Passwords: argon2id, checked in two threads of their own so that the event loop never waits.

Parameters are OWASP's (19 MiB, two passes, one lane).  An unknown e-mail address costs the same as a
wrong password: a hash of nobody's password is checked instead.
"""

from __future__ import annotations

import asyncio
import secrets
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final, TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from marketplace.accounts.errors import HashingBusy

CHARACTERS_MIN: Final = 12
CHARACTERS_MAX: Final = 128
WAITING_MAX: Final = 64
"""Two threads check about 80 a second; who would wait longer is told to come back."""
T = TypeVar("T")

_HASHER: Final = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
_THREADS: Final = ThreadPoolExecutor(2, thread_name_prefix="argon2")
_waiting: Final[list[None]] = []


async def _in_thread(work: Callable[[], T]) -> T:
    if len(_waiting) >= WAITING_MAX:
        raise HashingBusy("too many sign-ins at once; try again in a few seconds")
    _waiting.append(None)
    try:
        return await asyncio.get_running_loop().run_in_executor(_THREADS, work)
    finally:
        _waiting.pop()


def _canonical(password: str) -> str:
    """One spelling for what a person types on different keyboards (NIST SP 800-63B, 3.1.1.2)."""
    return unicodedata.normalize("NFKC", password)


@cache
def _hash_of_nobody() -> str:
    return _HASHER.hash(secrets.token_hex(32))


def _matches(stored: str | None, password: str) -> bool:
    nobodys = _hash_of_nobody()  # made by whoever comes first, known address or not
    try:
        matched = _HASHER.verify(stored if stored is not None else nobodys, _canonical(password))
    except (VerificationError, InvalidHashError):
        return False
    return matched and stored is not None


async def hash_password(password: str) -> str:
    """Give what is stored; 12 to 128 characters are the caller's promise."""
    return await _in_thread(lambda: _HASHER.hash(_canonical(password)))


async def is_right(stored: str | None, password: str) -> bool:
    """Tell whether the password matches; `stored` None takes as long and is never right."""
    return await _in_thread(lambda: _matches(stored, password))
