"""`POST /v1/chat/completions` below the framework.

A subclass of uvicorn's httptools protocol that answers one path itself and leaves every other request
to the ASGI application.  It relies on uvicorn's internals (`HttpToolsProtocol`'s `cycle`, `flow` and
`pipeline`), so the version is pinned and `tests/integration/test_gateway_http.py` covers what is used:
keep-alive, pipelining, chunked bodies, oversized bodies, disconnects, slow readers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from marketplace.gateway.requests import BODY_BYTES_MAX
from marketplace.gateway.responder import EVENT_STREAM, JSON, BuyerGone, Headers, Responder

PATH: Final = b"/v1/chat/completions"
HEADER_BYTES_MAX: Final = 64 * 1024
Serve = Callable[[Responder], Awaitable[None]]


def _head(status: int, headers: Headers, content_type: bytes, framing: bytes, *, keep_alive: bool) -> bytes:
    lines = [STATUS_LINE[status], b"content-type: ", content_type, b"\r\n", framing]
    for name, value in headers:
        lines += [name, b": ", value, b"\r\n"]
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


class ChatCycle:
    """One chat request and its response on one connection.

    Has the attributes of uvicorn's RequestResponseCycle that its protocol touches.
    """

    def __init__(self, protocol: HotRouteProtocol, *, keep_alive: bool) -> None:
        self._protocol = protocol
        self._transport = protocol.transport
        self._flow: FlowControl = protocol.flow
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = protocol.expect_100_continue
        self.peer = protocol.client[0] if protocol.client else ""
        self.headers = dict(protocol.headers)
        self.has_query = b"?" in protocol.url
        self.body: bytes | bytearray = bytearray()
        self.more_body = True
        self.message_event = asyncio.Event()
        self.response_complete = False
        self.is_gone = False
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
        """Read the body, then serve; uvicorn starts this as the request's task."""
        del app
        if self.waiting_for_100_continue and not self._transport.is_closing():
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while self.more_body and not self.disconnected and len(self.body) <= BODY_BYTES_MAX:
            self._flow.resume_reading()
            await self.message_event.wait()
            self.message_event.clear()
        if self.more_body and len(self.body) > BODY_BYTES_MAX:
            self.keep_alive = False  # the rest of the body is not read
        self.body = bytes(self.body)
        try:
            await self._protocol.serve(cast("Responder", self))
        finally:
            if not self.response_complete:  # an error in our own code: never leave the buyer hanging
                self._transport.close()

    def answer(self, status: int, headers: Headers, body: bytes, content_type: bytes = JSON) -> None:
        if self.disconnected or self.response_complete:
            return
        framing = b"content-length: %d\r\n" % len(body)
        head = _head(status, headers, content_type, framing, keep_alive=self.keep_alive)
        self._transport.write(head + body)
        self._complete()

    def begin(self, status: int, headers: Headers, content_type: bytes = EVENT_STREAM) -> None:
        if self.disconnected:
            return
        framing = b"transfer-encoding: chunked\r\ncache-control: no-store\r\n"
        self._transport.write(_head(status, headers, content_type, framing, keep_alive=self.keep_alive))

    async def send(self, data: bytes) -> None:
        if self.disconnected:
            raise BuyerGone
        if not data:
            return
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        if self._flow.write_paused:
            await self._flow.drain()
            if self.disconnected:
                raise BuyerGone

    def end(self, data: bytes = b"") -> None:
        if self.disconnected or self.response_complete:
            return
        last = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
        self._transport.write(last)
        self._complete()

    def _complete(self) -> None:
        self.response_complete = True
        if not self.keep_alive:
            self._transport.close()
        self._protocol.on_response_complete()


class HotRouteProtocol(HttpToolsProtocol):
    """Serves PATH itself; `serve` is set on a subclass made by `protocol_for`."""

    serve: Serve

    def on_headers_complete(self) -> None:
        path = self.url.partition(b"?")[0]
        if path != PATH or self.parser.get_method() != b"POST" or self.parser.should_upgrade():
            super().on_headers_complete()
            return
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        existing = self.cycle
        cycle: Any = ChatCycle(self, keep_alive=keep_alive)
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


def protocol_for(serve: Serve) -> type[HotRouteProtocol]:
    """Give the protocol class to hand to uvicorn (`http=`)."""
    return type("ChatProtocol", (HotRouteProtocol,), {"serve": staticmethod(serve)})
