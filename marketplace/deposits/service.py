"""What the command line runs: readers of the configured providers, and a watcher for each chain."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Final
from urllib.parse import urlsplit

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import ChainError
from chain.evm.reader import EvmReader
from chain.evm.rpc import JsonRpc
from chain.networks import EVM_NETWORKS, SOLANA, Chain
from chain.ports import ChainReader
from chain.quorum import OnFault, Provider, ProviderFault, agreed, default_agreement
from chain.solana.reader import SolanaReader
from chain.solana.rpc import SolanaRpc
from marketplace.deposits import cursor, metrics, recovery
from marketplace.deposits.alarms import acknowledge, halt_and_ask
from marketplace.deposits.booking import Credit, Rules
from marketplace.deposits.early import EarlyCredit
from marketplace.deposits.reconcile import Reconciled, check_chain
from marketplace.deposits.watcher import Pace, Watcher
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.platform.errors import SetupFault
from marketplace.platform.settings import ChainsConfig, EvmChainConfig

AUDIT_EVERY_S: Final = 3600.0
_log: Final = structlog.get_logger("marketplace.deposits")


def escrow_of(chain: Chain, chains: ChainsConfig) -> str:
    """The address whose USDC is the chain's escrow: Safe, or the multisig's token account."""
    return {
        Chain.ETHEREUM: chains.ethereum.escrow,
        Chain.BASE: chains.base.escrow,
        Chain.SOLANA: chains.solana.escrow,
    }[chain]


@asynccontextmanager
async def open_reader(
    chain: Chain, chains: ChainsConfig, *, agreement: int | None = None
) -> AsyncIterator[ChainReader]:
    """Read `chain` through its configured providers; by default more than half of them must agree.

    SetupFault if the configuration is not this network's.
    """

    def tell(fault: ProviderFault) -> None:
        metrics.PROVIDER_FAULTS.labels(chain, fault.provider, fault.kind).inc()
        _log.warning("provider fault", chain=chain.value, provider=fault.provider, kind=fault.kind.value)

    async with AsyncExitStack() as stack:
        providers = [
            Provider(f"{chain.value}-{number}", await _open_provider(stack, chain, chains, url))
            for number, url in enumerate(_rpc_urls(chain, chains), start=1)
        ]
        if not providers:
            raise SetupFault(f"{chain}: the chains file names no RPC provider")
        wanted = default_agreement(len(providers)) if agreement is None else agreement
        on_fault: OnFault = tell
        yield agreed(providers, wanted, on_fault)


async def watch(
    engine: AsyncEngine,
    clock: Clock,
    chains: ChainsConfig,
    which: Sequence[Chain],
    stop: asyncio.Event,
    *,
    deposit_micro_min: int,
    start_height: int | None = None,
    pace: Pace | None = None,
    on_credit: Callable[[Credit], None] | None = None,
    early: EarlyCredit | None = None,
) -> None:
    """Run a watcher for each chain in `which` until `stop` is set; each finishes the unit it is at.

    `start_height` counts only at a chain's very first start; `early` None lends nothing before finality.
    """
    async with AsyncExitStack() as stack:
        watchers = [
            Watcher(
                Rules(chain, escrow_of(chain, chains), deposit_micro_min, early),
                await stack.enter_async_context(open_reader(chain, chains)),
                engine,
                clock,
                start_height=start_height,
                pace=pace or Pace(),
                on_credit=on_credit,
            )
            for chain in which
        ]
        async with asyncio.TaskGroup() as group:
            for watcher in watchers:
                group.create_task(watcher.run(stop))
                escrow = escrow_of(watcher.rules.chain, chains)
                group.create_task(_audit_hourly(engine, clock, watcher, escrow, stop))


async def reconcile(
    engine: AsyncEngine, chains: ChainsConfig, which: Sequence[Chain] = tuple(Chain), *, patience_s: int = 30
) -> list[Reconciled]:
    """S1 on every chain: escrow:c and unswept:c against the chain, at the cursor."""
    results: list[Reconciled] = []
    for chain in which:
        async with open_reader(chain, chains) as reader:
            results += await check_chain(engine, reader, escrow_of(chain, chains), patience_s=patience_s)
    return results


async def audit(
    engine: AsyncEngine, clock: Clock, reader: ChainReader, escrow: str, *, patience_s: int = 60
) -> bool:
    """Halt the chain if its books differ from it (S1) and go on differing; True if they meet.

    A log that says more than arrived (A7) is found here.  Raises RpcUnavailable, LookupError.
    """
    unequal = [r for r in await check_chain(engine, reader, escrow, patience_s=patience_s) if not r.is_equal]
    for result in unequal:
        reason = (
            f"{result.account} at {result.height}: {result.onchain_micro} micro on chain, "
            f"{result.books_micro} in the books"
        )
        async with transaction(engine) as conn:
            await halt_and_ask(conn, reader.chain, actor="reconciler", reason=reason, now=clock.now())
    return not unequal


async def _audit_hourly(
    engine: AsyncEngine, clock: Clock, watcher: Watcher, escrow: str, stop: asyncio.Event
) -> None:
    while not stop.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), AUDIT_EVERY_S)
            return
        try:
            await audit(engine, clock, watcher.reader, escrow)
        except (ChainError, LookupError, SQLAlchemyError, OSError) as e:
            _log.warning("the books could not be compared", chain=watcher.rules.chain.value, reason=str(e))


async def halt(engine: AsyncEngine, clock: Clock, chain: Chain, *, actor: str, reason: str) -> None:
    """Stop credits on a chain."""
    async with transaction(engine) as conn:
        await cursor.halt_chain(conn, chain, actor=actor, reason=reason, now=clock.now())


async def resume(engine: AsyncEngine, clock: Clock, chain: Chain, *, actor: str, reason: str) -> None:
    """Let a halted chain go on; raises NotHalted."""
    async with transaction(engine) as conn:
        await cursor.resume_chain(conn, chain, actor=actor, reason=reason, now=clock.now())


async def acknowledge_alarm(
    engine: AsyncEngine, clock: Clock, chain: Chain, alarm: str, *, actor: str, reason: str
) -> None:
    """Accept what halted a chain (the halt's reason names the alarm) and let it go on, in one transaction.

    Raises NotHalted, and then nothing was acknowledged.
    """
    async with transaction(engine) as conn:
        await acknowledge(conn, chain, alarm, actor=actor, reason=reason, now=clock.now())
        await cursor.resume_chain(conn, chain, actor=actor, reason=f"{alarm}: {reason}", now=clock.now())


async def accept_history(
    engine: AsyncEngine,
    clock: Clock,
    chains: ChainsConfig,
    chain: Chain,
    *,
    from_height: int,
    deposit_micro_min: int,
    actor: str,
    reason: str,
) -> recovery.Accepted:
    """Let the books follow a chain whose final blocks changed; see `recovery.accept_history`."""
    async with open_reader(chain, chains) as reader:
        await reader.check_identity()
        return await recovery.accept_history(
            engine,
            clock,
            reader,
            Rules(chain, escrow_of(chain, chains), deposit_micro_min),
            from_height=from_height,
            actor=actor,
            reason=reason,
        )


def _rpc_urls(chain: Chain, chains: ChainsConfig) -> tuple[str, ...]:
    return {
        Chain.ETHEREUM: chains.ethereum.rpc,
        Chain.BASE: chains.base.rpc,
        Chain.SOLANA: chains.solana.rpc,
    }[chain]


async def _open_provider(stack: AsyncExitStack, chain: Chain, chains: ChainsConfig, url: str) -> ChainReader:
    if chain is Chain.SOLANA:
        if chains.solana.usdc_mint != SOLANA.usdc_mint:
            raise SetupFault(f"solana: USDC is {SOLANA.usdc_mint}, not {chains.solana.usdc_mint}")
        genesis_hash = None if is_on_this_machine(url) else SOLANA.genesis_hash
        return SolanaReader(await stack.enter_async_context(SolanaRpc(url)), genesis_hash=genesis_hash)
    config: EvmChainConfig = chains.ethereum if chain is Chain.ETHEREUM else chains.base
    network = EVM_NETWORKS[chain]
    if (config.chain_id, config.usdc) != (network.chain_id, network.usdc):
        raise SetupFault(f"{chain}: chain id and USDC must be {network.chain_id} and {network.usdc}")
    pinned = () if is_on_this_machine(url) else ((0, network.genesis_hash),)
    return EvmReader(network, await stack.enter_async_context(JsonRpc(url)), pinned_blocks=pinned)


def is_on_this_machine(url: str) -> bool:
    """Tell whether a provider is reached over loopback; no other may serve a development chain (A13)."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
