"""Real agents and thousands of simulated ones.

    python agents.py CONFIGURATION.json      a swarm: every node has its own connection, key and presence

The swarm reads node ids from its standard input, one a line, and drops that node's connection: a machine
that lost its power would fall silent, one whose agent died looks like this.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
import uvloop

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from gateway_peers.nodes import Configuration, Frames, StubNode, Wheel

from marketplace.platform.processes import start_child, stop_child
from node_agent import protocol
from node_agent.config import write_settings
from node_agent.files import write_private
from node_agent.identity import KEY_FILE

CONNECTING_MAX: Final = 32
"""At once; a gateway answers at most 64 who knock."""
TICKS: Final = 100
"""Statuses are spread over the three seconds between two of the same node."""


@contextmanager
def attached_agent(
    folder: Path, *, node_id: str, seed: str, nats_url: str, engine_url: str, api_key: str, model: str,
    capacity: int, core: int | None = None,
) -> Iterator[int]:  # fmt: skip
    """Run `tollway-node run` for one enrolled node beside an engine; gives its process id."""
    folder.mkdir(mode=0o700)
    write_private(folder / KEY_FILE, seed.encode() + b"\n")
    write_settings(folder, node_id=node_id, api="http://127.0.0.1:9", nats_url=nats_url)
    with (folder / "config.toml").open("a") as config:
        config.write(f"""
[[engines]]
name = "engine"
kind = "attach"
url = "{engine_url}"
api_key = "{api_key}"

  [[engines.models]]
  name = "{model}"
  input = "0.10"
  output = "0.15"
  context = 2048
  capacity = {capacity}
""")
    argv = [
        sys.executable,
        "-m",
        "node_agent.cli",
        "run",
        "--data-dir",
        str(folder),
        "--log-level",
        "warning",
    ]
    if core is not None:
        argv = ["taskset", "-c", str(core), *argv]
    child = start_child(argv, log=folder / "agent.log", cwd=Path(__file__).parent.parent.parent)
    try:
        yield child.pid
    finally:
        stop_child(child, stop_signal=signal.SIGTERM, patience_s=5)


# ---- the swarm


async def _connect(make: Callable[[], StubNode], nats_url: str) -> StubNode:
    """Connect, trying again for ever: a gateway that is overrun leaves a knock unanswered."""
    address = urlsplit(nats_url)
    while True:
        with contextlib.suppress(OSError):
            _, node = await asyncio.get_running_loop().create_connection(make, address.hostname, address.port)
            done, _ = await asyncio.wait(
                [node.ready, node.lost], timeout=20, return_when=asyncio.FIRST_COMPLETED
            )
            if node.ready in done:
                return node
            node.drop()
        await asyncio.sleep(0.2)


async def swarm(configuration: Configuration) -> None:
    frames, wheel = Frames(configuration), Wheel()
    waiting, nodes = list(configuration.seeds), dict[str, StubNode]()

    async def connect_some() -> None:
        while waiting:
            node_id = waiting.pop()
            make = partial(StubNode, node_id, configuration, frames, wheel)
            nodes[node_id] = await _connect(make, configuration.nats_url)

    await asyncio.gather(*(connect_some() for _ in range(CONNECTING_MAX)))
    print(f"connected {len(nodes)}", flush=True)
    asyncio.get_running_loop().add_reader(0, lambda: _drop_named(nodes))
    tick = 0
    while True:
        tick += 1
        for at, node in enumerate(nodes.values()):
            if at % TICKS == tick % TICKS:
                node.say_status()
        await asyncio.sleep(protocol.STATUS_EVERY_MS / 1000 / TICKS)


def _drop_named(nodes: dict[str, StubNode]) -> None:
    for node_id in os.read(0, 65536).decode().split():
        nodes.pop(node_id).drop()


if __name__ == "__main__":
    uvloop.run(swarm(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Configuration)))
