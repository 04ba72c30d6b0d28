"""How much may leave for whom: tiers as data, and who decided which tier a person has.

A person without a decision has the tier `none`.  A decision is a row with actor and reason, made by an admin
or by a provider's check; the newest counts, the older ones are the journal (K4).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, select, update
from sqlalchemy.dialects.postgresql import distinct_on, insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.units import Micro
from marketplace.ledger.money import Nano, from_micro
from marketplace.notices import outbox
from marketplace.platform.identity_checks import CheckStatus, Outcome, Started
from marketplace.platform.ids import uuid7
from marketplace.settlement.errors import NotFound, WrongState
from marketplace.settlement.tables import identity_checks, kyc, kyc_tiers

NONE: Final = "none"
"""The tier of everybody about whom nothing was decided."""
IDENTITY: Final = "identity"
"""The tier a provider's check gives."""


@dataclass(frozen=True, slots=True)
class Tier:
    """What may be withdrawn; None: no limit."""

    name: str
    withdrawal_max: Nano | None
    total_max: Nano | None
    """Of all withdrawals together, ever."""

    @property
    def is_limited(self) -> bool:
        return self.withdrawal_max is not None or self.total_max is not None


@dataclass(frozen=True, slots=True)
class Check:
    """One check of one person by a provider."""

    id: UUID
    person_id: UUID
    provider: str
    session: str | None
    url: str | None
    status: CheckStatus
    reason: str
    created_at: datetime


async def tiers(conn: AsyncConnection) -> dict[str, Tier]:
    """Every tier in force, by name."""
    newest = (
        select(kyc_tiers).ext(distinct_on(kyc_tiers.c.tier)).order_by(kyc_tiers.c.tier, kyc_tiers.c.id.desc())
    )
    return {
        row.tier: Tier(row.tier, _nano(row.withdrawal_micro_max), _nano(row.total_micro_max))
        for row in await conn.execute(newest)
    }


async def change_tier(
    conn: AsyncConnection,
    tier: str,
    *,
    withdrawal_max: Micro | None,
    total_max: Micro | None,
    actor: str,
    reason: str,
    now: datetime,
) -> None:
    """Put other limits of a tier in force, or a new tier; WrongState where they contradict each other."""
    if withdrawal_max is not None and total_max is not None and withdrawal_max.n > total_max.n:
        raise WrongState(
            f"{withdrawal_max} USDC at once is more than {total_max} USDC in all", code="bad_tier"
        )
    await conn.execute(
        insert(kyc_tiers).values(
            tier=tier,
            withdrawal_micro_max=None if withdrawal_max is None else withdrawal_max.n,
            total_micro_max=None if total_max is None else total_max.n,
            actor=actor,
            reason=reason,
            at=now,
        )
    )


async def tier_of(conn: AsyncConnection, person: UUID) -> Tier:
    """The tier a person has."""
    return (await tiers_of(conn, [person]))[person]


async def tiers_of(conn: AsyncConnection, persons: Collection[UUID]) -> dict[UUID, Tier]:
    """The tier each of these persons has."""
    newest = (
        select(kyc.c.person_id, kyc.c.tier)
        .ext(distinct_on(kyc.c.person_id))
        .where(kyc.c.person_id.in_(persons))
        .order_by(kyc.c.person_id, kyc.c.id.desc())
    )
    known, decided = await tiers(conn), {row.person_id: row.tier for row in await conn.execute(newest)}
    return {person: known[decided.get(person, NONE)] for person in persons}


async def decide(
    conn: AsyncConnection, *, person: UUID, tier: str, reason: str, actor: str, now: datetime
) -> None:
    """Give a person a tier; NotFound if there is no such person or tier.  He is told."""
    if tier not in (known := await tiers(conn)):
        raise NotFound(f"there is no tier {tier!r}; choose one of {', '.join(sorted(known))}")
    row = insert(kyc).values(person_id=person, tier=tier, reason=reason, actor=actor, at=now)
    try:
        await conn.execute(row)
    except IntegrityError as e:
        raise NotFound(f"there is no person {person}") from e
    message = f"Your withdrawals now have the tier {tier!r}: {reason}"
    await outbox.enqueue(conn, "kyc_decided", person, {"message": message}, now=now)


# ── checks by a provider ──────────────────────────────────────────────────────────────────────────────


async def ask(conn: AsyncConnection, *, person: UUID, provider: str, now: datetime) -> Check:
    """Put a check on record before the provider hears of it; one under way is given back instead.

    WrongState if the person needs none any more: his tier is what a check gives, or has no limit.
    """
    tier = await tier_of(conn, person)
    if tier.name == IDENTITY or not tier.is_limited:
        raise WrongState("your identity is verified already")
    row = insert(identity_checks).values(
        id=uuid7(), person_id=person, provider=provider, status=CheckStatus.ASKED.value,
        created_at=now, changed_at=now,
    )  # fmt: skip
    await conn.execute(row.on_conflict_do_nothing())
    t = identity_checks.c
    under_way = select(identity_checks).where(
        t.person_id == person, t.status.in_([CheckStatus.ASKED.value, CheckStatus.OPEN.value])
    )
    return _check((await conn.execute(under_way)).one())


async def started(conn: AsyncConnection, check_id: UUID, made: Started, *, now: datetime) -> None:
    """Note the provider's session of a check; the same again changes nothing."""
    t = identity_checks.c
    await conn.execute(
        update(identity_checks)
        .where(t.id == check_id, t.status == CheckStatus.ASKED.value)
        .values(session=made.session, url=made.url, status=CheckStatus.OPEN.value, changed_at=now)
    )


async def record(conn: AsyncConnection, outcome: Outcome, now: datetime) -> None:
    """Write down what a provider says of a session; who is verified gets the tier `identity`, once.

    A session that is not ours is ignored; a verified one stays verified, whatever comes late.
    """
    t = identity_checks.c
    found = (
        await conn.execute(
            select(identity_checks).where(t.session == outcome.session).with_for_update(key_share=True)
        )
    ).one_or_none()
    if found is None or found.status == CheckStatus.VERIFIED:
        return
    await conn.execute(
        update(identity_checks)
        .where(t.id == found.id)
        .values(status=outcome.status.value, reason=outcome.reason[:500], changed_at=now)
    )
    if outcome.status is CheckStatus.VERIFIED:
        reason = f"identity verified, session {outcome.session}"
        await decide(
            conn, person=found.person_id, tier=IDENTITY, reason=reason, actor=found.provider, now=now
        )


async def checks_of(conn: AsyncConnection, person: UUID) -> list[Check]:
    """A person's newest checks."""
    t = identity_checks.c
    statement = select(identity_checks).where(t.person_id == person).order_by(t.id.desc()).limit(20)
    return [_check(row) for row in await conn.execute(statement)]


def _nano(micro: int | None) -> Nano | None:
    return None if micro is None else from_micro(micro)


def _check(r: Row[Any]) -> Check:
    return Check(
        r.id, r.person_id, r.provider, r.session, r.url, CheckStatus(r.status), r.reason, r.created_at
    )
