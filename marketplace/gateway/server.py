"""The HTTP server of a gateway process: uvicorn, told when to stop by us, that accepts in bursts.

libuv accepts one connection in a turn of the loop (https://github.com/libuv/libuv/pull/3696).  A turn of a
busy gateway takes 10 to 20 ms, so of 256 buyers who connect at once the last would wait for seconds, with
most of the machine idle before and after.  So we take more of those that wait, in each turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator
from typing import Final

import structlog
import uvicorn

_log = structlog.get_logger()

ACCEPTS_MAX: Final = 16
"""Connections taken in one turn: what is left goes to the workers that share the socket, or waits a turn."""


class Acceptor:
    """Accepts on a listening socket beside the event loop's own server, until `close`."""

    def __init__(self, listener: int, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        """`listener`: the file descriptor of a socket that listens; ours is a copy of it."""
        self._loop = asyncio.get_running_loop()
        self._make_protocol = make_protocol
        self._socket = socket.socket(fileno=os.dup(listener))
        self._socket.setblocking(False)
        self._opening: set[asyncio.Task[None]] = set()
        self._loop.add_reader(self._socket.fileno(), self._accept)

    async def close(self) -> None:
        """Accept no more, and return when what was accepted is open, so that it can be told to end."""
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        if self._opening:
            await asyncio.wait(self._opening)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_MAX):
            try:
                connection, _ = self._socket.accept()
            except ConnectionAbortedError:  # he has left already
                continue
            except OSError:  # nobody waits; or there are no files left, which libuv's own accept deals with
                return
            task = self._loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError as error:
            _log.info("a connection was not opened", error=type(error).__name__)
            connection.close()


class Server(uvicorn.Server):
    """uvicorn without its signal handling (ours stops it in order), which says when it accepts."""

    def __init__(self, config: uvicorn.Config, ready_fd: int | None = None) -> None:
        super().__init__(config)
        self._ready_fd = ready_fd
        self._acceptors: list[Acceptor] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        make_protocol = functools.partial(
            self.config.http_protocol_class,
            config=self.config,  # type: ignore[call-arg]  # as uvicorn calls it
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        self._acceptors = [
            Acceptor(listener.fileno(), make_protocol)
            for server in self.servers
            for listener in server.sockets
        ]
        if self._ready_fd is not None:
            os.write(self._ready_fd, b"1")
            os.close(self._ready_fd)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for acceptor in self._acceptors:
            await acceptor.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
