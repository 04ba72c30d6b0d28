"""What `tollway up` and `tollway faucet` do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from chain.networks import Chain
from chain.units import Micro
from marketplace.platform.processes import end_with_make
from marketplace.platform.settings import load_chains
from marketplace.stack.development_chains import faucet
from marketplace.stack.folder import StackFolder, write_private
from marketplace.stack.stack import DemoModel, Ports, Stack, cancel_on_signals

DEFAULT_STACK: Final = Path("var/stack")


def stack_file(data_dir: Path) -> Path:
    """Where a stack says what it offers: beside the default folder (`var/stack.json`), inside any other."""
    root = data_dir.resolve()
    return root.with_suffix(".json") if root == DEFAULT_STACK.resolve() else root / "stack.json"


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
    end_with_make()
    interruption = cancel_on_signals()
    try:
        await _keep_up(data_dir, Stack(StackFolder(data_dir), ports, model, say, has_node=has_node), out)
    except asyncio.CancelledError:
        if not interruption.is_set():
            raise


async def _keep_up(data_dir: Path, stack: Stack, out: Console) -> None:
    stack.folder.make()
    async with stack.folder.owned():
        try:
            await stack.start()
            stack.say("the demo buyer deposits on Base …")
            await stack.fund_demo_buyer()
            if stack.has_node:
                await stack.wait_for_node()
            write_private(stack_file(data_dir), json.dumps(stack.facts(), indent=2))
            _show(stack, out, stack_file(data_dir))
            await stack.watch()
        finally:
            stack.say("ending …")
            await stack.stop()


def _show(stack: Stack, out: Console, file: Path) -> None:
    facts = stack.facts()
    table = Table(title="Tollway is up", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a key cut short is no key
    table.add_row("API (OpenAI-compatible)", f"{facts['api']}/v1")
    table.add_row("API documentation", f"{facts['api']}/docs")
    table.add_row("model", facts["model"])
    for role, key in facts["keys"].items():
        table.add_row(f"{role}'s key", key)
    for chain, url in facts["rpc"].items():
        table.add_row(f"{chain} RPC", url)
    table.add_row("all of this", str(file))
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
