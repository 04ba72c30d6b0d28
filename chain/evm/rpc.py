"""Raw JSON-RPC over HTTP: batches, one typed decode, and an error type for each way it can fail.

web3's formatters cost thirty times what the node does (measured 1,200 against 53,000 logs a second),
so bulk reading goes through here and is decoded straight into typed structs.

What fails:
    RpcUnavailable  no connection, a timeout, an HTTP status, an answer over the size limit
    NodeError       (is an RpcUnavailable) the node answered with a JSON-RPC error
    Reverted        the node answered that execution reverted; the message carries the contract's reason
    Malformed       the answer is not JSON-RPC, or not of the shape asked for
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aiohttp
import msgspec

from chain.errors import ChainError, Malformed, Reverted, RpcUnavailable

ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
"""20,000 Transfer logs are 12 MiB; a `blocks` call over 1,000 busy blocks stays below this."""
BATCH_MAX: Final = 100
"""Calls in one HTTP request; public providers refuse more."""
TIMEOUT_S: Final = 20.0
_QUANTITY: Final = re.compile(r"0x[0-9a-fA-F]{1,64}", re.ASCII)
_DATA: Final = re.compile(r"0x(?:[0-9a-fA-F]{2})*", re.ASCII)
_REVERT_STRING: Final = bytes.fromhex("08c379a0")

T = TypeVar("T")


class NodeError(RpcUnavailable):
    """A JSON-RPC error object."""

    def __init__(self, method: str, code: int, message: str) -> None:
        super().__init__(f"{method}: {message} ({code})")
        self.code = code
        self.message = message


class _ErrorObject(msgspec.Struct):
    code: int = 0
    message: str = ""
    data: Any = None


class _Response(msgspec.Struct):
    id: int | None = None
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: _ErrorObject | None = None


_RESPONSES: Final = msgspec.json.Decoder(list[_Response] | _Response)


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a batch."""

    method: str
    params: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a batch: a value, or the error it raises when the value is asked for."""

    method: str
    raw: bytes
    error: ChainError | None

    def value(self, shape: type[T]) -> T:
        """The result, of this shape; raises the call's error, or Malformed."""
        if self.error is not None:
            raise self.error
        return decode(self.raw, shape, self.method)


def decode(raw: bytes, shape: type[T], what: str) -> T:
    """Decode JSON of this shape; Malformed else."""
    try:
        return msgspec.json.decode(raw, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise Malformed(f"{what}: {e}") from e


def quantity(text: str) -> int:
    """Read a JSON-RPC quantity; Malformed if it is not one."""
    if not _QUANTITY.fullmatch(text):
        raise Malformed(f"{text[:80]!r} is not a quantity")
    return int(text, 16)


def data(text: str) -> bytes:
    """Read JSON-RPC data; Malformed if it is not hex bytes."""
    if not _DATA.fullmatch(text):
        raise Malformed(f"{text[:80]!r} is not data")
    return bytes.fromhex(text[2:])


class JsonRpc:
    """One provider.  Opens its connections at first use; `async with` or `aclose()` closes them."""

    def __init__(
        self, url: str, *, timeout_s: float = TIMEOUT_S, answer_bytes_max: int = ANSWER_BYTES_MAX
    ) -> None:
        self.url = url
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._answer_bytes_max = answer_bytes_max
        self._ids = itertools.count(1)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections; the next call would open new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def call(self, method: str, *params: Any, shape: type[T]) -> T:
        """Ask one thing."""
        return (await self.batch([Call(method, params)]))[0].value(shape)

    async def batch(self, calls: Sequence[Call]) -> list[Answer]:
        """Ask up to BATCH_MAX things in one request; answers in the order of the calls.

        Raises only for the request as a whole; each call's own error waits in its answer.
        """
        if not 0 < len(calls) <= BATCH_MAX:
            raise ValueError(f"a batch has 1..{BATCH_MAX} calls, not {len(calls)}")
        first = next(self._ids)
        numbered = [(first, calls[0]), *((next(self._ids), call) for call in calls[1:])]
        body = [
            {"jsonrpc": "2.0", "id": number, "method": call.method, "params": call.params}
            for number, call in numbered
        ]
        received = await self._post(msgspec.json.encode(body if len(body) > 1 else body[0]))
        try:
            decoded = _RESPONSES.decode(received)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
            raise Malformed(f"{self.url} does not answer in JSON-RPC: {e}") from e
        if isinstance(decoded, _Response):
            if len(calls) > 1 and decoded.error is not None:
                raise NodeError("batch", decoded.error.code, decoded.error.message)
            decoded = [decoded]
        by_id = {response.id: response for response in decoded}
        if len(decoded) != len(calls) or by_id.keys() != {number for number, _ in numbered}:
            raise Malformed(f"{self.url} answered other calls than those asked")
        return [_answer(call.method, by_id[number]) for number, call in numbered]

    async def _post(self, body: bytes) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=self._timeout, headers={"content-type": "application/json"}
            )
        try:
            async with self._session.post(self.url, data=body, allow_redirects=False) as response:
                received = bytearray()
                async for chunk in response.content.iter_chunked(1 << 16):
                    received += chunk
                    if len(received) > self._answer_bytes_max:
                        raise RpcUnavailable(f"{self.url} answers over {self._answer_bytes_max} bytes")
                if response.status != 200:
                    raise RpcUnavailable(f"{self.url} answers HTTP {response.status}")
                return bytes(received)
        except TimeoutError as e:
            raise RpcUnavailable(f"{self.url} does not answer within {self._timeout.total} s") from e
        except (aiohttp.ClientError, OSError) as e:
            raise RpcUnavailable(f"{self.url} cannot be reached: {e}") from e


def _answer(method: str, response: _Response) -> Answer:
    if response.error is None:
        return Answer(method, bytes(response.result), None)
    refusal = response.error
    if refusal.code == 3 or "revert" in refusal.message.lower():
        return Answer(method, b"", Reverted(_reason(refusal)))
    return Answer(method, b"", NodeError(method, refusal.code, refusal.message))


def _reason(refusal: _ErrorObject) -> str:
    """The contract's own words (Solidity's Error(string)), else the node's."""
    if isinstance(refusal.data, str) and _DATA.fullmatch(refusal.data):
        returned = bytes.fromhex(refusal.data[2:])
        if returned[:4] == _REVERT_STRING and len(returned) >= 68:
            length = int.from_bytes(returned[36:68])
            return returned[68 : 68 + min(length, 256)].decode(errors="replace")
    return refusal.message[:256]
