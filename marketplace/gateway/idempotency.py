"""Idempotency keys (B9): a request that is sent again is not served, nor billed, again.

The first request with a key claims it; a later one with the same body gets the first one's answer, byte for
byte, for 24 hours.  The law:

* another body is 409; keys are the buyer's own, so nobody else's are in the way (A76);
* while the first is running, a later one waits, then gets 409 `idempotency_in_progress`;
* a refusal that cost nothing frees the key; a charge never does: an answer that was cut short, was too large
  to keep, or was lost between its charge and its keeping is 409 `idempotency_response_lost`, which names the
  receipt, and is never billed again;
* who takes over from a gateway that died keeps the request's id, which is the charge's key: whatever
  both of them post, the ledger takes one, and the other's buyer is told 409 `idempotency_overtaken`.

Kept answers are content.  They are encrypted with a key derived from the buyer's API key, which we do not
have: the database and our own secrets together do not open them (A77).  Who comes with another of his
API keys is told to use the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn
from uuid import UUID

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from marketplace.gateway.responder import EVENT_STREAM, JSON, Headers, Responder
from marketplace.gateway.session import Session
from marketplace.ledger import usage
from marketplace.ledger.money import ZERO, dollars
from marketplace.platform.database import transaction
from marketplace.platform.http import Refusal
from marketplace.platform.ids import uuid7

_log = logging.getLogger(__name__)

HEADER: Final = b"idempotency-key"
KEY_CHARACTERS_MAX: Final = 255
KEPT_HOURS: Final = 24
RESPONSE_BYTES_MAX: Final = 1024 * 1024
BUYER_BYTES_MAX: Final = 64 * 1024 * 1024
"""Kept answers of one buyer; what comes on top is charged and not kept."""
WAIT_S_MAX: Final = 20.0
WAITING_MAX: Final = 256
LOOK_EVERY_S: Final = 0.25
HEARTBEAT_S: Final = 5.0
ALIVE_S: Final = 20
"""A claim without a heartbeat for this long is nobody's."""
DOUBT_S: Final = 75
"""How long a charge in doubt may still be posted by the gateway that has it (`Billing`)."""
STORE_S_MAX: Final = 5.0
_FAULTS: Final = (SQLAlchemyError, OSError, TimeoutError)
_PURPOSE: Final = b"tollway idempotency v1"
_NONCE_BYTES: Final = 12
_UNREPEATED: Final = (b"x-ratelimit-", b"retry-after")

_CLAIM: Final = text("""
    INSERT INTO idempotency (person_id, key_digest, request_digest, request_id, credential, state, owner,
                             alive_until, expires_at)
    VALUES (:person, :key, :request, :request_id, :credential, 'running', :owner,
            now() + :alive_s * INTERVAL '1 second', now() + :kept_h * INTERVAL '1 hour')
    ON CONFLICT DO NOTHING RETURNING request_id""")
_READ: Final = text("""
    SELECT request_digest, request_id, credential, state, response, alive_until > now() AS is_alive,
           alive_until + :doubt_s * INTERVAL '1 second' > now() AS is_in_doubt, expires_at <= now() AS is_over
    FROM idempotency WHERE person_id = :person AND key_digest = :key FOR UPDATE""")
_TAKE_OVER: Final = text("""
    UPDATE idempotency SET owner = :owner, credential = :credential, request_id = :request_id,
                           alive_until = now() + :alive_s * INTERVAL '1 second'
    WHERE person_id = :person AND key_digest = :key""")
_IS_ANSWERED: Final = text("""
    SELECT EXISTS (SELECT FROM receipts r WHERE r.id = :request_id)
        AND NOT EXISTS (SELECT FROM charges c WHERE c.id = :request_id)""")
"""Hashes are noted before the charge."""
_DROP_HASHES: Final = text("SELECT drop_unbilled_hashes(:request_id)")
_CHARGED: Final = text("""
    UPDATE idempotency SET state = 'charged' WHERE person_id = :person AND key_digest = :key""")
_FORGET: Final = text("DELETE FROM idempotency WHERE person_id = :person AND key_digest = :key")
_MINE: Final = "person_id = :person AND key_digest = :key AND owner = :owner AND state = 'running'"
_KEEP: Final = text(f"""
    UPDATE idempotency SET
        state = CASE WHEN held.bytes + :size <= :buyer_max THEN 'stored' ELSE 'charged' END,
        response = CASE WHEN held.bytes + :size <= :buyer_max THEN CAST(:response AS BYTEA) END,
        response_bytes = CASE WHEN held.bytes + :size <= :buyer_max THEN :size ELSE 0 END
    FROM (SELECT coalesce(sum(response_bytes), 0) AS bytes FROM idempotency WHERE person_id = :person) AS held
    WHERE {_MINE}""")  # noqa: S608 - constants only
_END_CHARGED: Final = text(f"UPDATE idempotency SET state = 'charged' WHERE {_MINE}")  # noqa: S608
_FREE: Final = text(f"DELETE FROM idempotency WHERE {_MINE}")  # noqa: S608
_LEAVE_IN_DOUBT: Final = text(
    f"UPDATE idempotency SET alive_until = now() + :doubt_s * INTERVAL '1 second' WHERE {_MINE}"  # noqa: S608
)
_BEAT: Final = text("""
    UPDATE idempotency SET alive_until = now() + :alive_s * INTERVAL '1 second'
    WHERE owner = :owner AND state = 'running' AND request_id = ANY(:ids)""")
_EXPIRE: Final = text("""
    DELETE FROM idempotency WHERE (person_id, key_digest) IN (
        SELECT person_id, key_digest FROM idempotency WHERE expires_at <= now() LIMIT 1000
        FOR UPDATE SKIP LOCKED)""")


class Kept(msgspec.Struct, array_like=True):
    """An answer as it left."""

    status: int
    headers: list[tuple[bytes, bytes]]
    content_type: bytes
    body: bytes
    is_stream: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """A key that this process is serving the first request of."""

    person_id: UUID
    key_digest: bytes
    request_digest: bytes
    request_id: UUID
    credential: UUID
    cipher: AESGCM


class Held:
    """A responder that remembers what is answered, and keeps the end back until `release`."""

    def __init__(self, inner: Responder) -> None:
        self._inner = inner
        self._head: tuple[int, list[tuple[bytes, bytes]], bytes] | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self._is_stream = False
        self._end: Callable[[], None] | None = None
        self.claim: Claim | None = None

    @property
    def peer(self) -> str:
        return self._inner.peer

    @property
    def path(self) -> bytes:
        return self._inner.path

    @property
    def has_query(self) -> bool:
        return self._inner.has_query

    @property
    def is_gone(self) -> bool:
        return self._inner.is_gone

    @property
    def is_clear(self) -> bool:
        return self._inner.is_clear

    @property
    def is_counted(self) -> bool:
        return self._inner.is_counted

    @property
    def headers(self) -> Mapping[bytes, bytes]:
        return self._inner.headers

    async def read_body(self) -> bytes:
        return await self._inner.read_body()

    def when_gone(self, act: Callable[[], None] | None) -> None:
        self._inner.when_gone(act)

    def answer(self, status: int, headers: Headers, body: bytes, content_type: bytes = JSON) -> None:
        if self._end is None:
            self._head = status, list(headers), content_type
            self._remember(body)
            self._end = lambda: self._inner.answer(status, headers, body, content_type)

    def begin(self, status: int, headers: Headers, content_type: bytes = EVENT_STREAM) -> None:
        self._head, self._is_stream = (status, list(headers), content_type), True
        self._inner.begin(status, headers, content_type)

    async def send(self, data: bytes) -> None:
        self._remember(data)
        await self._inner.send(data)

    def send_now(self, data: bytes) -> None:
        self._remember(data)
        self._inner.send_now(data)

    def end(self, data: bytes = b"") -> None:
        if self._end is None:
            self._remember(data)
            self._end = lambda: self._inner.end(data)

    def _remember(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= RESPONSE_BYTES_MAX:
            self._parts.append(data)
        else:
            self._parts.clear()

    def kept(self) -> Kept | None:
        """Give the whole answer; None while it has no end, or if it is too large to keep."""
        if self._head is None or self._end is None or self._size > RESPONSE_BYTES_MAX:
            return None
        status, headers, content_type = self._head
        headers = [(name, value) for name, value in headers if not name.startswith(_UNREPEATED)]
        return Kept(status, headers, content_type, b"".join(self._parts), self._is_stream)

    def replay(self, kept: Kept) -> None:
        """Answer as the first request was answered."""
        headers = [*kept.headers, (b"idempotent-replayed", b"true")]
        if kept.is_stream:
            self._inner.begin(kept.status, headers, kept.content_type)
            self._end = lambda: self._inner.end(kept.body)
        else:
            self._end = lambda: self._inner.answer(kept.status, headers, kept.body, kept.content_type)

    def release(self) -> None:
        """Let the end go."""
        if self._end is not None:
            self._end()


class Idempotency:
    """The keys of every gateway, in PostgreSQL; `start` to `stop` keeps this process's claims alive."""

    def __init__(self, engine: AsyncEngine, *, secret: bytes, wait_s: float = WAIT_S_MAX) -> None:
        self._engine = engine
        self._secret = secret
        self._wait_s = wait_s
        self._owner = uuid7()
        self._running: set[UUID] = set()
        self._waiting = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._beat(), name="idempotency")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if self._running:
                with contextlib.suppress(*_FAULTS):
                    async with transaction(self._engine) as connection:
                        values = {"owner": self._owner, "ids": list(self._running), "alive_s": ALIVE_S}
                        await connection.execute(_BEAT, values)

    # ---- the first moments of a request

    async def begin(self, held: Held, session: Session) -> bool:
        """Claim the request's key, or answer as the first request with it was answered (True).

        Raises Refusal 400 for a key that is none, 409 as the module says, 503 without a database.
        """
        wanted = self._wanted(held, session)
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._wait_s
        while True:
            try:
                async with transaction(self._engine) as connection:
                    found = await self._look(connection, wanted)
            except _FAULTS as e:
                raise Refusal(503, "ledger_unavailable", "try again", retry_after_s=2) from e
            if isinstance(found, Kept):
                session.status = found.status
                held.replay(found)
                return True
            if found is not None:
                held.claim, session.request_id = found, found.request_id
                self._running.add(found.request_id)
                return False
            if loop.time() >= give_up_at or self._waiting >= WAITING_MAX:
                raise Refusal(
                    409, "idempotency_in_progress",
                    "the first request with this Idempotency-Key is still running; try again",
                    retry_after_s=2,
                )  # fmt: skip
            self._waiting += 1
            try:
                await asyncio.sleep(LOOK_EVERY_S)
            finally:
                self._waiting -= 1

    def _wanted(self, held: Held, session: Session) -> Claim:
        presented = held.headers[HEADER]
        if not 1 <= len(presented) <= KEY_CHARACTERS_MAX or not all(32 < byte < 127 for byte in presented):
            raise Refusal(
                400, "invalid_idempotency_key",
                f"an Idempotency-Key is 1 to {KEY_CHARACTERS_MAX} visible ASCII characters",
            )  # fmt: skip
        assert session.person_id is not None
        assert session.key_id is not None
        person = session.person_id.bytes
        key_digest = hmac.new(self._secret, b"idempotency" + person + presented, hashlib.sha256).digest()
        api_key = held.headers[b"authorization"].partition(b" ")[2].strip()
        return Claim(
            session.person_id,
            key_digest,
            hashlib.sha256(held.path + b"\n" + session.request_sha256).digest(),
            session.request_id,
            session.key_id,
            AESGCM(HKDF(SHA256(), 32, salt=key_digest, info=_PURPOSE).derive(api_key)),
        )

    async def _look(self, connection: AsyncConnection, wanted: Claim) -> Claim | Kept | None:
        """Claim the key, or give what became of it; None while its first request runs."""
        values: dict[str, Any] = {
            "person": wanted.person_id, "key": wanted.key_digest, "request": wanted.request_digest,
            "request_id": wanted.request_id, "credential": wanted.credential, "owner": self._owner,
            "alive_s": ALIVE_S, "kept_h": KEPT_HOURS, "doubt_s": DOUBT_S,
        }  # fmt: skip
        if (await connection.execute(_CLAIM, values)).first() is not None:
            return wanted
        row = (await connection.execute(_READ, values)).one_or_none()
        if row is None:
            return None  # freed this moment
        if row.is_over:
            await connection.execute(_FORGET, values)
            return None
        _check_same(row, wanted)
        if row.state == "stored":
            return _open(row.response, wanted, row.request_id)
        if row.state == "charged":
            await self._lost(connection, row.request_id)
        if row.is_alive or row.request_id in self._running:  # or here, though the database was away for long
            return None
        if row.is_in_doubt and await connection.scalar(_IS_ANSWERED, {"request_id": row.request_id}):
            return None  # whoever answered it may still be charging
        return await self._take_over(connection, row.request_id, wanted, values)

    async def _take_over(
        self, connection: AsyncConnection, request_id: UUID, wanted: Claim, values: dict[str, Any]
    ) -> Claim | None:
        """Go on from a gateway that died, unless it had charged."""
        charge = await usage.find(connection, request_id)
        if charge is not None and (charge.amount != ZERO or charge.status == 200):
            await connection.execute(_CHARGED, values)
            return None  # the next look tells
        if charge is None:
            values["request_id"] = request_id  # else a refusal is on record under it
            await connection.execute(_DROP_HASHES, values)  # ours will be another answer
        await connection.execute(_TAKE_OVER, values)
        return Claim(
            wanted.person_id, wanted.key_digest, wanted.request_digest, values["request_id"],
            wanted.credential, wanted.cipher,
        )  # fmt: skip

    async def _lost(self, connection: AsyncConnection, request_id: UUID) -> NoReturn:
        charge = await usage.find(connection, request_id)
        cost = "?" if charge is None else dollars(charge.amount)
        raise Refusal(
            409, "idempotency_response_lost",
            f"the first request with this Idempotency-Key was charged ${cost} (receipt {request_id}), but "
            "its answer was cut short or is not kept; it is not charged again, use a new key to ask anew",
        )  # fmt: skip

    # ---- its last

    async def finish(self, held: Held, session: Session) -> None:
        """Keep what was answered, or free the key; then let the answer's end go."""
        try:
            if held.claim is not None:
                await asyncio.shield(asyncio.ensure_future(self._end(held.claim, held, session)))
        finally:
            held.release()

    async def _end(self, claim: Claim, held: Held, session: Session) -> None:
        values: dict[str, Any] = {
            "person": claim.person_id, "key": claim.key_digest, "owner": self._owner,
        }  # fmt: skip
        kept = held.kept()
        try:
            async with asyncio.timeout(STORE_S_MAX), transaction(self._engine) as connection:
                if session.usage is not None and session.status == 200 and kept is not None:
                    sealed = _seal(kept, claim)
                    values |= {"response": sealed, "size": len(sealed), "buyer_max": BUYER_BYTES_MAX}
                    await connection.execute(_KEEP, values)
                elif session.usage is not None or session.is_overtaken:
                    await connection.execute(_END_CHARGED, values)
                elif session.is_charged:  # begun, and not known to have ended
                    await connection.execute(_LEAVE_IN_DOUBT, {**values, "doubt_s": DOUBT_S})
                else:
                    await connection.execute(_FREE, values)
        except _FAULTS as e:  # the claim lapses; who comes then finds the charge, or none
            _log.warning(
                "an idempotency key's answer is not kept: %s", type(e).__name__,
                extra={"request_id": str(claim.request_id)},
            )  # fmt: skip
        finally:
            self._running.discard(claim.request_id)


def _check_same(row: Any, wanted: Claim) -> None:
    if row.request_digest != wanted.request_digest:
        raise Refusal(409, "idempotency_key_reused", "this Idempotency-Key was used with another request")
    if row.credential != wanted.credential and row.state == "stored":
        raise Refusal(
            409, "idempotency_other_credential",
            "this Idempotency-Key was used with another of your API keys, which alone opens the kept answer",
        )  # fmt: skip


def _associated(claim: Claim, request_id: UUID) -> bytes:
    return claim.person_id.bytes + claim.key_digest + claim.request_digest + request_id.bytes


def _seal(kept: Kept, claim: Claim) -> bytes:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    plain = msgspec.msgpack.encode(kept)
    return nonce + claim.cipher.encrypt(nonce, plain, _associated(claim, claim.request_id))


def _open(sealed: bytes, wanted: Claim, request_id: UUID) -> Kept:
    try:
        plain = wanted.cipher.decrypt(
            sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _associated(wanted, request_id)
        )
        return msgspec.msgpack.decode(plain, type=Kept)
    except (InvalidTag, msgspec.MsgspecError) as e:
        raise Refusal(
            409, "idempotency_response_lost",
            f"the answer to the first request with this Idempotency-Key (receipt {request_id}) does not open",
        ) from e  # fmt: skip


async def drop_expired(engine: AsyncEngine) -> int:
    """Forget keys older than a day, at most a thousand; how many there were."""
    async with transaction(engine) as connection:
        return (await connection.execute(_EXPIRE)).rowcount
