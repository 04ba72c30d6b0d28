"""What all settlement routes share: one transaction, refusals answered and documented, inputs, bodies."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import Header, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.errors import BadAddress
from chain.units import Micro, parse_usdc
from marketplace.ledger.errors import InsufficientFunds
from marketplace.platform.database import transaction
from marketplace.platform.http import Identity, Refusal, RefusalOut, Services
from marketplace.settlement.bank import BadIban
from marketplace.settlement.errors import (
    ApprovalRefused,
    KeyReused,
    NotEligible,
    NotFound,
    PlanRefused,
    SettlementRefusal,
    WrongState,
)
from marketplace.settlement.sanctions import Sanctioned
from marketplace.settlement.withdrawals import KEY_CHARACTERS_MAX, PAGE_MAX

Reason = Annotated[str, Field(min_length=1, max_length=1000)]
AmountText = Annotated[str, Field(min_length=1, max_length=24, examples=["25.00", "all"])]
Before = Annotated[UUID | None, Query(description="only those older than this one")]
Limit = Annotated[int, Query(ge=1, le=PAGE_MAX)]
IdempotencyKey = Annotated[
    str, Header(min_length=1, max_length=KEY_CHARACTERS_MAX, description="your own, once per request")
]

_AMOUNT: Final = re.compile(r"\d{1,12}(\.\d{1,6})?", re.ASCII)
"""No exponents, no signs: what cannot be large needs no further limit."""

_ANSWERS: Final[dict[type[SettlementRefusal], int]] = {
    NotEligible: 422,
    KeyReused: 409,
    NotFound: 404,
    WrongState: 409,
    PlanRefused: 409,
    ApprovalRefused: 400,
    Sanctioned: 422,
    BadIban: 400,
}


class Decision(BaseModel):
    """Why; kept for ever."""

    model_config = ConfigDict(extra="forbid")

    reason: Reason


class PayeeBody(BaseModel):
    """Where somebody wants to be paid: one entry of an address book."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    created_at: datetime
    usable_at: datetime = Field(description="end of the cooling time; withdrawals before are refused")
    retired_at: datetime | None


class Page(BaseModel):
    """A page, newest first."""

    has_more: bool = Field(description="ask again with `before` = the last id")


def errors(**reasons: str) -> dict[int | str, dict[str, Any]]:
    """Document refusals: `s404="no such batch"`."""
    always = {"s401": "no valid credential", "s403": "the credential lacks the scope"}
    return {
        int(status[1:]): {"model": RefusalOut, "description": why}
        for status, why in {**always, **reasons}.items()
    }


def asked(what: str) -> dict[int | str, dict[str, Any]]:
    """Document the refusals of a request to be paid; `what` cannot be read else."""
    return errors(
        s400=what,
        s409="the Idempotency-Key was used with other inputs",
        s422="a rule is not met; the code names it and the message says how to meet it",
    )


@asynccontextmanager
async def work(services: Services) -> AsyncIterator[AsyncConnection]:
    """One transaction, with every refusal answered."""
    try:
        async with transaction(services.engine) as conn:
            yield conn
    except SettlementRefusal as e:
        raise Refusal(_ANSWERS.get(type(e), 400), e.code, str(e)) from e
    except BadAddress as e:
        raise Refusal(400, "bad_address", str(e), param="address") from e
    except InsufficientFunds as e:
        raise Refusal(422, "earnings", str(e)) from e


def actor_of(identity: Identity) -> str:
    return f"person:{identity.person_id}"


def parse_amount(text: str) -> Micro | None:
    """Read an amount of USDC; None for `all`; Refusal 400."""
    given = text.strip()
    if given.lower() == "all":
        return None
    if not _AMOUNT.fullmatch(given):
        message = 'amount is a decimal number of USDC with at most 6 decimals, such as "25.00", or "all"'
        raise Refusal(400, "bad_amount", message, param="amount")
    try:
        return parse_usdc(given)
    except ValueError as e:
        raise Refusal(400, "bad_amount", str(e), param="amount") from e
