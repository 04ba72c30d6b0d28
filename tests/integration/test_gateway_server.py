"""How a gateway takes connections, on the event loop it runs on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
import uvloop

from marketplace.gateway.server import Server
from marketplace.platform.processes import free_port

CONNECTIONS = 96


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def _serving(listener: socket.socket | None = None) -> AsyncIterator[tuple[Server, int]]:
    port = free_port() if listener is None else listener.getsockname()[1]
    config = uvicorn.Config(_app, port=port, lifespan="off", http="httptools", log_config=None)
    server = Server(config)
    running = asyncio.create_task(server.serve(sockets=None if listener is None else [listener]))
    try:
        async with asyncio.timeout(5):
            while not server.started:
                await asyncio.sleep(0.01)
        yield server, port
    finally:
        server.should_exit = True
        await running


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


async def _turns_until(is_so: Callable[[], bool]) -> int:
    """How often the loop turns before it is so."""
    turns = 0
    async with asyncio.timeout(5):
        while not is_so():
            turns += 1
            await asyncio.sleep(0)
    return turns


def test_buyers_who_come_at_once_are_taken_in_few_turns_of_the_loop() -> None:
    async def run() -> None:
        async with _serving() as (server, port):
            clients = [_connect(port) for _ in range(CONNECTIONS)]  # the kernel has them
            connections = server.server_state.connections
            turns = await _turns_until(lambda: len(connections) == CONNECTIONS)
            assert turns < CONNECTIONS / 3, "libuv alone takes one connection a turn"
            for connection in connections:
                accepted = connection.transport.get_extra_info("socket")
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
                assert connection.client[0] == "127.0.0.1"
            for client in clients:
                client.sendall(b"GET / HTTP/1.1\r\nhost: t\r\n\r\n")
            answers = [await asyncio.to_thread(client.recv, 1024) for client in clients]
            assert all(answer.startswith(b"HTTP/1.1 204") for answer in answers)
            for client in clients:
                client.close()
            await _turns_until(lambda: not connections)

    uvloop.run(run())


@pytest.mark.parametrize("is_shared", [False, True], ids=["own-socket", "shared-socket"])
def test_a_stopped_server_takes_nobody(is_shared: bool) -> None:
    """A shared socket stays open, for the other workers; who connects then waits for one of them."""

    async def run() -> None:
        listener = socket.create_server(("127.0.0.1", 0)) if is_shared else None
        async with _serving(listener.dup() if listener else None) as (server, port):
            _connect(port).close()
        if listener is None:
            with pytest.raises(ConnectionRefusedError):
                _connect(port)
            return
        waiting = _connect(port)
        await asyncio.sleep(0.05)
        assert not server.server_state.connections
        listener.setblocking(False)
        taken, _ = listener.accept()
        taken.close()
        waiting.close()
        listener.close()

    uvloop.run(run())
