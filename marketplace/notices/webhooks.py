"""A person's webhooks, and how a call proves that it is ours.

A webhook's secret is HMAC(platform's secret, its id): shown to its owner whenever he asks, stored nowhere.
Calls follow the Standard Webhooks form, which has ready-made receivers in most languages:

    webhook-id          the notice's id: the same at every repetition
    webhook-timestamp   Unix seconds of this attempt; receivers refuse old ones
    webhook-signature   v1,base64(HMAC-SHA256(secret, "<id>.<timestamp>.<body>"))
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.notices.calling import require_safe_url
from marketplace.notices.errors import NoSuchWebhook, TooManyWebhooks
from marketplace.notices.tables import webhooks
from marketplace.platform.ids import uuid7

WEBHOOKS_MAX: Final = 5
"""Per person."""
SECRET_PREFIX: Final = "whsec_"  # noqa: S105  how the form marks a secret


async def add_webhook(
    conn: AsyncConnection, person_id: UUID, url: str, *, is_loopback_allowed: bool, now: datetime
) -> UUID:
    """Call `url` with this person's notices from now on; raises UnsafeUrl, TooManyWebhooks."""
    require_safe_url(url, is_loopback_allowed=is_loopback_allowed)
    await conn.execute(text("SELECT 1 FROM people WHERE id = :id FOR NO KEY UPDATE"), {"id": person_id})
    there = await conn.scalar(select(func.count()).where(*_of(person_id)))
    if (there or 0) >= WEBHOOKS_MAX:
        raise TooManyWebhooks(f"{WEBHOOKS_MAX} webhooks are there; remove one")
    webhook_id = uuid7()
    await conn.execute(insert(webhooks).values(id=webhook_id, person_id=person_id, url=url, created_at=now))
    return webhook_id


async def webhooks_of(conn: AsyncConnection, person_id: UUID) -> Sequence[Row[Any]]:
    """A person's webhooks, oldest first."""
    return (await conn.execute(select(webhooks).where(*_of(person_id)).order_by(webhooks.c.id))).all()


async def remove_webhook(conn: AsyncConnection, person_id: UUID, webhook_id: UUID, *, now: datetime) -> None:
    """Call it no more, not even for what waits; raises NoSuchWebhook."""
    removed = await conn.scalar(
        update(webhooks)
        .where(*_of(person_id), webhooks.c.id == webhook_id)
        .values(removed_at=now)
        .returning(webhooks.c.id)
    )
    if removed is None:
        raise NoSuchWebhook(f"there is no webhook {webhook_id} of yours")


async def url_of(conn: AsyncConnection, webhook_id: UUID) -> str | None:
    """Where to call; None once it is removed."""
    return await conn.scalar(
        select(webhooks.c.url).where(webhooks.c.id == webhook_id, webhooks.c.removed_at.is_(None))
    )


def webhook_secret(platform_secret: bytes, webhook_id: UUID) -> str:
    """The secret both sides know, in the form receivers take it."""
    return SECRET_PREFIX + base64.b64encode(_key(platform_secret, webhook_id)).decode()


def signed_headers(
    platform_secret: bytes, webhook_id: UUID, notice_id: UUID, body: bytes, *, unix_s: int
) -> dict[str, str]:
    """The headers of one call."""
    signed = f"{notice_id}.{unix_s}.".encode() + body
    signature = hmac.digest(_key(platform_secret, webhook_id), signed, "sha256")
    return {
        "content-type": "application/json",
        "webhook-id": str(notice_id),
        "webhook-timestamp": str(unix_s),
        "webhook-signature": "v1," + base64.b64encode(signature).decode(),
    }


def _key(platform_secret: bytes, webhook_id: UUID) -> bytes:
    return hmac.digest(platform_secret, b"tollway/webhook/v1/" + webhook_id.bytes, "sha256")


def _of(person_id: UUID) -> tuple[Any, Any]:
    return webhooks.c.person_id == person_id, webhooks.c.removed_at.is_(None)
