"""What moved the caller's money: an account's statement, a page by keyset, newest first.

A request is one line, as is everything else that moved money: a deposit, a top-up, a refund, a payout.  Each
says what it left; requests that cost nothing are in the usage only.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from marketplace.ledger import statements, usage
from marketplace.ledger.accounts import buyer as buyer_account
from marketplace.ledger.accounts import operator_earnings
from marketplace.ledger.money import ZERO, dollars
from marketplace.ledger.statements import Line
from marketplace.platform.http import AccountIdentity, RefusalOut, ServicesDep, listings

router = APIRouter(tags=["account"])
REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": RefusalOut} for status in (400, 401, 403, 429)
}


class LineOut(BaseModel):
    """One movement."""

    id: UUID = Field(description="Of the request (and its receipt), or of the transfer")
    timestamp: datetime = Field(description="When the request arrived, or the transfer was made")
    kind: str = Field(description="`charge`, or what else it was: `deposit`, `top_up`, `refund`, …")
    amount: str = Field(description="Dollars, signed decimal string")
    amount_nano: int
    balance: str = Field(description="What it left: dollars, signed decimal string")
    balance_nano: int
    reference: str | None = Field(description="The transfer's: a transaction on chain, a payment, a request")
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    status: int | None


class StatementOut(BaseModel):
    balance: str = Field(description="Posted now, dollars; what is held for running requests is in it")
    balance_nano: int
    data: list[LineOut] = Field(description="Newest first; may be empty before the end")
    brought_forward: str = Field(description="The balance before the oldest of these, dollars")
    brought_forward_nano: int
    next_before: UUID | None = Field(description="Give this as `before` for the next page; null at the end")


@router.get("/api/statement", responses=REFUSALS)
async def statement(
    identity: AccountIdentity,
    services: ServicesDep,
    response: Response,
    role: Literal["buyer", "operator"] = "buyer",
    limit: Annotated[int, Query(ge=1, le=usage.PAGE_ROWS_MAX)] = 100,
    before: UUID | None = None,
) -> StatementOut:
    """Everything that moved the caller's balance (or, as an operator, his earnings), with what it left."""
    person = str(identity.person_id)
    account = buyer_account(person) if role == "buyer" else operator_earnings(person)
    async with listings(services, response) as connection:
        found = await statements.page(connection, account, limit=limit, before=before)
    posted = ZERO if found is None else found.balance.posted
    forward = ZERO if found is None else found.brought_forward
    return StatementOut(
        balance=dollars(posted),
        balance_nano=posted.n,
        data=[] if found is None else [_line(line) for line in found.lines],
        brought_forward=dollars(forward),
        brought_forward_nano=forward.n,
        next_before=None if found is None else found.next_before,
    )


def _line(line: Line) -> LineOut:
    return LineOut(
        id=line.id,
        timestamp=line.made_at,
        kind=line.kind,
        amount=dollars(line.amount),
        amount_nano=line.amount.n,
        balance=dollars(line.balance),
        balance_nano=line.balance.n,
        reference=line.ref,
        model=line.model,
        prompt_tokens=line.tok_in,
        completion_tokens=line.tok_out,
        status=line.status,
    )
