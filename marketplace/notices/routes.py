"""A person's notices and webhooks."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from marketplace.notices.calling import URL_CHARACTERS_MAX
from marketplace.notices.errors import NoSuchWebhook, TooManyWebhooks, UnsafeUrl
from marketplace.notices.outbox import enqueue
from marketplace.notices.tables import notice_deliveries, notices
from marketplace.notices.webhooks import add_webhook, remove_webhook, webhook_secret, webhooks_of
from marketplace.platform.database import transaction
from marketplace.platform.http import AccountIdentity, Refusal, RefusalOut, ServicesDep

PAGE_MAX: Final = 200

router: Final = APIRouter(prefix="/api", tags=["notices"])

_ERRORS: Final[dict[int | str, dict[str, object]]] = {
    status: {"model": RefusalOut} for status in (400, 401, 403, 429)
}
_NOT_FOUND: Final[dict[int | str, dict[str, object]]] = {404: {"model": RefusalOut}}


class NewWebhook(BaseModel):
    """A webhook to call."""

    model_config = ConfigDict(extra="forbid")

    url: Annotated[
        str, Field(min_length=8, max_length=URL_CHARACTERS_MAX, examples=["https://example.org/t"])
    ]


class Webhook(BaseModel):
    """A webhook that is called with every notice of yours."""

    id: UUID
    url: str
    secret: str = Field(description="checks `webhook-signature` (Standard Webhooks, HMAC-SHA256)")
    created_at: datetime


class Webhooks(BaseModel):
    """Oldest first."""

    data: list[Webhook]


class Delivery(BaseModel):
    """Where a notice went."""

    channel: str = Field(description="email or webhook")
    target: str = Field(description="the e-mail address, or the webhook's id")
    status: str = Field(description="waiting, delivered or given_up")
    attempts: int
    last_error: str | None
    ended_at: datetime | None


class Notice(BaseModel):
    """Something you were told."""

    id: UUID
    kind: str
    payload: dict[str, Any]
    at: datetime
    deliveries: list[Delivery]


class Notices(BaseModel):
    """Newest first."""

    data: list[Notice]
    next_before: UUID | None = Field(description="give it as `before` for the next page; null on the last")


@router.post("/webhooks", status_code=201, responses=_ERRORS | {409: {"model": RefusalOut}})
async def new_webhook(body: NewWebhook, identity: AccountIdentity, services: ServicesDep) -> Webhook:
    """Have an address of yours called with every notice, signed; https on port 443 only."""
    now = services.clock.now()
    try:
        async with transaction(services.engine) as conn:
            webhook_id = await add_webhook(
                conn,
                identity.person_id,
                body.url,
                is_loopback_allowed=services.settings.is_development,
                now=now,
            )
    except UnsafeUrl as e:
        raise Refusal(400, "unsafe_url", str(e), param="url") from e
    except TooManyWebhooks as e:
        raise Refusal(409, "too_many_webhooks", str(e)) from e
    secret = services.settings.secret.get_secret_value().encode()
    return Webhook(id=webhook_id, url=body.url, secret=webhook_secret(secret, webhook_id), created_at=now)


@router.get("/webhooks", responses=_ERRORS)
async def list_webhooks(identity: AccountIdentity, services: ServicesDep) -> Webhooks:
    """List your webhooks with their secrets."""
    secret = services.settings.secret.get_secret_value().encode()
    async with transaction(services.engine) as conn:
        rows = await webhooks_of(conn, identity.person_id)
    return Webhooks(
        data=[
            Webhook(id=r.id, url=r.url, secret=webhook_secret(secret, r.id), created_at=r.created_at)
            for r in rows
        ]
    )


@router.delete("/webhooks/{webhook_id}", status_code=204, responses=_ERRORS | _NOT_FOUND)
async def delete_webhook(webhook_id: UUID, identity: AccountIdentity, services: ServicesDep) -> None:
    """Call a webhook no more."""
    try:
        async with transaction(services.engine) as conn:
            await remove_webhook(conn, identity.person_id, webhook_id, now=services.clock.now())
    except NoSuchWebhook as e:
        raise Refusal(404, "no_such_webhook", str(e)) from e


@router.post("/webhooks/test", status_code=202, responses=_ERRORS)
async def call_webhooks_for_a_test(identity: AccountIdentity, services: ServicesDep) -> None:
    """Call your webhooks once with a notice of kind `webhook_test`."""
    async with transaction(services.engine) as conn:
        await enqueue(conn, "webhook_test", identity.person_id, {}, now=services.clock.now())


@router.get("/notices", responses=_ERRORS)
async def list_notices(
    identity: AccountIdentity,
    services: ServicesDep,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 50,
    before: UUID | None = None,
) -> Notices:
    """List what you were told, and where it went."""
    statement = (
        select(notices)
        .where(notices.c.person_id == identity.person_id)
        .order_by(notices.c.id.desc())
        .limit(limit + 1)
    )
    if before is not None:
        statement = statement.where(notices.c.id < before)
    async with transaction(services.engine) as conn:
        rows = (await conn.execute(statement)).all()
        page = rows[:limit]
        sent = await conn.execute(
            select(notice_deliveries)
            .where(notice_deliveries.c.notice_id.in_([row.id for row in page]))
            .order_by(notice_deliveries.c.id)
        )
        by_notice: dict[UUID, list[Delivery]] = {}
        for row in sent:
            by_notice.setdefault(row.notice_id, []).append(
                Delivery(
                    channel=row.channel,
                    target=row.target,
                    status=row.status,
                    attempts=row.attempts,
                    last_error=row.last_error,
                    ended_at=row.ended_at,
                )
            )
    data = [
        Notice(id=r.id, kind=r.kind, payload=r.payload, at=r.at, deliveries=by_notice.get(r.id, []))
        for r in page
    ]
    return Notices(data=data, next_before=data[-1].id if len(rows) > limit else None)
