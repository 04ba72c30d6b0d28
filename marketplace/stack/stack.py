"""One machine's whole Tollway: servers, chains, processes and a demo operator's node.

The stack's process owns every other one.  Each child dies with it (`platform.processes`), so Ctrl-C,
`tollway down`, a crash and SIGKILL all leave nothing behind; data lies in the folder, and the next start
goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import aiohttp
import asyncpg
from pydantic import SecretStr
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import ChainError
from chain.localnet.artifacts import anvil_binary
from chain.localnet.settings import LocalnetError
from chain.networks import Chain
from chain.units import parse_usdc
from marketplace.accounts.errors import PersonUnknown
from marketplace.accounts.people import create_key, create_person, find_person
from marketplace.catalog.aliases import list_aliases, set_alias
from marketplace.catalog.models import CatalogError, Tier, add_model, read_model_folder
from marketplace.platform import database
from marketplace.platform.embedded_nats import EmbeddedNats, NatsCredentials, load_or_make_credentials
from marketplace.platform.embedded_postgres import EmbeddedPostgres
from marketplace.platform.errors import PortInUse, ServerFault, SetupFault
from marketplace.platform.processes import (
    free_port,
    require_free_port,
    require_linux,
    start_child,
    stop_child,
    tail,
)
from marketplace.platform.settings import load_chains, settings_environment
from marketplace.stack.development_chains import ChainPorts, DevelopmentChains, DevelopmentWallet, seed_in
from marketplace.stack.folder import StackFolder, write_private

ROOT: Final = Path(__file__).resolve().parents[2]
ENGINE: Final = Path(os.environ.get("TOLLWAY_ENGINE_DIR") or ROOT / ".engine").absolute()
READY_PATIENCE_S: Final = 60
NODE_PATIENCE_S: Final = 420
"""A cold start of vLLM on two busy cores takes up to two minutes."""
PORT_PATIENCE_S: Final = 3
"""How long a port may still be held by another folder's stack that is just ending."""
RESTART_PAUSE_S: Final = 1
RESTART_PAUSE_S_MAX: Final = 30
STEADY_S: Final = 60
"""After running this long, the next end of a process counts as its first."""
DEMO_BUYER_USDC: Final = "100"
ROLES: Final = ("buyer", "operator", "admin")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A model of the CPU engine, as the demo operator offers it."""

    name: str
    folder: str
    tier: Tier
    context: int
    price_in: str
    """Dollars per million prompt tokens."""
    price_out: str
    alias: str = ""
    """What else buyers may call it; empty where its name is short already."""


SMOLLM2: Final = DemoModel(
    "smollm2-135m-instruct", "SmolLM2-135M-Instruct", Tier.SMALL, 2048, "0.08", "0.12", alias="smollm2"
)
TINY: Final = DemoModel("tiny", "tiny", Tier.SMALL, 2048, "0.08", "0.12")
MODELS: Final = {"smollm2": SMOLLM2, "tiny": TINY}


@dataclass(frozen=True, slots=True)
class Ports:
    """Loopback ports; 0 chooses a free one."""

    api: int = 8700
    nats: int = 8701
    ethereum: int = 8702
    base: int = 8703
    solana: int = 8704

    @classmethod
    def any(cls) -> Ports:
        return cls(0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class People:
    """The stack's own people and their API keys."""

    buyer: UUID
    operator: UUID
    admin: UUID
    keys: dict[str, str]
    """By role: buyer, operator, admin."""

    @classmethod
    def read(cls, path: Path) -> People:
        """Read what `_seed` wrote; SetupFault if it is damaged."""
        try:
            stored = json.loads(path.read_text())
            keys = {role: str(stored["keys"][role]) for role in ROLES}
            buyer, operator, admin = (UUID(stored[role]) for role in ROLES)
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise SetupFault(
                f"{path} is damaged ({type(e).__name__}: {e}); restore it from a copy, or use another "
                "--data-dir"
            ) from e
        return cls(buyer, operator, admin, keys)


@dataclass(slots=True)
class _Child:
    """One supervised process."""

    name: str
    argv: list[str]
    environment: dict[str, str]
    patience_s: int
    process: subprocess.Popen[bytes] | None = None
    pause_s: float = RESTART_PAUSE_S
    restart_at: float = 0.0
    started_at: float = 0.0


@dataclass(slots=True)
class Stack:
    """Starts, watches and stops everything in one folder."""

    folder: StackFolder
    ports: Ports
    model: DemoModel
    say: Say
    prices: tuple[str, str] | None = None
    """(input, output) dollars per million tokens of the demo operator, instead of the model's own."""
    has_node: bool = True
    is_fresh: bool = False
    """Begin with an empty book, whatever lies in the folder or on a given server."""
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    people: People | None = None
    chains: DevelopmentChains | None = None
    api: str = ""
    _postgres: EmbeddedPostgres | None = None
    _nats: EmbeddedNats | None = None
    _nats_url: str = ""
    _nats_credentials: NatsCredentials | None = None
    _database_url: str = ""
    _children: list[_Child] = field(default_factory=list)

    # ---- start

    async def start(self) -> None:
        """Bring everything up, in order; SetupFault or ServerFault says what failed, nothing stays behind."""
        try:
            await self._check_machine()
            await self._step("database and messaging", self._start_servers)
            await self._step("development chains", self._start_chains)
            await self._step("people, model and keys", self._seed)
            await self._step("gateway, watchers, settler and worker", self._start_processes)
            if self.has_node:
                await self._step("operator's node (its engine is loading)", self._start_node)
        except BaseException:
            await self.stop()
            raise

    async def _step(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        began = time.monotonic()
        self.say(f"{what} …")
        await work()
        self.seconds[what] = round(time.monotonic() - began, 1)

    async def _check_machine(self) -> None:
        """Refuse at once, in a sentence, what would fail half way."""
        require_linux("the development stack")
        try:
            anvil_binary()
        except LocalnetError as e:
            raise SetupFault(f"{e} (`make setup` does it)") from e
        if self.has_node:
            for part in (ENGINE / "venv" / "bin" / "python", ENGINE / "models" / self.model.folder):
                if not part.exists():
                    raise SetupFault(f"{part} is missing; `make setup` builds it")
        wanted = [
            (self.ports.api, "the API"),
            (self.ports.ethereum, "the Ethereum node"),
            (self.ports.base, "the Base node"),
            (self.ports.solana, "the Solana node"),
        ]
        if not os.environ.get("TOLLWAY_NATS_URL"):
            wanted.append((self.ports.nats, "NATS"))
        for port, what in wanted:
            await _wait_until_free(port, what)

    async def _start_servers(self) -> None:
        given = os.environ.get("TOLLWAY_DATABASE_URL")
        if given:
            self._database_url = _given_database(given, is_fresh=self.is_fresh)
        else:
            self._postgres = EmbeddedPostgres(self.folder.root / "postgres")
            if self.is_fresh:
                self._postgres.forget()
            self._postgres.start()
            self._database_url = self._postgres.url()
        await self._open_book()
        self._nats_url = os.environ.get("TOLLWAY_NATS_URL", "")
        if self._nats_url:
            self._nats_credentials = _given_nats_credentials()
        else:
            self._nats_credentials = load_or_make_credentials(self.folder.secrets / "nats")
            port = self.ports.nats or free_port()
            self._nats = EmbeddedNats(self.folder.root / "nats", port, self._nats_credentials)
            self._nats.start()
            self._nats_url = self._nats.url

    async def _open_book(self) -> None:
        """Create and migrate the database; SetupFault if it cannot be reached or refuses."""
        try:
            await database.create_database(self._database_url)
            await asyncio.to_thread(database.migrate, self._database_url)
        except (OSError, SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError) as e:
            where = make_url(self._database_url).render_as_string(hide_password=True)
            reason = str(e).partition("\n")[0] or type(e).__name__
            raise SetupFault(f"the database {where} cannot be used: {reason}") from e

    async def _start_chains(self) -> None:
        ports = ChainPorts(self.ports.ethereum, self.ports.base, self.ports.solana)
        self.chains = DevelopmentChains(self.folder, ports)
        await self.chains.start()

    async def _seed(self) -> None:
        """Make the stack's people once, and put the model on offer."""
        engine = database.connect(self._database_url, pool_size=2)
        store = self.folder.secrets / "people.json"
        try:
            if not store.exists():
                await self._make_people(engine, store)
            self.people = People.read(store)
            async with engine.connect() as connection:
                await find_person(connection, self.people.buyer)
            await self._offer_model(engine)
        except PersonUnknown as e:
            raise SetupFault(
                f"{self.folder.root} belongs to another book than the one that was opened; give that one's "
                "TOLLWAY_DATABASE_URL (none if it was the folder's own), or another --data-dir"
            ) from e
        finally:
            await engine.dispose()

    async def _make_people(self, engine: AsyncEngine, store: Path) -> None:
        secret = SecretStr(self.folder.secret("hmac"))
        made: dict[str, Any] = {"keys": {}}
        async with database.transaction(engine) as connection:
            for role in ROLES:
                person = await create_person(
                    connection,
                    display_name=f"demo {role}",
                    is_operator=role == "operator",
                    is_admin=role == "admin",
                )
                scopes = {"account", "inference"} | ({"admin"} if role == "admin" else set())
                made[role] = str(person)
                made["keys"][role] = await create_key(connection, secret, person, "demo", scopes)
        write_private(store, json.dumps(made))

    async def _offer_model(self, engine: AsyncEngine) -> None:
        model_folder = ENGINE / "models" / self.model.folder
        if not model_folder.exists():  # only without a node, whose start needs it
            return
        files, _ = read_model_folder(model_folder)
        async with database.transaction(engine) as connection:
            await add_model(
                connection,
                name=self.model.name,
                tier=self.model.tier,
                context=self.model.context,
                files=files,
            )
            alias = self.model.alias
            if alias and alias not in await list_aliases(connection):  # what somebody set since, stays
                with contextlib.suppress(CatalogError):  # somebody gave a model this name
                    await set_alias(connection, alias, [self.model.name])

    async def _start_processes(self) -> None:
        assert self._nats_credentials is not None
        port = self.ports.api or free_port()
        self.api = f"http://127.0.0.1:{port}"
        self.environment = {
            "environment": "development",
            "data_dir": str(self.folder.root),
            "database_url": self._database_url,
            "nats_url": self._nats_url,
            "nats_password": self._nats_credentials.password,
            "nats_issuer_seed": self._nats_credentials.issuer_seed,
            "secret": self.folder.secret("hmac"),
            "chains_file": str(self.folder.chains_file),
            "settler_dir": str(self.folder.settler),
            "api_port": str(port),
            "public_url": self.api,
            # Development settings, visible as such: nobody wants to wait a day for a demo.
            "reserve_s": "0",
            "cooling_s": "0",
            "step_up_s": "0",  # the demo's people have keys alone
        }
        write_private(self.folder.environment_file, json.dumps(self.environment, indent=2))
        python = [sys.executable, "-m", "marketplace"]
        for name, patience_s in (("serve", 40), ("watch", 20), ("settle", 20), ("work", 20)):
            child = _Child(name, [*python, name], settings_environment(self.environment), patience_s)
            self._children.append(child)
            self._spawn(child)
        await self._wait_until_ready()

    async def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_PATIENCE_S
        async with aiohttp.ClientSession() as http:
            while time.monotonic() < deadline:
                self._raise_if_dead("serve")
                try:
                    async with http.get(f"{self.api}/readyz") as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)
        raise ServerFault(f"the gateway is not ready after {READY_PATIENCE_S} s:\n{self._log_of('serve')}")

    def _raise_if_dead(self, name: str) -> None:
        for child in self._children:
            if child.name == name and child.process is not None and child.process.poll() is not None:
                raise ServerFault(f"`{name}` ended:\n{self._log_of(name)}")

    def _log_of(self, name: str) -> str:
        return tail(self.folder.logs / f"{name}.log")

    def _spawn(self, child: _Child) -> None:
        log = self.folder.logs / f"{child.name}.log"
        child.started_at = time.monotonic()
        child.process = start_child(child.argv, log=log, env=child.environment, cwd=ROOT)

    # ---- the operator's node

    async def _start_node(self) -> None:
        """Enrol the demo operator's machine, once; offer the model at his own price; run his agent."""
        assert self.people is not None
        home = self.folder.node
        agent = [str(Path(sys.executable).parent / "tollway-node")]
        environment = {**os.environ, "TOLLWAY_NODE_DIR": str(home)}
        if not (home / "config.toml").exists():
            token = await self._enrolment_token()
            await _run([*agent, "enroll", token, "--api", self.api, "--name", "demo"], environment)
        price_in, price_out = self.prices or (self.model.price_in, self.model.price_out)
        shown = await _run([*agent, "models", "show", "--json"], environment)
        if self.model.name not in shown:
            engine_python = ENGINE / "venv" / "bin" / "python"
            await _run(
                [
                    *agent, "models", "add", self.model.name, "--input", price_in, "--output", price_out,
                    "--per", "1m", "--recipe", "vllm-cpu", "--python", str(engine_python),
                    "--model-path", str(ENGINE / "models" / self.model.folder),
                    "--context", str(self.model.context), "--capacity", "8",
                ],
                environment,
            )  # fmt: skip
        else:
            await _run(
                [*agent, "prices", "set", self.model.name, "--input", price_in, "--output", price_out],
                environment,
            )
        # The enrolled address may be an earlier start's port.
        argv = [*agent, "run", "--nats-url", self._nats_url]
        child = _Child("node", argv, environment, patience_s=60)
        self._children.append(child)
        self._spawn(child)

    async def _enrolment_token(self) -> str:
        assert self.people is not None
        headers = {"Authorization": f"Bearer {self.people.keys['operator']}"}
        async with (
            aiohttp.ClientSession(headers=headers) as http,
            http.post(f"{self.api}/api/nodes/enrolment-tokens", json={}) as answer,
        ):
            if answer.status >= 300:
                raise ServerFault(f"no enrolment token: {await answer.text()}")
            return str((await answer.json())["token"])

    async def wait_for_node(self) -> None:
        """Return once the gateway would send a request for the model to the node."""
        began = time.monotonic()
        said = began
        async with aiohttp.ClientSession() as http:
            while time.monotonic() - began < NODE_PATIENCE_S:
                self._raise_if_dead("serve")
                self._raise_if_dead("node")
                if await self._is_offered(http):
                    self.seconds["engine ready"] = round(time.monotonic() - began, 1)
                    return
                if time.monotonic() - said > 15:
                    said = time.monotonic()
                    self.say(f"the engine is loading, {said - began:.0f} s …")
                await asyncio.sleep(0.3)
        raise ServerFault(f"the node is not ready after {NODE_PATIENCE_S} s:\n{self._log_of('node')}")

    async def _is_offered(self, http: aiohttp.ClientSession) -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            async with http.get(f"{self.api}/v1/models/{self.model.name}") as answer:
                return answer.status == 200 and any(
                    offer["is_healthy"] for offer in (await answer.json())["offers"]
                )
        return False

    # ---- facts

    @property
    def rpc(self) -> dict[Chain, str]:
        assert self.chains is not None
        return self.chains.rpc

    @property
    def database_url(self) -> str:
        return self._database_url

    def facts(self) -> dict[str, Any]:
        """What `stack.json` says."""
        assert self.people is not None
        chains = load_chains(self.folder.chains_file)
        return {
            "api": self.api,
            "keys": self.people.keys,
            "model": self.model.name,
            "rpc": {chain.value: url for chain, url in self.rpc.items()},
            "usdc": {
                "ethereum": chains.ethereum.usdc,
                "base": chains.base.usdc,
                "solana": chains.solana.usdc_mint,
            },
            "escrow": {
                "ethereum": chains.ethereum.escrow,
                "base": chains.base.escrow,
                "solana": chains.solana.escrow,
            },
            "nats": self._nats_url,
            "database": self._database_url,
        }

    async def fund_demo_buyer(self) -> None:
        """Deposit for the demo buyer through the real path, once, and wait until it is spendable."""
        assert self.people is not None
        headers = {"Authorization": f"Bearer {self.people.keys['buyer']}"}
        try:
            async with aiohttp.ClientSession(self.api, headers=headers) as http:
                if (await _answer(http, "/api/deposits"))["data"]:
                    return
                addresses = (await _answer(http, "/api/deposit-addresses"))["data"]
                await self._pay_demo_deposit(
                    next(entry["address"] for entry in addresses if entry["chain"] == "base")
                )
                deadline = time.monotonic() + READY_PATIENCE_S
                while time.monotonic() < deadline:
                    if (await _answer(http, "/api/balance"))["available_nano"] > 0:
                        return
                    await asyncio.sleep(0.3)
        except aiohttp.ClientError as e:
            raise ServerFault(f"the gateway does not answer: {e}\n{self._log_of('serve')}") from e
        raise ServerFault(f"the demo buyer's deposit was not credited:\n{self._log_of('watch')}")

    async def _pay_demo_deposit(self, to: str) -> None:
        wallet = DevelopmentWallet(self.rpc, seed=seed_in(self.folder.secrets / "demo-wallet.seed"))
        amount = parse_usdc(DEMO_BUYER_USDC)
        try:
            await wallet.fund(Chain.BASE, amount)
            await wallet.pay(Chain.BASE, to, amount)
        except (ChainError, LocalnetError) as e:
            raise ServerFault(f"the demo buyer cannot pay on Base: {e}") from e

    # ---- life and end

    async def watch(self) -> None:
        """Restart processes that end, until cancelled; raises when a server, a chain or the disk is gone."""
        while True:
            self.folder.require_room()
            for server, name in ((self._postgres, "PostgreSQL"), (self._nats, "NATS")):
                if server is not None and not server.is_alive():
                    raise ServerFault(f"{name} ended; see {self.folder.root}")
            if self.chains is not None and not self.chains.are_running:
                raise ServerFault(f"a development chain ended; see {self.folder.chains}")
            for child in self._children:
                self._restart_if_dead(child)
            await asyncio.sleep(0.5)

    def _restart_if_dead(self, child: _Child) -> None:
        now = time.monotonic()
        if child.process is None or child.process.poll() is None:
            return
        if not child.restart_at:
            if now - child.started_at > STEADY_S:
                child.pause_s = RESTART_PAUSE_S
            self.say(f"`{child.name}` ended (exit code {child.process.returncode}); starting it again")
            child.restart_at = now + child.pause_s
            child.pause_s = min(child.pause_s * 2, RESTART_PAUSE_S_MAX)
        elif now >= child.restart_at:
            child.restart_at = 0.0
            self._spawn(child)

    async def stop(self) -> None:
        """End everything in reverse order; safe to repeat."""
        self.folder.mark_ending()
        children, self._children = list(reversed(self._children)), []
        for child in children:
            if child.process is not None and child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        for child in children:
            if child.process is not None:
                await asyncio.to_thread(
                    stop_child, child.process, stop_signal=signal.SIGTERM, patience_s=child.patience_s
                )
        if self.chains is not None:
            await self.chains.stop()
        for server in (self._nats, self._postgres):
            if server is not None:
                await asyncio.to_thread(server.stop)
        self._nats, self._postgres, self.chains = None, None, None


def cancel_on_signals() -> asyncio.Event:
    """Let the first SIGTERM, SIGINT or SIGHUP cancel the current task; gives the event it sets.

    Later ones are ignored: ending in order takes a moment.
    """
    task, interrupted = asyncio.current_task(), asyncio.Event()
    assert task is not None

    def interrupt() -> None:
        if not interrupted.is_set():
            interrupted.set()
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    return interrupted


def _given_database(given: str, *, is_fresh: bool) -> str:
    """Give the SQLAlchemy URL of TOLLWAY_DATABASE_URL, or of a new database beside it."""
    try:
        url = make_url(database.with_driver(given))
    except ValueError as e:
        raise SetupFault(f"TOLLWAY_DATABASE_URL: {e}") from e
    if is_fresh:
        url = url.set(database=f"tollway_demo_{secrets.token_hex(4)}")
    return url.render_as_string(hide_password=False)


def _given_nats_credentials() -> NatsCredentials:
    """Who we are on the server of TOLLWAY_NATS_URL, whose configuration names the same."""
    password = os.environ.get("TOLLWAY_NATS_PASSWORD", "")
    seed = os.environ.get("TOLLWAY_NATS_ISSUER_SEED", "")
    if not (password and seed):
        raise SetupFault(
            "TOLLWAY_NATS_URL needs TOLLWAY_NATS_PASSWORD (of its users `auth` and `marketplace`) and "
            "TOLLWAY_NATS_ISSUER_SEED (account seed that signs its auth callout)"
        )
    return NatsCredentials(password, seed)


async def _answer(http: aiohttp.ClientSession, path: str) -> Any:
    """GET from our own gateway; ServerFault with its words unless it answers 200."""
    async with http.get(path) as answer:
        if answer.status != 200:
            raise ServerFault(f"GET {path} answered {answer.status}: {await answer.text()}")
        return await answer.json()


async def _wait_until_free(port: int, what: str) -> None:
    """Return once the port can be bound; PortInUse if it stays taken.  0 stands for any port."""
    deadline = time.monotonic() + PORT_PATIENCE_S
    while True:
        try:
            require_free_port(port, what)
        except PortInUse as e:
            if time.monotonic() >= deadline:
                raise PortInUse(
                    f"port {port} ({what}) is in use on 127.0.0.1; free it or choose others with --port-base"
                ) from e
            await asyncio.sleep(0.2)
        else:
            return


async def _run(argv: list[str], environment: dict[str, str]) -> str:
    """Run a short command; ServerFault with its words if it fails."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        env=environment,
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    if process.returncode:
        raise ServerFault(f"{' '.join(argv[1:3])} failed: {(err or out).decode(errors='replace').strip()}")
    return out.decode(errors="replace")
