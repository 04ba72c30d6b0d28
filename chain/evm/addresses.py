"""EVM addresses: EIP-55 spelling and what may be paid."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from typing import Final

from eth_hash.auto import keccak

from chain.addresses import ADDRESS_TEXT_MAX, EvmAddress
from chain.errors import BadAddress
from chain.networks import EVM_NETWORKS

_SHAPE: Final = re.compile(r"0x[0-9a-fA-F]{40}", re.ASCII)
RESERVED_BELOW: Final = 0x10000
"""The zero address, precompiles, the Safe's list sentinel 0x1 and 0xdead: nobody holds their keys."""


@lru_cache(maxsize=1 << 16)
def checksummed(digits: str) -> EvmAddress:
    """Spell 40 lower-case hex digits as EIP-55 does.  Cached: a keccak costs 12 µs, a log 2."""
    digest = keccak(digits.encode()).hex()
    return EvmAddress(
        "0x" + "".join(c.upper() if d >= "8" else c for c, d in zip(digits, digest[:40], strict=True))
    )


def from_bytes(raw: bytes) -> EvmAddress:
    """Spell the last 20 bytes of `raw`."""
    return checksummed(raw[-20:].hex())


def to_bytes(address: str) -> bytes:
    """The 20 bytes of an address already parsed."""
    raw = bytes.fromhex(address.removeprefix("0x"))
    if len(raw) != 20:
        raise BadAddress(f"{address!r} is not an EVM address")
    return raw


def parse_address(text: str) -> EvmAddress:
    """Parse any address: lower case, or mixed case with a right EIP-55 checksum; else BadAddress."""
    if len(text) > ADDRESS_TEXT_MAX:
        raise BadAddress(f"an address is not {len(text)} characters long")
    trimmed = text.strip()
    if not _SHAPE.fullmatch(trimmed):
        raise BadAddress(f"{trimmed!r} is not an EVM address: 0x and 40 hexadecimal digits are expected")
    spelt = checksummed(trimmed[2:].lower())
    if trimmed not in (spelt, spelt.lower()):
        raise BadAddress(f"{trimmed} has a wrong EIP-55 checksum: a character was mistyped")
    return spelt


def parse_payable(text: str, forbidden: Collection[str] = ()) -> EvmAddress:
    """Parse an address that may be paid; BadAddress for reserved ones, USDC itself and `forbidden`."""
    address = parse_address(text)
    if int(address, 16) < RESERVED_BELOW:
        raise BadAddress(f"{address} belongs to nobody: money sent there is lost")
    if any(address == network.usdc for network in EVM_NETWORKS.values()):
        raise BadAddress(f"{address} is the USDC contract, not a wallet")
    if address in forbidden:
        raise BadAddress(f"{address} belongs to Tollway and cannot be paid out to")
    return address
