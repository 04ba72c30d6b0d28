"""JSON web tokens signed with a NATS nkey, just as nats-server reads them.

Format: header `{"typ":"JWT","alg":"ed25519-nkey"}`, base64url parts, Ed25519 over "header.claims"
(NATS' ADR-14 and the server's auth callout; tried with nats-server 2.15.1).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Any, Final

import nkeys

TOKEN_BYTES_MAX: Final = 64 * 1024

_HEADER: Final = {"typ": "JWT", "alg": "ed25519-nkey"}


class TokenMalformed(Exception):
    """Not a token of this format."""


class Signer:
    """An account key that issues tokens."""

    def __init__(self, seed: str) -> None:
        self._key = nkeys.from_seed(seed.encode())
        self.public_key = str(self._key.public_key.decode())

    def sign(self, claims: dict[str, Any], *, issued_s: int) -> str:
        """Give the signed token of `claims`, completed with issuer, time and id."""
        body = {**claims, "iss": self.public_key, "iat": issued_s}
        unique = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
        body["jti"] = base64.b32encode(unique).decode().rstrip("=")
        signed = f"{_part(_HEADER)}.{_part(body)}"
        return f"{signed}.{_to_base64url(self._key.sign(signed.encode()))}"


def read_claims(token: bytes) -> dict[str, Any]:
    """Give the claims of `token` without checking its signature; raises TokenMalformed."""
    if len(token) > TOKEN_BYTES_MAX:
        raise TokenMalformed(f"a token of {len(token)} bytes")
    parts = token.split(b".")
    if len(parts) != 3:
        raise TokenMalformed("a token has three parts")
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + b"=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError, RecursionError) as error:
        raise TokenMalformed("the claims are not base64url JSON") from error
    if not isinstance(claims, dict):
        raise TokenMalformed("the claims are not an object")
    return claims


def _part(value: dict[str, Any]) -> str:
    return _to_base64url(json.dumps(value, separators=(",", ":")).encode())


def _to_base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
