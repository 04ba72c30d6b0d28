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
    unsupported: tuple[tuple[str, str], ...] = ()
    """(address, name) of tokens people send by mistake: recorded with a support case, never credited."""
    genesis_hash: str = ""
    """Block 0 of the public network; development chains, which have another, run on this machine."""


@dataclass(frozen=True, slots=True)
class SolanaNetwork:
    """Constants of Solana; addresses are base58."""

    chain: Chain
    usdc_mint: str
    expected_finality_s: int
    unsupported: tuple[tuple[str, str], ...] = ()
    """(mint, name), as for EVM."""
    genesis_hash: str = ""
    """As for EVM."""


ETHEREUM: Final = EvmNetwork(
    Chain.ETHEREUM,
    1,
    "0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48",
    900,
    (("0xdAC17F958D2ee523a2206206994597C13D831ec7", "USDT"),),
    "0xd4e56740f876aef8c010b86a40d5f56745a118d0906a34e69aec8c0db1cb8fa3",
)
BASE: Final = EvmNetwork(
    Chain.BASE,
    8453,
    "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913",
    1200,
    (
        ("0xd9aAEc86B65D86f6A7B5B1b0c42FFA531710b6CA", "USDbC"),
        ("0xfde4C96c8593536E31F229EA8f37b2ADa2699bb2", "USDT"),
    ),
    "0xf712aa9241cc24369b143cf6dce85f0902a9731e70d66818a3a5845b296c73dd",
)
SOLANA: Final = SolanaNetwork(
    Chain.SOLANA,
    "EPjFWdd5AufqSSqeM2qN1xzybapC8G4wEGGkZwyTDt1v",
    15,
    (("Es9vMFrzaCERmJfrF4H2FYD4KCoNkY11McCe8BenwNYB", "USDT"),),
    "5eykt4UsFv8P8NJdTREpY1vzqKqZKvdpKuc147dw2N9d",
)

EVM_NETWORKS: Final[dict[Chain, EvmNetwork]] = {n.chain: n for n in (ETHEREUM, BASE)}

SAFE_VERSION_MIN: Final = (1, 4, 0)
"""Older Safes do not index the hash by which an execution is found; those before 1.3 do not even bind the
chain id into the signed domain, so a signature could be replayed."""
