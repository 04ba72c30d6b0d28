"""What all settlement routes share: one transaction, every refusal answered, and documented."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

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


def errors(**reasons: str) -> dict[int | str, dict[str, Any]]:
    """Document refusals: `s404="no such batch"`."""
    always = {"s401": "no valid credential", "s403": "the credential lacks the scope"}
    return {
        int(status[1:]): {"model": RefusalOut, "description": why}
        for status, why in {**always, **reasons}.items()
    }


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
    return parse_usdc(given)
