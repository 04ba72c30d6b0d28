"""Addresses that may be paid: parsed once at the edge, then carried as their own types.

A payout address is a person's text.  `parse_payout_address` gives back the one canonical spelling, or
raises BadAddress with a sentence for that person.  Nothing else makes these types.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, NewType

from chain.networks import Chain

EvmAddress = NewType("EvmAddress", str)
"""EIP-55 checksummed, ``0x`` and 40 hex digits."""
SolanaAddress = NewType("SolanaAddress", str)
"""Base58 of the 32 bytes of an Ed25519 public key, which is on the curve."""

ADDRESS_TEXT_MAX: Final = 128
"""Longer texts are refused unread; the longest address is 44 characters."""


def parse_payout_address(
    chain: Chain, text: str, forbidden: Collection[str] = ()
) -> EvmAddress | SolanaAddress:
    """Give back `text` as a payable address of `chain`, canonically spelt, or raise BadAddress.

    Refused besides what is malformed: the zero address and the chain's reserved ones, the USDC token
    itself, and whatever is in `forbidden` (canonical spelling): the escrow, our deposit addresses.
    """
    # The parsers need keccak and a curve check, which live with each chain's libraries.
    if chain.is_evm:
        from chain.evm.addresses import parse_payable as parse_evm

        return parse_evm(text, forbidden)
    from chain.solana.addresses import parse_payable as parse_solana

    return parse_solana(text, forbidden)
