"""The three development chains of a stack: started, deployed, funded; and what a wallet does on them."""

from __future__ import annotations

import asyncio
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chain.evm import keystore as evm_keystore
from chain.evm.rpc import JsonRpc
from chain.localnet import evm, settings, solana
from chain.localnet.settings import LocalnetError as EvmLocalnetError
from chain.localnet.solana_wallet import SolanaWallet
from chain.networks import BASE, ETHEREUM, EVM_NETWORKS, SOLANA, Chain, EvmNetwork
from chain.solana import keystore as solana_keystore
from chain.solana.rpc import SolanaRpc
from chain.units import Micro
from marketplace.platform.errors import SetupFault
from marketplace.stack.folder import StackFolder, write_private

SIGNERS: Final = ("alice", "bob", "carol")
THRESHOLD: Final = 2
GAS_WEI: Final = 10**20
SEED_BYTES: Final = 32
DEVELOPMENT_SCRYPT_N: Final = 2**12
"""Cheap keystores for throw-away keys; a signer's real one costs a second."""


@dataclass(frozen=True, slots=True)
class ChainPorts:
    """Loopback ports of the three nodes; 0 chooses a free one."""

    ethereum: int = 0
    base: int = 0
    solana: int = 0


class DevelopmentChains:
    """Two anvils and a Solana node, alive as long as this process."""

    def __init__(self, folder: StackFolder, ports: ChainPorts) -> None:
        self._folder = folder
        self._ports = ports
        self._anvils: dict[Chain, evm.Anvil] = {}
        self._solana: solana.SolanaNode | None = None
        self.rpc: dict[Chain, str] = {}

    async def start(self) -> None:
        """Start the nodes and deploy what is missing; SetupFault says what keeps them from starting."""
        configuration = settings.read()
        ports = {Chain.ETHEREUM: self._ports.ethereum, Chain.BASE: self._ports.base}
        try:
            for network in (ETHEREUM, BASE):
                node = await evm.Anvil.start(
                    network, configuration.evm(network), self._folder.chains, ports[network.chain]
                )
                self._anvils[network.chain] = node
                self.rpc[network.chain] = node.url
            self._solana = await solana.SolanaNode.start(
                self._folder.chains / "solana",
                port=self._ports.solana,
                slot_ms=configuration.solana.slot_ms,
                finalized_after=configuration.solana.finalized_after_slots,
            )
            self.rpc[Chain.SOLANA] = self._solana.url
            await self._deploy(configuration)
        except (EvmLocalnetError, solana.LocalnetError) as e:
            await self.stop()
            raise SetupFault(str(e)) from e
        except BaseException:
            await self.stop()
            raise

    async def _deploy(self, configuration: settings.Settings) -> None:
        evm_signers, solana_signers = self._signers()
        described: dict[str, object] = {}
        for network in (ETHEREUM, BASE):
            async with JsonRpc(self.rpc[network.chain]) as rpc:
                deployed = await evm.deploy(
                    rpc, network, configuration.evm(network), evm_signers, threshold=THRESHOLD
                )
                for name in ("gas-evm.key", "gas-evm-sweeps.key"):
                    key = seed_in(self._folder.settler / name)
                    await evm.fund(rpc, network, evm.address_of(key), eth_wei=GAS_WEI)
            described[network.chain.value] = {
                "rpc": [self.rpc[network.chain]],
                "chain_id": network.chain_id,
                "usdc": deployed.usdc,
                "escrow": deployed.safe,
                "forwarder_factory": deployed.forwarder_factory,
                "multi_send": deployed.multi_send_call_only,
                "signers": list(deployed.owners),
                "threshold": deployed.threshold,
            }
        gas = solana_keystore.from_seed(seed_in(self._folder.settler / "gas-solana.key"))
        seed_in(self._folder.settler / "solana-pool.seed")
        async with SolanaRpc(self.rpc[Chain.SOLANA]) as rpc:
            placed = await solana.deploy(
                rpc, signers=solana_signers, gas_payer=str(gas.pubkey()), threshold=THRESHOLD
            )
        described["solana"] = {
            "rpc": [self.rpc[Chain.SOLANA]],
            "usdc_mint": placed.usdc_mint,
            "multisig": placed.multisig,
            "escrow": placed.escrow,
            "nonce_account": placed.nonce_account,
            "gas_payer": placed.gas_payer,
            "signers": list(placed.signers),
            "threshold": placed.threshold,
        }
        write_private(self._folder.chains_file, json.dumps(described, indent=2))

    def _signers(self) -> tuple[list[str], list[str]]:
        """Give the signers' addresses on EVM and Solana, making their keystores at first use."""
        passphrase = self._folder.secret("signer-passphrase")
        evm_addresses: list[str] = []
        solana_addresses: list[str] = []
        for name in SIGNERS:
            home = self._folder.signers / name
            home.mkdir(exist_ok=True, mode=0o700)
            if not (home / "evm.json").exists():
                evm_keystore.create(home / "evm.json", passphrase, scrypt_n=DEVELOPMENT_SCRYPT_N)
            if not (home / "solana.json").exists():
                solana_keystore.create(home / "solana.json", passphrase, scrypt_n=DEVELOPMENT_SCRYPT_N)
            evm_addresses.append(evm_keystore.address(home / "evm.json"))
            solana_addresses.append(solana_keystore.address_of(home / "solana.json"))
        return evm_addresses, solana_addresses

    @property
    def are_running(self) -> bool:
        return (
            all(node.is_running for node in self._anvils.values())
            and self._solana is not None
            and self._solana.is_running
        )

    async def stop(self) -> None:
        """Let every node write its chain and end."""
        stopping = [node.stop() for node in self._anvils.values()]
        if self._solana is not None:
            stopping.append(self._solana.stop())
        await asyncio.gather(*stopping)
        self._anvils, self._solana = {}, None


def seed_in(path: Path) -> bytes:
    """A 32-byte secret kept as hex in a private file, made at first use; SetupFault if it is damaged."""
    if not path.exists():
        write_private(path, secrets.token_hex(SEED_BYTES) + "\n")
    try:
        seed = bytes.fromhex(path.read_text().strip())
    except ValueError:
        seed = b""
    if len(seed) != SEED_BYTES:
        raise SetupFault(f"{path} does not hold {SEED_BYTES} bytes in hex; restore it from a copy")
    return seed


class DevelopmentWallet:
    """A person's wallet on all three development chains, filled by the faucet."""

    def __init__(self, rpc: dict[Chain, str], *, seed: bytes | None = None) -> None:
        self._rpc = rpc
        self._key = seed or secrets.token_bytes(32)
        self.evm_address = str(evm.address_of(self._key))
        self._solana_seed = self._key

    async def fund(self, chain: Chain, amount: Micro) -> str:
        """Faucet: mint USDC to this wallet and give it gas; gives the transaction."""
        return await faucet(self._rpc, chain, await self.address(chain), amount)

    async def address(self, chain: Chain) -> str:
        if chain.is_evm:
            return self.evm_address
        async with SolanaRpc(self._rpc[chain]) as rpc:
            return SolanaWallet(rpc, seed=self._solana_seed).address

    async def pay(self, chain: Chain, to: str, amount: Micro) -> str:
        """Send USDC to an address, as any wallet or exchange would; gives the transaction."""
        if chain.is_evm:
            async with JsonRpc(self._rpc[chain]) as rpc:
                return await evm.pay_usdc(rpc, EVM_NETWORKS[chain], self._key, to, amount)
        async with SolanaRpc(self._rpc[chain]) as solana_rpc:
            return await SolanaWallet(solana_rpc, seed=self._solana_seed).pay(to, amount)

    async def pay_link(self, url: str) -> str:
        """Pay a Solana Pay link; gives the transaction."""
        async with SolanaRpc(self._rpc[Chain.SOLANA]) as rpc:
            return await SolanaWallet(rpc, seed=self._solana_seed).pay_link(url)

    def sign_in_message(self, message: str) -> str:
        """Sign a sign-in message with the EVM key (EIP-191); 0x and 65 bytes of hex."""
        from chain.evm.signatures import personal_message_digest

        signature = evm_keystore.sign_digest(self._key, personal_message_digest(message))
        return "0x" + signature.hex()

    async def sign_in_message_on_solana(self, message: str) -> str:
        """Sign a sign-in message with the Solana key; base58."""
        from chain.solana.base58 import encode

        async with SolanaRpc(self._rpc[Chain.SOLANA]) as rpc:
            return encode(SolanaWallet(rpc, seed=self._solana_seed).sign_message(message.encode()))

    async def usdc(self, chain: Chain) -> Micro:
        """USDC in this wallet now."""
        return await usdc_of(self._rpc, chain, await self.address(chain))


async def faucet(rpc: dict[Chain, str], chain: Chain, to: str, amount: Micro) -> str:
    """Mint development USDC to a wallet and give it gas for a few transactions; gives the transaction.

    SetupFault where the chain is not a development one, or refuses.
    """
    try:
        if chain.is_evm:
            network: EvmNetwork = EVM_NETWORKS[chain]
            async with JsonRpc(rpc[chain]) as evm_rpc:
                sent = await evm.fund(evm_rpc, network, to, usdc=amount, eth_wei=10**17)
                assert sent is not None
                return sent
        async with SolanaRpc(rpc[chain]) as solana_rpc:
            return await solana.fund(solana_rpc, to, usdc=amount, lamports=10**9)
    except (EvmLocalnetError, solana.LocalnetError) as e:
        raise SetupFault(str(e)) from e


async def usdc_of(rpc: dict[Chain, str], chain: Chain, owner: str) -> Micro:
    """USDC a wallet holds at the newest block."""
    if chain.is_evm:
        from chain.evm import abi

        async with JsonRpc(rpc[chain]) as evm_rpc:
            call = {
                "to": EVM_NETWORKS[chain].usdc,
                "data": "0x" + abi.load("usdc")["balanceOf"].encode(owner).hex(),
            }
            answer = await evm_rpc.call("eth_call", call, "latest", shape=str)
            return Micro(int(answer, 16))
    from chain.solana import programs
    from chain.solana.addresses import parse_address

    async with SolanaRpc(rpc[chain]) as solana_rpc:
        mint = parse_address(SOLANA.usdc_mint)
        account = str(programs.associated_token_account(parse_address(owner), mint))
        state = await solana_rpc.account(account, "confirmed")
        return Micro(programs.token_account(state.owner, state.bytes()).amount if state else 0)
