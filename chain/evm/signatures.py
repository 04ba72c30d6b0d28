"""secp256k1 signatures as wallets and Safes use them; malleable ones are refused."""

from __future__ import annotations

import re
from typing import Final

from eth_hash.auto import keccak
from eth_keys.datatypes import Signature
from eth_keys.exceptions import BadSignature
from eth_utils.exceptions import ValidationError

from chain.addresses import EvmAddress
from chain.errors import ChainRefusal
from chain.evm.addresses import from_bytes

CURVE_ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
MESSAGE_MAX: Final = 8 * 1024
_SIGNATURE: Final = re.compile(r"0x[0-9a-fA-F]{130}", re.ASCII)


class BadSignatureGiven(ChainRefusal):
    """Not a signature of the expected form, or not by the expected key."""


def recover(digest: bytes, signature: bytes) -> EvmAddress:
    """Who signed this 32-byte digest: 65 bytes r, s, v with v 27 or 28 (or 0, 1) and s in the low half.

    Both s and order - s verify on the curve (EIP-2); only the low one is accepted, so that one consent
    has one signature.
    """
    if len(signature) != 65:
        raise BadSignatureGiven(f"a signature is 65 bytes, not {len(signature)}")
    r, s, v = int.from_bytes(signature[:32]), int.from_bytes(signature[32:64]), signature[64]
    if v not in (0, 1, 27, 28):
        raise BadSignatureGiven(f"a signature's last byte is 27 or 28, not {v}")
    if not (0 < r < CURVE_ORDER and 0 < s <= CURVE_ORDER // 2):
        raise BadSignatureGiven("a signature's numbers are out of range (s must be in the low half)")
    try:
        key = Signature(vrs=(v % 27, r, s)).recover_public_key_from_msg_hash(digest)
    except (BadSignature, ValidationError) as e:
        raise BadSignatureGiven(f"no key made this signature: {e}") from e
    return from_bytes(key.to_canonical_address())


def personal_message_digest(message: str) -> bytes:
    """EIP-191, version E: what a wallet signs when it is shown a text."""
    encoded = message.encode()
    return keccak(b"\x19Ethereum Signed Message:\n" + str(len(encoded)).encode() + encoded)


def recover_personal_sign(message: str, signature: str) -> EvmAddress:
    """Who signed this text with `personal_sign`; BadSignatureGiven (a ChainRefusal) if nobody can have."""
    if len(message) > MESSAGE_MAX:
        raise BadSignatureGiven(f"a message of {len(message)} characters is over {MESSAGE_MAX}")
    if not _SIGNATURE.fullmatch(signature):
        raise BadSignatureGiven("a signature is 0x and 130 hexadecimal digits")
    return recover(personal_message_digest(message), bytes.fromhex(signature[2:]))
