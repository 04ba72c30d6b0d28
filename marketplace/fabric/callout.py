"""Who may connect to NATS as a node: the answer to the server's auth callout.

Admitted is whoever signed this connection's own nonce with the key of a node that is known and not
revoked; he gets `node_permissions` and replaces an older connection of the same node.  Everybody else is
refused, without a reason that would help him.  Our own users (password) never come here.

Every gateway answers, in one queue group.  The server waits for the answer as long as its
`authorization.timeout` (5 s); when we are overrun we stay silent and the agent tries again.
The request's own signature is not checked: only the server can publish into the AUTH account.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Final, Self

from sqlalchemy.exc import SQLAlchemyError

from marketplace.fabric.connection import Connection
from marketplace.fabric.errors import FabricUnavailable
from marketplace.fabric.nkey_jwt import Signer, TokenMalformed, read_claims
from marketplace.fabric.permissions import node_permissions
from marketplace.fabric.sessions import Session, Sessions
from marketplace.platform.clock import Clock
from node_agent.protocol import NodeId, ProofInvalidError, verify_connect_challenge

_log = logging.getLogger(__name__)

SUBJECT: Final = "$SYS.REQ.USER.AUTH"
QUEUE: Final = "callout"
ACCOUNT: Final = "APP"
"""Where admitted nodes live (`marketplace.platform.embedded_nats`)."""
IN_FLIGHT_MAX: Final = 64
_REFUSAL: Final = "not a known node"


@dataclass(frozen=True, slots=True)
class _Knock:
    """What a connection request tells."""

    user_key: str
    """The server's name for this request; the answer must repeat it."""
    session: Session
    public_key: str
    nonce: str
    signature: str

    @classmethod
    def read(cls, token: bytes) -> Self:
        try:
            claims = read_claims(token)["nats"]
            client, options = claims["client_info"], claims["connect_opts"]
            return cls(
                user_key=str(claims["user_nkey"]),
                session=Session(str(claims["server_id"]["id"]), int(client["id"])),
                public_key=str(options.get("nkey", ""))[:100],
                nonce=str(client.get("nonce", ""))[:200],
                signature=str(options.get("sig", ""))[:200],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TokenMalformed(f"an authorization request lacks {error}") from error


class Callout:
    """Answers connection requests until closed."""

    def __init__(self, auth: Connection, sessions: Sessions, signer: Signer, clock: Clock) -> None:
        """`auth`: a connection of the AUTH account's user; `signer`: the issuer the server trusts."""
        self._auth = auth
        self._sessions = sessions
        self._signer = signer
        self._clock = clock
        self._answering: set[asyncio.Task[None]] = set()
        self._sid = b""

    def start(self) -> None:
        self._sid = self._auth.subscribe(SUBJECT, self._knocked, queue=QUEUE)

    async def close(self) -> None:
        self._auth.unsubscribe(self._sid)
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)

    def _knocked(self, subject: bytes, reply: bytes, payload: bytes) -> None:
        del subject
        if len(self._answering) >= IN_FLIGHT_MAX or not reply:
            _log.warning("too many nodes connect at once; one has to try again")
            return
        task = asyncio.create_task(self._answer(reply.decode(), payload))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, reply: str, payload: bytes) -> None:
        try:
            knock = _Knock.read(payload)
            node = await self._admit(knock)
            self._auth.publish(reply, self._response(knock, node).encode())
        except TokenMalformed:
            _log.exception("an authorization request we cannot read")
        except (OSError, SQLAlchemyError, TimeoutError, FabricUnavailable) as error:
            _log.warning("a node's connection stays unanswered: %s", error)

    async def _admit(self, knock: _Knock) -> NodeId | None:
        """Tell which node this is, None if none; the database is asked only after the signature."""
        try:
            verify_connect_challenge(
                public_key=knock.public_key, nonce=knock.nonce, signature=knock.signature
            )
        except ProofInvalidError as error:
            _log.info("refused a connection: %s", error)
            return None
        return await self._sessions.admit(knock.public_key, knock.session)

    def _response(self, knock: _Knock, node: NodeId | None) -> str:
        now_s = int(self._clock.now().timestamp())
        verdict: dict[str, Any] = {"type": "authorization_response", "version": 2}
        if node is None:
            verdict["error"] = _REFUSAL
        else:
            user = {
                "sub": knock.user_key,
                "aud": ACCOUNT,
                "name": node,
                "nats": node_permissions(node),
            }
            verdict["jwt"] = self._signer.sign(user, issued_s=now_s)
        return self._signer.sign(
            {"sub": knock.user_key, "aud": knock.session.server, "nats": verdict}, issued_s=now_s
        )
