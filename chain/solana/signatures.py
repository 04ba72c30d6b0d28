"""Signatures over text, by Solana wallets: sign-in.

A wallet's `signMessage` signs the UTF-8 bytes as they are (no prefix, unlike Ethereum), so what is
signed must itself say whom it is for; `accounts` writes that text, this only checks the signature.
"""

from __future__ import annotations

from typing import Final

from solders.pubkey import Pubkey
from solders.signature import Signature

MESSAGE_BYTES_MAX: Final = 4096
SIGNATURE_BYTES: Final = 64


def is_signed_by(address: str, message: bytes, signature: bytes) -> bool:
    """Tell whether `signature` (64 bytes) is `address`'s Ed25519 signature over `message`.

    False for anything malformed: an address that is none, a wrong length, a message over 4,096 bytes.
    """
    if len(signature) != SIGNATURE_BYTES or len(message) > MESSAGE_BYTES_MAX:
        return False
    try:
        key = Pubkey.from_string(address)
    except ValueError:
        return False
    return key.is_on_curve() and Signature(signature).verify(key, message)
