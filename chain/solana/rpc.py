"""A lean JSON-RPC client for Solana nodes: typed answers, a deadline, a size cap, batches.

Answers are decoded straight into `msgspec` structs that name only the fields we read, so a block of
thousands of transactions costs no more than the balances in it, and an answer of the wrong shape is
`Malformed` instead of a KeyError three calls later.

RpcUnavailable (chain.errors)
└── NodeError     the node answered with a JSON-RPC error; `code`, `message`, `data`
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

import aiohttp
import msgspec

from chain.errors import Malformed, RpcUnavailable

T = TypeVar("T")

RESPONSE_BYTES_MAX: Final = 256 * 1024 * 1024
"""A batch of full mainnet blocks fits; anything above is a broken or hostile provider."""
TIMEOUT_S: Final = 20

PREFLIGHT_FAILURE: Final = -32002
BLOCK_NOT_AVAILABLE: Final = -32004
SLOT_SKIPPED: Final = -32007
LONG_TERM_SLOT_SKIPPED: Final = -32009
BLOCK_STATUS_NOT_AVAILABLE_YET: Final = -32014
"""Codes of `rpc-client-api/src/custom_error.rs`."""


class NodeError(RpcUnavailable):
    """The node answered with a JSON-RPC error."""

    def __init__(self, method: str, code: int, message: str, data: Any = None) -> None:
        super().__init__(f"{method}: {message} ({code})")
        self.code = code
        self.message = message
        self.data = data


class _Error(msgspec.Struct):
    code: int
    message: str
    data: Any = None


class _Reply(msgspec.Struct, Generic[T]):
    id: int | None = None
    result: T | None = None
    error: _Error | None = None


class Context(msgspec.Struct):
    """Slot at which a state question was answered."""

    slot: int


class InContext(msgspec.Struct, Generic[T]):
    """An answer about state."""

    context: Context
    value: T


class AccountState(msgspec.Struct, rename="camel"):
    """An account in encoding base64."""

    lamports: int
    data: tuple[str, str]
    owner: str

    def bytes(self) -> bytes:
        """The account's data; Malformed if it is not base64."""
        try:
            return base64.b64decode(self.data[0], validate=True)
        except ValueError as e:
            raise Malformed("account data is not base64") from e


class SignatureStatus(msgspec.Struct, rename="camel"):
    """How far a transaction has come."""

    slot: int
    err: Any = None
    confirmation_status: str | None = None


class LatestBlockhash(msgspec.Struct, rename="camel"):
    """A blockhash to sign with, and until which height it is good."""

    blockhash: str
    last_valid_block_height: int


class SolanaRpc:
    """One provider.  Owns its HTTP session; use as an async context manager or `close()` it."""

    def __init__(
        self, url: str, *, timeout_s: float = TIMEOUT_S, response_bytes_max: int = RESPONSE_BYTES_MAX
    ) -> None:
        self.url = url
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._limit = response_bytes_max
        self._session: aiohttp.ClientSession | None = None
        self._decoders: dict[Any, msgspec.json.Decoder[Any]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(self, method: str, params: Sequence[Any], shape: type[T]) -> T:
        """Ask one question; NodeError, RpcUnavailable or Malformed.

        `shape` must not be optional; use `ask` where null is an answer.
        """
        answer = await self.ask(method, params, shape)
        if answer is None:
            raise Malformed(f"{method}: null instead of an answer")
        return answer

    async def ask(self, method: str, params: Sequence[Any], shape: type[T]) -> T | None:
        """Ask one question to which null is an answer."""
        body = {"jsonrpc": "2.0", "id": 0, "method": method, "params": params}
        raw = await self._post(msgspec.json.encode(body))
        reply: _Reply[T] = self._decode(raw, _Reply[shape])  # type: ignore[valid-type]  # built at run time
        if reply.error is not None:
            raise NodeError(method, reply.error.code, reply.error.message, reply.error.data)
        return reply.result

    async def batch(
        self, method: str, params: Sequence[Sequence[Any]], shape: type[T]
    ) -> list[T | NodeError]:
        """Ask the same method once per parameter list, in one request; answers in the order asked."""
        if not params:
            return []
        body = [{"jsonrpc": "2.0", "id": i, "method": method, "params": p} for i, p in enumerate(params)]
        raw = await self._post(msgspec.json.encode(body))
        if raw.lstrip()[:1] != b"[":
            refused: _Reply[Any] = self._decode(raw, _Reply[Any])
            error = refused.error or _Error(0, "one answer to a batch")
            raise NodeError(method, error.code, error.message, error.data)
        replies: list[_Reply[T]] = self._decode(raw, list[_Reply[shape]])  # type: ignore[valid-type]  # as above
        by_id = {r.id: r for r in replies}
        if len(by_id) != len(params) or any(i not in by_id for i in range(len(params))):
            raise Malformed(f"{method}: a batch of {len(params)} got {len(replies)} answers")
        answers: list[T | NodeError] = []
        for i in range(len(params)):
            reply = by_id[i]
            if reply.error is not None:
                answers.append(NodeError(method, reply.error.code, reply.error.message, reply.error.data))
            elif reply.result is None:
                answers.append(NodeError(method, 0, "null instead of an answer"))
            else:
                answers.append(reply.result)
        return answers

    def _decode(self, raw: bytes, shape: Any) -> Any:
        decoder = self._decoders.get(shape)
        if decoder is None:
            decoder = self._decoders[shape] = msgspec.json.Decoder(shape)
        try:
            return decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            raise Malformed(f"{self.url}: {e}") from e

    async def _post(self, body: bytes) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(self.url, data=body, headers=headers) as response:
                raw = await self._read(response)
                if response.status != 200 and raw.lstrip()[:1] not in (b"{", b"["):
                    raise RpcUnavailable(f"{self.url}: HTTP {response.status}")
                return raw
        except (TimeoutError, aiohttp.ClientError, OSError) as e:
            raise RpcUnavailable(f"{self.url}: {type(e).__name__} {e}") from e

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in response.content.iter_any():
            size += len(part)
            if size > self._limit:
                raise RpcUnavailable(f"{self.url}: answer over {self._limit} bytes")
            parts.append(part)
        return b"".join(parts)

    # ── the questions more than one module asks ───────────────────────────────────────────────────

    async def account(self, key: str, commitment: str) -> AccountState | None:
        """Account state, or None if it does not exist."""
        options = {"encoding": "base64", "commitment": commitment}
        answer = await self.call("getAccountInfo", [key, options], InContext[AccountState | None])
        return answer.value

    async def accounts(self, keys: Sequence[str], commitment: str) -> list[AccountState | None]:
        """States of at most 100 accounts, in order, at one slot."""
        options = {"encoding": "base64", "commitment": commitment}
        answer = await self.call(
            "getMultipleAccounts", [list(keys), options], InContext[list[AccountState | None]]
        )
        if len(answer.value) != len(keys):
            raise Malformed("getMultipleAccounts: another number of accounts than asked for")
        return answer.value

    async def latest_blockhash(self) -> LatestBlockhash:
        """Newest confirmed blockhash."""
        answer = await self.call(
            "getLatestBlockhash", [{"commitment": "confirmed"}], InContext[LatestBlockhash]
        )
        return answer.value

    async def send(self, raw: bytes) -> str:
        """Send a signed transaction with preflight; gives its signature.

        NodeError if the node refused it, RpcUnavailable if nobody knows what happened.
        """
        options = {"encoding": "base64", "preflightCommitment": "confirmed"}
        return await self.call("sendTransaction", [base64.b64encode(raw).decode(), options], str)

    async def status(self, signature: str) -> SignatureStatus | None:
        """Where the transaction stands, searching all history; None if the node does not know it."""
        options = {"searchTransactionHistory": True}
        answer = await self.call(
            "getSignatureStatuses", [[signature], options], InContext[list[SignatureStatus | None]]
        )
        return answer.value[0] if answer.value else None
