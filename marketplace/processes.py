"""The processes beside the gateway, composed: `tollway watch`, `tollway settle` and `tollway work`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import ChainError
from chain.evm.gas import GasPayer
from chain.evm.rpc import JsonRpc
from chain.evm.sweeps import Sweeper
from chain.networks import EVM_NETWORKS, Chain
from chain.solana.rpc import SolanaRpc
from marketplace.deposits import addresses, pool, service
from marketplace.deposits.early import EarlyCredit
from marketplace.deposits.solana_sweeps import solana_sweeper
from marketplace.deposits.sweeper import EvmSweeper, SweepPolicy
from marketplace.gateway.receipts_work import keep_receipts
from marketplace.ledger.partitions import ensure_partitions
from marketplace.ledger.rollups import roll_up
from marketplace.notices.calling import Caller
from marketplace.notices.delivery import Courier
from marketplace.notices.mail import FolderMailer, Mailer, SmtpMailer
from marketplace.platform import database
from marketplace.platform.clock import Clock, SystemClock
from marketplace.platform.errors import SetupFault
from marketplace.platform.operations import answering_operations
from marketplace.platform.settings import ChainsConfig, Settings, load_chains
from marketplace.settlement.service import Schedule, settle

EVM_SWEEP_KEY: Final = "gas-evm-sweeps.key"
"""Not the payouts' gas key: two processes on one account would take each other's nonces."""
SOLANA_GAS_KEY: Final = "gas-solana.key"
SOLANA_POOL_SEED: Final = "solana-pool.seed"
KEEPING_S: Final = 1.0
DAY_S: Final = 86_400
ROLL_UP_S: Final = 60

_log = structlog.get_logger()


def stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


@asynccontextmanager
async def _book(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """The book, with the operator's questions answered while it is open."""
    engine = database.connect(settings.database_url.get_secret_value())
    try:
        async with answering_operations(engine, host=settings.api_host, port=settings.metrics_port):
            yield engine
    finally:
        await engine.dispose()


async def run_watchers(
    settings: Settings,
    which: Sequence[Chain],
    *,
    start_height: int | None = None,
    early: EarlyCredit | None = None,
) -> None:
    """Watch chains until SIGTERM: credit what is final."""
    stop = stop_on_signals()
    async with _book(settings) as engine:
        await service.watch(
            engine,
            SystemClock(),
            load_chains(settings.chains_file),
            which,
            stop,
            deposit_micro_min=settings.deposit_micro_min,
            start_height=start_height,
            early=early,
        )


async def run_settler(settings: Settings, which: Sequence[Chain]) -> None:
    """Settle until SIGTERM: payouts, sweeps, the Solana address pool, the ledger's partitions."""
    stop, clock = stop_on_signals(), SystemClock()
    chains = load_chains(settings.chains_file)
    async with _book(settings) as engine, AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        group.create_task(
            settle(
                engine,
                chains,
                clock,
                stop,
                settler_dir=settings.settler_dir,
                which=which,
                schedule=Schedule(plan_every_s=settings.plan_every_s),
            )
        )
        for chain in which:
            keep = (
                await _sweeps(stack, engine, clock, chains, chain, settings.settler_dir)
                if chain.is_evm
                else await _pool(stack, engine, clock, chains, settings.settler_dir)
            )
            group.create_task(_repeat(keep, stop, what=f"deposit addresses of {chain}"))
        group.create_task(_keep_partitions(engine, stop))
        group.create_task(_keep_rollups(engine, stop))


async def run_worker(settings: Settings) -> None:
    """Work in the background until SIGTERM: deliver notices, sign receipts, add up and forget."""
    stop, clock = stop_on_signals(), SystemClock()
    async with (
        _book(settings) as engine,
        Caller(is_loopback_allowed=settings.is_development) as caller,
        asyncio.TaskGroup() as group,
    ):
        courier = Courier(
            engine,
            clock,
            mailer=_mailer(settings),
            caller=caller,
            secret=settings.secret.get_secret_value().encode(),
        )
        group.create_task(_repeat(courier.tick, stop, what="notices"))
        group.create_task(keep_receipts(settings, engine, stop))


def _mailer(settings: Settings) -> Mailer:
    url = settings.smtp_url.get_secret_value()
    if url:
        return SmtpMailer(url, settings.mail_from)
    if settings.is_development:
        return FolderMailer(settings.data_dir / "mail", settings.mail_from)
    raise SetupFault("TOLLWAY_SMTP_URL is not set: notices could not be mailed")


async def _sweeps(
    stack: AsyncExitStack,
    engine: AsyncEngine,
    clock: Clock,
    chains: ChainsConfig,
    chain: Chain,
    settler_dir: Path,
) -> Callable[[], Awaitable[object]]:
    config = chains.ethereum if chain is Chain.ETHEREUM else chains.base
    rpc = await stack.enter_async_context(JsonRpc(config.rpc[0]))
    payer = GasPayer(rpc, EVM_NETWORKS[chain].chain_id, _secret(settler_dir / EVM_SWEEP_KEY))
    rail = Sweeper(addresses.shared_forwarders(chains), rpc, payer)
    return EvmSweeper(chain, engine, rail, clock, SweepPolicy()).tick


async def _pool(
    stack: AsyncExitStack, engine: AsyncEngine, clock: Clock, chains: ChainsConfig, settler_dir: Path
) -> Callable[[], Awaitable[object]]:
    rpc = await stack.enter_async_context(SolanaRpc(chains.solana.rpc[0]))
    keeper = pool.pool_keeper(
        engine,
        clock,
        rpc,
        chains.solana,
        pool_seed=_secret(settler_dir / SOLANA_POOL_SEED),
        gas_seed=_secret(settler_dir / SOLANA_GAS_KEY),
    )
    sweeper = solana_sweeper(
        engine, clock, rpc, chains.solana, gas_seed=_secret(settler_dir / SOLANA_GAS_KEY)
    )

    async def both() -> bool:
        is_progress = await keeper.tick()
        return await sweeper.tick() or is_progress

    return both


async def _repeat(work: Callable[[], Awaitable[object]], stop: asyncio.Event, *, what: str) -> None:
    """Repeat `work` until stopped; what the chain or the database refuses now is tried again."""
    while not stop.is_set():
        try:
            while await work():
                if stop.is_set():
                    return
        except (ChainError, OSError) as e:
            _log.warning("trying again", what=what, reason=f"{type(e).__name__}: {e}")
        except Exception:
            _log.exception("trying again", what=what)
        await _wait(stop, KEEPING_S)


async def _keep_partitions(engine: AsyncEngine, stop: asyncio.Event) -> None:
    while not stop.is_set():
        try:
            async with database.transaction(engine) as connection:
                await ensure_partitions(connection)
        except Exception:
            _log.exception("partitions could not be made ahead")
        await _wait(stop, DAY_S)


async def _keep_rollups(engine: AsyncEngine, stop: asyncio.Event) -> None:
    """Add what was posted to the daily sums, every ROLL_UP_S seconds."""
    while not stop.is_set():
        try:
            async with database.transaction(engine) as connection:
                while await roll_up(connection):
                    continue
        except Exception:
            _log.exception("daily sums wait")
        await _wait(stop, ROLL_UP_S)


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


def _secret(path: Path) -> bytes:
    try:
        return bytes.fromhex(path.read_text().strip())
    except (FileNotFoundError, ValueError) as e:
        raise SetupFault(f"{path} does not hold a key: 64 hex digits, on the settler's machine only") from e
