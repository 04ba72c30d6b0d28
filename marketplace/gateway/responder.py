"""How the chat route answers, whatever carries it.

The route lives below the framework (a subclass of uvicorn's httptools protocol: measured 84 µs a request
against 410 µs for raw ASGI and 6 ms for FastAPI with httpx); the same code also runs as an ASGI
application, which other servers and some tests use.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from marketplace.gateway.requests import BODY_BYTES_MAX
from marketplace.platform.http import Refusal

Headers = Sequence[tuple[bytes, bytes]]
JSON: Final = b"application/json"
EVENT_STREAM: Final = b"text/event-stream; charset=utf-8"
BODY_S_MAX: Final = 30
"""A buyer sends the whole body within this; at the largest body that is 35 kB/s."""
SEND_S_MAX: Final = 30
"""A buyer who takes nothing for this long has left."""
PARTS_WAITING_MAX: Final = 16


class BuyerGone(Exception):
    """The buyer closed the connection, or stopped reading; nothing more can be delivered."""


def body_too_large() -> Refusal:
    return Refusal(413, "body_too_large", f"a body has at most {BODY_BYTES_MAX} bytes")


def body_too_slow() -> Refusal:
    return Refusal(408, "body_timeout", f"the body did not arrive within {BODY_S_MAX} s")


class Responder(Protocol):
    """One request's way back to its buyer."""

    @property
    def peer(self) -> str:
        """Address of the other end of the socket."""
        ...

    @property
    def path(self) -> bytes:
        """What was asked, without its query string."""
        ...

    @property
    def has_query(self) -> bool: ...

    @property
    def is_gone(self) -> bool:
        """The buyer has closed the connection."""
        ...

    @property
    def is_clear(self) -> bool:
        """The stream has begun and its buyer keeps up: `send_now` may be called."""
        ...

    @property
    def is_counted(self) -> bool:
        """Somebody before us has counted this request against its caller's rate limit."""
        ...

    @property
    def headers(self) -> Mapping[bytes, bytes]:
        """The request's headers, lower-case names; the last of a repeated one."""
        ...

    async def read_body(self) -> bytes:
        """Give the whole body; Refusal 413 or 408 above the limits, BuyerGone if he left before its end."""
        ...

    def when_gone(self, act: Callable[[], None] | None) -> None:
        """Call `act` once when the buyer leaves, at once if he has left; None forgets the last one."""
        ...

    def answer(self, status: int, headers: Headers, body: bytes, content_type: bytes = JSON) -> None:
        """Send a whole response; harmless if the buyer is gone."""
        ...

    def begin(self, status: int, headers: Headers, content_type: bytes = EVENT_STREAM) -> None:
        """Send the head of a stream."""
        ...

    async def send(self, data: bytes) -> None:
        """Send a part of the stream, waiting while the buyer is slow; BuyerGone when he has left."""
        ...

    def send_now(self, data: bytes) -> None:
        """Send a part of the stream without waiting, by the end of the loop's turn; only while `is_clear`."""
        ...

    def end(self, data: bytes = b"") -> None:
        """Send the stream's last part and finish; harmless if the buyer is gone."""
        ...


Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class AsgiResponder:
    """A Responder over ASGI; `run` serves through it.

    ASGI's sends are coroutines and ours are not, so messages wait in a row that `send` keeps short.
    """

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        self.path = scope["path"].encode()
        self.peer = (scope.get("client") or ("", 0))[0]
        self.headers: Mapping[bytes, bytes] = dict(scope["headers"])
        self.has_query = bool(scope.get("query_string"))
        self.is_gone = False
        self.is_clear = False  # every part waits for its turn in the row
        self.is_counted = True  # by the framework's middleware
        self._receive = receive
        self._send = send
        self._act: Callable[[], None] | None = None
        self._row: deque[dict[str, Any]] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._is_over = False

    async def run(self, serve: Callable[[Responder], Awaitable[None]]) -> None:
        """Serve one request to its end, carrying messages out meanwhile."""
        serving = asyncio.ensure_future(serve(self))
        serving.add_done_callback(lambda _: self._changed.set())
        try:
            await self._carry(serving)
            await serving
        except OSError:  # how newer servers tell that the buyer has left
            self._leave()
            await serving
        except asyncio.CancelledError:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            raise
        finally:
            if self._watching is not None:
                self._watching.cancel()

    async def _carry(self, serving: asyncio.Future[None]) -> None:
        while not self.is_gone:
            self._changed.clear()
            while self._row:
                await self._send(self._row.popleft())
                if len(self._row) < PARTS_WAITING_MAX:
                    self._room.set()
            if self._is_over or serving.done():
                return
            await self._changed.wait()

    async def read_body(self) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S_MAX):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        self._leave()
                        raise BuyerGone
                    body += message.get("body", b"")
                    if len(body) > BODY_BYTES_MAX:
                        raise body_too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError as e:
            raise body_too_slow() from e
        self._watching = asyncio.create_task(self._watch())
        return bytes(body)

    def when_gone(self, act: Callable[[], None] | None) -> None:
        self._act = act
        if self.is_gone and act is not None:
            act()

    async def _watch(self) -> None:
        """Notice when the buyer leaves."""
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self._leave()

    def _leave(self) -> None:
        self.is_gone = True
        self._changed.set()
        self._room.set()
        if self._act is not None:
            self._act()

    def answer(self, status: int, headers: Headers, body: bytes, content_type: bytes = JSON) -> None:
        if self._is_over:
            return
        head = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers]
        self._put({"type": "http.response.start", "status": status, "headers": head})
        self.end(body)

    def begin(self, status: int, headers: Headers, content_type: bytes = EVENT_STREAM) -> None:
        head = [(b"content-type", content_type), (b"cache-control", b"no-store"), *headers]
        self._put({"type": "http.response.start", "status": status, "headers": head})

    async def send(self, data: bytes) -> None:
        if self.is_gone:
            raise BuyerGone
        if data:
            self._put({"type": "http.response.body", "body": data, "more_body": True})
        if len(self._row) >= PARTS_WAITING_MAX:
            self._room.clear()
            try:
                await asyncio.wait_for(self._room.wait(), SEND_S_MAX)
            except TimeoutError:
                self._leave()
            if self.is_gone:
                raise BuyerGone

    def send_now(self, data: bytes) -> None:
        self._put({"type": "http.response.body", "body": data, "more_body": True})

    def end(self, data: bytes = b"") -> None:
        if not self._is_over:
            self._put({"type": "http.response.body", "body": data})
            self._is_over = True

    def _put(self, message: dict[str, Any]) -> None:
        self._row.append(message)
        self._changed.set()
