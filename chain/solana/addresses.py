"""Solana addresses: what may be paid."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from solders.pubkey import Pubkey

from chain.addresses import ADDRESS_TEXT_MAX, SolanaAddress
from chain.errors import BadAddress
from chain.networks import SOLANA

_NOT_WALLETS: Final = frozenset(
    {
        SOLANA.usdc_mint,
        "11111111111111111111111111111111",  # the system program; all zero bytes
        "1nc1nerator11111111111111111111111111111111",
        "TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA",
        "TokenzQdBNbLqP5VEhdkAS6EPFLC1PHnBqCXEpPxuEb",
        "ATokenGPvbdGVxr1b2hvZbsiqW5xWH25efTNsLJA8knL",
        "So11111111111111111111111111111111111111112",
    }
)


def parse_address(text: str) -> Pubkey:
    """Parse base58 of exactly 32 bytes; BadAddress else."""
    if len(text) > ADDRESS_TEXT_MAX:
        raise BadAddress(f"an address is not {len(text)} characters long")
    trimmed = text.strip()
    if trimmed[:2].lower() == "0x":
        raise BadAddress(f"{trimmed} looks like an Ethereum address, and this is Solana")
    try:
        return Pubkey.from_string(trimmed)
    except ValueError as e:
        raise BadAddress(f"{trimmed!r} is not a Solana address: base58 of 32 bytes is expected") from e


def parse_payable(text: str, forbidden: Collection[str] = ()) -> SolanaAddress:
    """Parse a wallet that may be paid.

    Off-curve addresses are refused: no key can own them, so they are programs' accounts (the source is
    Solana's guide for exchanges).  So are the USDC mint, the token programs and `forbidden`.
    """
    key = parse_address(text)
    address = str(key)
    if address in _NOT_WALLETS:
        raise BadAddress(f"{address} is a program or a token, not a wallet")
    if not key.is_on_curve():
        raise BadAddress(f"{address} is a program's account (off the curve); give the wallet's own address")
    if address in forbidden:
        raise BadAddress(f"{address} belongs to Tollway and cannot be paid out to")
    return SolanaAddress(address)
