"""The running agent: connected to the fabric, its engines cared for, requests answered, status told.

`Service.run` returns after `stop` was called and the running requests finished, or the drain time passed.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from node_agent import protocol
from node_agent.config import CONFIG_FILE, Config, ConfigError, EngineSettings, Model, load_config
from node_agent.engines import Engine, EngineState
from node_agent.engines.attach import AttachEngine
from node_agent.engines.spawn import SpawnEngine
from node_agent.fabric_link import CLOSE_SECONDS_MAX, connect_options
from node_agent.files import write_private
from node_agent.identity import Identity
from node_agent.journal import Journal
from node_agent.meter import Meter
from node_agent.receipts import ReceiptBook
from node_agent.relay import Relay

STATUS_FILE: Final = "status.json"
CANCEL_AGAIN_SECONDS: Final = 0.5
RECONNECT_SECONDS: Final = 1.0
DISCONNECT_SECONDS_MAX: Final = 5.0
SAME_COMPLAINT_SECONDS: Final = 30.0
PENDING_MESSAGES_MAX: Final = 4096
LOOK_EVERY_SECONDS: Final = 0.2  # at the engines' states
NOBODY_LISTENS: Final = "503"
"""The status with which NATS answers a message that nobody is subscribed to."""

_log = logging.getLogger(__name__)


class EngineView(msgspec.Struct, frozen=True):
    """An engine as `tollway-node status` shows it."""

    name: str
    state: str
    restarts: int
    last_error: str


class LocalStatus(msgspec.Struct, frozen=True):
    """What the running agent leaves in `status.json` for the operator's own eyes."""

    pid: int
    time_ms: int
    node_id: str
    version: str
    is_connected: bool
    is_draining: bool
    running: int
    served: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    engines: list[EngineView]
    models: list[protocol.ModelStatus]
    tokens_per_second: float = 0.0
    earned_today_nano: int = 0
    """By this node's own count, at its own prices, since 00:00 UTC; the marketplace's word counts."""


class _Voice:
    """Publishes one answer's frames, and with some of them asks NATS whether anybody listens."""

    def __init__(self, publish: Callable[[str, bytes, str], Awaitable[None]], to: str, unheard: str) -> None:
        self._publish = publish
        self._to = to
        self._unheard = unheard
        self._asked = time.monotonic()

    async def __call__(self, data: bytes) -> None:
        now = time.monotonic()
        is_due = now - self._asked >= protocol.LISTENERS_ASKED_MS / 1000
        if is_due:
            self._asked = now
        await self._publish(self._to, data, self._unheard if is_due else "")


class Service:
    """One agent."""

    def __init__(
        self,
        config: Config,
        identity: Identity,
        folder: Path,
        *,
        version: str,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.config = config
        self.node_id = protocol.parse_node_id(config.node_id)
        self._identity = identity
        self._folder = folder
        self._version = version
        self._now_ms = now_ms
        self._engines: dict[str, Engine] = {
            settings.name: _build_engine(settings, folder) for settings in config.engines
        }
        self._models: dict[str, tuple[Engine, Model]] = {
            model.name: (self._engines[settings.name], model) for settings, model in config.models()
        }
        self._relays: dict[str, Relay] = {}
        self._numbered: dict[str, Relay] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._journal = Journal(folder)
        self._receipts = ReceiptBook(folder, seed=identity.seed, node_id=self.node_id)
        self._nats = Client()
        self._stopping = asyncio.Event()
        self._wake_status = asyncio.Event()
        self._sequence = 0
        self._served = self._failed = self._prompt_tokens = self._completion_tokens = 0
        self._meter = Meter(now_ms())
        self._complaint: tuple[str, float] = ("", 0.0)
        self._config_seen_ns = _changed_ns(folder)

    # -- life -----------------------------------------------------------------------------

    def stop(self) -> None:
        """Take no more requests and return from `run` when the running ones are done; again: at once."""
        if self._stopping.is_set():
            for relay in list(self._relays.values()):
                relay.cancel()
        self._stopping.set()
        self._wake_status.set()

    async def run(self) -> None:
        """Work until `stop`; leaves no engine process and no connection behind."""
        status = asyncio.create_task(self._tell_status(), name="status")
        fabric = asyncio.create_task(self._stay_connected(), name="fabric")
        try:
            for engine in self._engines.values():
                await engine.start()
            await self._stopping.wait()
            await self._drain()
        finally:
            for task in (fabric, status):
                await end_task(task)
            await asyncio.gather(fabric, status, return_exceptions=True)
            await asyncio.gather(
                *(engine.stop() for engine in self._engines.values()), return_exceptions=True
            )
            await self._disconnect()
            self._journal.close()
            self._receipts.close()
            (self._folder / STATUS_FILE).unlink(missing_ok=True)

    async def _drain(self) -> None:
        _log.info("draining: %d requests still running", len(self._tasks))
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=self.config.drain_seconds)
        for relay in list(self._relays.values()):
            relay.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=5.0)

    async def _disconnect(self) -> None:
        """Send what is still to be sent and close, whatever state the connection is in."""
        is_connected = self._nats.is_connected
        for step in (self._nats.flush, self._nats.close) if is_connected else (self._nats.close,):
            # nats-py asserts that it was begun, which settings it cannot begin with prevent
            with contextlib.suppress(nats.errors.Error, OSError, TimeoutError, AssertionError):
                async with asyncio.timeout(DISCONNECT_SECONDS_MAX if is_connected else CLOSE_SECONDS_MAX):
                    await step()

    # -- the fabric -----------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        """Keep a connection; nats-py reconnects by itself until the server refuses us, then we begin anew."""
        while True:
            closed = asyncio.Event()
            try:
                await self._connect(closed)
                await closed.wait()
                self._complain("the connection was closed")
            except (nats.errors.Error, ConfigError, OSError, TimeoutError) as error:
                self._complain(str(error) or type(error).__name__)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _connect(self, closed: asyncio.Event) -> None:
        async def on_closed() -> None:
            closed.set()

        async def on_error(error: Exception) -> None:
            self._complain(str(error) or type(error).__name__)

        async def on_disconnected() -> None:
            self._give_up_answers()

        async def on_connected() -> None:
            _log.info("connected to %s", self.config.nats_url)
            self._wake_status.set()

        self._nats = Client()
        await self._nats.connect(
            **connect_options(self.config, self._identity),
            max_reconnect_attempts=-1,
            reconnect_time_wait=1,
            ping_interval=10,
            max_outstanding_pings=3,
            closed_cb=on_closed,
            disconnected_cb=on_disconnected,
            error_cb=on_error,
            reconnected_cb=on_connected,
        )
        limit = PENDING_MESSAGES_MAX
        await self._nats.subscribe(
            protocol.request_subject(self.node_id), cb=self._on_request, pending_msgs_limit=limit
        )
        await self._nats.subscribe(
            protocol.control_subject(self.node_id), cb=self._on_control, pending_msgs_limit=limit
        )
        await self._nats.subscribe(
            protocol.receipts_subject(self.node_id), cb=self._on_receipts, pending_msgs_limit=limit
        )
        await self._nats.subscribe(
            protocol.unheard_subject(self.node_id), cb=self._on_unheard, pending_msgs_limit=limit
        )
        await on_connected()

    def _give_up_answers(self) -> None:
        """Abort what was asked over a connection that is gone: NATS lets nobody answer it over the next."""
        if self._relays:
            _log.warning("the connection broke under %d requests; they are given up", len(self._relays))
        for relay in list(self._relays.values()):
            relay.cancel()

    def _complain(self, text: str) -> None:
        """Log a connection trouble, the same one not more than twice a minute."""
        text = " ".join(text.split()) or "unknown trouble"
        said, when = self._complaint
        if text != said or time.monotonic() - when > SAME_COMPLAINT_SECONDS:
            hint = " (is this node still enrolled?)" if "authorization" in text.lower() else ""
            _log.warning("fabric %s: %s%s", self.config.nats_url, text, hint)
            self._complaint = (text, time.monotonic())

    async def _publish(self, subject: str, data: bytes, reply: str = "") -> None:
        """Publish; raises `ConnectionError` when there is no connection: nothing is kept for the next one."""
        if not self._nats.is_connected:
            raise ConnectionError("not connected")
        try:
            await self._nats.publish(subject, data, reply)
        except nats.errors.Error as error:
            raise ConnectionError(str(error)) from error

    async def _on_receipts(self, message: Msg) -> None:
        """Check a page of receipts against the journal, keep it, and sign it."""
        try:
            page = protocol.decode_receipts(message.data)
            answer = await asyncio.to_thread(self._receipts.countersign, page)
        except (protocol.ProtocolError, OSError) as error:
            _log.warning("a page of receipts was not signed: %s", error)
            return
        with contextlib.suppress(ConnectionError):
            await self._publish(message.reply, protocol.encode(answer))

    # -- requests -------------------------------------------------------------------------

    async def _on_control(self, message: Msg) -> None:
        try:
            control = protocol.decode_control(message.data)
        except protocol.ProtocolError as error:
            _log.warning("a control message was dropped: %s", error)
            return
        relay = self._relays.get(control.id)
        if relay is None:
            return
        if isinstance(control, protocol.Cancel):
            relay.cancel()
        else:
            relay.grant(control.up_to)

    async def _on_unheard(self, message: Msg) -> None:
        """NATS says that nobody listens to an answer: its gateway is gone, so the engine may stop."""
        relay = self._numbered.get(message.subject.rpartition(".")[2])
        if relay is not None and (message.headers or {}).get("Status") == NOBODY_LISTENS:
            _log.info("request %s: nobody listens any more", relay.request.id)
            relay.cancel()

    async def _on_request(self, message: Msg) -> None:
        if not message.reply:
            return
        try:
            request = protocol.decode_request(message.data)
        except protocol.ProtocolError as error:
            _log.warning("a request was refused: %s", type(error).__name__)
            await self._refuse(
                message.reply, protocol.FailureCode.BAD_REQUEST, "not a request", is_retriable=False
            )
            return
        refusal = self._reason_to_refuse(request)
        if refusal is not None:
            self._failed += 1
            await self._refuse(message.reply, *refusal, is_retriable=True)
            return
        engine, model = self._models[request.model]
        number = str(next(self._numbers))
        voice = _Voice(self._publish, message.reply, protocol.unheard_subject(self.node_id, number))
        relay = Relay(request, voice, now_ms=self._now_ms)
        self._relays[request.id] = self._numbered[number] = relay
        task = asyncio.create_task(self._answer(relay, engine, model), name=f"request {request.id}")
        task.add_done_callback(lambda _: self._numbered.pop(number))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _reason_to_refuse(self, request: protocol.Request) -> tuple[protocol.FailureCode, str] | None:
        code = protocol.FailureCode
        if self._stopping.is_set():
            return code.DRAINING, "the node is stopping"
        if request.model not in self._models:
            return code.UNKNOWN_MODEL, "this node does not offer the model"
        engine, model = self._models[request.model]
        if engine.state is not EngineState.READY:
            return code.ENGINE_DOWN, f"the engine is {engine.state}"
        if self._running(model.name) >= model.capacity:
            return code.OVERLOADED, f"all {model.capacity} places are taken"
        if request.id in self._relays:
            return code.INTERNAL, "a request of this id is running"
        return None

    def _running(self, model: str) -> int:
        return sum(relay.request.model == model for relay in self._relays.values())

    async def _refuse(
        self, reply: str, code: protocol.FailureCode, message: str, *, is_retriable: bool
    ) -> None:
        with contextlib.suppress(ConnectionError):
            await self._publish(reply, protocol.encode(protocol.Failed(0, code, message, is_retriable)))

    async def _answer(self, relay: Relay, engine: Engine, model: Model) -> None:
        try:
            entry = await relay.run(engine.chat, model.name_in_engine)
        finally:
            del self._relays[relay.request.id]
        if entry.outcome == "ok":
            self._served += 1
        elif entry.outcome != protocol.FailureCode.CANCELLED:
            self._failed += 1
        self._prompt_tokens += entry.prompt_tokens or 0
        self._completion_tokens += entry.completion_tokens or 0
        self._meter.note(model, entry)
        self._journal.write(entry)
        self._receipts.remember(entry)

    # -- status ---------------------------------------------------------------------------

    async def _tell_status(self) -> None:
        before = self._states()
        while True:
            try:
                self._take_over_prices()
                before = self._states()
                models = list(await asyncio.gather(*(self._model_status(name) for name in self._models)))
                await self._publish_status(models)
                self._write_local_status(models)
            except OSError as error:
                self._complain(f"the status could not be sent: {error}")
            await self._wait_for_news(before)

    async def _wait_for_news(self, before: list[EngineState]) -> None:
        """Return when the next status is due, or soon after an engine changed its state."""
        until = time.monotonic() + protocol.STATUS_EVERY_MS / 1000
        while time.monotonic() < until and self._states() == before:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_SECONDS):  # wait_for may swallow a cancellation
                    await self._wake_status.wait()
                self._wake_status.clear()
                return

    def _take_over_prices(self) -> None:
        """Read prices again when the settings changed; everything else waits for the next start."""
        changed_ns = _changed_ns(self._folder)
        if changed_ns == self._config_seen_ns:
            return
        self._config_seen_ns = changed_ns
        try:
            fresh = {model.name: model for _, model in load_config(self._folder).models()}
        except ConfigError as error:
            _log.warning("the changed settings are not used: %s", error)
            return
        for name, (engine, model) in self._models.items():
            if name in fresh:
                prices = {"input": fresh[name].input, "output": fresh[name].output}
                self._models[name] = engine, msgspec.structs.replace(model, **prices)
        _log.info("prices read again")

    def _states(self) -> list[EngineState]:
        return [engine.state for engine in self._engines.values()]

    async def _model_status(self, name: str) -> protocol.ModelStatus:
        engine, model = self._models[name]
        is_ready = engine.state is EngineState.READY
        load = await engine.load(model.name_in_engine) if is_ready else None
        return protocol.ModelStatus(
            name=name,
            context=model.context,
            price_in=model.price_in,
            price_out=model.price_out,
            running=max(self._running(name), load.running if load else 0),
            waiting=load.waiting if load else 0,
            kv_used_permille=load.kv_used_permille if load else 0,
            capacity=model.capacity,
            tokenizer_sha256=model.tokenizer_sha256,
            is_ready=is_ready,
        )

    async def _publish_status(self, models: list[protocol.ModelStatus]) -> None:
        if not self._nats.is_connected:
            return
        status = protocol.Status(
            v=protocol.VERSION,
            node_id=self.node_id,
            seq=self._sequence,
            time_ms=self._now_ms(),
            version=self._version,
            is_draining=self._stopping.is_set(),
            models=models,
            served=self._served,
            failed=self._failed,
        )
        self._sequence += 1
        await self._publish(protocol.status_subject(self.node_id), protocol.encode(status))

    def _write_local_status(self, models: list[protocol.ModelStatus]) -> None:
        generated = self._completion_tokens + sum(relay.completion_tokens for relay in self._relays.values())
        status = LocalStatus(
            pid=os.getpid(),
            time_ms=self._now_ms(),
            node_id=self.node_id,
            version=self._version,
            is_connected=self._nats.is_connected,
            is_draining=self._stopping.is_set(),
            running=len(self._relays),
            served=self._served,
            failed=self._failed,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            engines=[
                EngineView(engine.name, str(engine.state), engine.restarts, engine.last_error)
                for engine in self._engines.values()
            ],
            models=models,
            tokens_per_second=self._meter.rate(generated, time.monotonic()),
            earned_today_nano=self._meter.earned_today_nano(self._now_ms()),
        )
        write_private(self._folder / STATUS_FILE, msgspec.json.encode(status))


def read_local_status(folder: Path) -> LocalStatus | None:
    """What a running agent last wrote in `folder`; None if there is none or it is not readable."""
    try:
        return msgspec.json.decode((folder / STATUS_FILE).read_bytes(), type=LocalStatus)
    except (OSError, *protocol.NOT_DECODED):
        return None


def _changed_ns(folder: Path) -> int:
    try:
        return (folder / CONFIG_FILE).stat().st_mtime_ns
    except OSError:
        return 0


def _build_engine(settings: EngineSettings, folder: Path) -> Engine:
    names = [model.name_in_engine for model in settings.models]
    if settings.kind == "attach":
        assert settings.url is not None
        return AttachEngine(settings.name, url=settings.url, api_key=settings.api_key, models=names)
    model = settings.models[0]
    values: dict[str, Any] = {
        "python": settings.python,
        "model_path": settings.model_path,
        "model_name": names[0],
        "context": str(model.context),
        "capacity": str(model.capacity),
        "context_of_all": str(model.context * model.capacity),
    }
    return SpawnEngine(
        settings.name,
        argv=settings.argv,
        values=values,
        environment=settings.environment,
        models=names,
        folder=folder / "engines",
        start_seconds_max=float(settings.start_seconds_max),
    )


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel a task until it has ended.

    Once is not enough: Python 3.11's `asyncio.wait_for`, which nats-py connects with, loses a cancellation
    that comes just as it is done, and the task would try to connect for ever.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_AGAIN_SECONDS)
