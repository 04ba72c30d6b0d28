"""What `tollway up` and `tollway faucet` do."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from chain.networks import Chain
from chain.units import Micro
from marketplace.platform.settings import load_chains
from marketplace.stack.development_chains import faucet
from marketplace.stack.folder import StackFolder, write_private
from marketplace.stack.stack import DemoModel, Ports, Stack

STACK_FILE: Final = Path("var/stack.json")
_PR_SET_PDEATHSIG: Final = 1


async def run_up(
    data_dir: Path,
    model: DemoModel,
    ports: Ports,
    say: Callable[[str], None],
    out: Console,
    *,
    has_node: bool,
) -> None:
    """Start a stack, print what it offers, keep it running until a signal or `tollway down`."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    _end_with_make()
    folder = StackFolder(data_dir)
    folder.make()
    with folder.owned():
        stack = Stack(folder, ports, model, say, has_node=has_node)
        starting = asyncio.create_task(_start(stack, has_node=has_node))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
        try:
            if not starting.cancelled():
                starting.result()
            if not stop.is_set():
                write_private(STACK_FILE if data_dir == Path("var/stack") else data_dir / "stack.json",
                              json.dumps(stack.facts(), indent=2))  # fmt: skip
                _show(stack, out)
                await stack.watch(stop)
        finally:
            stopping.cancel()
            say("ending …")
            await stack.stop()


async def _start(stack: Stack, *, has_node: bool) -> None:
    await stack.start()
    stack.say("the demo buyer deposits on Base …")
    await stack.fund_demo_buyer()
    if has_node:
        await stack.wait_for_node()


def _end_with_make() -> None:
    """Under make, end when make is killed: it cannot pass SIGKILL on."""
    if "MAKELEVEL" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _show(stack: Stack, out: Console) -> None:
    facts = stack.facts()
    table = Table(title="Tollway is up", show_header=False)
    table.add_row("API (OpenAI-compatible)", f"{facts['api']}/v1")
    table.add_row("API documentation", f"{facts['api']}/docs")
    table.add_row("model", facts["model"])
    for role, key in facts["keys"].items():
        table.add_row(f"{role}'s key", key)
    for chain, url in facts["rpc"].items():
        table.add_row(f"{chain} RPC", url)
    table.add_row("all of this", str(STACK_FILE))
    out.print(table)
    out.print("Development settings: earnings mature at once, payout addresses need no cooling time.")
    out.print("Ctrl-C or `make down` ends it; the data stays.")


async def run_faucet(data_dir: Path, chain: Chain, to: str, amount: Micro) -> str:
    """Mint development USDC on a running stack's chain; gives the transaction."""
    chains = load_chains(StackFolder(data_dir).chains_file)
    rpc = {
        Chain.ETHEREUM: chains.ethereum.rpc[0],
        Chain.BASE: chains.base.rpc[0],
        Chain.SOLANA: chains.solana.rpc[0],
    }
    return await faucet(rpc, chain, to, amount)
