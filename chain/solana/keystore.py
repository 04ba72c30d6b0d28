"""A signer's Ed25519 key on his own disk, under a password.

A JSON file: the 32-byte seed under AES-256-GCM with a key from scrypt (N = 2^17, r = 8, p = 1: 128 MiB,
OWASP's figure), the address as associated data so that it cannot be swapped.  Written once, mode 0600.

KeystoreError
├── WrongPassword     or the file was changed: the two cannot be told apart
└── BadKeystore       not a keystore of ours
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from solders.keypair import Keypair

from chain.errors import ChainRefusal

VERSION: Final = "tollway-ed25519-1"
SCRYPT_N: Final = 2**17
SCRYPT_N_MAX: Final = 2**20
_R: Final = 8
_P: Final = 1
_FILE_BYTES_MAX: Final = 4096
PASSWORD_CHARACTERS_MIN: Final = 8


class KeystoreError(ChainRefusal):
    """A key file cannot be used."""


class WrongPassword(KeystoreError):
    """The password is wrong, or the file was changed."""


class BadKeystore(KeystoreError):
    """Not a keystore of ours."""


def create(path: Path, password: str, *, seed: bytes | None = None, scrypt_n: int = SCRYPT_N) -> str:
    """Write a new key (or `seed`) to `path` and give its address.

    FileExistsError if `path` exists: a key is never overwritten.  ValueError for a short password.
    """
    if len(password) < PASSWORD_CHARACTERS_MIN:
        raise ValueError(f"a keystore password has at least {PASSWORD_CHARACTERS_MIN} characters")
    secret = secrets.token_bytes(32) if seed is None else seed
    address = str(Keypair.from_seed(secret).pubkey())
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    sealed = AESGCM(_key(password, salt, scrypt_n)).encrypt(nonce, secret, _bound(address))
    body = {
        "version": VERSION,
        "address": address,
        "scrypt_n": scrypt_n,
        "salt": salt.hex(),
        "nonce": nonce.hex(),
        "sealed": sealed.hex(),
    }
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(body, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    return address


def address_of(path: Path) -> str:
    """Read whose key it is, without a password."""
    return str(_read(path)["address"])


def load(path: Path, password: str) -> Keypair:
    """Unlock the key; WrongPassword or BadKeystore."""
    body = _read(path)
    try:
        address = str(body["address"])
        salt, nonce, sealed = (bytes.fromhex(str(body[name])) for name in ("salt", "nonce", "sealed"))
        n = int(str(body["scrypt_n"]))
    except (KeyError, ValueError) as e:
        raise BadKeystore(f"{path}: {e}") from e
    if not 2 <= n <= SCRYPT_N_MAX or n & (n - 1):
        raise BadKeystore(f"{path}: scrypt cost {n}")
    try:
        secret = AESGCM(_key(password, salt, n)).decrypt(nonce, sealed, _bound(address))
    except (InvalidTag, ValueError) as e:
        raise WrongPassword(f"{path}: wrong password, or the file was changed") from e
    keypair = Keypair.from_seed(secret)
    if str(keypair.pubkey()) != address:
        raise BadKeystore(f"{path}: the key is not {address}'s")
    return keypair


def from_seed(seed: bytes) -> Keypair:
    """Make the key of a 32-byte secret seed, for keys kept elsewhere (settings, a vault)."""
    return Keypair.from_seed(seed)


def sign(keypair: Keypair, message: bytes) -> bytes:
    """Give the 64-byte Ed25519 signature over `message`."""
    return bytes(keypair.sign_message(message))


def _key(password: str, salt: bytes, n: int) -> bytes:
    return Scrypt(salt=salt, length=32, n=n, r=_R, p=_P).derive(password.encode())


def _bound(address: str) -> bytes:
    return f"{VERSION}:{address}".encode()


def _read(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        raw = file.read(_FILE_BYTES_MAX + 1)
    try:
        body = json.loads(raw)
    except ValueError as e:
        raise BadKeystore(f"{path} is not a keystore") from e
    if isinstance(body, dict) and "crypto" in body:
        raise BadKeystore(f"{path} is an EVM keystore; here signs a Solana key: take the Solana one")
    if len(raw) > _FILE_BYTES_MAX or not isinstance(body, dict) or body.get("version") != VERSION:
        raise BadKeystore(f"{path} is not a keystore of version {VERSION}")
    if not isinstance(body.get("address"), str):
        raise BadKeystore(f"{path} names no address")
    return body
