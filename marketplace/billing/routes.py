"""Stripe's webhook: checked, read from Stripe, then stored once with what it changes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import APIRouter, Header, Request
from pydantic import SecretStr
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.billing.errors import BadEvent
from marketplace.billing.events import ABOUT_CHECKS, BYTES_MAX, StripeEvent, read_event
from marketplace.billing.tables import stripe_events
from marketplace.platform.database import transaction
from marketplace.platform.http import Refusal, RefusalOut, ServicesDep
from marketplace.platform.identity_checks import IdentityUnavailable, Outcome
from marketplace.platform.settings import Settings

if TYPE_CHECKING:
    from marketplace.billing.stripe_identity import StripeIdentity

router = APIRouter(prefix="/api", tags=["webhooks"])

_REFUSED: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": RefusalOut, "description": "not an event signed by Stripe, too old, or of the other mode"},
    404: {"model": RefusalOut, "description": "Stripe is not set up here"},
    503: {"model": RefusalOut, "description": "Stripe does not answer; it will send the event again"},
}


@dataclass(frozen=True, slots=True)
class StripeDoor:
    """What the webhook needs; lives on `app.state.stripe`."""

    identity: StripeIdentity
    webhook_secret: SecretStr
    on_identity: Callable[[AsyncConnection, Outcome, datetime], Awaitable[None]]
    """Records what an identity check came to, in the event's own transaction."""


def open_door(
    settings: Settings, on_identity: Callable[[AsyncConnection, Outcome, datetime], Awaitable[None]]
) -> StripeDoor | None:
    """Set Stripe up as the settings say; None where they name no key."""
    if not settings.stripe_api_key.get_secret_value():
        return None
    from marketplace.billing.stripe_identity import StripeIdentity

    identity = StripeIdentity(settings.stripe_api_key, api_base=settings.stripe_api_base)
    return StripeDoor(identity, settings.stripe_webhook_secret, on_identity)


@router.post("/webhooks/stripe", status_code=204, responses=_REFUSED)
async def stripe_webhook(
    request: Request,
    services: ServicesDep,
    stripe_signature: Annotated[str, Header(max_length=2000)] = "",
) -> None:
    """Take an event of Stripe's; the same event again changes nothing."""
    door: StripeDoor | None = getattr(request.app.state, "stripe", None)
    if door is None:
        raise Refusal(404, "not_found", "Stripe is not set up here")
    try:
        event = read_event(
            await _body(request),
            stripe_signature,
            secret=door.webhook_secret,
            is_live=door.identity.is_live,
        )
    except BadEvent as e:
        raise Refusal(400, "bad_event", str(e)) from e
    if not event.kind.startswith(ABOUT_CHECKS):
        return
    try:
        outcome = await door.identity.read(event.object_id)
    except IdentityUnavailable as e:
        raise Refusal(503, "provider_unavailable", str(e), retry_after_s=30) from e
    async with transaction(services.engine) as conn:
        if await _is_new(conn, event, services.clock.now()):
            await door.on_identity(conn, outcome, services.clock.now())


async def _body(request: Request) -> bytes:
    parts = bytearray()
    async for part in request.stream():
        parts += part
        if len(parts) > BYTES_MAX:
            raise BadEvent(f"an event of more than {BYTES_MAX} bytes")
    return bytes(parts)


async def _is_new(conn: AsyncConnection, event: StripeEvent, now: datetime) -> bool:
    row = insert(stripe_events).values(id=event.id, kind=event.kind, object_id=event.object_id, at=now)
    stored = await conn.scalar(row.on_conflict_do_nothing().returning(stripe_events.c.id))
    return stored is not None
