"""How much somebody may withdraw, and the check that raises it."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from marketplace.platform.database import transaction
from marketplace.platform.http import AccountIdentity, Refusal, RefusalOut, ServicesDep
from marketplace.platform.identity_checks import CheckStatus, IdentityProvider, IdentityUnavailable
from marketplace.settlement import kyc
from marketplace.settlement.errors import WrongState

router = APIRouter(prefix="/kyc", tags=["operators"])
"""Included by `routes.router`, under /api."""

_GUARDED: Final[dict[int | str, dict[str, Any]]] = {
    401: {"model": RefusalOut, "description": "no valid credential"},
    403: {"model": RefusalOut, "description": "the credential lacks the scope"},
}


class CheckBody(BaseModel):
    """One identity check."""

    id: UUID
    provider: str
    url: str | None = Field(description="where you do it; null while the provider has not answered")
    status: CheckStatus
    reason: str = Field(description="why not, in the provider's words")
    created_at: datetime


class KycStanding(BaseModel):
    """What you may withdraw; null is no limit."""

    tier: str
    withdrawal_max: str | None = Field(description="decimal dollars, at once")
    withdrawal_nano_max: str | None
    total_max: str | None = Field(description="decimal dollars, all withdrawals together")
    total_nano_max: str | None
    checks: list[CheckBody]


@router.get("", responses=_GUARDED)
async def get_kyc(services: ServicesDep, identity: AccountIdentity) -> KycStanding:
    """Your KYC tier, its limits, and your checks."""
    async with transaction(services.engine) as conn:
        tier = await kyc.tier_of(conn, identity.person_id)
        checks = await kyc.checks_of(conn, identity.person_id)
    at_once, total = tier.withdrawal_max, tier.total_max
    return KycStanding(
        tier=tier.name,
        withdrawal_max=None if at_once is None else str(at_once),
        withdrawal_nano_max=None if at_once is None else str(at_once.n),
        total_max=None if total is None else str(total),
        total_nano_max=None if total is None else str(total.n),
        checks=[_body(check) for check in checks],
    )


@router.post(
    "/checks",
    status_code=201,
    responses={
        **_GUARDED,
        404: {"model": RefusalOut, "description": "no provider is set up; an admin reviews by hand"},
        409: {"model": RefusalOut, "description": "verified already"},
        503: {"model": RefusalOut, "description": "the provider does not answer; ask again"},
    },
)
async def start_check(request: Request, services: ServicesDep, identity: AccountIdentity) -> CheckBody:
    """Start a check of your identity, or continue the one under way; do it at its `url`."""
    provider: IdentityProvider | None = getattr(request.app.state, "identity_provider", None)
    if provider is None:
        message = "no identity provider is set up here: write to support, and a person reviews your papers"
        raise Refusal(404, "no_provider", message)
    try:
        async with transaction(services.engine) as conn:
            check = await kyc.ask(
                conn, person=identity.person_id, provider=provider.name, now=services.clock.now()
            )
        # The id is on record first and is the provider's idempotency key: dying here starts no second one.
        made = await provider.start(check_id=check.id, person=identity.person_id)
    except WrongState as e:
        raise Refusal(409, e.code, str(e)) from e
    except IdentityUnavailable as e:
        raise Refusal(503, "provider_unavailable", str(e), retry_after_s=10) from e
    async with transaction(services.engine) as conn:
        await kyc.started(conn, check.id, made, now=services.clock.now())
        found = next(c for c in await kyc.checks_of(conn, identity.person_id) if c.id == check.id)
    return _body(found)


def _body(check: kyc.Check) -> CheckBody:
    return CheckBody(
        id=check.id,
        provider=check.provider,
        url=check.url,
        status=check.status,
        reason=check.reason,
        created_at=check.created_at,
    )
