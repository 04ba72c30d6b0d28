"""Read an engine's OpenAI-compatible stream, with hard limits, into typed events.

The agent always asks for a stream with running usage and token ids, whatever the buyer asked for:
a cut answer then still has a count, and ids are what completions are billed on. Engines that do
not know these options answer 400; the client then asks again without, and remembers what was then served
(not what was refused all the same: a buyer can have an engine quote an option's name).

Nothing here logs what passes through, and error texts go only to the buyer they belong to.
"""

import json
from collections.abc import AsyncGenerator, Iterable
from typing import Any, Final

import aiohttp
import msgspec

from node_agent.engines import (
    EngineBusyError,
    EngineDownError,
    EngineEvent,
    EngineMalformedError,
    EngineRefusedError,
    Usage,
)
from node_agent.load import TEXT_BYTES_MAX, Load, parse_load
from node_agent.protocol import (
    IDLE_MS_MAX,
    MESSAGE_CHARS_MAX,
    NOT_DECODED,
    TOKEN_COUNT_MAX,
    ChoiceDelta,
    ChoiceIndex,
    ShortText,
    TokenId,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)

EVENT_BYTES_MAX: Final = 2 * 1024 * 1024  # one event; the first may carry the prompt's token ids
STREAM_BYTES_MAX: Final = 128 * 1024 * 1024  # a whole answer as JSON; frames have their own, lower limit
ERROR_BYTES_MAX: Final = 64 * 1024
CONNECT_SECONDS_MAX: Final = 5.0
PROBE_SECONDS_MAX: Final = 5.0
WARM_UP_SECONDS_MAX: Final = 120.0
BUSY_STATUSES: Final = (429, 503)
REFUSED_STATUSES: Final = (400, 404, 413, 422)

_DONE: Final = b"[DONE]"
_JSON: Final = {"Content-Type": "application/json", "Accept-Encoding": "identity"}

# What an engine is asked for, fullest first; the next is tried when it refuses the one before.
_Options = dict[str, Any]
_DIALECTS: Final[tuple[_Options, ...]] = (
    {
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "return_token_ids": True,
    },
    {"stream_options": {"include_usage": True}},
    {},
)
_OPTION_NAMES: Final = ("return_token_ids", "continuous_usage_stats", "stream_options", "include_usage")


# -- Server-sent events ---------------------------------------------------------------------------


class EventSplitter:
    """Cut a byte stream into the data of server-sent events."""

    __slots__ = ("_buffer", "_total")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._total = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Give back the events `data` completes; raises `EngineMalformedError` above a limit."""
        self._total += len(data)
        if self._total > STREAM_BYTES_MAX:
            raise EngineMalformedError(f"the engine's answer passes {STREAM_BYTES_MAX} bytes")
        self._buffer += data
        if b"\r" in self._buffer:
            self._buffer = self._buffer.replace(b"\r\n", b"\n")
        *whole, rest = self._buffer.split(b"\n\n")
        if len(rest) > EVENT_BYTES_MAX or any(len(event) > EVENT_BYTES_MAX for event in whole):
            raise EngineMalformedError(f"an event of the engine passes {EVENT_BYTES_MAX} bytes")
        self._buffer = bytearray(rest)
        return [data for event in whole if (data := _event_data(bytes(event)))]

    @property
    def is_clean(self) -> bool:
        return not self._buffer.strip()


def _event_data(event: bytes) -> bytes:
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


# -- The chunks, with the frames' own ranges; what is not named here is ignored ------------------------


class _Function(msgspec.Struct):
    name: ShortText | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: ChoiceIndex = 0
    id: ShortText | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    role: ShortText | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None


class _TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[_TopLogprob] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_TokenLogprob] | None = None
    # a text completion's
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    index: ChoiceIndex = 0
    delta: _Delta | None = None
    text: str | None = None
    """A text completion's; a chat's is in `delta`."""
    logprobs: _Logprobs | None = None
    finish_reason: ShortText | None = None
    stop_reason: str | int | None = None
    token_ids: list[TokenId] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Any = None
    prompt_token_ids: list[TokenId] | None = None
    error: Any = None


_chunk_decoder: Final = msgspec.json.Decoder(_Chunk)


def parse_chunk(data: bytes) -> EngineEvent:
    """Give back one chunk, typed; nonsense in `usage` is dropped, elsewhere it raises.

    Errors: `EngineMalformedError`; what the engine reports in an event, by its code: `EngineRefusedError`,
    `EngineBusyError`, else `EngineDownError`.
    """
    chunk = _decode_chunk(data)
    if chunk.error is not None:
        raise _error_event(chunk.error)
    return EngineEvent(
        choices=[_choice(choice) for choice in chunk.choices or ()],
        prompt_token_ids=chunk.prompt_token_ids,
        usage=clean_usage(chunk.usage),
    )


def _decode_chunk(data: bytes) -> _Chunk:
    try:
        return _chunk_decoder.decode(data)
    except NOT_DECODED:
        pass
    try:  # Python's own parser reads NaN and Infinity, which some engines write into `usage`
        return msgspec.convert(json.loads(data), _Chunk)
    except (ValueError, RecursionError) as error:
        raise EngineMalformedError("the engine sent an event that is not a chat completion chunk") from error


def _choice(choice: _Choice) -> ChoiceDelta:
    delta = choice.delta or _Delta()
    return ChoiceDelta(
        index=choice.index,
        role=delta.role,
        content=choice.text if choice.delta is None else delta.content,
        reasoning=delta.reasoning if delta.reasoning is not None else delta.reasoning_content,
        tool_calls=[_tool_call(call) for call in delta.tool_calls] if delta.tool_calls else None,
        logprobs=_logprobs(choice.logprobs),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        token_ids=choice.token_ids,
    )


def _tool_call(call: _ToolCall) -> ToolCallDelta:
    function = call.function or _Function()
    return ToolCallDelta(index=call.index, id=call.id, name=function.name, arguments=function.arguments)


def _logprobs(logprobs: _Logprobs | None) -> list[TokenLogprob] | None:
    if logprobs is None:
        return None
    if logprobs.content is None:
        return _text_logprobs(logprobs)
    return [
        TokenLogprob(
            token=entry.token,
            logprob=entry.logprob,
            bytes=entry.bytes,
            top=[TopLogprob(top.token, top.logprob, top.bytes) for top in entry.top_logprobs or ()],
        )
        for entry in logprobs.content
    ]


def _text_logprobs(logprobs: _Logprobs) -> list[TokenLogprob] | None:
    """Give a text completion's columns as rows; None where they are missing or of different lengths."""
    tokens, chosen = logprobs.tokens or [], logprobs.token_logprobs or []
    tops = logprobs.top_logprobs or [None] * len(tokens)
    if not tokens or not len(tokens) == len(chosen) == len(tops):
        return None
    return [
        TokenLogprob(
            token=token,
            logprob=0.0 if logprob is None else logprob,
            top=[TopLogprob(name, value) for name, value in (top or {}).items()],
        )
        for token, logprob, top in zip(tokens, chosen, tops, strict=True)
    ]


def clean_usage(usage: Any) -> Usage | None:
    """Give back the counts that are counts: negative, fractional, huge or textual ones are dropped (A58)."""
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    return Usage(
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else None,
    )


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= TOKEN_COUNT_MAX else None


def error_text(error: object) -> str:
    """Give back an engine's error in one printable line."""
    if isinstance(error, dict):
        error = error.get("message", error.get("error", error.get("detail", "")))
        if isinstance(error, dict):
            return error_text(error)
    text = " ".join(str(error or "no reason given").split())
    return "".join(c if c.isprintable() else "?" for c in text)[:MESSAGE_CHARS_MAX]


# -- The client -----------------------------------------------------------------------------------


class OpenAIClient:
    """One engine's HTTP interface. Call `close` at the end."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._headers = headers | _JSON
        self._session: aiohttp.ClientSession | None = None
        self._dialect = 0
        self.tells_token_ids = False
        """True once an answer carried them: some engines accept the wish and ignore it."""

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # An engine that inflates a bomb for us is refused, not obeyed (A62).
                auto_decompress=False,
                trust_env=False,
                # An engine may close a kept connection just as a request goes out on it, which would fail
                # the request; engines are near, so a new one costs little.
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=CONNECT_SECONDS_MAX, sock_read=IDLE_MS_MAX / 1000
                ),
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def chat(self, body: dict[str, Any], model: str) -> AsyncGenerator[list[EngineEvent], None]:
        """Run one completion and give back its events, those that arrived together together.

        A body with a `prompt` is a text completion, any other a chat.
        Reading is the back-pressure: while the caller does not ask, the engine's socket fills up.
        Closing the generator drops the connection, which makes vLLM abort the request.
        """
        try:
            async with await self._post(body, model) as response:
                try:
                    async for events in _read(response):
                        self.tells_token_ids = self.tells_token_ids or _has_token_ids(events)
                        yield events
                finally:
                    if not response.content.at_eof():
                        response.close()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineDownError(f"the engine's connection failed ({type(error).__name__})") from error

    async def _post(self, body: dict[str, Any], model: str) -> aiohttp.ClientResponse:
        kept = {name: value for name, value in body.items() if name not in ("stream", *_OPTION_NAMES)}
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        dialect = self._dialect
        while True:
            content = msgspec.json.encode({**kept, "model": model, "stream": True, **_DIALECTS[dialect]})
            response = await self._open().post(
                f"{self.url}{path}", data=content, headers=self._headers, allow_redirects=False
            )
            if response.status == 200:
                self._dialect = max(self._dialect, dialect)
                return response
            text = await _refusal(response)
            is_option = response.status in (400, 422) and any(name in text for name in _OPTION_NAMES)
            if is_option and dialect + 1 < len(_DIALECTS):
                dialect += 1
                continue
            raise _error_of(response.status, text)

    async def probe(self, path: str) -> bytes:
        """Give back what the engine answers under `path`; raises `EngineDownError` unless it is a 200."""
        timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS_MAX)
        try:
            async with self._open().get(
                self.url + path, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status != 200:
                    raise EngineDownError(f"{path} answers {response.status}")
                return await response.content.read(TEXT_BYTES_MAX)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineDownError(f"{path} does not answer ({type(error).__name__})") from error

    async def load(self, model: str) -> Load:
        """How busy the engine is with `model`; zeros if it does not say."""
        try:
            return parse_load((await self.probe("/metrics")).decode(errors="replace"), model)
        except EngineDownError:
            return Load()

    async def context(self, model: str) -> int | None:
        """The engine's context length for `model`, None if it does not say; raises if it lacks the model."""
        try:
            listing = msgspec.json.decode(await self.probe("/v1/models"))
            entries = [entry for entry in listing["data"] if entry["id"] == model]
        except (*NOT_DECODED, KeyError, TypeError) as error:
            raise EngineMalformedError("/v1/models is not a list of models") from error
        if not entries:
            raise EngineRefusedError(f"the engine does not offer the model {model}")
        meta = entries[0].get("meta")  # llama.cpp's place for it, per slot
        told = entries[0].get("max_model_len", meta.get("n_ctx") if isinstance(meta, dict) else None)
        return _count(told)

    async def warm_up(self, model: str) -> None:
        """Generate a few tokens with logprobs; raises `EngineError` unless tokens come.

        `/health` is no proof: vLLM was seen healthy and dead at its first request.
        """
        body = {
            "messages": [{"role": "user", "content": "Say hello."}],
            "max_tokens": 4,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 1,
        }
        seen = 0
        async for events in self.chat(body, model):
            seen += sum(len(event.choices) for event in events)
        if seen == 0:
            raise EngineMalformedError("the warm-up generation gave nothing")


async def _read(response: aiohttp.ClientResponse) -> AsyncGenerator[list[EngineEvent], None]:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise EngineMalformedError("the engine compresses its answer although asked not to")
    splitter = EventSplitter()
    async for data in response.content.iter_any():
        whole = splitter.feed(data)
        is_done = _DONE in whole
        events = [parse_chunk(event) for event in _until_done(whole)]
        if events:
            yield events
        if is_done:
            return
    raise EngineDownError("the engine's answer ended before its end mark")


def _has_token_ids(events: list[EngineEvent]) -> bool:
    return any(choice.token_ids for event in events for choice in event.choices)


def _until_done(events: Iterable[bytes]) -> Iterable[bytes]:
    for event in events:
        if event == _DONE:
            return
        yield event


async def _refusal(response: aiohttp.ClientResponse) -> str:
    body = await response.content.read(ERROR_BYTES_MAX)
    response.close()
    try:
        return error_text(msgspec.json.decode(body))
    except NOT_DECODED:
        return error_text(body.decode(errors="replace"))


def _error_event(error: Any) -> Exception:
    """Tell a refusal from a failure: vLLM begins a stream before it has looked at all of the request.

    Taken for a failure, a bad request would go to the next node and count against every one it reaches.
    """
    status = error.get("code") if isinstance(error, dict) else None
    if status in BUSY_STATUSES or status in REFUSED_STATUSES:
        return _error_of(status, error_text(error))
    return EngineDownError(f"the engine failed in mid-answer: {error_text(error)}"[:MESSAGE_CHARS_MAX])


def _error_of(status: int, text: str) -> Exception:
    if status in BUSY_STATUSES:
        return EngineBusyError(text)
    if status in REFUSED_STATUSES:
        return EngineRefusedError(text)
    return EngineDownError(f"the engine answers {status}: {text}"[:MESSAGE_CHARS_MAX])
