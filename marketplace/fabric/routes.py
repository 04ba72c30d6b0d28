"""The operators' routes: make an enrolment token, enrol, see and revoke nodes, see why they were chosen."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, Field
from sqlalchemy import select

from marketplace.fabric import enrolment, reports
from marketplace.fabric.live import LiveNode, LiveNodes
from marketplace.fabric.tables import nodes
from marketplace.platform.database import transaction
from marketplace.platform.http import AccountIdentity, Refusal, RefusalOut, ServicesDep
from node_agent.protocol import ENROLL_PATH, EnrollRequest, ProofInvalidError

router = APIRouter(tags=["nodes"])


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": RefusalOut} for status in statuses}


class EnrolmentToken(BaseModel):
    token: str = Field(description="Shown once; works once.")
    expires_at: datetime


class EnrolmentBody(BaseModel):
    """What an agent presents (`node_agent.protocol.EnrollRequest`)."""

    token: str = Field(min_length=1, max_length=200)
    public_key: str = Field(max_length=64, description="Ed25519 nkey of the user kind, `U…`")
    time_ms: int = Field(ge=0, lt=1 << 53)
    signature: str = Field(
        max_length=128, description="Base64 of the signature over purpose, token, key and time"
    )
    agent_version: str = Field(max_length=200)
    name: str = Field(default="", max_length=200)


class EnrolmentAnswer(BaseModel):
    """What the agent keeps (`node_agent.protocol.EnrollReply`)."""

    node_id: str
    nats_url: str
    operator: str


class NodeModel(BaseModel):
    """One model; prices in nano-dollars per million tokens."""

    name: str
    context: int
    price_in_nano_per_million: int
    price_out_nano_per_million: int
    running: int
    waiting: int
    capacity: int
    is_ready: bool
    success_permille: int | None
    latency_ms: int | None


class LiveStatus(BaseModel):
    silent_ms: int = Field(description="Since its last status")
    is_draining: bool
    version: str
    models: list[NodeModel]


class NodeView(BaseModel):
    id: str
    name: str
    public_key: str
    created_at: datetime
    revoked_at: datetime | None
    last_seen_at: datetime | None
    live: LiveStatus | None = Field(description="null when the node has been silent for 60 s")


class NodeList(BaseModel):
    data: list[NodeView]


class LossOut(BaseModel):
    """One reason why requests went to others."""

    reason: str = Field(description="price, latency, load, recent_failure, drawn_lower, or why left out")
    requests: int
    share_permille: int = Field(description="of the decisions in which the node was considered")
    own: int | None = Field(description="the node's number, averaged over these losses")
    winner: int | None = Field(description="the winners' number, averaged over these losses")
    unit: str | None = Field(description="of both numbers")
    message: str = Field(description="one sentence, to be shown as it is")


class ModelReportOut(BaseModel):
    model: str
    considered: int = Field(description="decisions, of those sampled, in which the node was known")
    chosen: int = Field(description="of them, asked first")
    share_permille: int
    lost: list[LossOut]


class NodeReportOut(BaseModel):
    node_id: str
    name: str
    models: list[ModelReportOut]


class OperatorReport(BaseModel):
    hours: int
    since: datetime
    nodes: list[NodeReportOut]


_STATUS_OF: Final = {
    enrolment.NotAnOperator: (403, "not_an_operator"),
    enrolment.TooMany: (409, "too_many"),
    enrolment.TokenRefused: (403, "enrolment_token_refused"),
    enrolment.KeyRefused: (409, "key_refused"),
}


def _refusal(error: enrolment.EnrolmentRefused) -> Refusal:
    status, code = _STATUS_OF[type(error)]
    return Refusal(status, code, str(error))


@router.post("/api/nodes/enrolment-tokens", status_code=201, responses=_refusals(401, 403, 409))
async def make_enrolment_token(services: ServicesDep, identity: AccountIdentity) -> EnrolmentToken:
    """Make a one-use token, good for 60 minutes, with which one machine can enrol as a node of yours."""
    try:
        async with transaction(services.engine) as connection:
            token, expires_at = await enrolment.make_token(
                connection,
                secret=services.settings.secret.get_secret_value().encode(),
                operator_id=identity.person_id,
                now=services.clock.now(),
            )
    except enrolment.EnrolmentRefused as error:
        raise _refusal(error) from error
    return EnrolmentToken(token=token, expires_at=expires_at)


@router.post(ENROLL_PATH, responses=_refusals(400, 403, 409))
async def enroll(services: ServicesDep, body: EnrolmentBody) -> EnrolmentAnswer:
    """Enrol a machine; the token and the signature are the credentials."""
    request = EnrollRequest(**body.model_dump())
    settings = services.settings
    try:
        async with transaction(services.engine) as connection:
            enrolled = await enrolment.enroll(
                connection,
                secret=settings.secret.get_secret_value().encode(),
                request=request,
                now=services.clock.now(),
            )
    except ProofInvalidError as error:
        raise Refusal(403, "proof_invalid", str(error)) from error
    except enrolment.EnrolmentRefused as error:
        raise _refusal(error) from error
    return EnrolmentAnswer(
        node_id=enrolled.node_id,
        nats_url=settings.public_nats_url or settings.nats_url,
        operator=str(enrolled.operator_id),
    )


@router.get("/api/nodes", responses=_refusals(401, 403))
async def list_nodes(services: ServicesDep, identity: AccountIdentity, request: Request) -> NodeList:
    """List your nodes, newest first, with what they last said of themselves."""
    async with transaction(services.engine) as connection:
        rows = (
            await connection.execute(
                select(nodes)
                .where(nodes.c.operator_id == identity.person_id)
                .order_by(nodes.c.id.desc())
                .limit(enrolment.NODES_PER_OPERATOR_MAX)
            )
        ).all()
    live: LiveNodes | None = getattr(request.app.state, "live_nodes", None)
    return NodeList(
        data=[
            NodeView(
                id=row.id,
                name=row.name,
                public_key=row.public_key,
                created_at=row.created_at,
                revoked_at=row.revoked_at,
                last_seen_at=row.last_seen_at,
                live=_live_status(live.live(row.id)) if live is not None and row.revoked_at is None else None,
            )
            for row in rows
        ]
    )


@router.delete("/api/nodes/{node_id}", status_code=204, responses=_refusals(401, 403, 404))
async def revoke_node(
    services: ServicesDep, identity: AccountIdentity, node_id: Annotated[str, Path(max_length=64)]
) -> None:
    """Revoke a node for ever: it gets no more requests and its connection is cut within 5 s."""
    async with transaction(services.engine) as connection:
        found = await enrolment.revoke(
            connection, operator_id=identity.person_id, node_id=node_id, now=services.clock.now()
        )
    if not found:
        raise Refusal(404, "node_not_found", "you have no such node")


@router.get("/api/operator/report", responses=_refusals(400, 401, 403))
async def report(
    services: ServicesDep,
    identity: AccountIdentity,
    hours: Annotated[int, Query(ge=1, le=reports.HOURS_MAX)] = 24,
) -> OperatorReport:
    """Tell why requests went to your nodes or to others, from a sample of the router's decisions."""
    since = services.clock.now() - timedelta(hours=hours)
    async with transaction(services.engine) as connection:
        found = await reports.read(connection, identity.person_id, since=since)
    return OperatorReport(hours=hours, since=since, nodes=[_node_report(node) for node in found])


def _node_report(node: reports.NodeReport) -> NodeReportOut:
    return NodeReportOut(
        node_id=node.node_id, name=node.name, models=[_model_report(model) for model in node.models]
    )


def _model_report(model: reports.ModelReport) -> ModelReportOut:
    return ModelReportOut(
        model=model.model,
        considered=model.considered,
        chosen=model.chosen,
        share_permille=1000 * model.chosen // model.considered,
        lost=[
            LossOut(
                reason=loss.reason,
                requests=loss.requests,
                share_permille=1000 * loss.requests // model.considered,
                own=loss.own,
                winner=loss.winner,
                unit=loss.unit,
                message=loss.message,
            )
            for loss in model.lost
        ],
    )


def _live_status(node: LiveNode | None) -> LiveStatus | None:
    if node is None:
        return None
    return LiveStatus(
        silent_ms=node.silent_ms,
        is_draining=node.is_draining,
        version=node.version,
        models=[
            NodeModel(
                name=model.name,
                context=model.context,
                price_in_nano_per_million=model.price_in,
                price_out_nano_per_million=model.price_out,
                running=model.running,
                waiting=model.waiting,
                capacity=model.capacity,
                is_ready=model.is_ready,
                success_permille=model.success_permille,
                latency_ms=model.latency_ms,
            )
            for model in node.models
        ],
    )
