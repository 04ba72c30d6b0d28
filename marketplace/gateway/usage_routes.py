"""What was used, request by request: a page by keyset, a CSV export, one request by its id.

Every row says the seven things of R17 (when, model, tokens, cost in its parts, node, latency, status) and
what the request did to the caller's balance (R50).  A buyer sees what he asked, an operator what he served.
"""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.fabric.node_ids import node_id_of
from marketplace.ledger import usage as ledger_usage
from marketplace.ledger.accounts import buyer as buyer_account
from marketplace.ledger.accounts import find_account, operator_earnings
from marketplace.ledger.charges import Charge
from marketplace.ledger.money import Nano, cost, dollars
from marketplace.metering.counting import CountedOn
from marketplace.platform.http import (
    AS_OF,
    AccountIdentity,
    Identity,
    Refusal,
    RefusalOut,
    Services,
    ServicesDep,
    listings,
)

router = APIRouter(tags=["account"])
REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": RefusalOut} for status in (400, 401, 403, 429)
}
CSV_ROWS_MAX: Final = 100_000
Role = Literal["buyer", "operator"]

_PRICES: Final = text("SELECT id, price_in, price_out FROM price_versions WHERE id = ANY(:ids)")
_OWNERS: Final = text("SELECT id, owner FROM accounts WHERE id = ANY(:ids)")
_ATTEMPTS: Final = text(
    "SELECT attempt, node, model, reason FROM failed_attempts WHERE id = :id ORDER BY attempt, at"
)
_NODES: Final = text("SELECT id, operator_id FROM nodes WHERE id = ANY(:ids)")
_COUNTED_ON: Final = text("SELECT counted_on FROM receipts WHERE id = :id")


class UsageRow(BaseModel):
    """One request: what it was, who served it, what it cost."""

    id: UUID = Field(description="The request's id, and its receipt's")
    timestamp: datetime
    model: str
    status: int
    prompt_tokens: int
    completion_tokens: int
    counted_by: str
    cost: str = Field(description="Dollars, decimal string")
    cost_nano: int
    prompt_cost_nano: int = Field(description="The prompt's part of the cost")
    completion_cost_nano: int = Field(description="The rest; the parts add up exactly")
    price_in: str | None = Field(description="Dollars per million prompt tokens, as charged")
    price_out: str | None
    price_version: int
    operator_nano: int
    platform_nano: int
    balance_impact: str = Field(description="What it did to the caller's balance: dollars, signed")
    balance_impact_nano: int
    operator: UUID | None = Field(description="Who served it; null if nobody did")
    node: UUID | None
    node_id: str | None = Field(description="The same node as everything else names it")
    key_id: UUID | None
    latency_ms: int
    ttft_ms: int | None
    finish_reason: str | None
    stream: bool


class FailedAttempt(BaseModel):
    """A node that was sent the request, prompt and all, and did not answer it to the end."""

    attempt: int = Field(description="1 was asked first")
    node_id: str
    operator: UUID | None
    model: str
    reason: str


class UsageDetail(UsageRow):
    """One request, with how its tokens were counted and who else was asked."""

    counted_on: Literal["ids", "text"] | None = Field(
        description="`ids` the engine sampled, or delivered `text` encoded again; null: nothing served"
    )
    receipt: str | None = Field(description="Where its receipt is")
    failed_attempts: list[FailedAttempt] = Field(
        description="Other nodes that saw the prompt, for its buyer alone; kept for 400 days"
    )


class UsageOut(BaseModel):
    data: list[UsageRow]
    next_before: UUID | None = Field(description="Give this as `before` for the next page; null at the end")


@dataclass(frozen=True, slots=True)
class Wish:
    """Which requests, as the query says."""

    role: Role
    model: str | None
    key_id: UUID | None
    node: UUID | None
    status: int | None
    since: datetime | None
    until: datetime | None

    async def selection(
        self, connection: AsyncConnection, identity: Identity
    ) -> ledger_usage.Selection | None:
        """The ledger's words for it; None where the caller has no account, and so no requests."""
        account_id = await _account(connection, identity, self.role)
        if account_id is None:
            return None
        return ledger_usage.Selection(
            buyer=account_id if self.role == "buyer" else None,
            operator=account_id if self.role == "operator" else None,
            model=self.model,
            key_id=self.key_id,
            node=self.node,
            status=self.status,
            since=self.since,
            until=self.until,
        )


def _wish(
    role: Role = "buyer",
    model: Annotated[str | None, Query(max_length=200)] = None,
    key_id: UUID | None = None,
    node: UUID | None = None,
    status: Annotated[int | None, Query(ge=100, le=599)] = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Wish:
    if (since is not None and since.tzinfo is None) or (until is not None and until.tzinfo is None):
        raise Refusal(400, "invalid_request", "since and until need a time zone, such as a trailing Z")
    return Wish(role, model, key_id, node, status, since, until)


async def _account(connection: AsyncConnection, identity: Identity, role: Role) -> int | None:
    person = str(identity.person_id)
    return await find_account(
        connection, buyer_account(person) if role == "buyer" else operator_earnings(person)
    )


@router.get("/api/usage", responses={**REFUSALS, 200: {"content": {"text/csv": {}}}}, response_model=UsageOut)
async def usage(
    identity: AccountIdentity,
    services: ServicesDep,
    response: Response,
    wish: Annotated[Wish, Depends(_wish)],
    limit: Annotated[int, Query(ge=1, le=ledger_usage.PAGE_ROWS_MAX)] = 100,
    before: UUID | None = None,
    format: Literal["json", "csv"] = "json",  # noqa: A002 - the query's own word
) -> Response | UsageOut:
    """The caller's requests (or, as an operator, those served), newest first, by keyset.

    `format=csv` gives all of the selection, at most 100,000 rows, whatever `limit` says.
    """
    async with listings(services, response) as connection:
        selection = await wish.selection(connection, identity)
        if format == "csv":
            return StreamingResponse(
                _csv(services, selection, wish.role),
                media_type="text/csv; charset=utf-8",
                headers={
                    "Content-Disposition": 'attachment; filename="usage.csv"',
                    AS_OF: response.headers[AS_OF],
                },
            )
        if selection is None:
            return UsageOut(data=[], next_before=None)
        charges = await ledger_usage.page(connection, selection, limit=limit, before=before)
        rows = await _rows(connection, charges, wish.role)
    return UsageOut(data=rows, next_before=charges[-1].id if len(charges) == limit else None)


@router.get("/api/usage/{request_id}", responses={**REFUSALS, 404: {"model": RefusalOut}})
async def one_request(
    request_id: UUID, identity: AccountIdentity, services: ServicesDep, role: Role = "buyer"
) -> UsageDetail:
    """One of the caller's requests (or, as an operator, of those served)."""
    async with services.engine.connect() as connection:
        account = await _account(connection, identity, role)
        charge = await ledger_usage.find(connection, request_id)
        owner = None if charge is None else charge.buyer if role == "buyer" else charge.operator
        if charge is None or owner is None or owner != account:
            raise Refusal(404, "request_not_found", "you have no request of this id")
        (row,) = await _rows(connection, [charge], role)
        counted_on = await connection.scalar(_COUNTED_ON, {"id": request_id})
        attempts = await _failed_attempts(connection, request_id) if role == "buyer" else []
    has_receipt = counted_on is not None or charge.amount.n > 0
    return UsageDetail(
        **row.model_dump(),
        counted_on=None if counted_on is None else _name(CountedOn(counted_on)),
        receipt=f"/api/receipts/{request_id}" if has_receipt else None,
        failed_attempts=attempts,
    )


async def _failed_attempts(connection: AsyncConnection, request_id: UUID) -> list[FailedAttempt]:
    rows = (await connection.execute(_ATTEMPTS, {"id": request_id})).all()
    if not rows:
        return []
    ids = {"ids": [node_id_of(row.node) for row in rows]}
    operators = {row.id: row.operator_id for row in await connection.execute(_NODES, ids)}
    return [
        FailedAttempt(
            attempt=row.attempt, node_id=node_id_of(row.node), model=row.model, reason=row.reason,
            operator=operators.get(node_id_of(row.node)),
        )
        for row in rows
    ]  # fmt: skip


def _name(counted_on: CountedOn) -> Literal["ids", "text"]:
    return "ids" if counted_on is CountedOn.IDS else "text"


# ---- rows


async def _rows(connection: AsyncConnection, charges: Sequence[Charge], role: Role) -> list[UsageRow]:
    versions = {charge.price_version for charge in charges if charge.price_version}
    operators = {charge.operator for charge in charges if charge.operator is not None}
    prices = {
        row.id: (row.price_in, row.price_out)
        for row in await connection.execute(_PRICES, {"ids": list(versions)})
    }
    owners = {row.id: row.owner for row in await connection.execute(_OWNERS, {"ids": list(operators)})}
    return [_row(charge, role, prices.get(charge.price_version), owners) for charge in charges]


def _row(charge: Charge, role: Role, prices: tuple[int, int] | None, owners: dict[int, str]) -> UsageRow:
    amount, share = charge.amount, charge.amount - charge.fee
    prompt = Nano(0)
    if prices is not None:
        prompt = min(
            amount, cost(tokens_in=charge.tok_in, tokens_out=0, price_in=prices[0], price_out=prices[1])
        )
    impact = share.n if role == "operator" else -amount.n
    return UsageRow(
        id=charge.id,
        timestamp=charge.made_at,
        model=charge.model,
        status=charge.status,
        prompt_tokens=charge.tok_in,
        completion_tokens=charge.tok_out,
        counted_by=charge.counted_by.name.lower(),
        cost=dollars(amount),
        cost_nano=amount.n,
        prompt_cost_nano=prompt.n,
        completion_cost_nano=(amount - prompt).n,
        price_in=None if prices is None else dollars(Nano(prices[0])),
        price_out=None if prices is None else dollars(Nano(prices[1])),
        price_version=charge.price_version,
        operator_nano=share.n,
        platform_nano=charge.fee.n,
        balance_impact=dollars(Nano(impact)),
        balance_impact_nano=impact,
        operator=None if charge.operator is None else UUID(owners[charge.operator]),
        node=charge.node,
        node_id=None if charge.node is None else node_id_of(charge.node),
        key_id=charge.key_id if role == "buyer" else None,
        latency_ms=charge.latency_ms,
        ttft_ms=charge.ttft_ms,
        finish_reason=charge.finish,
        stream=charge.stream,
    )


# ---- CSV


async def _csv(
    services: Services, selection: ledger_usage.Selection | None, role: Role
) -> AsyncIterator[bytes]:
    """The selection as CSV, read page by page as it is taken."""
    yield _lines([list(UsageRow.model_fields)])
    before, left = None, CSV_ROWS_MAX if selection is not None else 0
    while left > 0 and selection is not None:
        limit = min(left, ledger_usage.PAGE_ROWS_MAX)
        async with listings(services) as connection:
            charges = await ledger_usage.page(connection, selection, limit=limit, before=before)
            rows = await _rows(connection, charges, role)
        yield _lines([_cell(value) for value in row.model_dump(mode="json").values()] for row in rows)
        if len(charges) < limit:
            return
        before, left = charges[-1].id, left - limit


def _cell(value: object) -> object:
    """A value no spreadsheet takes for a formula: texts of requests can be anything."""
    is_formula = isinstance(value, str) and value[:1] in {"=", "+", "-", "@", "\t", "\r"}
    return f"'{value}" if is_formula and not _is_number(str(value)) else value


def _is_number(text_: str) -> bool:
    return text_.lstrip("-").replace(".", "", 1).isdigit()


def _lines(rows: Iterable[Sequence[object]]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()
