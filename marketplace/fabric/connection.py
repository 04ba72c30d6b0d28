"""A connection to NATS, as small as the hot path needs.

Why not `nats-py`: it spends a queue, a task switch and an object on every message, and on a lost
connection it buffers what is published, where a marketplace must know at once and ask another node.
This one parses in the event loop's read callback, calls the subscriber directly, gathers the writes of
one loop turn into one, and reconnects forever.  Measured per received frame, both ends included: see README.

The law:

- `publish` either hands the bytes to a live connection or raises `FabricUnavailable`; it never buffers
  for later, never blocks.
- Subscriptions survive reconnections; messages in between are lost, as ever in core NATS.
- A callback runs in the read loop: it must be quick and it must not await.  What it raises is logged.

Protocol: https://docs.nats.io/reference/reference-protocols/nats-protocol (client protocol 1).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import random
import secrets
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast
from urllib.parse import urlsplit

from marketplace.fabric.errors import FabricError, FabricUnavailable

_log = logging.getLogger(__name__)

CONNECT_DEADLINE_S: Final = 5
PING_EVERY_S: Final = 15
RETRY_S_MIN: Final = 0.05
RETRY_S_MAX: Final = 2.0
CONTROL_LINE_BYTES_MAX: Final = 64 * 1024
"""Longest line a server may send us (its INFO lists a cluster's addresses)."""
MESSAGE_BYTES_MAX: Final = 8 * 1024 * 1024
WRITE_BUFFER_BYTES_MAX: Final = 16 * 1024 * 1024
"""Beyond this the connection is congested and `publish` refuses."""
PORT_DEFAULT: Final = 4222
BUSY_S: Final = 0.001
"""A connection read twice within so long is busy …"""
REST_S: Final = 0.002
"""… and is then read once in so long: the frames of many streams in one system call and one wake-up …"""
REST_BYTES_MAX: Final = 16 * 1024
"""… unless there was more than this to read: then the server must not be kept waiting."""

_NO_RESPONDERS: Final = b"NATS/1.0 503"
_CRLF: Final = b"\r\n"

MessageCallback = Callable[[bytes, bytes, bytes], None]
"""(subject, reply, payload)"""
AbsenceCallback = Callable[[bytes], None]
"""(subject): the server says nobody listens on what was published with this reply subject."""


class _Refused(FabricError):
    """The server does not want us (wrong password, unknown user)."""


@dataclass(slots=True)
class _Subscription:
    subject: str
    queue: str
    callback: MessageCallback
    on_absence: AbsenceCallback | None


class _Wire(asyncio.Protocol):
    """One TCP connection: bytes in, callbacks out."""

    __slots__ = (
        "_flush_scheduled",
        "_is_full",
        "_loop",
        "_out",
        "_read_at",
        "_rest",
        "_subscriptions",
        "closed",
        "info",
        "info_arrived",
        "pong_waiters",
        "refusal",
        "transport",
    )

    def __init__(self, subscriptions: dict[bytes, _Subscription]) -> None:
        self._subscriptions = subscriptions
        self._loop = asyncio.get_running_loop()
        self._rest = b""
        self._out: list[bytes] = []
        self._flush_scheduled = False
        self._is_full = False
        self._read_at = 0.0
        """When this was last read, or could be again (loop seconds)."""
        self.transport: asyncio.Transport | None = None
        self.info: dict[str, object] = {}
        self.info_arrived: asyncio.Future[None] = self._loop.create_future()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.pong_waiters: list[asyncio.Future[None]] = []
        self.refusal = ""

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none by inheritance, only by what they offer.
        self.use(cast("asyncio.Transport", transport))

    def use(self, transport: asyncio.Transport) -> None:
        """Write through `transport` from now on: the socket's, or the one that encrypts for it."""
        self.transport = transport
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES_MAX)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.transport = None
        for waiter in (self.info_arrived, self.closed, *self.pong_waiters):
            if not waiter.done():
                waiter.set_result(None)
        self.pong_waiters.clear()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False

    def data_received(self, data: bytes) -> None:
        buffer = self._rest + data if self._rest else data
        position = 0
        size = len(buffer)
        while position < size:
            end_of_line = buffer.find(_CRLF, position)
            if end_of_line < 0:
                if size - position > CONTROL_LINE_BYTES_MAX:
                    self.abort()
                    return
                break
            if buffer.startswith(b"MSG ", position):
                fields = buffer[position + 4 : end_of_line].split(b" ")
                start = end_of_line + 2
                end = start + int(fields[-1])
                if end + 2 > size:
                    if end - start > MESSAGE_BYTES_MAX:
                        self.abort()
                        return
                    break
                subscription = self._subscriptions.get(fields[1])
                if subscription is not None:
                    reply = fields[2] if len(fields) == 4 else b""
                    try:
                        subscription.callback(fields[0], reply, buffer[start:end])
                    except Exception:
                        _log.exception("a subscriber failed", extra={"subject": subscription.subject})
                position = end + 2
            elif buffer.startswith(b"HMSG ", position):
                after = self._message_with_headers(buffer, position, end_of_line)
                if after == position:
                    break
                position = after
            else:
                self._control_line(buffer[position:end_of_line])
                position = end_of_line + 2
        self._rest = buffer[position:] if position < size else b""
        now = self._loop.time()
        is_small = len(data) <= REST_BYTES_MAX
        transport, is_busy = self.transport, now - self._read_at <= BUSY_S
        if is_busy and is_small and transport is not None and not transport.is_closing():
            transport.pause_reading()
            self._loop.call_later(REST_S, self._read_on)
        self._read_at = now

    # -- reading

    def _read_on(self) -> None:
        self._read_at = self._loop.time()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def _message_with_headers(self, buffer: bytes, position: int, end_of_line: int) -> int:
        """Handle one HMSG; give back where the next begins, or `position` if it is incomplete."""
        fields = buffer[position + 5 : end_of_line].split(b" ")
        header_size, total = int(fields[-2]), int(fields[-1])
        start = end_of_line + 2
        end = start + total
        if end + 2 > len(buffer):
            if total > MESSAGE_BYTES_MAX:
                self.abort()
            return position
        subscription = self._subscriptions.get(fields[1])
        if subscription is not None:
            reply = fields[2] if len(fields) == 5 else b""
            try:
                if buffer.startswith(_NO_RESPONDERS, start):
                    if subscription.on_absence is not None:
                        subscription.on_absence(fields[0])
                else:
                    subscription.callback(fields[0], reply, buffer[start + header_size : end])
            except Exception:
                _log.exception("a subscriber failed", extra={"subject": subscription.subject})
        return end + 2

    def _control_line(self, line: bytes) -> None:
        if line == b"PING":
            self.write(b"PONG\r\n")
        elif line == b"PONG":
            if self.pong_waiters:
                waiter = self.pong_waiters.pop(0)
                if not waiter.done():
                    waiter.set_result(None)
        elif line.startswith(b"INFO "):
            self.info = json.loads(line[5:])
            if not self.info_arrived.done():
                self.info_arrived.set_result(None)
        elif line.startswith(b"-ERR"):
            self.refusal = line[4:].decode(errors="replace").strip(" '")
            _log.warning("NATS: %s", self.refusal)
        elif line != b"+OK":
            self.abort()

    # -- writing

    def write(self, data: bytes) -> None:
        """Queue `data` for the end of this loop turn."""
        self._out.append(data)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        data = b"".join(self._out)
        self._out.clear()
        if self.transport is not None:
            self.transport.write(data)

    @property
    def is_writable(self) -> bool:
        return self.transport is not None and not self._is_full

    def ping(self) -> asyncio.Future[None]:
        """Ask for a sign of life; done at its arrival or when the connection is lost."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self.pong_waiters.append(waiter)
        self.write(b"PING\r\n")
        return waiter

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Connection:
    """A NATS user's connection; reconnects until closed."""

    def __init__(
        self, urls: str, *, user: str, password: str, name: str, ca_file: Path | None = None
    ) -> None:
        """`urls`: one or several of a cluster, comma separated, `nats://host:port` or `tls://host:port`.

        `ca_file`: who signed the servers' certificates (PEM); None for whom the machine trusts.
        """
        self._urls = [url.strip() for url in urls.split(",") if url.strip()]
        if not self._urls:
            raise ValueError("no NATS address is given")
        self._ca_file = ca_file
        self._user = user
        self._password = password
        self._name = name
        self._subscriptions: dict[bytes, _Subscription] = {}
        self._next_sid = 1
        self._wire: _Wire | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()
        self._lost_callbacks: list[Callable[[], None]] = []
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._inbox = f"_INBOX.{secrets.token_hex(10)}"
        self._inbox_sid = b""
        self._last_error = "not started"

    # -- life

    async def start(self, *, deadline_s: float = 10) -> None:
        """Connect; raises FabricUnavailable if that takes longer. Afterwards reconnects by itself."""
        assert self._keeping is None, "started twice"
        self._keeping = asyncio.create_task(self._keep_connected(), name=f"nats:{self._name}")
        try:
            async with asyncio.timeout(deadline_s):
                await self._connected.wait()
        except TimeoutError:
            await self.close()
            raise FabricUnavailable(f"NATS as {self._user!r}: {self._last_error}") from None

    async def close(self) -> None:
        """End the connection; what was published before is sent first."""
        keeping, self._keeping = self._keeping, None
        if keeping is None:
            return
        wire = self._wire
        if wire is not None and wire.transport is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await wire.ping()  # everything before it has arrived
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    @property
    def is_connected(self) -> bool:
        return self._connected.is_set()

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` every time the connection breaks."""
        self._lost_callbacks.append(callback)

    # -- talking

    def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Send one message; raises FabricUnavailable if it cannot leave now."""
        wire = self._wire
        if wire is None or not wire.is_writable:
            raise FabricUnavailable(
                f"no connection to NATS: {self._last_error}" if wire is None else "congested"
            )
        head = f"PUB {subject} {reply} {len(payload)}\r\n" if reply else f"PUB {subject} {len(payload)}\r\n"
        wire.write(b"%b%b\r\n" % (head.encode(), payload))

    def subscribe(
        self,
        subject: str,
        callback: MessageCallback,
        *,
        queue: str = "",
        on_absence: AbsenceCallback | None = None,
    ) -> bytes:
        """Have `callback` called for every message on `subject`; gives a handle for `unsubscribe`."""
        sid = b"%d" % self._next_sid
        self._next_sid += 1
        subscription = _Subscription(subject, queue, callback, on_absence)
        self._subscriptions[sid] = subscription
        if self._wire is not None:
            self._wire.write(_subscribe_line(sid, subscription))
        return sid

    def unsubscribe(self, sid: bytes) -> None:
        if self._subscriptions.pop(sid, None) is not None and self._wire is not None:
            self._wire.write(b"UNSUB %b\r\n" % sid)

    async def flush(self, *, deadline_s: float = 5) -> None:
        """Return once the server has handled everything sent so far; raises FabricUnavailable."""
        wire = self._wire
        if wire is None:
            raise FabricUnavailable(f"no connection to NATS: {self._last_error}")
        try:
            async with asyncio.timeout(deadline_s):
                await wire.ping()
        except TimeoutError:
            raise FabricUnavailable("NATS did not answer a ping") from None
        if wire.transport is None:
            raise FabricUnavailable("the connection broke")

    async def ask(self, subject: str, payload: bytes, *, deadline_s: float) -> bytes | None:
        """Publish and wait for one answer; None if nobody listens; raises FabricUnavailable, TimeoutError."""
        if not self._inbox_sid:
            self._inbox_sid = self.subscribe(
                f"{self._inbox}.*",
                self._answered,
                on_absence=lambda subject: self._answered(subject, b"", b""),
            )
        reply = f"{self._inbox}.{secrets.token_hex(8)}"
        waiter: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[reply.encode()] = waiter
        try:
            self.publish(subject, payload, reply)
            async with asyncio.timeout(deadline_s):
                return await waiter or None
        finally:
            del self._waiting[reply.encode()]

    def _answered(self, subject: bytes, reply: bytes, payload: bytes) -> None:
        del reply
        waiter = self._waiting.get(subject)
        if waiter is not None and not waiter.done():
            waiter.set_result(payload)

    # -- staying connected

    async def _keep_connected(self) -> None:
        attempt = 0
        random.shuffle(self._urls)  # gateways spread over a cluster's servers
        for url in itertools.cycle(self._urls):  # after a loss the next server, not the lost one
            wire = _Wire(self._subscriptions)
            try:
                await self._connect(wire, url)
                attempt = 0
                self._wire = wire
                self._connected.set()
                await self._watch(wire)
                self._last_error = wire.refusal or "the connection broke"
            except (OSError, FabricError, TimeoutError, ValueError) as error:
                self._last_error = str(error) or type(error).__name__
            finally:
                self._lose(wire)
            attempt += 1
            pause_s = min(RETRY_S_MAX, RETRY_S_MIN * 2 ** min(attempt, 10))
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311 - spreads reconnections

    def _lose(self, wire: _Wire) -> None:
        was_connected = self._wire is wire
        self._wire = None
        self._connected.clear()
        wire.abort()
        if was_connected:
            for callback in self._lost_callbacks:
                callback()

    async def _connect(self, wire: _Wire, url: str) -> None:
        parsed = urlsplit(url)
        host = parsed.hostname or "127.0.0.1"
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_DEADLINE_S):
            await loop.create_connection(lambda: wire, host, parsed.port or PORT_DEFAULT)
            await wire.info_arrived
            if parsed.scheme == "tls" or wire.info.get("tls_required"):
                if wire.transport is None:
                    raise _Refused("the server closed the connection")
                context = ssl.create_default_context(cafile=self._ca_file)
                secure = await loop.start_tls(wire.transport, wire, context, server_hostname=host)
                assert secure is not None, "only a closed transport gives none"
                wire.use(secure)
            wire.write(self._connect_line())
            for sid, subscription in self._subscriptions.items():
                wire.write(_subscribe_line(sid, subscription))
            await wire.ping()
        if wire.transport is None or wire.refusal:
            raise _Refused(wire.refusal or "the server closed the connection")

    def _connect_line(self) -> bytes:
        options = {
            "verbose": False,
            "pedantic": False,
            "lang": "python",
            "version": "1",
            "protocol": 1,
            "headers": True,
            "no_responders": True,
            "echo": False,
            "name": self._name,
            "user": self._user,
            "pass": self._password,
        }
        return b"CONNECT " + json.dumps(options).encode() + _CRLF

    async def _watch(self, wire: _Wire) -> None:
        """Return when the connection is closed or gives no sign of life."""
        while True:
            await asyncio.wait({wire.closed}, timeout=PING_EVERY_S)
            if wire.closed.done():
                return
            pong = wire.ping()
            await asyncio.wait({pong, wire.closed}, timeout=PING_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            if not pong.done():
                _log.warning("NATS gives no sign of life, reconnecting", extra={"connection": self._name})
                return


def _subscribe_line(sid: bytes, subscription: _Subscription) -> bytes:
    queue = f"{subscription.queue} " if subscription.queue else ""
    return b"SUB %b %b\r\n" % (f"{subscription.subject} {queue}".rstrip().encode(), sid)
