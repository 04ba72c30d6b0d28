"""Our relay without the marketplace: the same server, fabric client and SSE writer, and nothing else.

    python relay.py CONFIGURATION.json

No key, no limit, no choice, no counting, no hold, no charge and no receipt: each request goes to the next of
the nodes.  What is between this and the gateway is what the marketplace costs; what is below it is what
Python, uvicorn's protocol and NATS cost.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Final

import msgspec
import uvicorn
import uvloop

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from marketplace.fabric.connection import Connection
from marketplace.fabric.node_client import NodeClient
from marketplace.gateway.answer import DONE, Answer
from marketplace.gateway.answer_shapes import UsageOut
from marketplace.gateway.hot_route import protocol_for
from marketplace.gateway.responder import Responder
from marketplace.gateway.server import Server
from marketplace.platform.garbage import collect_rarely
from marketplace.platform.ids import uuid7
from node_agent.protocol import VERSION, WALL_MS_MAX, Delta, Request, parse_node_id

USAGE: Final = UsageOut(0, 0, 0, "0", 0, "", "", "")


class Configuration(msgspec.Struct):
    nats_url: str
    password: str
    model: str
    nodes: list[str]
    port: int


class _Asked(msgspec.Struct):
    stream: bool = False


_decoder: Final = msgspec.json.Decoder(_Asked)


async def main(configuration: Configuration) -> None:
    connection = Connection(
        configuration.nats_url, user="marketplace", password=configuration.password, name="relay"
    )
    await connection.start()
    client = NodeClient(connection)
    client.start()
    nodes = itertools.cycle([parse_node_id(node) for node in configuration.nodes])

    async def serve(responder: Responder) -> None:
        body = await responder.read_body()
        is_stream = _decoder.decode(body).stream
        request = Request(
            v=VERSION, id=uuid7().hex, model=configuration.model, body=body, stream=is_stream,
            deadline_ms=WALL_MS_MAX,
        )  # fmt: skip
        answer = Answer(request_id=request.id, model=configuration.model, created_s=0, choices=1)
        if is_stream:
            responder.begin(200, [])
        async with client.request(next(nodes), request) as reply:
            while frames := await reply.batch():
                out = b""
                for frame in frames:
                    if isinstance(frame, Delta):
                        answer.take(frame)
                        out += answer.chunk(frame) if is_stream else b""
                await responder.send(out)
        if is_stream:
            responder.end(DONE)
        else:
            responder.answer(200, [], answer.completion(USAGE))

    async def no_application(scope: object, receive: object, send: object) -> None:
        raise NotImplementedError

    config = uvicorn.Config(
        no_application, port=configuration.port, http=protocol_for(serve), ws="none", lifespan="off",
        log_config=None, access_log=False, server_header=False,
    )  # fmt: skip
    collect_rarely()
    await Server(config).serve()


if __name__ == "__main__":
    uvloop.run(main(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Configuration)))
