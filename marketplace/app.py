"""The composition root of the gateway process: `tollway serve`.

Packages that do not know one another meet here: the key ring, the catalogue, the fabric, the ledger's
lease keeper and poster, and the routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    generate_latest,
    multiprocess,
)
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.accounts.authenticate import AccountAuthenticator
from marketplace.accounts.key_ring import KeyRing
from marketplace.accounts.routes import router as accounts_router
from marketplace.billing.routes import open_door
from marketplace.billing.routes import router as stripe_router
from marketplace.catalog.models import TokenizerFiles
from marketplace.catalog.prices import PriceBook
from marketplace.catalog.routes import router as catalog_router
from marketplace.catalog.shelf import Shelf
from marketplace.deposits.routes import router as deposits_router
from marketplace.fabric.requirement_routes import router as requirement_router
from marketplace.fabric.routes import router as fabric_router
from marketplace.gateway import metrics
from marketplace.gateway.chat import ChatService
from marketplace.gateway.hot_route import protocol_for
from marketplace.gateway.idempotency import Idempotency
from marketplace.gateway.ledger_accounts import RememberedAccounts
from marketplace.gateway.openapi import router as chat_router
from marketplace.gateway.quote import router as quote_router
from marketplace.gateway.receipts_routes import router as receipts_router
from marketplace.gateway.receipts_writer import ReceiptWriter
from marketplace.gateway.routes import router as gateway_router
from marketplace.gateway.server import Server
from marketplace.gateway.statement_routes import router as statement_router
from marketplace.gateway.statistics_routes import router as statistics_router
from marketplace.gateway.usage_routes import router as usage_router
from marketplace.gateway.workers import METRICS_FOLDER
from marketplace.ledger.lease_keeper import LeaseKeeper
from marketplace.ledger.money import Nano
from marketplace.ledger.overdrafts import Overdraft
from marketplace.ledger.poster import Poster
from marketplace.metering.counting import TokenCounter
from marketplace.notices.routes import router as notices_router
from marketplace.platform import database
from marketplace.platform.allotments import Allotments
from marketplace.platform.clock import SystemClock
from marketplace.platform.garbage import give_back
from marketplace.platform.http import Services, install_error_handlers
from marketplace.platform.huge_pages import keep_collapsed
from marketplace.platform.ids import uuid7
from marketplace.platform.limits import (
    DEFAULT_LIMITS,
    DEVELOPMENT_LIMITS,
    RateLimitMiddleware,
    RateLimits,
    SharedLimits,
)
from marketplace.platform.settings import Settings, load_chains
from marketplace.reputation.routes import router as reputation_router
from marketplace.reputation.service import ReputationService
from marketplace.routing.replay import DecisionLog
from marketplace.routing.service import FabricService
from marketplace.settlement.kyc import record as record_identity_check
from marketplace.settlement.routes import router as settlement_router
from node_agent.protocol import STATUS_EVERY_MS

DRAIN_S = 30
"""How long a stopping gateway lets its streams finish."""
HEAR_S = 1.25 * STATUS_EVERY_MS / 1000
"""How long a new worker listens to the nodes before it accepts: each speaks once in STATUS_EVERY_MS."""
VERSION = "0.1.0"
ROUTERS = (
    chat_router, quote_router, catalog_router, gateway_router, accounts_router,
    deposits_router, fabric_router, settlement_router,
    notices_router, requirement_router, stripe_router, reputation_router,
    receipts_router, usage_router, statistics_router, statement_router,
)  # fmt: skip
"""Every package's routes; the served OpenAPI is made of them."""

_log = structlog.get_logger()


def _counter_of(files: TokenizerFiles) -> TokenCounter:
    counter = TokenCounter(
        tokenizer=files.tokenizer, chat_template=files.chat_template, special_tokens=files.special_tokens
    )
    give_back()
    return counter


class Gateway:
    """One gateway process: its services, from `start` to `stop`, and the ASGI application."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.clock = SystemClock()
        self.engine: AsyncEngine = database.connect(settings.database_url.get_secret_value(), pool_size=20)
        # A pool of its own: a busy one must not make the keys stale.
        self.keys_engine = database.connect(settings.database_url.get_secret_value(), pool_size=2)
        replica_url = settings.database_replica_url.get_secret_value()
        self.replica = (
            database.connect(replica_url, connect_seconds_max=database.REPLICA_SECONDS_MAX)
            if replica_url
            else None
        )
        self.keys = KeyRing(self.keys_engine, settings.secret, self.clock)
        self.shelf: Shelf[TokenCounter] = Shelf(self.engine, _counter_of)
        self.fabric = FabricService(settings, self.engine, PriceBook(self.engine))
        self.reputation = ReputationService(settings, self.engine, self.clock, self.fabric)
        terms = Overdraft(Nano(settings.overdraft_nano), Nano(settings.overdraft_nano_total))
        self.keeper = LeaseKeeper(
            self.engine, worker=f"gateway-{uuid7()}", overdraft=terms if terms.limit.n else None
        )
        self.poster = Poster(self.engine, settle=self.keeper.settle)
        self.receipts = ReceiptWriter(self.engine)
        self.idempotency = Idempotency(self.engine, secret=settings.secret.get_secret_value().encode())
        rules = DEVELOPMENT_LIMITS if settings.is_development else DEFAULT_LIMITS
        self.allotments = Allotments(self.engine, self.clock.monotonic)
        self.limits = SharedLimits(RateLimits(self.clock.monotonic, rules), self.allotments, rules)
        self.decisions = (
            DecisionLog(settings.decision_log, every=settings.decision_log_every)
            if settings.decision_log is not None
            else None
        )
        self.chat = ChatService(
            keys=self.keys,
            limits=self.limits,
            allotments=self.allotments,
            shelf=self.shelf,
            registry=self.fabric.registry,
            nodes=self.fabric.nodes,
            keeper=self.keeper,
            poster=self.poster,
            receipts=self.receipts,
            idempotency=self.idempotency,
            accounts=RememberedAccounts(self.engine),
            clock=self.clock,
            secret=settings.secret.get_secret_value().encode(),
            trusted_proxies=settings.trusted_proxies,
            decisions=self.decisions,
        )
        self.app = self._make_app()

    def _make_app(self) -> FastAPI:
        app = FastAPI(
            title="Tollway",
            version=VERSION,
            summary="A marketplace for LLM inference that settles on chain",
            docs_url="/docs",
            redoc_url=None,
        )
        authenticator = AccountAuthenticator(self.engine, self.settings, self.clock, self.keys)
        app.state.services = Services(
            self.engine,
            self.settings,
            load_chains(self.settings.chains_file),
            self.clock,
            authenticator,
            self.replica,
        )
        app.state.shelf = self.shelf
        app.state.registry = self.fabric.registry
        app.state.live_nodes = self.fabric.registry
        app.state.chat = self.chat
        app.state.stripe = open_door(self.settings, record_identity_check)
        app.state.identity_provider = None if app.state.stripe is None else app.state.stripe.identity
        install_error_handlers(app)
        for router in ROUTERS:
            app.include_router(router)
        self._add_operations(app)
        app.add_middleware(
            RateLimitMiddleware,
            limits=self.limits,
            trusted_proxies=self.settings.trusted_proxies,
            person_of=authenticator.person_of,
        )
        return app

    def _add_operations(self, app: FastAPI) -> None:
        @app.get("/healthz", include_in_schema=False)
        async def healthy() -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/readyz", include_in_schema=False)
        async def ready() -> JSONResponse:
            reasons = await self.unready()
            return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

        @app.get("/metrics", include_in_schema=False)
        async def prometheus() -> PlainTextResponse:
            metrics.WAITING_CHARGES.set(self.poster.waiting)
            return PlainTextResponse(generate_latest(_metrics()), media_type=CONTENT_TYPE_LATEST)

    async def unready(self) -> list[str]:
        """Say what keeps this process from serving; empty when it can."""
        reasons = []
        if not self.keys.is_fresh:
            reasons.append("keys are stale")
        if not self.fabric.is_connected:
            reasons.append("no connection to NATS")
        if not self.poster.is_ready:
            reasons.append("no poster lane")
        try:
            async with asyncio.timeout(2), self.engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
        except Exception:
            reasons.append("the database does not answer")
        return reasons

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start every service in order; stop them in reverse."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.engine.dispose)
            stack.push_async_callback(self.keys_engine.dispose)
            if self.replica is not None:
                stack.push_async_callback(self.replica.dispose)
            await self.keys.start()
            stack.push_async_callback(self.keys.stop)
            await self.shelf.start()
            stack.push_async_callback(self.shelf.stop)
            if self.decisions is not None:
                stack.callback(self.decisions.close)
            await self.allotments.start()
            stack.push_async_callback(self.allotments.stop)
            await self.keeper.start()
            stack.push_async_callback(self.keeper.close)
            await self.poster.start()
            stack.push_async_callback(self.poster.close)
            await self.receipts.start()
            stack.push_async_callback(self.receipts.close)
            await self.idempotency.start()
            stack.push_async_callback(self.idempotency.stop)
            await self.fabric.start()
            stack.push_async_callback(self.fabric.stop)
            await self.reputation.start()
            stack.push_async_callback(self.reputation.stop)
            stack.push_async_callback(self.chat.close)
            yield


def _metrics() -> CollectorRegistry:
    """Give this process's metrics, or all workers' together where there are several."""
    if METRICS_FOLDER not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


async def serve(settings: Settings, *, listen_fd: int | None = None, ready_fd: int | None = None) -> None:
    """Run one gateway until SIGTERM or SIGINT; streams are given DRAIN_S to finish.

    A worker accepts on a socket its owner bound (`listen_fd`), and says on `ready_fd` when it does.
    """
    gateway_process = Gateway(settings)
    async with gateway_process.running():
        config = uvicorn.Config(
            gateway_process.app,
            host=settings.api_host,
            port=settings.api_port,
            http=protocol_for(gateway_process.chat.serve),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # ours decide whose X-Forwarded-For counts (A84)
            timeout_keep_alive=75,
            timeout_graceful_shutdown=DRAIN_S,
            backlog=2048,
        )
        server = Server(config, ready_fd)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: setattr(server, "should_exit", True))
        _log.info("gateway is serving", host=settings.api_host, port=settings.api_port)
        sockets = None
        if listen_fd is not None:
            # Others serve meanwhile; who accepts before the nodes have spoken answers 503.
            await asyncio.sleep(HEAR_S)
            sockets = [socket.socket(fileno=listen_fd)]
        collapsing = asyncio.create_task(keep_collapsed())
        try:
            await server.serve(sockets=sockets)
        finally:
            collapsing.cancel()
