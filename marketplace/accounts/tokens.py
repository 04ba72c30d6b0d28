"""API keys and session tokens: how they look and what is stored of them.

A key is `sk-tollway-` + 37 random base62 characters (220 bits) + 6 that are the CRC-32 of all before them,
so a mistyped or invented key is refused without any look-up, and a scanner of public code can tell one of
ours from noise.  A session token is `st-` + 43 random base62 characters (256 bits).

Only an HMAC-SHA256 under the installation's secret is stored, so a copy of the database lets nobody in
and cannot even be tested against a guess.
"""

from __future__ import annotations

import hmac
import re
import secrets
import zlib
from hashlib import sha256
from typing import Final
from urllib.parse import unquote_plus

from pydantic import SecretStr

ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
KEY_START: Final = "sk-tollway-"
SESSION_START: Final = "st-"
KEY_RANDOM: Final = 37
KEY_CHECK: Final = 6
SESSION_RANDOM: Final = 43
SHOWN: Final = len(KEY_START) + 4
"""How much of a key is shown again; 24 of its 220 bits."""

_KEY_LENGTH: Final = len(KEY_START) + KEY_RANDOM + KEY_CHECK
_PAIRS: Final = tuple(low + high for high in ALPHABET for low in ALPHABET)
_SESSION: Final = re.compile(rf"{SESSION_START}[0-9A-Za-z]{{{SESSION_RANDOM}}}", re.ASCII)
_ANY: Final = re.compile(
    rf"{KEY_START}[0-9A-Za-z]{{{KEY_RANDOM}}}|\b{SESSION_START}[0-9A-Za-z]{{{SESSION_RANDOM}}}", re.ASCII
)
_CREDENTIAL_PARAMETERS: Final = frozenset(
    {"api_key", "api-key", "apikey", "access_token", "authorization", "password"}
)


def _random(characters: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(characters))


def _checksum(body: str) -> str:
    """CRC-32 in six base62 digits, the least first; two at a time, since every request pays for this."""
    crc = zlib.crc32(body.encode())
    return _PAIRS[crc % 3_844] + _PAIRS[crc // 3_844 % 3_844] + _PAIRS[crc // 14_776_336]


def make_key() -> str:
    """Make a new API key, to be shown once."""
    body = KEY_START + _random(KEY_RANDOM)
    return body + _checksum(body)


def make_session_token() -> str:
    """Make a new session token."""
    return SESSION_START + _random(SESSION_RANDOM)


def is_key(presented: str) -> bool:
    """Tell whether this can be a key of ours: shape and checksum; nothing is looked up."""
    return (
        len(presented) == _KEY_LENGTH
        and presented.isascii()
        and presented.startswith(KEY_START)
        and presented[len(KEY_START) :].isalnum()
        and presented.endswith(_checksum(presented[:-KEY_CHECK]))
    )


def is_session_token(presented: str) -> bool:
    """Tell whether this can be a session token, by its shape."""
    return _SESSION.fullmatch(presented) is not None


class Digester:
    """Gives the one form in which a credential is stored; one sub-key per kind of credential."""

    def __init__(self, secret: SecretStr, purpose: str) -> None:
        subkey = hmac.digest(secret.get_secret_value().encode(), f"tollway {purpose}".encode(), "sha256")
        # RFC 2104 with both padded blocks hashed beforehand: 1.0 us a call against 2.4 of hmac.digest.
        block = subkey.ljust(64, b"\0")
        self._inner = sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = sha256(bytes(byte ^ 0x5C for byte in block))

    def __call__(self, credential: str) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(credential.encode())
        outer.update(inner.digest())
        return outer.digest()


def key_digester(secret: SecretStr) -> Digester:
    return Digester(secret, "api key")


def session_digester(secret: SecretStr) -> Digester:
    return Digester(secret, "session")


def has_credential(query: str) -> bool:
    """Tell whether a raw query string carries a credential, by its parameters' names or by its text.

    Addresses end up in logs, histories and Referer headers, so such a request is refused (ASVS 14.2.1).
    """
    if not query:
        return False
    names = {unquote_plus(part.partition("=")[0]).lower() for part in query.split("&")}
    return not names.isdisjoint(_CREDENTIAL_PARAMETERS) or _ANY.search(unquote_plus(query)) is not None


def make_nonce() -> str:
    """Make a nonce for a text to sign: 131 random bits, letters and digits as EIP-4361 wants."""
    return _random(22)
