"""`anvil.toml`: how the development chains are set up."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Final

import msgspec

from chain.networks import EVM_NETWORKS, Chain, EvmNetwork

PROJECT_ROOT: Final = Path(__file__).resolve().parents[2]
SETTINGS_FILE: Final = PROJECT_ROOT / "anvil.toml"


class LocalnetError(Exception):
    """A development chain cannot be started or set up; the message says what to do."""


class EvmSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One anvil."""

    chain_id: int
    block_time_s: int
    slots_in_an_epoch: int
    """`safe` lags the head by this many blocks, `finalized` by twice as many."""
    hardfork: str
    flags: tuple[str, ...]
    states_kept: int
    """Heights below the head whose balances can still be asked for."""

    @property
    def finality_lag_blocks(self) -> int:
        return 2 * self.slots_in_an_epoch


class SolanaSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The Solana VM behind JSON-RPC."""

    slot_ms: int
    finalized_after_slots: int


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All development chains."""

    ethereum: EvmSettings
    base: EvmSettings
    solana: SolanaSettings

    def evm(self, network: EvmNetwork) -> EvmSettings:
        return self.ethereum if network.chain is Chain.ETHEREUM else self.base


def read(path: Path = SETTINGS_FILE) -> Settings:
    """Read and check the settings; LocalnetError names what is wrong."""
    try:
        settings = msgspec.convert(tomllib.loads(path.read_text()), Settings)
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as e:
        raise LocalnetError(f"{path}: {e}") from e
    for network in EVM_NETWORKS.values():
        if settings.evm(network).chain_id != network.chain_id:
            raise LocalnetError(f"{path}: {network.chain} has chain id {network.chain_id}")
    return settings
