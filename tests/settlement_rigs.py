"""Real chains to settle on: an escrow that holds USDC, three signers' keystores, the settler's folder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from solders.pubkey import Pubkey

from chain.evm import keystore as evm_keystore
from chain.evm.reader import EvmReader
from chain.evm.rpc import JsonRpc
from chain.localnet import evm as anvil
from chain.localnet import settings as localnet_settings
from chain.localnet import solana as solana_vm
from chain.localnet.solana_vm.server import serving
from chain.localnet.solana_wallet import SolanaWallet
from chain.networks import BASE, ETHEREUM, SOLANA, Chain
from chain.solana import keystore as solana_keystore
from chain.solana.programs import associated_token_account as token_account
from chain.solana.reader import SolanaReader
from chain.solana.rpc import SolanaRpc
from chain.units import Micro
from marketplace.platform.settings import ChainsConfig, EvmChainConfig, SolanaChainConfig
from marketplace.settlement.rails import EVM_GAS_KEY, SOLANA_GAS_KEY

PASSPHRASE = "correct horse battery"
UNUSED_EVM = EvmChainConfig(
    rpc=(),
    chain_id=1,
    usdc=ETHEREUM.usdc,
    escrow="0x" + "22" * 20,
    forwarder_factory="0x" + "33" * 20,
    multi_send="0x" + "44" * 20,
    signers=("0x" + "55" * 20,),
    threshold=1,
)
UNUSED_SOLANA = SolanaChainConfig(
    rpc=(),
    usdc_mint=SOLANA.usdc_mint,
    multisig="multisig",
    escrow="escrow",
    nonce_account="nonce",
    gas_payer="gas",
    signers=("one",),
    threshold=1,
)


@dataclass
class Rig:
    """One chain with an escrow that holds USDC, three signers' keystores, and the settler's folder."""

    chain: Chain
    chains: ChainsConfig
    folder: Path
    keystores: list[Path]
    wallet: str
    """Where the operator wants to be paid."""
    new_wallet: Callable[[int], str]
    """Another wallet, by number; it has no USDC account yet."""
    usdc_of: Callable[[str], Awaitable[int]]
    hurry: Callable[[], Awaitable[None]]
    """Bring finality nearer."""
    rpc: JsonRpc | SolanaRpc
    """The test's own connection, to do things to the chain."""

    @property
    def chains_file(self) -> Path:
        return self.folder / "chains.json"

    @property
    def signers(self) -> tuple[str, ...]:
        return self.chains.base.signers if self.chain is Chain.BASE else self.chains.solana.signers

    @property
    def escrow(self) -> str:
        return self.chains.base.escrow if self.chain is Chain.BASE else self.chains.solana.escrow


@asynccontextmanager
async def a_base_rig(folder: Path, escrow_micro: int) -> AsyncIterator[Rig]:
    settings = localnet_settings.read().base
    stores = [folder / f"signer-{n}.json" for n in range(3)]
    owners = [evm_keystore.create(path, PASSPHRASE, scrypt_n=2) for path in stores]
    gas = anvil.development_key(folder / EVM_GAS_KEY)
    async with await anvil.Anvil.start(BASE, settings, folder) as node, JsonRpc(node.url) as rpc:
        placed = await anvil.deploy(rpc, BASE, settings, owners)
        await anvil.fund(rpc, BASE, anvil.address_of(gas), eth_wei=10**18)
        await anvil.fund(rpc, BASE, placed.safe, usdc=Micro(escrow_micro))
        config = EvmChainConfig(
            rpc=(node.url,),
            chain_id=BASE.chain_id,
            usdc=placed.usdc,
            escrow=placed.safe,
            forwarder_factory=placed.forwarder_factory,
            multi_send=placed.multi_send_call_only,
            signers=placed.owners,
            threshold=placed.threshold,
        )
        reader = EvmReader(BASE, rpc)

        async def usdc_of(address: str) -> int:
            return (await reader.usdc_balance(address)).n

        async def hurry() -> None:
            await anvil.mine(rpc, settings.finality_lag_blocks)

        yield Rig(
            Chain.BASE,
            ChainsConfig(ethereum=UNUSED_EVM, base=config, solana=UNUSED_SOLANA),
            folder,
            stores,
            anvil.address_of(bytes([9]) * 32),
            lambda n: anvil.address_of((10_000 + n).to_bytes(32)),
            usdc_of,
            hurry,
            rpc,
        )


@asynccontextmanager
async def a_solana_rig(folder: Path, escrow_micro: int) -> AsyncIterator[Rig]:
    stores = [folder / f"signer-{n}.json" for n in range(3)]
    signers = [solana_keystore.create(path, PASSPHRASE, scrypt_n=2) for path in stores]
    seed = anvil.development_key(folder / SOLANA_GAS_KEY)
    gas = str(solana_keystore.from_seed(seed).pubkey())
    options = {"slot_ms": 10, "finalized_after": 8, "empty_every": 3}
    async with (
        serving(folder / "vm", port=0, clock=lambda: int(time.time()), **options) as (port, _),
        SolanaRpc(f"http://127.0.0.1:{port}") as rpc,
    ):
        placed = await solana_vm.deploy(rpc, signers=signers, gas_payer=gas)
        await solana_vm.fund(rpc, placed.multisig, usdc=Micro(escrow_micro))
        config = SolanaChainConfig(
            rpc=(rpc.url,),
            usdc_mint=placed.usdc_mint,
            multisig=placed.multisig,
            escrow=placed.escrow,
            nonce_account=placed.nonce_account,
            gas_payer=placed.gas_payer,
            signers=placed.signers,
            threshold=placed.threshold,
        )
        wallet, reader = SolanaWallet(rpc), SolanaReader(rpc)

        async def usdc_of(address: str) -> int:
            if address != placed.escrow:
                address = str(
                    token_account(Pubkey.from_string(address), Pubkey.from_string(placed.usdc_mint))
                )
            return (await reader.usdc_balance(address)).n

        async def hurry() -> None:
            await asyncio.sleep(0)

        yield Rig(
            Chain.SOLANA,
            ChainsConfig(ethereum=UNUSED_EVM, base=UNUSED_EVM, solana=config),
            folder,
            stores,
            wallet.address,
            lambda n: str(solana_keystore.from_seed((10_000 + n).to_bytes(32)).pubkey()),
            usdc_of,
            hurry,
            rpc,
        )
