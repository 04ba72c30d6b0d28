"""A development Ethereum or Base: one anvil with the real USDC, Safe and forwarder code on it.

The contracts stand at their public addresses: Safe's because they are created the way Safe created
them (their code hashes are compared with safe-deployments), USDC's because anvil lets us put its proxy
there.  So what is signed and computed here is what would be signed and computed on the public networks.

anvil keeps its chain in a file: written every few seconds and when it is stopped by SIGTERM.  After a
restart, blocks keep their hashes, and logs and receipts are served (checked by
tests/integration/test_evm_chain.py).  Balances at a height are known for the last `states_kept` heights
since the start: keeping them in the file too costs 0.2 MB a block at every write, without end.  So
`start` puts enough blocks on top that the `finalized` one can be asked.  Only SIGKILL to anvil itself
loses the seconds since the last write.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import msgspec
from eth_abi.abi import encode as abi_encode
from eth_hash.auto import keccak
from eth_keys.datatypes import PrivateKey

from chain.addresses import EvmAddress
from chain.errors import ChainError, RpcUnavailable
from chain.evm import abi, forwarders, gas
from chain.evm.addresses import from_bytes, to_bytes
from chain.evm.forwarders import CREATE2_DEPLOYER, create2_address
from chain.evm.payouts import SafeTerms
from chain.evm.rpc import Call, JsonRpc, data, quantity
from chain.evm.safe import MULTI_SEND_CALL_ONLY
from chain.localnet import artifacts
from chain.localnet.settings import EvmSettings, LocalnetError
from chain.networks import EvmNetwork
from chain.units import Micro

STATE_WRITTEN_EVERY_S: Final = 5
START_WITHIN_S: Final = 15.0
STOP_WITHIN_S: Final = 15.0
_PR_SET_PDEATHSIG: Final = 1

FAUCET: Final = EvmAddress("0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266")
"""anvil's first account, whose key is public and which anvil signs for: mints, and owns USDC's roles."""
_USDC_ADMIN: Final = EvmAddress("0xa0Ee7A142d267C1f36714E4a8F75612F20a79720")
"""anvil's tenth account; a proxy's admin cannot call the token."""
SAFE_CREATE2_DEPLOYER: Final = EvmAddress("0x914d7Fec6aaC8cd542e72Bca78B30650d45643d7")
"""Safe's own copy of the deterministic deployer, from which its addresses follow."""
_CREATE2_DEPLOYER_CODE: Final = (
    "0x7fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffe0"
    "3601600081602082378035828234f58015156039578182fd5b8082525050506014600cf3"
)
"""The deterministic deployment proxy; anvil has it at first, but not after a reset."""
_IMPLEMENTATION_SLOT: Final = "0x" + keccak(b"org.zeppelinos.proxy.implementation").hex()
_ADMIN_SLOT: Final = "0x" + keccak(b"org.zeppelinos.proxy.admin").hex()
_NOBODY: Final = "0x" + "00" * 20
_MINT_ALLOWANCE: Final = 10**18
_DEPLOY_GAS: Final = 8_000_000


class PortInUse(LocalnetError):
    """Something else listens on the port."""


class NodeDied(LocalnetError):
    """anvil ended by itself or never answered; the message carries the end of its log."""


@dataclass(frozen=True, slots=True)
class EvmDeployment:
    """What stands on a development chain."""

    network: EvmNetwork
    usdc: str
    safe: EvmAddress
    owners: tuple[EvmAddress, ...]
    threshold: int
    forwarder_factory: EvmAddress
    multi_send_call_only: str

    def terms(self) -> SafeTerms:
        """The Safe as its signers and the settler know it."""
        return SafeTerms(self.network, self.safe, self.owners, self.threshold, self.multi_send_call_only)


class Anvil:
    """One running anvil.  `start` makes it; `stop` (or leaving `async with`) writes its chain and ends it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.log = log
        self.pid = process.pid
        self._process = process

    @classmethod
    async def start(cls, network: EvmNetwork, settings: EvmSettings, data_dir: Path, port: int = 0) -> Self:
        """Start the chain kept in `data_dir`, on loopback, and wait until it serves the right chain id.

        `port` 0 chooses a free one.  Call from the main thread: on Linux anvil gets SIGTERM, and so
        writes its chain, when the thread that started it ends, even by SIGKILL.  Raises NotInstalled,
        PortInUse or NodeDied (all LocalnetError).
        """
        binary = artifacts.anvil_binary()
        port = _claim_port(port, network)
        log = data_dir / f"{network.chain}.log"
        node = cls(_spawn([str(binary), *_arguments(network, settings, data_dir, port)], log), port, log)
        try:
            await node._wait_until_serving(network)
            await node._renew_finality(settings)
        except BaseException:
            await node.stop()
            raise
        return node

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    async def stop(self) -> None:
        """Let anvil write its chain and end; kill it if it does not within STOP_WITHIN_S."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self._process.wait, STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    async def _wait_until_serving(self, network: EvmNetwork) -> None:
        deadline = asyncio.get_running_loop().time() + START_WITHIN_S
        async with JsonRpc(self.url, timeout_s=2.0) as rpc:
            while asyncio.get_running_loop().time() < deadline:
                if not self.is_running:
                    raise NodeDied(f"the {network.chain} node ended at start:\n{self._log_end()}")
                try:
                    if quantity(await rpc.call("eth_chainId", shape=str)) == network.chain_id:
                        return
                except ChainError:
                    await asyncio.sleep(0.02)
        raise NodeDied(f"the {network.chain} node does not answer on {self.url}:\n{self._log_end()}")

    async def _renew_finality(self, settings: EvmSettings) -> None:
        async with JsonRpc(self.url) as rpc:
            if quantity(await rpc.call("eth_blockNumber", shape=str)):
                await mine(rpc, settings.finality_lag_blocks + 1)

    def _log_end(self) -> str:
        return self.log.read_text(errors="replace")[-800:]


def _claim_port(port: int, network: EvmNetwork) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise PortInUse(f"port {port}, wanted for {network.chain}, is in use or forbidden: {e}") from e
        return int(probe.getsockname()[1])


def _arguments(network: EvmNetwork, settings: EvmSettings, data_dir: Path, port: int) -> list[str]:
    given = {
        "--host": "127.0.0.1",
        "--port": port,
        "--chain-id": settings.chain_id,
        "--block-time": settings.block_time_s,
        "--slots-in-an-epoch": settings.slots_in_an_epoch,
        "--state": data_dir / f"{network.chain}.json",
        "--state-interval": STATE_WRITTEN_EVERY_S,
        "--prune-history": settings.states_kept,
    }
    if settings.hardfork:
        given["--hardfork"] = settings.hardfork
    flat = [str(part) for pair in given.items() for part in pair]
    # Mixed mining: a block at once for every transaction, and one every block_time_s, so finality moves.
    return [*flat, "--mixed-mining", "--quiet", "--no-cors", *settings.flags]


def _spawn(argv: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        return subprocess.Popen(  # noqa: S603  argv is ours
            argv,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent(),  # touches only the C library loaded before
        )


def _die_with_parent() -> Callable[[], None]:
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    parent = os.getpid()

    def before_exec() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

    return before_exec


async def deploy(
    rpc: JsonRpc, network: EvmNetwork, settings: EvmSettings, owners: Sequence[str], threshold: int = 2
) -> EvmDeployment:
    """Put USDC, Safe, the escrow of these owners and its forwarder factory on the chain.

    Idempotent: what stands already is left alone.  The escrow and the factory have the same addresses
    on every chain for the same owners (in any order) and threshold.  About a second.
    """
    ordered = tuple(sorted((from_bytes(to_bytes(o)) for o in owners), key=lambda o: int(o, 16)))
    await _deploy_usdc(rpc, network)
    for deployer in (CREATE2_DEPLOYER, SAFE_CREATE2_DEPLOYER):
        if not await _has_code(rpc, deployer):
            await rpc.call("anvil_setCode", deployer, _CREATE2_DEPLOYER_CODE, shape=msgspec.Raw)
    for name in artifacts.DEPLOYMENT_FILES:
        await _deploy_safe_contract(rpc, name)
    safe = await _deploy_escrow(rpc, ordered, threshold)
    factory = forwarders.factory_address(safe)
    if not await _has_code(rpc, factory):
        await _create2(rpc, CREATE2_DEPLOYER, forwarders.factory_creation_code(safe))
        if not await _has_code(rpc, factory):
            raise LocalnetError(f"the forwarder factory did not land at {factory} on {network.chain}")
    # What was just deployed is asked for at the finalized block too.
    await rpc.call("anvil_mine", hex(settings.finality_lag_blocks + 1), shape=msgspec.Raw)
    return EvmDeployment(network, network.usdc, safe, ordered, threshold, factory, MULTI_SEND_CALL_ONLY)


async def fund(
    rpc: JsonRpc, network: EvmNetwork, address: str, *, usdc: Micro | None = None, eth_wei: int = 0
) -> str | None:
    """Faucet: mint USDC to `address` and add ether to it; the mint's transaction hash, if any."""
    if eth_wei:
        balance = quantity(await rpc.call("eth_getBalance", address, "latest", shape=str))
        await rpc.call("anvil_setBalance", address, hex(balance + eth_wei), shape=msgspec.Raw)
    if usdc is None or usdc.n == 0:
        return None
    return await send_as(rpc, FAUCET, network.usdc, abi.load("usdc")["mint"].encode(address, usdc.n))


async def pay_usdc(rpc: JsonRpc, network: EvmNetwork, key: bytes, to: str, amount: Micro) -> str:
    """Pay USDC from a wallet, as a buyer's would; transaction hash, once it is in a block."""
    wallet = gas.GasPayer(rpc, network.chain_id, key)
    outer = await wallet.wrap(network.usdc, abi.load("usdc")["transfer"].encode(to, amount.n))
    await gas.broadcast(rpc, outer.raw, outer.tx)
    await wait_mined(rpc, [outer.tx])
    return outer.tx


async def send_as(rpc: JsonRpc, sender: str, to: str, calldata: bytes) -> str:
    """Send as one of anvil's own accounts; transaction hash, once it is in a block and succeeded."""
    call = {"from": sender, "to": to, "data": "0x" + calldata.hex()}
    tx = await rpc.call("eth_sendTransaction", call, shape=str)
    await wait_mined(rpc, [tx])
    return tx


async def mine(rpc: JsonRpc, blocks: int) -> None:
    """Put this many empty blocks on top, for whoever does not want to wait for finality."""
    await rpc.call("anvil_mine", hex(blocks), shape=msgspec.Raw)


class _Receipt(msgspec.Struct):
    status: str


async def wait_mined(rpc: JsonRpc, txs: Sequence[str]) -> None:
    """Wait until all are in blocks; LocalnetError if one failed."""
    for _ in range(1_000):
        answers = await rpc.batch([Call("eth_getTransactionReceipt", (tx,)) for tx in txs])
        receipts = [answer.value(_Receipt | None) for answer in answers]  # type: ignore[arg-type]  # a union is a shape too
        if all(receipts):
            failed = [tx for tx, r in zip(txs, receipts, strict=True) if r and quantity(r.status) != 1]
            if failed:
                raise LocalnetError(f"failed on {rpc.url}: {failed}")
            return
        await asyncio.sleep(0.01)
    raise RpcUnavailable(f"{rpc.url} does not mine {txs}")


def development_key(path: Path) -> bytes:
    """A private key kept in a file of the data folder, made at first use: gas payers, demo wallets."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return bytes.fromhex(path.read_text().strip())
    key = secrets.token_bytes(32)
    with os.fdopen(descriptor, "w") as file:
        file.write(key.hex() + "\n")
    return key


def address_of(key: bytes) -> EvmAddress:
    """The address of a private key."""
    return from_bytes(PrivateKey(key).public_key.to_canonical_address())


async def _has_code(rpc: JsonRpc, address: str) -> bool:
    return await rpc.call("eth_getCode", address, "latest", shape=str) != "0x"


async def _create(rpc: JsonRpc, creation_code: bytes) -> EvmAddress:
    """Create a contract from the faucet and give its address."""
    nonce = quantity(await rpc.call("eth_getTransactionCount", FAUCET, "pending", shape=str))
    call = {"from": FAUCET, "data": "0x" + creation_code.hex(), "gas": hex(_DEPLOY_GAS)}
    await wait_mined(rpc, [await rpc.call("eth_sendTransaction", call, shape=str)])
    # rlp([address, nonce]) of a nonce below 2^15, which is what a fresh chain has
    number = nonce.to_bytes((nonce.bit_length() + 7) // 8)
    encoded = number if 0 < nonce < 0x80 else bytes([0x80 + len(number)]) + number
    body = b"\x94" + to_bytes(FAUCET) + encoded
    return from_bytes(keccak(bytes([0xC0 + len(body)]) + body))


async def _create2(rpc: JsonRpc, deployer: str, creation_code: bytes) -> None:
    calldata = "0x" + (bytes(32) + creation_code).hex()
    call = {"from": FAUCET, "to": deployer, "data": calldata, "gas": hex(_DEPLOY_GAS)}
    await wait_mined(rpc, [await rpc.call("eth_sendTransaction", call, shape=str)])


async def _deploy_usdc(rpc: JsonRpc, network: EvmNetwork) -> None:
    usdc = abi.load("usdc")
    if await _has_code(rpc, network.usdc):
        asked = {"to": network.usdc, "data": "0x" + usdc["minterAllowance"].encode(FAUCET).hex()}
        if int.from_bytes(data(await rpc.call("eth_call", asked, "latest", shape=str))):
            return
        # Stopped half way through the very first deployment; nothing else can be on the chain yet.
        await rpc.call("anvil_reset", shape=msgspec.Raw)
    checker = await _create(rpc, artifacts.artifact("SignatureChecker").creation_code())
    token_code = artifacts.artifact("FiatTokenV2_2").creation_code({"SignatureChecker": checker})
    implementation = await _create(rpc, token_code)
    proxy = artifacts.artifact("FiatTokenProxy").deployedBytecode
    for method, params in (
        ("anvil_setCode", (network.usdc, proxy)),
        ("anvil_setStorageAt", (network.usdc, _IMPLEMENTATION_SLOT, _word(implementation))),
        ("anvil_setStorageAt", (network.usdc, _ADMIN_SLOT, _word(_USDC_ADMIN))),
    ):
        await rpc.call(method, *params, shape=msgspec.Raw)
    roles = (FAUCET, FAUCET, FAUCET, FAUCET)
    calls = (
        usdc["initialize"].encode("USD Coin", "USDC", "USD", 6, *roles),
        usdc["initializeV2"].encode("USD Coin"),
        usdc["initializeV2_1"].encode(FAUCET),
        usdc["initializeV2_2"].encode([], "USDC"),
        usdc["configureMinter"].encode(FAUCET, _MINT_ALLOWANCE),
    )
    for calldata in calls:
        await send_as(rpc, FAUCET, network.usdc, calldata)


async def _deploy_safe_contract(rpc: JsonRpc, name: str) -> None:
    """Create one of Safe's contracts where Safe has it, and compare the code with Safe's own record."""
    published = artifacts.safe_deployment(name)
    if not await _has_code(rpc, published.address):
        await _create2(rpc, SAFE_CREATE2_DEPLOYER, artifacts.artifact(name).creation_code())
    deployed = data(await rpc.call("eth_getCode", published.address, "latest", shape=str))
    if "0x" + keccak(deployed).hex() != published.codeHash:
        raise LocalnetError(f"{name} at {published.address} is not the code that Safe published")


async def _deploy_escrow(rpc: JsonRpc, owners: Sequence[str], threshold: int) -> EvmAddress:
    """A SafeL2 proxy of these owners; its address follows from owners and threshold alone."""
    singleton = artifacts.safe_deployment("SafeL2").address
    factory = artifacts.safe_deployment("SafeProxyFactory").address
    handler = artifacts.safe_deployment("CompatibilityFallbackHandler").address
    setup = abi.load("safe")["setup"].encode(
        list(owners), threshold, _NOBODY, b"", handler, _NOBODY, 0, _NOBODY
    )
    salt = keccak(keccak(setup) + bytes(32))
    proxy_code = artifacts.artifact("SafeProxy").creation_code() + abi_encode(["address"], [singleton])
    safe = from_bytes(create2_address(to_bytes(factory), salt, keccak(proxy_code)))
    if not await _has_code(rpc, safe):
        create = abi.load("safe_proxy_factory")["createProxyWithNonce"].encode(singleton, setup, 0)
        await send_as(rpc, FAUCET, factory, create)
        if not await _has_code(rpc, safe):
            raise LocalnetError(f"the escrow did not land at {safe}")
    return safe


def _word(address: str) -> str:
    return "0x" + to_bytes(address).rjust(32, b"\0").hex()
