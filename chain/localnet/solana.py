"""The development Solana node as a process, and Tollway's accounts on it.

`SolanaNode` starts and stops the node; `deploy` puts USDC, the 2-of-3 escrow and the nonce accounts on
it and may be called again at any time; `fund` is the faucet.  Nothing here works on a public network:
`deploy` begins with a method only this node has.

LocalnetError
├── PortInUse       another program listens there
├── FolderBusy      another node has the data folder open
└── NodeFailed      the node ended or said nothing; the message carries its last words
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.system_program import (
    ID as SYSTEM_PROGRAM,
)
from solders.system_program import (
    CreateAccountParams,
    InitializeNonceAccountParams,
    TransferParams,
    create_account,
    initialize_nonce_account,
    transfer,
)

from chain.localnet.solana_vm.bank import FAUCET
from chain.localnet.solana_vm.journal import JournalBusy, JournalError
from chain.localnet.solana_vm.server import serving
from chain.networks import SOLANA
from chain.solana import programs
from chain.solana.escrow import EscrowTerms
from chain.solana.rpc import SolanaRpc
from chain.solana.sending import send_and_confirm
from chain.solana.sweeps import sweep_terms
from chain.units import Micro

HOST: Final = "127.0.0.1"
SLOT_MS: Final = 250
FINALIZED_AFTER: Final = 8
"""Slots; with 250 ms slots a transaction is final in 2 s (public network: 32 slots, 13 s)."""
EMPTY_EVERY: Final = 8
"""Every eighth empty slot is a block, the others are skipped: 2 s between blocks when nothing happens."""
START_S_MAX: Final = 30
STOP_S_MAX: Final = 5
GAS_LAMPORTS: Final = 10 * 10**9
EXIT_PORT_IN_USE: Final = 98
EXIT_FOLDER_BUSY: Final = 99
_READY: Final = "listening on "


class LocalnetError(Exception):
    """The development node cannot do what was asked."""


class PortInUse(LocalnetError):
    """Another program listens on the port."""


class FolderBusy(LocalnetError):
    """Another node has the data folder open."""


class NodeFailed(LocalnetError):
    """The node ended or said nothing."""


class SolanaNode:
    """A running node: `async with await SolanaNode.start(folder) as node: node.url`."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.port = port
        self.url = f"http://{HOST}:{port}"

    @classmethod
    async def start(
        cls,
        folder: Path,
        *,
        port: int = 0,
        slot_ms: int = SLOT_MS,
        finalized_after: int = FINALIZED_AFTER,
        empty_every: int = EMPTY_EVERY,
    ) -> Self:
        """Start a node on `folder` (made if missing) and wait until it answers; port 0 picks a free one.

        The node is a child in its own session that ends when this process does, even by kill -9.
        Raises PortInUse, FolderBusy or NodeFailed.
        """
        folder.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  # one local mkdir, before anything runs
        arguments = {
            "--data-dir": str(folder),
            "--port": str(port),
            "--slot-ms": str(slot_ms),
            "--finalized-after": str(finalized_after),
            "--empty-every": str(empty_every),
            "--parent": str(os.getpid()),
        }
        flat = [part for pair in arguments.items() for part in pair]
        with (folder / "node.log").open("ab") as log:  # as above
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "chain.localnet.solana", *flat),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        try:
            bound = await asyncio.wait_for(cls._ready(process, folder, port), START_S_MAX)
        except BaseException:
            await _end(process)
            raise
        return cls(process, bound)

    @staticmethod
    async def _ready(process: asyncio.subprocess.Process, folder: Path, port: int) -> int:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode().strip()
        if line.startswith(_READY):
            return int(line.rsplit(":", 1)[1])
        code = await process.wait()
        if code == EXIT_PORT_IN_USE:
            raise PortInUse(f"port {port} is in use; choose another or stop the program that listens there")
        if code == EXIT_FOLDER_BUSY:
            raise FolderBusy(f"{folder} is in use by another Solana node")
        raise NodeFailed(f"the Solana node ended with code {code}; see {folder / 'node.log'}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    async def stop(self) -> None:
        """End the node; its state stays in the data folder."""
        await _end(self._process)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_S_MAX)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


# ── Tollway's accounts ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class SolanaDeployment:
    """Where things are; addresses in base58."""

    usdc_mint: str
    multisig: str
    """SPL multisig; the owner wallet of the escrow, and the recipient of Solana Pay links."""
    signers: tuple[str, ...]
    threshold: int
    escrow: str
    """Token account of the multisig for USDC."""
    gas_payer: str
    nonce_account: str
    """Durable nonce of payout batches."""
    sweep_nonce_account: str
    """Durable nonce of sweeps, so that a waiting sweep never blocks a payout."""
    genesis_hash: str

    @property
    def terms(self) -> EscrowTerms:
        """What payout batches are made of."""
        return EscrowTerms(
            mint=self.usdc_mint,
            multisig=self.multisig,
            signers=self.signers,
            threshold=self.threshold,
            escrow=self.escrow,
            gas_payer=self.gas_payer,
            nonce_account=self.nonce_account,
        )

    @property
    def sweep_terms(self) -> EscrowTerms:
        """What sweeps are made of."""
        return sweep_terms(self.terms, self.sweep_nonce_account)

    def to_dict(self) -> dict[str, object]:
        """Give a JSON-serialisable form."""
        return asdict(self)


async def deploy(
    rpc: SolanaRpc, *, signers: Sequence[str], gas_payer: str, threshold: int = 2
) -> SolanaDeployment:
    """Put USDC, the multisig, its escrow and the nonce accounts on a development node.

    Idempotent: addresses follow from signers, threshold and gas payer, and what exists is left alone.
    """
    keys = tuple(Pubkey.from_string(s) for s in signers)
    gas, mint = Pubkey.from_string(gas_payer), Pubkey.from_string(SOLANA.usdc_mint)
    label = ",".join([*signers, str(threshold)])
    multisig = _keypair("multisig", label)
    nonces = [_keypair(f"{purpose} nonce", f"{label},{gas_payer}") for purpose in ("payout", "sweep")]
    await _place_mint(rpc, mint)
    if await rpc.account(str(multisig.pubkey()), "confirmed") is None:
        await _create_multisig(rpc, multisig, keys, threshold)
    escrow = programs.associated_token_account(multisig.pubkey(), mint)
    if await rpc.account(str(escrow), "confirmed") is None:
        make = programs.create_associated_token_account(FAUCET.pubkey(), multisig.pubkey(), mint)
        await send_and_confirm(rpc, [make], [FAUCET])
    for nonce in nonces:
        if await rpc.account(str(nonce.pubkey()), "confirmed") is None:
            await _create_nonce(rpc, nonce, gas)
    state = await rpc.account(gas_payer, "confirmed")
    missing = GAS_LAMPORTS - (state.lamports if state else 0)
    if missing > GAS_LAMPORTS // 2:
        await fund(rpc, gas_payer, lamports=missing)
    return SolanaDeployment(
        usdc_mint=str(mint),
        multisig=str(multisig.pubkey()),
        signers=tuple(signers),
        threshold=threshold,
        escrow=str(escrow),
        gas_payer=gas_payer,
        nonce_account=str(nonces[0].pubkey()),
        sweep_nonce_account=str(nonces[1].pubkey()),
        genesis_hash=await rpc.call("getGenesisHash", [], str),
    )


async def fund(rpc: SolanaRpc, owner: str, *, usdc: Micro | None = None, lamports: int = 0) -> str:
    """Give `owner` development USDC and SOL in one transaction; gives its signature, confirmed."""
    to, mint = Pubkey.from_string(owner), Pubkey.from_string(SOLANA.usdc_mint)
    # A random transfer to itself: two equal requests in one block must be two transactions.
    salt = TransferParams(
        from_pubkey=FAUCET.pubkey(), to_pubkey=FAUCET.pubkey(), lamports=secrets.randbelow(2**32)
    )
    instructions = [transfer(salt)]
    if lamports:
        give = TransferParams(from_pubkey=FAUCET.pubkey(), to_pubkey=to, lamports=lamports)
        instructions.append(transfer(give))
    if usdc is not None:
        instructions.append(programs.create_associated_token_account(FAUCET.pubkey(), to, mint))
        account = programs.associated_token_account(to, mint)
        instructions.append(programs.mint_to(mint=mint, to=account, authority=FAUCET.pubkey(), amount=usdc.n))
    return await send_and_confirm(rpc, instructions, [FAUCET])


def _keypair(purpose: str, label: str) -> Keypair:
    return Keypair.from_seed(hashlib.sha256(f"tollway development {purpose}:{label}".encode()).digest())


async def _place_mint(rpc: SolanaRpc, mint: Pubkey) -> None:
    if await rpc.account(str(mint), "processed") is not None:
        return
    # Mint layout: authority (option, key), supply, decimals, initialised, freeze authority (option, key).
    some = (1).to_bytes(4, "little") + bytes(FAUCET.pubkey())
    data = some + (0).to_bytes(8, "little") + bytes([programs.USDC_DECIMALS, 1]) + some
    state = {
        "lamports": await rpc.call("getMinimumBalanceForRentExemption", [len(data)], int),
        "data": base64.b64encode(data).decode(),
        "owner": str(programs.TOKEN_PROGRAM),
    }
    await rpc.call("dev_setAccount", [str(mint), state], int)


async def _create(rpc: SolanaRpc, new: Keypair, size: int, owner: Pubkey, initialise: Instruction) -> None:
    rent = await rpc.call("getMinimumBalanceForRentExemption", [size], int)
    make = create_account(
        CreateAccountParams(
            from_pubkey=FAUCET.pubkey(), to_pubkey=new.pubkey(), lamports=rent, space=size, owner=owner
        )
    )
    await send_and_confirm(rpc, [make, initialise], [FAUCET, new])


async def _create_multisig(rpc: SolanaRpc, new: Keypair, signers: tuple[Pubkey, ...], threshold: int) -> None:
    initialise = programs.initialize_multisig(new.pubkey(), signers, threshold)
    await _create(rpc, new, programs.MULTISIG_BYTES, programs.TOKEN_PROGRAM, initialise)


async def _create_nonce(rpc: SolanaRpc, new: Keypair, authority: Pubkey) -> None:
    params = InitializeNonceAccountParams(nonce_pubkey=new.pubkey(), authority=authority)
    await _create(rpc, new, programs.NONCE_BYTES, SYSTEM_PROGRAM, initialize_nonce_account(params))


# ── the process ───────────────────────────────────────────────────────────────────────────────────


def _die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when the parent ends (Linux); leave at once if it already has."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(0)


async def _watch_parent(parent: int, ended: asyncio.Event) -> None:
    """Where the kernel cannot tell us (macOS), look once a second."""
    while os.getppid() == parent:  # noqa: ASYNC110  # the kernel has no event for it there
        await asyncio.sleep(1)
    ended.set()


async def _serve(options: argparse.Namespace) -> int:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    must_look = options.parent and sys.platform != "linux"
    watcher = asyncio.create_task(_watch_parent(options.parent, ended)) if must_look else None
    async with serving(
        options.data_dir,
        port=options.port,
        slot_ms=options.slot_ms,
        finalized_after=options.finalized_after,
        empty_every=options.empty_every,
        clock=lambda: int(time.time()),
    ) as (port, slots):
        print(f"{_READY}{HOST}:{port}", flush=True)
        waits = [asyncio.create_task(ended.wait()), *([slots] if slots is not None else [])]
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        if slots is not None and slots in done:
            slots.result()
    if watcher is not None:
        watcher.cancel()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a node until SIGTERM or Ctrl-C; prints one line when it listens."""
    parser = argparse.ArgumentParser(description="A development Solana node on 127.0.0.1.")
    parser.add_argument("--data-dir", type=Path, required=True, help="where the chain is kept")
    parser.add_argument("--port", type=int, default=8899, help="0 picks a free one")
    parser.add_argument("--slot-ms", type=int, default=SLOT_MS, help="0: slots move by dev_tick only")
    parser.add_argument("--finalized-after", type=int, default=FINALIZED_AFTER, help="slots")
    parser.add_argument("--empty-every", type=int, default=EMPTY_EVERY, help="empty slots per block")
    parser.add_argument("--parent", type=int, default=0, help="end when this process ends")
    options = parser.parse_args(arguments)
    if options.parent:
        _die_with_parent(options.parent)
    try:
        return asyncio.run(_serve(options))
    except JournalBusy as e:
        print(e, file=sys.stderr)
        return EXIT_FOLDER_BUSY
    except JournalError as e:
        print(e, file=sys.stderr)
        return 1
    except OSError as e:
        print(f"cannot run the Solana node: {e}", file=sys.stderr)
        return EXIT_PORT_IN_USE if e.errno == errno.EADDRINUSE else 1


if __name__ == "__main__":
    raise SystemExit(main())
