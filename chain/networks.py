"""The networks Tollway settles on: one table, every per-chain constant."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Chain(StrEnum):
    """The networks, by the name the ledger's accounts and the API use."""

    ETHEREUM = "ethereum"
    BASE = "base"
    SOLANA = "solana"

    @property
    def is_evm(self) -> bool:
        return self is not Chain.SOLANA


@dataclass(frozen=True, slots=True)
class EvmNetwork:
    """Constants of one EVM chain; addresses are EIP-55 checksummed."""

    chain: Chain
    chain_id: int
    usdc: str
    expected_finality_s: int
    """How long a deposit usually waits for the `finalized` tag on the public network."""


@dataclass(frozen=True, slots=True)
class SolanaNetwork:
    """Constants of Solana; addresses are base58."""

    chain: Chain
    usdc_mint: str
    expected_finality_s: int


ETHEREUM: Final = EvmNetwork(Chain.ETHEREUM, 1, "0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48", 900)
BASE: Final = EvmNetwork(Chain.BASE, 8453, "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913", 1200)
SOLANA: Final = SolanaNetwork(Chain.SOLANA, "EPjFWdd5AufqSSqeM2qN1xzybapC8G4wEGGkZwyTDt1v", 15)

EVM_NETWORKS: Final[dict[Chain, EvmNetwork]] = {n.chain: n for n in (ETHEREUM, BASE)}

SAFE_VERSION_MIN: Final = (1, 3, 0)
"""Older Safes do not bind the chain id into the signed domain, so a signature could be replayed."""
