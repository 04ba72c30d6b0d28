"""A signer's key, encrypted on the signer's own disk (Ethereum keystore, version 3)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final, cast

from eth_account import Account
from eth_keys.datatypes import PrivateKey

from chain.addresses import EvmAddress
from chain.errors import ChainRefusal
from chain.evm.addresses import checksummed, from_bytes

SCRYPT_N: Final = 1 << 18
"""geth's standard cost: about a second and 256 MiB for each guess."""
PASSWORD_CHARACTERS_MIN: Final = 10
KEYSTORE_BYTES_MAX: Final = 64 * 1024


class KeystoreError(ChainRefusal):
    """The keystore cannot be opened: missing, not a keystore, or another password."""


def create(path: Path, password: str, *, key: bytes | None = None, scrypt_n: int = SCRYPT_N) -> EvmAddress:
    """Write a new keystore, readable by its owner only, and give back its address.

    `key` imports an existing private key.  An existing file is never overwritten (FileExistsError).
    `scrypt_n` is lowered by tests only.
    """
    if len(password) < PASSWORD_CHARACTERS_MIN:
        raise KeystoreError(f"a keystore's password has at least {PASSWORD_CHARACTERS_MIN} characters")
    secret = bytes(Account.create().key) if key is None else key
    document = Account.encrypt(secret, password, kdf="scrypt", iterations=scrypt_n)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    return from_bytes(PrivateKey(secret).public_key.to_canonical_address())


def address(path: Path) -> EvmAddress:
    """Whose keystore this is; needs no password."""
    return checksummed(str(_read(path)["address"]).removeprefix("0x").lower())


def unlock(path: Path, password: str) -> bytes:
    """The private key.  KeystoreError for a wrong password."""
    document = _read(path)
    try:
        return bytes(Account.decrypt(document, password))
    except (ValueError, KeyError, TypeError) as e:
        raise KeystoreError(f"{path} does not open with this password") from e


def sign_safe_hash(path: Path, password: str, safe_tx_hash: bytes) -> bytes:
    """Sign a SafeTx hash: 65 bytes r, s, v, with v 27 or 28, as `Safe.checkSignatures` reads EIP-712 ones."""
    return sign_digest(unlock(path, password), safe_tx_hash)


def sign_digest(key: bytes, digest: bytes) -> bytes:
    """Sign a 32-byte digest with a private key (deterministic, s in the low half)."""
    if len(digest) != 32:
        raise ValueError(f"a digest is 32 bytes, not {len(digest)}")
    signature = PrivateKey(key).sign_msg_hash(digest)
    return bytes(signature.to_bytes()[:64] + bytes([signature.v + 27]))


def _read(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(KEYSTORE_BYTES_MAX))
    except (OSError, ValueError) as e:
        raise KeystoreError(f"{path} cannot be read as a keystore: {e}") from e
    if isinstance(document, dict) and "sealed" in document:
        raise KeystoreError(f"{path} is a Solana keystore; here signs an EVM key: take the EVM one")
    if not isinstance(document, dict) or "address" not in document or "crypto" not in document:
        raise KeystoreError(f"{path} is not a keystore")
    return cast("dict[str, object]", document)
