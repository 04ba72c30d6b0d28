"""Stub nodes: enrolled, admitted and limited as any node, but with a row of frames in place of an engine.

    python nodes.py CONFIGURATION.json

Their frames are encoded once by `node_agent.protocol`; a request costs the stub a decode and a few
publishes, so that it is not what a benchmark measures.  A prompt with `pace_ms=010` gets a token every
10 ms, each in a frame of its own unless the gateway asks for a gap between frames, which is kept as an
agent's relay keeps it; at a pace of 0 a stream is three frames after the first token's, as an agent would
coalesce what its engine wrote at once.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import nkeys
import uvloop

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from node_agent import protocol

FRAMES_AFTER_FIRST: Final = 3
CAPACITY: Final = 1_000


class Configuration(msgspec.Struct):
    nats_url: str
    model: str
    seeds: dict[str, str]
    """Node id → nkey seed."""
    prices: dict[str, tuple[int, int]]
    """Node id → nano-dollars per million tokens, in and out."""
    pieces: list[str]
    ids: list[int]
    prompt_ids: list[int]


class Frames:
    """The answer as frames, each ready to follow `PUB <reply>`."""

    def __init__(self, configuration: Configuration) -> None:
        self._prompt_ids = configuration.prompt_ids
        self._pieces, self._ids = configuration.pieces, configuration.ids
        self._paced: dict[tuple[int, int, int], list[tuple[int, list[bytes]]]] = {}
        count = len(self._ids)
        self.plain = self._rows([[self._joined()]], [count])
        step = -(-(count - 1) // FRAMES_AFTER_FIRST)
        cuts = [0, *range(1, count, step), count]
        self.stream = self._cut(cuts)

    def _cut(self, cuts: Sequence[int]) -> list[bytes]:
        """Frames that end before these tokens."""
        choices = [[self._choice(at) for at in range(a, b)] for a, b in pairwise(cuts)]
        return self._rows(choices, cuts[1:])

    def paced(self, pace_ms: int, gap_ms: int, began_ms: int) -> list[tuple[int, list[bytes]]]:
        """What is sent when (ms after the beginning): what an agent reads at multiples of the gap."""
        phase = began_ms % gap_ms if gap_ms else 0
        if (pace_ms, gap_ms, phase) not in self._paced:
            times, cuts, count = [0], [0, 1], len(self._ids)
            while cuts[-1] < count:
                at_ms = cuts[-1] * pace_ms
                if gap_ms:
                    at_ms = max(at_ms, ((times[-1] + phase) // gap_ms + 1) * gap_ms - phase)
                times.append(at_ms)
                cuts.append(min(count, at_ms // pace_ms + 1))
            accepted, first, *others, end = self._cut(cuts)
            rows = [[accepted, first], *([frame] for frame in others)]
            rows[-1].append(end)
            self._paced[pace_ms, gap_ms, phase] = list(zip(times, rows, strict=True))
        return self._paced[pace_ms, gap_ms, phase]

    def _choice(self, at: int) -> protocol.ChoiceDelta:
        return protocol.ChoiceDelta(
            role="assistant" if at == 0 else None,
            content=self._pieces[at],
            finish_reason="stop" if at == len(self._ids) - 1 else None,
            token_ids=[self._ids[at]],
        )

    def _joined(self) -> protocol.ChoiceDelta:
        return protocol.ChoiceDelta(
            role="assistant", content="".join(self._pieces), finish_reason="stop", token_ids=self._ids
        )

    def _rows(self, deltas: Sequence[list[protocol.ChoiceDelta]], totals: Sequence[int]) -> list[bytes]:
        prompt = len(self._prompt_ids)
        frames: list[protocol.Frame] = [protocol.Accepted(0)]
        for at, (choices, total) in enumerate(zip(deltas, totals, strict=True)):
            ids = self._prompt_ids if at == 0 else None
            frames.append(protocol.Delta(at + 1, choices, ids, prompt, total))
        frames.append(protocol.End(len(frames), prompt, len(self._ids), 0, 1))
        return [b" %d\r\n%b\r\n" % (len(data), data) for data in map(protocol.encode, frames)]


class Wheel:
    """Paced streams by the millisecond of their next frame; one timer for all."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._slots: dict[int, list[PacedAnswer]] = {}
        self._now_ms = int(self._loop.time() * 1000)
        self._is_turning = False

    def put(self, answer: PacedAnswer) -> None:
        if not self._is_turning:
            self._is_turning = True
            self._now_ms = int(self._loop.time() * 1000)
            self._loop.call_later(0.001, self._turn)
        answer.due_ms = max(answer.due_ms, self._now_ms)  # what lies before was looked at already
        self._slots.setdefault(answer.due_ms, []).append(answer)

    def _turn(self) -> None:
        until_ms = int(self._loop.time() * 1000)
        while self._now_ms <= until_ms:
            for answer in self._slots.pop(self._now_ms, ()):
                if answer.go_on():
                    answer.due_ms = max(answer.due_ms, self._now_ms + 1)
                    self._slots.setdefault(answer.due_ms, []).append(answer)
            self._now_ms += 1
        if self._slots:
            self._loop.call_later(0.001, self._turn)
        else:
            self._is_turning = False


class PacedAnswer:
    """One request being answered, a frame at a time."""

    __slots__ = ("_at", "_began_ms", "_node", "_reply", "_rows", "due_ms", "is_cancelled")

    def __init__(
        self, node: StubNode, reply: bytes, rows: Sequence[tuple[int, list[bytes]]], began_ms: int
    ) -> None:
        self._node, self._reply, self._rows, self._at = node, reply, rows, 0
        self._began_ms = self.due_ms = began_ms
        self.is_cancelled = False

    def go_on(self) -> bool:
        """Send what is due; False when there is no more."""
        if self.is_cancelled:
            return False
        self._node.answer(self._reply, self._rows[self._at][1])
        self._at += 1
        if self._at == len(self._rows):
            return False
        self.due_ms = self._began_ms + self._rows[self._at][0]
        return True


class StubNode(asyncio.Protocol):
    """One node's connection to the fabric."""

    def __init__(self, node_id: str, configuration: Configuration, frames: Frames, wheel: Wheel) -> None:
        self.frames = frames
        self._node_id = protocol.parse_node_id(node_id)
        self._price = configuration.prices[node_id]
        self._model = configuration.model
        self._pair = nkeys.from_seed(bytearray(configuration.seeds[node_id].encode()))
        self._wheel = wheel
        self._answering: dict[str, PacedAnswer] = {}
        self._rest = b""
        self._out: list[bytes] = []
        self._seq = 0
        self._clock_ms = random.Random(node_id).randrange(1_000)
        """What its clock is ahead: nodes are machines of their own, and do not beat together."""
        self._is_known = False
        self._transport: Any = None
        self.ready = asyncio.get_running_loop().create_future()
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.lost.set_result(exc)

    def drop(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        buffer, at = self._rest + data, 0
        while (end := buffer.find(b"\r\n", at)) >= 0:
            line = buffer[at:end]
            if not line.startswith(b"MSG "):
                self._control_line(line)
                at = end + 2
                continue
            fields = line.split(b" ")
            start, size = end + 2, int(fields[-1])
            if start + size + 2 > len(buffer):
                break
            payload = buffer[start : start + size]
            if fields[2] == b"1":
                self._on_request(payload, fields[3])
            else:
                self._on_control(payload)
            at = start + size + 2
        self._rest = buffer[at:]

    def _control_line(self, line: bytes) -> None:
        if line.startswith(b"INFO ") and not self._is_known:
            self._is_known = True  # later ones only tell what has changed
            self._connect(json.loads(line[5:])["nonce"])
        elif line == b"PING":
            self._write(b"PONG\r\n")
        elif line == b"PONG" and not self.ready.done():
            self.ready.set_result(None)
        elif line.startswith(b"-ERR"):
            print(f"stub node {self._node_id}: {line.decode()}", file=sys.stderr, flush=True)
            self.drop()

    def _connect(self, nonce: str) -> None:
        options = {
            "verbose": False, "pedantic": False, "lang": "python", "version": "1", "protocol": 1,
            "headers": True, "no_responders": True, "name": f"stub {self._node_id}",
            "nkey": self._pair.public_key.decode(),
            "sig": base64.urlsafe_b64encode(self._pair.sign(nonce.encode())).rstrip(b"=").decode(),
        }  # fmt: skip
        self._write(b"CONNECT " + json.dumps(options).encode() + b"\r\n")
        for sid, subject in (
            (1, protocol.request_subject(self._node_id)), (2, protocol.control_subject(self._node_id)),
        ):  # fmt: skip
            self._write(f"SUB {subject} {sid}\r\n".encode())
        self._write(b"PING\r\n")

    def _on_request(self, payload: bytes, reply: bytes) -> None:
        request = protocol.decode_request(payload)
        if not request.stream:
            self.answer(reply, self.frames.plain)
            return
        pace_ms = int(request.body.partition(b"pace_ms=")[2][:3] or b"0")
        if not pace_ms:
            self.answer(reply, self.frames.stream)
            return
        began_ms = int(asyncio.get_running_loop().time() * 1000)
        rows = self.frames.paced(pace_ms, request.frame_gap_ms, began_ms + self._clock_ms)
        answer = self._answering[request.id] = PacedAnswer(self, reply, rows, began_ms)
        self._wheel.put(answer)

    def _on_control(self, payload: bytes) -> None:
        message = protocol.decode_control(payload)
        if isinstance(message, protocol.Cancel) and message.id in self._answering:
            self._answering.pop(message.id).is_cancelled = True

    def answer(self, reply: bytes, frames: Sequence[bytes]) -> None:
        head = b"PUB " + reply
        self._write(b"".join([head + frame for frame in frames]))

    def say_status(self) -> None:
        price_in, price_out = self._price
        model = protocol.ModelStatus(self._model, 8192, price_in, price_out, capacity=CAPACITY)
        self._seq += 1
        status = protocol.Status(1, self._node_id, self._seq, 0, "stub", is_draining=False, models=[model])
        data = protocol.encode(status)
        self._write(
            b"PUB %b %d\r\n%b\r\n" % (protocol.status_subject(self._node_id).encode(), len(data), data)
        )

    def _write(self, data: bytes) -> None:
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        if self._transport is not None:
            self._transport.write(b"".join(self._out))
        self._out.clear()


async def main(configuration: Configuration) -> None:
    frames, wheel, loop = Frames(configuration), Wheel(), asyncio.get_running_loop()
    address = urlsplit(configuration.nats_url)
    nodes = []
    for node_id in configuration.seeds:
        node = StubNode(node_id, configuration, frames, wheel)
        await loop.create_connection(lambda node=node: node, address.hostname, address.port)
        await node.ready
        nodes.append(node)
    while True:
        for node in nodes:
            node.say_status()
        done, _ = await asyncio.wait([node.lost for node in nodes], timeout=protocol.STATUS_EVERY_MS / 1000)
        if done:
            sys.exit("the fabric is gone")


if __name__ == "__main__":
    uvloop.run(main(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Configuration)))
