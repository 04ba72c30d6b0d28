"""An operator's standing and his disputes; the decisions of admins."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.platform.database import transaction
from marketplace.platform.http import (
    AccountIdentity,
    AdminIdentity,
    Refusal,
    RefusalOut,
    Services,
    ServicesDep,
)
from marketplace.reputation import assess, holds
from marketplace.reputation.errors import DisputeRefused
from marketplace.reputation.standing import GOOD, Finding, Kind, NodeFacts, Severity, State

router = APIRouter(prefix="/api", tags=["reputation"])


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": RefusalOut} for status in statuses}


@asynccontextmanager
async def _work(services: Services) -> AsyncIterator[AsyncConnection]:
    """One transaction, with every refusal answered."""
    try:
        async with transaction(services.engine) as connection:
            yield connection
    except DisputeRefused as error:
        raise Refusal(404 if error.code == "not_open" else 409, error.code, str(error)) from error


class FindingOut(BaseModel):
    """One thing that is not as it should be."""

    kind: Kind
    severity: Severity = Field(description="a strike holds earnings, a warning does not")
    node_id: str
    model: str
    message: str

    @classmethod
    def of(cls, finding: Finding) -> Self:
        return cls(
            kind=finding.kind,
            severity=finding.severity,
            node_id=finding.node_id,
            model=finding.model,
            message=finding.message,
        )


class NodeFactsOut(BaseModel):
    """What is known of one node's offer of one model, within the window."""

    node_id: str
    model: str
    requests: int
    failed: int
    success_permille: int | None
    first_token_ms: int | None = Field(description="mean")
    completions: int
    mean_completion_tokens: int | None
    drifts: int = Field(description="requests whose counts were overstated")
    checks: int = Field(description="answers read again by the reference engine")
    checks_suspicious: int
    offences: int

    @classmethod
    def of(cls, facts: NodeFacts) -> Self:
        lengths = facts.lengths
        return cls(
            node_id=facts.node_id,
            model=facts.model,
            requests=facts.requests,
            failed=facts.failed,
            success_permille=facts.success_permille,
            first_token_ms=facts.first_token_ms,
            completions=lengths.completions,
            mean_completion_tokens=int(lengths.mean) if lengths.completions else None,
            drifts=facts.drifts,
            checks=facts.checks,
            checks_suspicious=facts.suspicious,
            offences=facts.offences,
        )


class DisputeOut(BaseModel):
    id: UUID
    state: Literal["open", "accepted", "rejected"]
    at: datetime
    text: str
    answer: str | None

    @classmethod
    def of(cls, dispute: holds.Dispute) -> Self:
        return cls.model_validate(
            {
                "id": dispute.id,
                "state": dispute.state,
                "at": dispute.at,
                "text": dispute.text,
                "answer": dispute.answer,
            }
        )


class StandingOut(BaseModel):
    """How an operator stands, and why."""

    standing: State = Field(description="held: earnings cannot be withdrawn and no requests come")
    reason: str = Field(description="why it is held; empty otherwise")
    since: datetime | None
    findings: list[FindingOut]
    nodes: list[NodeFactsOut]
    dispute: DisputeOut | None = Field(description="the newest one")


class DisputeBody(BaseModel):
    text: str = Field(min_length=1, max_length=holds.TEXT_CHARACTERS_MAX)


class DecisionBody(BaseModel):
    is_accepted: bool = Field(description="true ends the hold, and forgives what was counted before")
    reason: str = Field(min_length=1, max_length=holds.REASON_CHARACTERS_MAX)


class AdminDispute(DisputeOut):
    operator_id: UUID
    standing: StandingOut


class AdminDisputes(BaseModel):
    data: list[AdminDispute]


@router.get("/operator/standing", responses=_refusals(401, 403))
async def standing(services: ServicesDep, identity: AccountIdentity) -> StandingOut:
    """Tell how you stand, with every reason and the numbers behind it."""
    async with transaction(services.engine) as connection:
        return await _standing(connection, identity.person_id, services.clock.now())


@router.post("/operator/standing/dispute", status_code=201, responses=_refusals(400, 401, 403, 409))
async def dispute(services: ServicesDep, identity: AccountIdentity, body: DisputeBody) -> DisputeOut:
    """Say what is wrong with your hold; a person will decide."""
    async with _work(services) as connection:
        made = await holds.dispute(connection, identity.person_id, body.text, now=services.clock.now())
    return DisputeOut.of(made)


@router.get("/admin/disputes", responses=_refusals(401, 403))
async def list_disputes(
    services: ServicesDep,
    identity: AdminIdentity,
    state: Annotated[Literal["open", "accepted", "rejected"], Query()] = "open",
) -> AdminDisputes:
    """List disputes, oldest first, each with how its operator stands now."""
    del identity
    now = services.clock.now()
    async with transaction(services.engine) as connection:
        found = await holds.disputes(connection, state)
        judged = await assess.standings(connection, now=now)
        data = [
            AdminDispute(
                **DisputeOut.of(one).model_dump(),
                operator_id=one.operator_id,
                standing=await _standing(connection, one.operator_id, now, judged),
            )
            for one in found
        ]
    return AdminDisputes(data=data)


@router.post("/admin/disputes/{dispute_id}/decide", status_code=204, responses=_refusals(400, 401, 403, 404))
async def decide(
    services: ServicesDep, identity: AdminIdentity, dispute_id: UUID, body: DecisionBody
) -> None:
    """Decide a dispute, with a reason the operator reads; on record."""
    async with _work(services) as connection:
        await holds.decide(
            connection,
            dispute_id,
            is_accepted=body.is_accepted,
            actor=f"person:{identity.person_id}",
            reason=body.reason,
            now=services.clock.now(),
        )


async def _standing(
    connection: AsyncConnection,
    operator: UUID,
    now: datetime,
    judged: assess.Judged | None = None,
) -> StandingOut:
    if judged is None:
        judged = await assess.standings(connection, now=now)
    found, facts = judged.get(operator, (GOOD, []))
    newest = (await holds.decided(connection, [operator])).get(operator)
    is_held = newest is not None and not newest.is_good
    last = await holds.last_dispute(connection, operator)
    return StandingOut(
        standing=State.HELD if is_held else State.WARNED if found.findings else State.GOOD,
        reason=newest.reason if newest is not None and is_held else "",
        since=newest.at if newest is not None and is_held else None,
        findings=[FindingOut.of(finding) for finding in found.findings],
        nodes=[NodeFactsOut.of(node) for node in facts],
        dispute=None if last is None else DisputeOut.of(last),
    )
