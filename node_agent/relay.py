"""One request: from the engine's events to numbered frames, within credit and limits.

Events that arrive together leave together, so under load frames carry several tokens and each
keeps its place; a gateway with many streams asks for a gap between frames, in which they gather. For a
buyer who does not stream, the answer is gathered and leaves in as few frames as limits allow. Out of
credit, the engine is not read, which holds it back through its own socket.
The relay ends in exactly one `End` or `Failed`, whatever happens, and then its engine
connection is closed, which is what makes vLLM abort.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final, TypeVar

import msgspec

from node_agent.engines import (
    EngineBusyError,
    EngineDownError,
    EngineEvent,
    EngineMalformedError,
    EngineRefusedError,
    Usage,
)
from node_agent.journal import Entry
from node_agent.protocol import (
    CHOICE_DELTAS_MAX,
    CREDIT_STALL_MS,
    FRAME_BYTES_MAX,
    HEARTBEAT_MS,
    IDLE_MS_MAX,
    MESSAGE_CHARS_MAX,
    NOT_DECODED,
    PIECES_MAX,
    PROMPT_IDS_PER_FRAME,
    REPLY_BYTES_MAX,
    TOKEN_IDS_MAX,
    Accepted,
    ChoiceDelta,
    Delta,
    End,
    Failed,
    FailureCode,
    Frame,
    Heartbeat,
    Request,
    ResponseDigest,
    encode,
    pieces,
)

_T = TypeVar("_T")
Publish = Callable[[bytes], Awaitable[None]]
Chat = Callable[[dict[str, Any], str], AsyncGenerator[list[EngineEvent], None]]

GATHER_BYTES_MAX: Final = 128 * 1024  # of text and ids; leaves room for what surrounds them
TAIL_BYTES_RESERVED: Final = 4 * 1024  # of the reply, so that an end always fits

_log = logging.getLogger(__name__)


class RelayError(Exception):
    """The answer cannot go on; `code` and the text are what the gateway is told."""

    def __init__(self, code: FailureCode, message: str, *, is_retriable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.is_retriable = is_retriable


class Relay:
    """The answering of one request. `run` once; `grant` and `cancel` at any time meanwhile."""

    def __init__(self, request: Request, publish: Publish, *, now_ms: Callable[[], int]) -> None:
        self.request = request
        self._publish = publish
        self._now_ms = now_ms
        self._began = time.monotonic()
        self._sequence = 0
        self._bytes_sent = 0
        self._deltas = 0
        self._credit = request.credit
        self._credit_came = asyncio.Event()
        self._cancelled = False
        self._task: asyncio.Task[Any] | None = None
        self._sending = asyncio.Lock()
        self._last_sent = self._began
        self._usage = Usage()
        self._said = ResponseDigest()
        self._first_token_ms: int | None = None

    @property
    def completion_tokens(self) -> int:
        """What the engine says it generated so far; 0 where it does not say."""
        return self._usage.completion_tokens or 0

    # -- from the gateway -----------------------------------------------------------------

    def grant(self, up_to: int) -> None:
        """Allow `up_to` deltas in all; lower or repeated numbers change nothing."""
        if up_to > self._credit:
            self._credit = up_to
            self._credit_came.set()

    def cancel(self) -> None:
        """Stop at once and abort in the engine."""
        if not self._cancelled and self._task is not None:
            self._task.cancel()
        self._cancelled = True

    # -- the run --------------------------------------------------------------------------

    async def run(self, chat: Chat, engine_model: str) -> Entry:
        """Answer the request; give back what happened. Raises nothing of the engine's or the gateway's."""
        self._task = asyncio.current_task()
        heart = asyncio.create_task(self._beat())
        outcome = "ok"
        try:
            try:
                await self._answer(chat, engine_model)
            finally:
                heart.cancel()
                await asyncio.gather(heart, return_exceptions=True)
        except asyncio.CancelledError:
            if not self._cancelled:
                raise
            outcome = FailureCode.CANCELLED
            await self._fail(FailureCode.CANCELLED, "cancelled", is_retriable=False)
        except Exception as error:
            failure = _as_failure(error)
            outcome = failure.code
            await self._fail(failure.code, str(failure), is_retriable=failure.is_retriable)
        return self._entry(outcome)

    async def _answer(self, chat: Chat, engine_model: str) -> None:
        if self._cancelled:
            raise asyncio.CancelledError
        body = _body_of(self.request)
        await self._send(Accepted)
        try:
            async with asyncio.timeout(self.request.deadline_ms / 1000):
                await self._forward(chat(body, engine_model))
        except TimeoutError as error:
            raise RelayError(FailureCode.DEADLINE, "the deadline passed", is_retriable=False) from error
        usage = self._usage
        engine_ms = self._elapsed_ms()
        await self._send(
            lambda seq: End(seq, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, engine_ms)
        )

    async def _forward(self, answer: AsyncGenerator[list[EngineEvent], None]) -> None:
        gathered = _Gathered()
        gap_s = self.request.frame_gap_ms / 1000
        async with contextlib.aclosing(answer):
            while (events := await _next(answer)) is not None:
                self._note(events)
                if self.request.stream:
                    await self._send_delta(_choices(events), _prompt_ids(events))
                    if gap_s and _goes_on(events):
                        # The engine's next words gather in its socket, and leave with the other streams'.
                        await asyncio.sleep(until_tick(asyncio.get_running_loop().time(), gap_s))
                else:
                    gathered.add(events)
                    if gathered.size > GATHER_BYTES_MAX:
                        await self._send_delta(*gathered.take())
        if not gathered.is_empty:
            await self._send_delta(*gathered.take())

    def _note(self, events: list[EngineEvent]) -> None:
        if self._first_token_ms is None and any(event.choices for event in events):
            self._first_token_ms = self._elapsed_ms()
        for event in events:
            for choice in event.choices:
                self._said.add(choice)
            if event.usage is not None:
                self._usage = _newer(self._usage, event.usage)

    # -- frames ---------------------------------------------------------------------------

    async def _send_delta(self, choices: list[ChoiceDelta], prompt_ids: list[int] | None) -> None:
        """Send one `Delta`, or several if it would pass a frame's limit. Empty ones are not sent."""
        while prompt_ids is not None and len(prompt_ids) > PROMPT_IDS_PER_FRAME:
            await self._send_one_delta([], prompt_ids[:PROMPT_IDS_PER_FRAME])
            prompt_ids = prompt_ids[PROMPT_IDS_PER_FRAME:]
        if choices or prompt_ids:
            await self._send_one_delta(choices, prompt_ids)

    async def _send_one_delta(self, choices: list[ChoiceDelta], prompt_ids: list[int] | None) -> None:
        if _is_too_large(choices, prompt_ids):
            if len(choices) + bool(prompt_ids) < 2:
                raise EngineMalformedError("the engine sent a piece too large for a frame")
            half = len(choices) // 2
            await self._send_one_delta(choices[:half], prompt_ids)
            await self._send_one_delta(choices[half:], None)
            return
        await self._wait_for_credit()
        usage = self._usage
        self._deltas += 1
        await self._send(
            lambda seq: Delta(seq, choices, prompt_ids, usage.prompt_tokens, usage.completion_tokens)
        )

    async def _wait_for_credit(self) -> None:
        while self._deltas >= self._credit:
            self._credit_came.clear()
            try:
                async with asyncio.timeout(CREDIT_STALL_MS / 1000):
                    await self._credit_came.wait()
            except TimeoutError as error:
                raise RelayError(FailureCode.DEADLINE, "no credit came", is_retriable=False) from error

    async def _send(self, make: Callable[[int], Frame]) -> None:
        """Number, encode and publish a frame; the lock keeps numbers and order the same."""
        async with self._sending:
            frame = make(self._sequence)
            data = encode(frame)
            spare = 0 if isinstance(frame, End | Failed) else TAIL_BYTES_RESERVED
            if self._bytes_sent + len(data) > REPLY_BYTES_MAX - spare:
                raise RelayError(
                    FailureCode.BAD_REQUEST, f"the answer passes {REPLY_BYTES_MAX} bytes", is_retriable=False
                )
            self._sequence += 1
            self._bytes_sent += len(data)
            self._last_sent = time.monotonic()
            await self._publish(data)

    async def _fail(self, code: FailureCode, message: str, *, is_retriable: bool) -> None:
        text = message[:MESSAGE_CHARS_MAX]
        try:
            await self._send(lambda seq: Failed(seq, code, text, is_retriable))
        except Exception as error:
            _log.warning("request %s: the end could not be sent (%s)", self.request.id, type(error).__name__)

    async def _beat(self) -> None:
        """Say that we are alive whenever nothing else was said for a while."""
        while True:
            quiet = time.monotonic() - self._last_sent
            if quiet >= HEARTBEAT_MS / 1000:
                if self._sequence > 0:
                    await self._send(Heartbeat)
                quiet = 0.0
            await asyncio.sleep(HEARTBEAT_MS / 1000 - quiet)

    # -- afterwards -----------------------------------------------------------------------

    def _elapsed_ms(self) -> int:
        return int((time.monotonic() - self._began) * 1000)

    def _entry(self, outcome: str) -> Entry:
        return Entry(
            time_ms=self._now_ms(),
            id=self.request.id,
            model=self.request.model,
            outcome=outcome,
            is_stream=self.request.stream,
            prompt_tokens=self._usage.prompt_tokens,
            completion_tokens=self._usage.completion_tokens,
            cached_tokens=self._usage.cached_tokens,
            first_token_ms=self._first_token_ms,
            total_ms=self._elapsed_ms(),
            response_sha256=self._said.digest().hex(),
        )


class _Gathered:
    """An answer in the making, joined per choice."""

    def __init__(self) -> None:
        self.size = 0
        self._events: list[EngineEvent] = []

    @property
    def is_empty(self) -> bool:
        return not self._events

    def add(self, events: list[EngineEvent]) -> None:
        self._events += events
        self.size += sum(_size(choice) for event in events for choice in event.choices)
        self.size += sum(5 * len(event.prompt_token_ids or ()) for event in events)

    def take(self) -> tuple[list[ChoiceDelta], list[int] | None]:
        events, self._events, self.size = self._events, [], 0
        by_index: dict[int, list[ChoiceDelta]] = {}
        for choice in _choices(events):
            by_index.setdefault(choice.index, []).append(choice)
        return [_join(parts) for _, parts in sorted(by_index.items())], _prompt_ids(events)


def _size(choice: ChoiceDelta) -> int:
    """Roughly the bytes a choice takes in a frame, never much less."""
    if choice.logprobs or choice.tool_calls:
        return len(msgspec.msgpack.encode(choice))
    return (
        16 + 3 * (len(choice.content or "") + len(choice.reasoning or "")) + 5 * len(choice.token_ids or ())
    )


def _is_too_large(choices: list[ChoiceDelta], prompt_ids: list[int] | None) -> bool:
    """True if a `Delta` of these would pass a frame's limits; encodes only what comes near them."""
    if len(choices) > CHOICE_DELTAS_MAX or pieces(choices) > PIECES_MAX:
        return True
    if any(len(choice.token_ids or ()) > TOKEN_IDS_MAX for choice in choices):
        return True
    bound = 5 * len(prompt_ids or ())
    for choice in choices:
        text = len(choice.content or "") + len(choice.reasoning or "")
        bound += 2048 + 4 * text + 5 * len(choice.token_ids or ())
        if choice.logprobs or choice.tool_calls or isinstance(choice.stop_reason, str):
            bound += FRAME_BYTES_MAX
    if bound < FRAME_BYTES_MAX:
        return False
    return len(encode(Delta(1 << 30, choices, prompt_ids, 1 << 31, 1 << 31))) > FRAME_BYTES_MAX


def _join(parts: list[ChoiceDelta]) -> ChoiceDelta:
    """One choice out of its pieces; a field no piece had stays None."""
    return ChoiceDelta(
        index=parts[0].index,
        role=next((part.role for part in parts if part.role is not None), None),
        content=_joined([part.content for part in parts]),
        reasoning=_joined([part.reasoning for part in parts]),
        tool_calls=_chained([part.tool_calls for part in parts]),
        logprobs=_chained([part.logprobs for part in parts]),
        finish_reason=next((part.finish_reason for part in reversed(parts) if part.finish_reason), None),
        stop_reason=next(
            (part.stop_reason for part in reversed(parts) if part.stop_reason is not None), None
        ),
        token_ids=_chained([part.token_ids for part in parts]),
    )


def _joined(texts: list[str | None]) -> str | None:
    present = [text for text in texts if text is not None]
    return "".join(present) if present else None


def _chained(lists: "list[list[_T] | None]") -> "list[_T] | None":
    present = [entries for entries in lists if entries is not None]
    return [entry for entries in present for entry in entries] if present else None


def _choices(events: list[EngineEvent]) -> list[ChoiceDelta]:
    return [choice for event in events for choice in event.choices]


def until_tick(now_s: float, gap_s: float) -> float:
    """Seconds to the next multiple of `gap_s` that is at least a tenth of it away.

    A timer may fire a little early: it would otherwise be set again for a moment in which nothing gathers.
    """
    left_s = gap_s - now_s % gap_s
    return left_s if left_s >= gap_s / 10 else left_s + gap_s


def _goes_on(events: list[EngineEvent]) -> bool:
    """Text with more to come: neither vLLM's opening event, before the first token, nor a choice's last."""
    choices = _choices(events)
    return not any(choice.finish_reason for choice in choices) and any(
        choice.content or choice.reasoning or choice.tool_calls or choice.token_ids for choice in choices
    )


def _prompt_ids(events: list[EngineEvent]) -> list[int] | None:
    return next((event.prompt_token_ids for event in events if event.prompt_token_ids), None)


async def _next(answer: AsyncGenerator[list[EngineEvent], None]) -> list[EngineEvent] | None:
    try:
        async with asyncio.timeout(IDLE_MS_MAX / 1000) as limit:
            return await anext(answer, None)
    except TimeoutError as error:
        if limit.expired():
            raise EngineDownError("the engine fell silent") from error
        raise


def _newer(old: Usage, new: Usage) -> Usage:
    """Running counts never shrink; a count that is missing now keeps its last value."""
    return Usage(
        prompt_tokens=_larger(old.prompt_tokens, new.prompt_tokens),
        completion_tokens=_larger(old.completion_tokens, new.completion_tokens),
        cached_tokens=_larger(old.cached_tokens, new.cached_tokens),
    )


def _larger(old: int | None, new: int | None) -> int | None:
    if old is None or new is None:
        return new if old is None else old
    return max(old, new)


def _body_of(request: Request) -> dict[str, Any]:
    if request.kind not in {"chat", "completion"}:
        raise RelayError(
            FailureCode.BAD_REQUEST, f"this node does not do {request.kind!r}", is_retriable=True
        )
    try:
        body = msgspec.json.decode(request.body)
    except NOT_DECODED as error:
        raise RelayError(FailureCode.BAD_REQUEST, "the body is not JSON", is_retriable=False) from error
    if not isinstance(body, dict):
        raise RelayError(FailureCode.BAD_REQUEST, "the body is not a JSON object", is_retriable=False)
    if ("prompt" in body) != (request.kind == "completion"):
        raise RelayError(FailureCode.BAD_REQUEST, f"the body is no {request.kind}", is_retriable=False)
    return body


def _as_failure(error: Exception) -> RelayError:
    match error:
        case RelayError():
            return error
        case EngineBusyError():
            return RelayError(FailureCode.OVERLOADED, str(error), is_retriable=True)
        case EngineRefusedError():
            return RelayError(FailureCode.BAD_REQUEST, str(error), is_retriable=False)
        case EngineDownError():
            return RelayError(FailureCode.ENGINE_DOWN, str(error), is_retriable=True)
        case EngineMalformedError():
            return RelayError(FailureCode.INTERNAL, str(error), is_retriable=True)
        case ConnectionError():
            return RelayError(FailureCode.INTERNAL, "the fabric is gone", is_retriable=True)
        case _:
            _log.exception("a relay failed", exc_info=_without_content(error))
            return RelayError(FailureCode.INTERNAL, "the node agent failed", is_retriable=True)


def _without_content(error: Exception) -> Exception:
    """The same kind of error with its place but not its text, which might quote the request."""
    return RuntimeError(type(error).__name__).with_traceback(error.__traceback__)
