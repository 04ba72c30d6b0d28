"""Real rails, built from the chains file and the settler's own keys.

`settler_dir` holds two files of 64 hex digits, mode 0600, on the settler's machine only: `gas-evm.key`, a
private key that pays gas on both EVM chains, and `gas-solana.key`, the seed of the key that pays Solana's
fees and advances the durable nonce.  Neither can move the escrow's money.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from chain.networks import EVM_NETWORKS, Chain
from chain.ports import PayoutRail
from marketplace.platform.errors import SetupFault
from marketplace.platform.settings import ChainsConfig
from marketplace.settlement.consents import EvmConsent, SolanaConsent

EVM_GAS_KEY: Final = "gas-evm.key"
SOLANA_GAS_KEY: Final = "gas-solana.key"


@asynccontextmanager
async def open_rails(
    chains: ChainsConfig, settler_dir: Path, which: Sequence[Chain] = tuple(Chain)
) -> AsyncIterator[dict[Chain, PayoutRail]]:
    """Open the payout rails of `which` chains; SetupFault for a missing key or endpoint."""
    async with AsyncExitStack() as stack:
        rails: dict[Chain, PayoutRail] = {}
        for chain in which:
            if chain is Chain.SOLANA:
                rails[chain] = await _open_solana(stack, chains, settler_dir)
            else:
                rails[chain] = await _open_evm(stack, chains, chain, settler_dir)
        yield rails


async def _open_evm(
    stack: AsyncExitStack, chains: ChainsConfig, chain: Chain, settler_dir: Path
) -> PayoutRail:
    from chain.evm.gas import GasPayer
    from chain.evm.payouts import SafeRail
    from chain.evm.rpc import JsonRpc

    config = chains.ethereum if chain is Chain.ETHEREUM else chains.base
    _require_endpoint(config.rpc, chain)
    rpc, *witnesses = [await stack.enter_async_context(JsonRpc(url)) for url in config.rpc]
    payer = GasPayer(rpc, EVM_NETWORKS[chain].chain_id, _read_key(settler_dir / EVM_GAS_KEY))
    return SafeRail(EvmConsent(chain, config).terms, rpc, payer, witnesses=witnesses)


async def _open_solana(stack: AsyncExitStack, chains: ChainsConfig, settler_dir: Path) -> PayoutRail:
    from chain.solana import keystore
    from chain.solana.payouts import MultisigRail
    from chain.solana.rpc import SolanaRpc

    _require_endpoint(chains.solana.rpc, Chain.SOLANA)
    rpc, *witnesses = [await stack.enter_async_context(SolanaRpc(url)) for url in chains.solana.rpc]
    key = keystore.from_seed(_read_key(settler_dir / SOLANA_GAS_KEY))
    try:
        return MultisigRail(rpc, SolanaConsent(chains.solana).terms, key, witnesses=witnesses)
    except ValueError as e:
        raise SetupFault(
            f"{settler_dir / SOLANA_GAS_KEY} is not the key of the chains file's gas payer"
        ) from e


async def confirm_table(chains: ChainsConfig, table: str, contents: Sequence[str]) -> int:
    """Require of the chains file's providers that a lookup table holds `contents`; how many said so."""
    from chain.solana import tables
    from chain.solana.rpc import SolanaRpc

    _require_endpoint(chains.solana.rpc, Chain.SOLANA)
    async with AsyncExitStack() as stack:
        rpcs = [await stack.enter_async_context(SolanaRpc(url)) for url in chains.solana.rpc]
        return await tables.agreed(rpcs, table, contents)


def _require_endpoint(urls: Sequence[str], chain: Chain) -> None:
    if not urls:
        raise SetupFault(f"the chains file names no RPC endpoint for {chain}")


def _read_key(path: Path) -> bytes:
    try:
        key = bytes.fromhex(path.read_text().strip())
    except FileNotFoundError as e:
        raise SetupFault(f"{path} is missing: only the settler's machine has it") from e
    except ValueError as e:
        raise SetupFault(f"{path} does not hold 64 hex digits") from e
    if len(key) != 32:
        raise SetupFault(f"{path} does not hold 64 hex digits")
    return key
