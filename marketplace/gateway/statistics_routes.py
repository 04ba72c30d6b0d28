"""Sums of usage by day, model and key, from the daily sums: cheap for the busiest buyer too."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from datetime import UTC, date, timedelta
from typing import Any, Final, Literal, TypeVar
from uuid import UUID

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from marketplace.gateway.usage_rollup import KeyDay, key_days
from marketplace.ledger import usage as ledger_usage
from marketplace.ledger.accounts import buyer as buyer_account
from marketplace.ledger.accounts import find_account, operator_earnings
from marketplace.ledger.money import ZERO, Nano, dollars
from marketplace.platform.http import AccountIdentity, Refusal, RefusalOut, ServicesDep, listings

router = APIRouter(tags=["account"])
REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": RefusalOut} for status in (400, 401, 403, 429)
}
DAYS_MAX: Final = 366
DAYS_DEFAULT: Final = 30
_K = TypeVar("_K", bound=Hashable)


class Sums(BaseModel):
    requests: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    cost: str = Field(description="Dollars, decimal string; for an operator, what he earned")
    cost_nano: int


class DaySums(Sums):
    day: date


class ModelSums(Sums):
    model: str


class KeySums(Sums):
    key_id: UUID


class StatsOut(BaseModel):
    """Sums over whole UTC days, as of the latest roll-up (within a minute)."""

    first: date
    last: date
    totals: Sums
    by_day: list[DaySums] = Field(description="Days with requests, oldest first")
    by_model: list[ModelSums] = Field(description="Dearest first")
    by_key: list[KeySums] = Field(description="Dearest first; empty for an operator")


@dataclass(frozen=True, slots=True)
class _Part:
    """One day's sums of one model or key, whoever keeps them."""

    day: date
    model: str
    requests: int
    failed: int
    tok_in: int
    tok_out: int
    amount: Nano


@router.get("/api/stats", responses=REFUSALS)
async def stats(
    identity: AccountIdentity,
    services: ServicesDep,
    response: Response,
    first: date | None = None,
    last: date | None = None,
    role: Literal["buyer", "operator"] = "buyer",
) -> StatsOut:
    """The caller's usage (or, as an operator, what was served) by day, by model and by key."""
    last = last or services.clock.now().astimezone(UTC).date()
    first = first or last - timedelta(days=DAYS_DEFAULT - 1)
    if not timedelta(0) <= last - first < timedelta(days=DAYS_MAX):
        raise Refusal(
            400, "invalid_request", f"from first to last there are 1 to {DAYS_MAX} days", param="first"
        )
    person, is_buyer = str(identity.person_id), role == "buyer"
    async with listings(services, response) as connection:
        account = await find_account(
            connection, buyer_account(person) if is_buyer else operator_earnings(person)
        )
        days: Iterable[ledger_usage.Day] = ()
        keys: Iterable[KeyDay] = ()
        if account is not None:
            whose = {"buyer": account} if is_buyer else {"operator": account}
            days = await ledger_usage.daily(connection, **whose, first=first, last=last)
            keys = await key_days(connection, buyer=account, first=first, last=last) if is_buyer else ()
    parts = [_part(day, is_buyer=is_buyer) for day in days]
    by_key = _grouped(keys, lambda part: part.key_id)
    return StatsOut(
        first=first,
        last=last,
        totals=Sums(**_summed(parts)),
        by_day=[
            DaySums(day=day, **sums) for day, sums in sorted(_grouped(parts, lambda part: part.day).items())
        ],
        by_model=_dearest(
            ModelSums(model=model, **sums) for model, sums in _grouped(parts, lambda part: part.model).items()
        ),
        by_key=_dearest(KeySums(key_id=key, **sums) for key, sums in by_key.items()),
    )


def _part(day: ledger_usage.Day, *, is_buyer: bool) -> _Part:
    sums = day.totals
    amount = sums.amount if is_buyer else sums.earned
    return _Part(day.day, day.model, sums.requests, day.failed, sums.tok_in, sums.tok_out, amount)


_P = TypeVar("_P", _Part, KeyDay)


def _grouped(parts: Iterable[_P], key: Callable[[_P], _K]) -> dict[_K, dict[str, Any]]:
    groups: dict[_K, list[_P]] = {}
    for part in parts:
        groups.setdefault(key(part), []).append(part)
    return {name: _summed(of_group) for name, of_group in groups.items()}


def _summed(parts: Iterable[_Part] | Iterable[KeyDay]) -> dict[str, Any]:
    requests = failed = tok_in = tok_out = 0
    amount = ZERO
    for part in parts:
        requests += part.requests
        failed += part.failed
        tok_in += part.tok_in
        tok_out += part.tok_out
        amount += part.amount
    return {
        "requests": requests, "failed": failed, "prompt_tokens": tok_in, "completion_tokens": tok_out,
        "cost": dollars(amount), "cost_nano": amount.n,
    }  # fmt: skip


_S = TypeVar("_S", bound=Sums)


def _dearest(sums: Iterable[_S]) -> list[_S]:
    return sorted(sums, key=lambda each: (-each.cost_nano, -each.requests))
