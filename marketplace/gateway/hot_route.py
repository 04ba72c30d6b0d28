"""`POST /v1/chat/completions` and `/v1/completions` below the framework.

A subclass of uvicorn's httptools protocol that answers two paths itself and leaves every other request
to the ASGI application.  For both it bounds what uvicorn leaves open: the size of a request's head and
the time a request may take to arrive.  It relies on uvicorn's internals (`HttpToolsProtocol`'s `cycle`,
`flow`, `pipeline` and `_start_asgi_task`), so the version is pinned and
`tests/integration/test_gateway_wire.py` covers what is used: keep-alive, pipelining, chunked bodies,
oversized and slow bodies, disconnects, slow readers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from marketplace.gateway import chat, completions
from marketplace.gateway.requests import BODY_BYTES_MAX
from marketplace.gateway.responder import (
    BODY_S_MAX,
    EVENT_STREAM,
    JSON,
    SEND_S_MAX,
    BuyerGone,
    Headers,
    Responder,
    body_too_large,
    body_too_slow,
)
from marketplace.platform.http import Refusal

PATHS: Final = frozenset({chat.PATH, completions.PATH})
HEADER_BYTES_MAX: Final = 64 * 1024
"""Request line and headers together; for every path."""
HEADER_S_MAX: Final = 15
"""From a request's first byte (or the connection) to the end of its headers; for every path."""
REQUEST_S_MAX: Final = 60
"""From the end of its headers to the end of its body; for every path."""
IDLE_CLOSE_S: Final = 2
"""How long a stopping process waits for a connection's next request, which may be on its way."""
LINGER_S: Final = 2
"""How long a refused body's rest is read and dropped, so that the refusal is not lost in a reset."""
Serve = Callable[[Responder], Awaitable[None]]


def _head(status: int, headers: Headers, content_type: bytes, framing: bytes, *, keep_alive: bool) -> bytes:
    lines = [STATUS_LINE[status], b"content-type: ", content_type, b"\r\n", framing]
    for name, value in headers:
        lines += [name, b": ", value, b"\r\n"]
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


class Outbox:
    """Streams that were given parts in this turn of the loop: each writes them at its end, in one call."""

    def __init__(self) -> None:
        self._streams: list[ChatCycle] = []

    def add(self, stream: ChatCycle) -> None:
        if not self._streams:
            asyncio.get_running_loop().call_soon(self._flush)
        self._streams.append(stream)

    def _flush(self) -> None:
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.flush()


class ChatCycle:
    """One chat request and its response on one connection; a `Responder`.

    Has the attributes of uvicorn's RequestResponseCycle that its protocol touches.
    """

    def __init__(self, protocol: HotRouteProtocol, *, version: str, keep_alive: bool) -> None:
        self._protocol = protocol
        self._transport = protocol.transport
        self._flow: FlowControl = protocol.flow
        self._is_chunked = version != "1.0"
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = protocol.expect_100_continue
        self.peer = protocol.client[0] if protocol.client else ""
        self.path = protocol.url.partition(b"?")[0]
        self.headers = dict(protocol.headers)
        self.has_query = b"?" in protocol.url
        self.body = bytearray()
        self.more_body = True
        self.message_event = asyncio.Event()
        self.response_started = False
        self.response_complete = False
        self.is_gone = False
        self.is_counted = False
        self._unsent: list[bytes] = []
        """Given to `send_now` in this turn."""
        self._act: Callable[[], None] | None = None

    def when_gone(self, act: Callable[[], None] | None) -> None:
        self._act = act
        if self.is_gone and act is not None:
            act()

    @property
    def disconnected(self) -> bool:
        return self.is_gone

    @disconnected.setter
    def disconnected(self, value: bool) -> None:
        if value and not self.is_gone:
            self.is_gone = True
            if self._act is not None:
                self._act()

    async def run_asgi(self, app: object) -> None:
        """Serve; uvicorn starts this as the request's task."""
        del app
        try:
            await self._protocol.serve(cast("Responder", self))
        finally:
            if not self.response_complete:  # cancelled, or an error in our own code: nobody is left hanging
                self._transport.close()

    async def read_body(self) -> bytes:
        if not self.more_body and len(self.body) <= BODY_BYTES_MAX:  # the usual case: it came with the head
            return bytes(self.body)
        if int(self.headers.get(b"content-length", b"0")) > BODY_BYTES_MAX:
            raise body_too_large()
        if self.waiting_for_100_continue and not self._transport.is_closing():
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(BODY_S_MAX):
                while self.more_body and not self.is_gone and len(self.body) <= BODY_BYTES_MAX:
                    self._flow.resume_reading()
                    self.message_event.clear()
                    await self.message_event.wait()
        except TimeoutError as e:
            raise body_too_slow() from e
        if len(self.body) > BODY_BYTES_MAX:
            raise body_too_large()
        if self.more_body:
            raise BuyerGone
        return bytes(self.body)

    def answer(self, status: int, headers: Headers, body: bytes, content_type: bytes = JSON) -> None:
        if self.is_gone or self.response_complete:
            return
        if self.more_body:
            self.keep_alive = False  # its rest is not read
        framing = b"content-length: %d\r\n" % len(body)
        head = _head(status, headers, content_type, framing, keep_alive=self.keep_alive)
        self._transport.write(head + body)
        self._complete()

    def begin(self, status: int, headers: Headers, content_type: bytes = EVENT_STREAM) -> None:
        if self.is_gone:
            return
        self.response_started = True
        framing = b"cache-control: no-store\r\n"
        if self._is_chunked:
            framing += b"transfer-encoding: chunked\r\n"
        self._transport.write(_head(status, headers, content_type, framing, keep_alive=self.keep_alive))

    @property
    def is_clear(self) -> bool:
        return self.response_started and not (
            self.is_gone or self._flow.write_paused or self.response_complete
        )

    def send_now(self, data: bytes) -> None:
        if not self._unsent:
            self._protocol.outbox.add(self)
        self._unsent.append(data)

    def flush(self) -> None:
        """Write what `send_now` was given."""
        if self._unsent:
            data = self._with_unsent(b"")
            if not self.is_gone and not self._transport.is_closing():
                self._transport.write(self._framed(data))

    def _with_unsent(self, data: bytes) -> bytes:
        if not self._unsent:
            return data
        parts, self._unsent = self._unsent, []
        return b"".join((*parts, data))

    async def send(self, data: bytes) -> None:
        if self.is_gone:
            raise BuyerGone
        data = self._with_unsent(data)
        if not data:
            return
        self._transport.write(self._framed(data))
        if self._flow.write_paused:
            try:
                await asyncio.wait_for(self._flow.drain(), SEND_S_MAX)
            except TimeoutError:
                self._transport.abort()  # he holds the connection and takes nothing
                self.disconnected = True
            if self.is_gone:
                raise BuyerGone

    def end(self, data: bytes = b"") -> None:
        if self.is_gone or self.response_complete:
            return
        data = self._with_unsent(data)
        last = b"0\r\n\r\n" if self._is_chunked else b""
        self._transport.write((self._framed(data) if data else b"") + last)
        self._complete()

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data

    def _complete(self) -> None:
        self.response_complete = True
        if not self.keep_alive:
            if self.more_body:
                self._protocol.linger()
            else:
                self._transport.close()
        self._protocol.on_response_complete()


class HotRouteProtocol(HttpToolsProtocol):
    """Serves PATHS itself; `serve` and `outbox` are set on a subclass made by `protocol_for`."""

    serve: Serve
    outbox: Outbox
    _serving: Any = None
    """The cycle whose response is due; `cycle` may be a later, pipelined one."""
    _head_bytes = 0
    _in_head = True
    _refusal: Refusal | None = None
    _is_refused = False
    """Nothing that still arrives is looked at."""
    _is_stopping = False
    """This process stops: a connection ends with the response that is due."""
    _due: float | None = None
    """When what is arriving must have arrived (loop seconds)."""
    _timer: asyncio.TimerHandle | None = None

    # ---- arrival, bounded in size and time

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._give_time(HEADER_S_MAX)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._due is None:
                self._give_time(HEADER_S_MAX)
        super().data_received(data)
        if self._in_head and self._head_bytes > HEADER_BYTES_MAX and not self.transport.is_closing():
            self._refuse(Refusal(431, "headers_too_large", f"headers take at most {HEADER_BYTES_MAX} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 1
        self._give_time(HEADER_S_MAX)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._give_time(REQUEST_S_MAX)
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > HEADER_BYTES_MAX:
            self._refusal = Refusal(431, "headers_too_large", f"at most {HEADER_BYTES_MAX} bytes")
            raise ValueError("headers are too large")  # the parser stops; send_400_response answers
        path = self.url.partition(b"?")[0]
        if path not in PATHS or self.parser.get_method() != b"POST" or self.parser.should_upgrade():
            if self._is_stopping:
                self.headers.append((b"connection", b"close"))  # uvicorn answers with the same
            super().on_headers_complete()
            return
        version = self.parser.get_http_version()
        existing = self.cycle
        keep_alive = version != "1.0" and self.parser.should_keep_alive() and not self._is_stopping
        cycle: Any = ChatCycle(self, version=version, keep_alive=keep_alive)
        self.cycle = cycle
        if existing is None or existing.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def on_body(self, body: bytes) -> None:
        cycle: Any = self.cycle
        if isinstance(cycle, ChatCycle):
            if not cycle.response_complete and len(cycle.body) <= BODY_BYTES_MAX:
                cycle.body += body
                if len(cycle.body) > BODY_BYTES_MAX:
                    cycle.message_event.set()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._due = None
        self._in_head, self._head_bytes = True, 0
        cycle: Any = self.cycle
        if isinstance(cycle, ChatCycle) and cycle.response_complete:
            self.transport.close()  # a refused body has come to its end
            return
        super().on_message_complete()

    def shutdown(self) -> None:
        """End this connection with the next response whose head can say so, or when none comes.

        uvicorn would close an idle connection at once, and one in mid-response at its end, and so cut a
        request its client is just sending.
        """
        self._is_stopping = True
        cycle = self.cycle
        if cycle is not None and not cycle.response_started:
            cycle.keep_alive = False
        self.loop.call_later(IDLE_CLOSE_S, self._close_if_idle)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_stopping:
            self.loop.call_later(IDLE_CLOSE_S, self._close_if_idle)

    def _close_if_idle(self) -> None:
        is_arriving = self._head_bytes > 0 or not self._in_head
        if (self.cycle is None or self.cycle.response_complete) and not is_arriving:
            self.transport.close()

    def linger(self) -> None:
        """Say no more, and drop what still arrives for a moment, then close."""
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._due = None
        self.loop.call_later(LINGER_S, self.transport.close)

    def _give_time(self, seconds: float) -> None:
        """One timer a connection: it looks at what is due when it fires, requests only say when."""
        self._due = self.loop.time() + seconds
        if self._timer is None:
            self._timer = self.loop.call_at(self._due, self._check_time)

    def _check_time(self) -> None:
        self._timer = None
        if self._due is None or self.transport.is_closing():
            return
        if self.loop.time() < self._due:
            self._timer = self.loop.call_at(self._due, self._check_time)
            return
        serving = self._serving
        is_later = self._in_head or self.cycle is not serving
        if serving is not None and not serving.response_complete and is_later:
            self._give_time(HEADER_S_MAX)  # a later request's slowness must not tear the response under way
        elif self._in_head and not self._head_bytes:
            self.transport.close()  # a connection that never asked anything
        else:
            self._refuse(Refusal(408, "request_timeout", "the request did not arrive in time"))

    # ---- refusals before there is a request

    def send_400_response(self, msg: str) -> None:
        refusal, self._refusal = self._refusal, None
        self._refuse(refusal or Refusal(400, "invalid_http", msg))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer and close; a response that is under way is only cut, since nothing can be put into it."""
        if self.transport.is_closing() or self._is_refused:
            return
        self._is_refused = True
        self._disconnect_all()
        serving = self._serving
        if serving is not None and serving.response_started and not serving.response_complete:
            self.transport.close()
            return
        body = json.dumps(refusal.body()).encode()
        framing = b"content-length: %d\r\n" % len(body)
        self.transport.write(_head(refusal.status, [], JSON, framing, keep_alive=False) + body)
        self.linger()

    # ---- who is being served

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._serving = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._due = None
        if self._timer is not None:
            self._timer.cancel()
        self._disconnect_all()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it where the connection broke
        # No circle is left for the collector, which comes rarely: a connection has some 10 kB.
        self.cycle = self._serving = None  # type: ignore[assignment]
        self.pipeline.clear()

    def _disconnect_all(self) -> None:
        """Tell every request on this connection that nobody waits for it; uvicorn tells only the last."""
        for cycle in (self._serving, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()


def protocol_for(serve: Serve) -> type[HotRouteProtocol]:
    """Give the protocol class to hand to uvicorn (`http=`)."""
    return type("ChatProtocol", (HotRouteProtocol,), {"serve": staticmethod(serve), "outbox": Outbox()})
