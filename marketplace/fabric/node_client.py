"""Ask a node, read its answer: the hot path's view of the fabric.

    client = NodeClient(connection)
    client.start()
    async with client.request(node, request) as reply:      # published before `request` returns
        async for frame in reply:                           # Accepted, Delta…, Heartbeat…, End
            …

One wildcard subscription serves every reply; a frame costs one dictionary look-up, one decode and a
wake-up, no task.  Frames are checked as they arrive (`ReplyReader`) and wait in a row that the credit
bounds: a consumer that stops reading stops the node.  What was received before an error is given first,
then the error is raised (`marketplace.fabric.errors.RequestBroken`; `TooMuchHeld` drops it instead).

Leaving the `async with` before the end sends `Cancel`; so do a passed limit and a broken protocol.

What waits here is bounded three times: by credit per request, by `REPLY_BYTES_MAX` per answer, and by
`Limits.held_bytes` for the whole process, beyond which the longest answer under way is given up.  So buyers
who do not read, together with nodes that send all they may, cannot make a gateway grow.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self

from marketplace.fabric.connection import Connection
from marketplace.fabric.errors import (
    ConnectionLost,
    FabricUnavailable,
    Limit,
    NodeAbsent,
    NodeFailed,
    NodeSilent,
    ProtocolBroken,
    RequestBroken,
    TooMuchHeld,
)
from marketplace.fabric.floods import UnwantedCallback
from marketplace.fabric.permissions import answering_node, reply_subject, reply_subjects
from node_agent.protocol import (
    ACCEPT_MS_MAX,
    FIRST_TOKEN_MS_MAX,
    IDLE_MS_MAX,
    WALL_MS_MAX,
    Accepted,
    Cancel,
    Credit,
    Delta,
    End,
    Failed,
    Frame,
    Heartbeat,
    NodeId,
    ProtocolError,
    ReplyReader,
    Request,
    control_subject,
    encode,
    request_subject,
)

_log = logging.getLogger(__name__)

IN_FLIGHT_MAX: Final = 20_000
HEARTBEATS_MAX: Final = 2_000
"""More than ten times what ten minutes of silence need; they cost no credit, so they need a limit."""
HELD_BYTES_MAX: Final = 512 * 1024 * 1024
"""Received bytes of all answers whose readers are not done. Streams of 2,000 tokens have some 0.2 MB each."""
DEADLINE_GRACE_MS: Final = 2_000
"""How long after its own deadline a node may still take to say so."""
STREAMS_PER_GAP_MS: Final = 3
"""So far apart, the frames of 18 to 288 streams are 3,000 to 6,000 a second, however fast their engines."""
FRAME_GAPS_MS: Final = (48, 24, 12, 6)
"""The gaps there are.  Nodes send at multiples of them, and each is twice the next, so that frames of streams
with different gaps leave together too (ADR 0044).  Engines seldom write a stream's tokens closer than 6 ms,
and 20 parts a second still read as a flow."""

_ACCEPT: Final[Limit] = "accept"
_FIRST_TOKEN: Final[Limit] = "first_token"  # noqa: S105 - a token of text
_IDLE: Final[Limit] = "idle"
_WALL: Final[Limit] = "wall"

AnswerFrame = Accepted | Delta | Heartbeat | End


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a gateway waits, in ms. The protocol's numbers; tests shorten them.

    The limit of the first token is for streams: for other buyers the node gathers the whole answer first,
    and vouches for its engine with heartbeats.
    """

    accept_ms: int = ACCEPT_MS_MAX
    first_token_ms: int = FIRST_TOKEN_MS_MAX
    idle_ms: int = IDLE_MS_MAX
    wall_ms: int = WALL_MS_MAX
    held_bytes: int = HELD_BYTES_MAX


FrameCallback = Callable[[Frame], None]
Passage = Callable[[Delta], bool]
"""Takes a delta where it arrives, or says False and leaves it for the reply's reader."""


class Witness(Protocol):
    """Somebody who looks at a few answers as they pass (`marketplace.reputation`)."""

    def watch(self, node: NodeId, request: Request) -> FrameCallback | None:
        """Give what is to be called with each frame of the answer, None for an answer nobody looks at.

        It runs in the read loop: it must be quick, keep little, and not raise.
        """
        ...


class Reply:
    """The answer to one request: frames in order, then the end or an error.

    `node` and `request_id` say what it answers. One consumer reads it.
    """

    __slots__ = (
        "_client",
        "_credit",
        "_error",
        "_frames",
        "_heartbeats",
        "_last_s",
        "_loop",
        "_passage",
        "_reader",
        "_started_s",
        "_timer",
        "_waiter",
        "_wall_s",
        "_watch",
        "had_delta",
        "held_bytes",
        "is_accepted",
        "is_over",
        "is_stream",
        "key",
        "node",
        "request_id",
    )

    def __init__(
        self, client: NodeClient, key: bytes, node: NodeId, request: Request, watch: FrameCallback | None
    ) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._reader = ReplyReader(request.credit)
        self._credit = request.credit
        self._frames: deque[AnswerFrame] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: RequestBroken | None = None
        self._heartbeats = 0
        self._watch = watch
        self._passage: Passage | None = None
        self.is_stream = request.stream
        self._started_s = self._last_s = self._loop.time()
        limits = client.limits
        self._wall_s = self._started_s + min(limits.wall_ms, request.deadline_ms + DEADLINE_GRACE_MS) / 1000
        self.key = key
        self.node = node
        self.request_id = request.id
        self.is_accepted = False
        self.had_delta = False
        self.held_bytes = 0
        """Received so far: what is kept of the answer, here and by its reader, is in proportion to it."""
        self.is_over = False
        """Nothing more will arrive; frames may still be waiting to be read."""
        self._timer = self._loop.call_at(self._due()[0], self._check_limits)

    # -- reading

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AnswerFrame:
        """Give the next frame; ends after `End`; raises RequestBroken."""
        frames = self._frames
        if not frames:
            await self._arrival()
            if not frames:
                raise StopAsyncIteration
        frame = frames.popleft()
        self._grant()
        return frame

    async def batch(self) -> list[AnswerFrame]:
        """Give all frames that have arrived, waiting for at least one; empty after `End`.

        For a consumer that would write them out together. Raises RequestBroken.
        """
        if not self._frames:
            await self._arrival()
        frames = list(self._frames)
        self._frames.clear()
        self._grant()
        return frames

    def pass_on(self, passage: Passage) -> None:
        """Have deltas offered to `passage` as they arrive, while nothing waits here before them.

        It spares the reader a wake-up for each.  `passage` runs in the read loop: it must be quick, and it
        must not raise.
        """
        self._passage = passage

    async def _arrival(self) -> None:
        """Return when there are frames or the end; raises the error if that is what comes next."""
        self._grant()
        while not self._frames:
            if self._error is not None:
                raise self._error
            if self.is_over:
                return
            assert self._waiter is None, "a reply has one consumer"
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _grant(self) -> None:
        """Let the node go on once what waits here is at most half a window."""
        if self.is_over or len(self._frames) > self._credit // 2:
            return
        up_to = self._reader.top_up(self._credit)
        if up_to is not None:
            self._client.tell(self.node, Credit(self.request_id, up_to))

    # -- ending early

    def cancel(self) -> None:
        """Stop the node, if it is still at work; later frames are dropped. Harmless when repeated."""
        if not self.is_over:
            self._end()
            self._client.tell(self.node, Cancel(self.request_id))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
        self._client.release(self)

    # -- what the client calls

    def receive(self, payload: bytes) -> None:
        try:
            frame = self._reader.feed(payload)
        except ProtocolError as error:
            self.fail(ProtocolBroken(str(error)), is_node_at_work=True)
            return
        self._last_s = self._loop.time()
        self.held_bytes += len(payload)
        self._client.hold(len(payload))
        if self.is_over:
            return  # it was the longest of too much
        if self._watch is not None:
            self._watch(frame)
        kind = type(frame)
        if kind is Delta:
            self.had_delta = True
            if self._passage is not None and not self._frames and self._passage(frame):  # type: ignore[arg-type]
                self._grant()
                return
        elif kind is Heartbeat:
            self._heartbeats += 1
            if self._heartbeats > HEARTBEATS_MAX:
                self.fail(ProtocolBroken("too many heartbeats"), is_node_at_work=True)
                return
            if self._frames and type(self._frames[-1]) is Heartbeat:
                return  # two in a row say no more than one
        elif kind is Accepted:
            self.is_accepted = True
        elif kind is End:
            self._end()
        elif isinstance(frame, Failed):
            failure = NodeFailed(frame.code, frame.message, is_retriable=frame.is_retriable)
            self.fail(failure, is_node_at_work=False)
            return
        self._frames.append(frame)  # type: ignore[arg-type]  # `Failed` has returned
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, error: RequestBroken, *, is_node_at_work: bool) -> None:
        """End with `error`, telling the node to stop if it may still be at work."""
        if self.is_over:
            return
        error.had_delta = self.had_delta
        self._error = error
        self._end()
        if is_node_at_work:
            self._client.tell(self.node, Cancel(self.request_id))

    def give_up(self, error: RequestBroken) -> None:
        """End with `error` at once, dropping what waits here, even the end of a whole answer."""
        self._frames.clear()
        self.fail(error, is_node_at_work=True)
        error.had_delta = self.had_delta
        self._error = error

    def _end(self) -> None:
        self.is_over = True
        self._timer.cancel()
        self._client.forget(self)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- time

    def _due(self) -> tuple[float, Limit]:
        """When the next limit passes, and which (loop seconds)."""
        limits = self._client.limits
        due_s, limit = self._wall_s, _WALL
        if not self.is_accepted:
            return min((due_s, limit), (self._started_s + limits.accept_ms / 1000, _ACCEPT))
        if not self.had_delta and self.is_stream:
            first_s = self._started_s + limits.first_token_ms / 1000
            due_s, limit = min((due_s, limit), (first_s, _FIRST_TOKEN))
        return min((due_s, limit), (self._last_s + limits.idle_ms / 1000, _IDLE))

    def _check_limits(self) -> None:
        """One timer a request: it looks at the clock when it fires, frames do not touch it."""
        now_s = self._loop.time()
        due_s, limit = self._due()
        if now_s < due_s:
            self._timer = self._loop.call_at(due_s, self._check_limits)
            return
        after_ms = round((now_s - self._started_s) * 1000)
        self.fail(NodeSilent(limit, after_ms), is_node_at_work=True)


class NodeClient:
    """Every request of this process to any node."""

    def __init__(
        self,
        connection: Connection,
        *,
        limits: Limits | None = None,
        on_unwanted: UnwantedCallback | None = None,
        on_absent: Callable[[NodeId], None] | None = None,
    ) -> None:
        """`connection`: of the user `marketplace`; may be shared with other subscribers.

        `on_unwanted`: told of every frame that nobody waits for; `on_absent`: of every node that was asked
        and is not connected.
        """
        self.limits = limits or Limits()
        self.witness: Witness | None = None
        """Who looks at answers as they pass; nobody until set."""
        self.held_bytes = 0
        """Received bytes of all answers whose readers are not done."""
        self._unreleased: set[Reply] = set()
        self._on_unwanted = on_unwanted
        self._on_absent = on_absent
        self._connection = connection
        self._gateway = secrets.token_hex(8)
        self._next = 0
        self._replies: dict[bytes, Reply] = {}
        self._by_request: dict[str, Reply] = {}
        self._sid = b""
        self._streams = 0

    def start(self) -> None:
        self._sid = self._connection.subscribe(
            reply_subjects(self._gateway), self._received, on_absence=self._absent
        )
        self._connection.on_lost(self._lost)

    async def close(self) -> None:
        """Cancel what is still running."""
        for reply in list(self._replies.values()):
            reply.fail(ConnectionLost("this gateway is stopping"), is_node_at_work=True)
        self._connection.unsubscribe(self._sid)

    @property
    def in_flight(self) -> int:
        return len(self._replies)

    @property
    def frame_gap_ms(self) -> int:
        """How far apart a stream's frames should be for this process to keep up with all of them."""
        most_ms = self._streams // STREAMS_PER_GAP_MS
        return next((gap_ms for gap_ms in FRAME_GAPS_MS if gap_ms <= most_ms), 0)

    def request(self, node: NodeId, request: Request) -> Reply:
        """Send `request` to `node`; raises FabricUnavailable if it could not be sent, ValueError for a
        request id already in flight. Use the reply in an `async with`, so that it cannot be left running.
        """
        if request.id in self._by_request:
            raise ValueError("this request id is in flight")
        if len(self._replies) >= IN_FLIGHT_MAX:
            raise FabricUnavailable(f"{IN_FLIGHT_MAX} requests are in flight")
        self._next += 1
        subject = reply_subject(self._gateway, self._next, node)
        self._connection.publish(request_subject(node), encode(request), subject)
        watch = None if self.witness is None else self.witness.watch(node, request)
        reply = Reply(self, subject.encode(), node, request, watch)
        self._replies[reply.key] = reply
        self._streams += request.stream
        self._unreleased.add(reply)
        self._by_request[request.id] = reply
        return reply

    def cancel(self, request_id: str) -> bool:
        """Stop a request; its consumer sees the end of the iteration. False if it is not in flight."""
        reply = self._by_request.get(request_id)
        if reply is None:
            return False
        reply.cancel()
        return True

    # -- what replies call

    def tell(self, node: NodeId, message: Cancel | Credit) -> None:
        """Send a control message if possible: when it is not, the reply is about to fail anyway."""
        try:
            self._connection.publish(control_subject(node), encode(message))
        except FabricUnavailable as error:
            _log.debug("control message not sent: %s", error)

    def hold(self, size: int) -> None:
        """Count received bytes; beyond what may be held the longest answer under way is given up."""
        self.held_bytes += size
        if self.held_bytes > self.limits.held_bytes:
            longest = max(self._unreleased, key=lambda reply: reply.held_bytes)
            self.release(longest)
            longest.give_up(TooMuchHeld("this gateway holds too much at once"))

    def release(self, reply: Reply) -> None:
        """Nothing is kept of this answer any more."""
        if reply in self._unreleased:
            self._unreleased.remove(reply)
            self.held_bytes -= reply.held_bytes

    def forget(self, reply: Reply) -> None:
        self._streams -= self._replies.pop(reply.key, None) is not None and reply.is_stream
        self._by_request.pop(reply.request_id, None)

    # -- what the connection calls

    def _received(self, subject: bytes, reply: bytes, payload: bytes) -> None:
        del reply
        found = self._replies.get(subject)
        if found is not None:
            found.receive(payload)
        elif self._on_unwanted is not None:
            self._on_unwanted(answering_node(subject), len(payload))

    def _absent(self, subject: bytes) -> None:
        found = self._replies.get(subject)
        if found is not None:
            found.fail(NodeAbsent(f"node {found.node} is not connected"), is_node_at_work=False)
            if self._on_absent is not None:
                self._on_absent(found.node)

    def _lost(self) -> None:
        for reply in list(self._replies.values()):
            reply.fail(ConnectionLost("the connection to NATS broke"), is_node_at_work=False)
