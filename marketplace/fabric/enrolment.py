"""How a machine becomes a node.

An operator makes a one-use token; the agent presents it once, with its public key and a signature that
proves it holds the private one.  The token's digest is an HMAC, so the database alone is no use to a
thief; it is consumed by a compare-and-set, so of two presentations one wins (attack row A82).

    EnrolmentRefused
    ├── NotAnOperator
    ├── TooMany              tokens outstanding, or nodes of one operator
    ├── TokenRefused         unknown, used or expired: the caller is not told which
    └── KeyRefused           the key belongs to another node, or to a revoked one
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.fabric.node_ids import node_id_of
from marketplace.fabric.tables import enrolment_tokens, nodes
from marketplace.platform.ids import uuid7
from node_agent.protocol import EnrollRequest, NodeId, verify_enroll_request

TOKEN_LIFE: Final = timedelta(minutes=60)
TOKENS_OUTSTANDING_MAX: Final = 100
"""Unused, unexpired tokens of one operator."""
NODES_PER_OPERATOR_MAX: Final = 1_000
_PREFIX: Final = "enroll-"
_PURPOSE: Final = b"tollway enrolment token v1\n"


class EnrolmentRefused(Exception):
    """Business says no."""


class NotAnOperator(EnrolmentRefused):
    """This person is not an operator, or is frozen."""


class TooMany(EnrolmentRefused):
    """A limit of this module is reached."""


class TokenRefused(EnrolmentRefused):
    """Unknown, used or expired."""


class KeyRefused(EnrolmentRefused):
    """The key belongs to another operator's node, or to a revoked one."""


@dataclass(frozen=True, slots=True)
class Enrolled:
    node_id: NodeId
    operator_id: UUID


async def make_token(
    connection: AsyncConnection, *, secret: bytes, operator_id: UUID, now: datetime
) -> tuple[str, datetime]:
    """Make a one-use token; give it (never seen again) and when it expires."""
    await _require_operator(connection, operator_id)
    await connection.execute(
        delete(enrolment_tokens).where(
            enrolment_tokens.c.operator_id == operator_id,
            enrolment_tokens.c.used_at.is_(None),
            enrolment_tokens.c.expires_at <= now,
        )
    )
    outstanding = await connection.scalar(
        select(func.count())
        .select_from(enrolment_tokens)
        .where(enrolment_tokens.c.operator_id == operator_id, enrolment_tokens.c.used_at.is_(None))
    )
    if (outstanding or 0) >= TOKENS_OUTSTANDING_MAX:
        raise TooMany(f"{TOKENS_OUTSTANDING_MAX} enrolment tokens are waiting to be used")
    token = _PREFIX + secrets.token_urlsafe(32)
    expires_at = now + TOKEN_LIFE
    await connection.execute(
        insert(enrolment_tokens).values(
            digest=_digest(secret, token), operator_id=operator_id, created_at=now, expires_at=expires_at
        )
    )
    return token, expires_at


async def enroll(
    connection: AsyncConnection, *, secret: bytes, request: EnrollRequest, now: datetime
) -> Enrolled:
    """Bind the request's key to the token's operator; raises EnrolmentRefused, ProofInvalidError.

    The same key may come again with a fresh token of the same operator (the first answer was lost):
    it gets the same node.
    """
    verify_enroll_request(request, int(now.timestamp() * 1000))
    digest = _digest(secret, request.token)
    # Lock first: a second presentation waits here, then finds `used_at` set.
    operator_id = await connection.scalar(
        select(enrolment_tokens.c.operator_id)
        .where(
            enrolment_tokens.c.digest == digest,
            enrolment_tokens.c.used_at.is_(None),
            enrolment_tokens.c.expires_at > now,
        )
        .with_for_update()
    )
    if operator_id is None:
        raise TokenRefused("this enrolment token is unknown, used or expired; make a new one")
    await _require_operator(connection, operator_id)
    node_id = await _bind(connection, request, operator_id, now)
    await connection.execute(
        update(enrolment_tokens)
        .where(enrolment_tokens.c.digest == digest)
        .values(used_at=now, node_id=node_id)
    )
    return Enrolled(node_id, operator_id)


async def revoke(connection: AsyncConnection, *, operator_id: UUID, node_id: str, now: datetime) -> bool:
    """Revoke the operator's node for ever; False if he has no such node. Repeating changes nothing.

    Its live connection is cut by `marketplace.fabric.sessions` within 5 s.
    """
    found = await connection.execute(
        update(nodes)
        .where(nodes.c.id == node_id, nodes.c.operator_id == operator_id)
        .values(revoked_at=func.coalesce(nodes.c.revoked_at, now))
    )
    return found.rowcount == 1


async def _bind(
    connection: AsyncConnection, request: EnrollRequest, operator_id: UUID, now: datetime
) -> NodeId:
    owned = await connection.scalar(
        select(func.count())
        .select_from(nodes)
        .where(nodes.c.operator_id == operator_id, nodes.c.revoked_at.is_(None))
    )
    if (owned or 0) >= NODES_PER_OPERATOR_MAX:
        raise TooMany(f"an operator has at most {NODES_PER_OPERATOR_MAX} nodes")
    fresh = node_id_of(uuid7(int(now.timestamp() * 1000)))
    await connection.execute(
        upsert(nodes)
        .values(
            id=fresh,
            operator_id=operator_id,
            name=request.name or fresh,
            public_key=request.public_key,
            created_at=now,
        )
        .on_conflict_do_nothing(index_elements=["public_key"])
    )
    row = (
        await connection.execute(
            select(nodes.c.id, nodes.c.operator_id, nodes.c.revoked_at).where(
                nodes.c.public_key == request.public_key
            )
        )
    ).one()
    if row.operator_id != operator_id or row.revoked_at is not None:
        raise KeyRefused("this key has been used before; let the agent make a new one")
    return NodeId(row.id)


async def _require_operator(connection: AsyncConnection, person_id: UUID) -> None:
    # The table is `marketplace.accounts`' own; the fabric only asks this one question of it.
    found = await connection.scalar(
        text("SELECT is_operator AND frozen_at IS NULL FROM people WHERE id = :id"), {"id": person_id}
    )
    if not found:
        raise NotAnOperator(
            "only an operator in good standing may enrol nodes; POST /api/me/operator makes an account one"
        )


def _digest(secret: bytes, token: str) -> bytes:
    return hmac.new(secret, _PURPOSE + token.encode(), hashlib.sha256).digest()
