"""Delivering what waits in the outbox; `Courier.tick` is one unit of work.

    claim (a transaction)   attempts + 1, and the next try put off: what a killed courier held comes back
    call  (none is open)    e-mail or webhook
    record (a transaction)  delivered; or waiting for the next try; or, after ATTEMPTS_MAX, given up

A claim that another courier has taken over meanwhile is recorded by him: the record names the attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

import msgspec
import structlog
from prometheus_client import Counter
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.notices.calling import Caller
from marketplace.notices.errors import NotDelivered
from marketplace.notices.mail import Mail, Mailer
from marketplace.notices.messages import compose
from marketplace.notices.tables import notice_deliveries, notices
from marketplace.notices.webhooks import signed_headers, url_of
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction

AT_ONCE: Final = 8
CLAIM: Final = timedelta(minutes=2)
"""Longer than any attempt: a call takes at most 10 s, a mail's five steps 20 s each."""
FIRST_WAIT: Final = timedelta(seconds=15)
"""After the first failure; doubled after each, up to WAIT_MAX."""
WAIT_MAX: Final = timedelta(hours=6)
ATTEMPTS_MAX: Final = 16
"""With the waits above: given up after about a day and a half."""
OUTCOMES: Final = Counter("tollway_notice_deliveries", "Attempts, by outcome", ["channel", "outcome"])
_log: Final = structlog.get_logger("marketplace.notices")


@dataclass(frozen=True, slots=True)
class _Delivery:
    """One claimed attempt."""

    id: UUID
    channel: str
    target: str
    attempt: int
    notice_id: UUID
    kind: str
    payload: dict[str, Any]
    at: str


@dataclass(frozen=True, slots=True)
class _Removed:
    """There is nobody to deliver to any more."""


def wait_after(attempt: int) -> timedelta:
    """How long to wait after failed attempt number `attempt` (from 1).

    >>> [str(wait_after(n)) for n in (1, 2, 5, 40)]
    ['0:00:15', '0:00:30', '0:04:00', '6:00:00']
    """
    return min(FIRST_WAIT * (1 << min(attempt - 1, 20)), WAIT_MAX)


class Courier:
    """Delivers notices; any number may work at once."""

    def __init__(
        self, engine: AsyncEngine, clock: Clock, *, mailer: Mailer, caller: Caller, secret: bytes
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._mailer = mailer
        self._caller = caller
        self._secret = secret

    async def tick(self) -> bool:
        """Try up to AT_ONCE deliveries that are due; False if none is."""
        claimed = await self._claim()
        await asyncio.gather(*(self._attempt(delivery) for delivery in claimed))
        return bool(claimed)

    async def _claim(self) -> Sequence[_Delivery]:
        now = self._clock.now()
        t = notice_deliveries.c
        due = (
            select(t.id)
            .where(t.status == "waiting", t.next_at <= now)
            .order_by(t.next_at)
            .limit(AT_ONCE)
            .with_for_update(skip_locked=True)
            .cte("due")  # as a plain subquery it might be planned to run more than once
        )
        statement = (
            update(notice_deliveries)
            .where(t.id == due.c.id, notices.c.id == t.notice_id)
            .values(attempts=t.attempts + 1, next_at=now + CLAIM)
            .returning(
                t.id,
                t.channel,
                t.target,
                t.attempts,
                notices.c.id,
                notices.c.kind,
                notices.c.payload,
                notices.c.at,
            )
        )
        async with transaction(self._engine) as conn:
            rows = (await conn.execute(statement)).all()
        return [
            _Delivery(id_, channel, target, attempt, notice, kind, payload, at.isoformat())
            for id_, channel, target, attempt, notice, kind, payload, at in rows
        ]

    async def _attempt(self, delivery: _Delivery) -> None:
        error: str | None = None
        outcome = "delivered"
        try:
            if isinstance(await self._deliver(delivery), _Removed):
                outcome, error = "given_up", "the webhook was removed"
        except NotDelivered as e:
            outcome, error = "failed", str(e)
        except Exception as e:  # one that cannot be written must not stop the others
            _log.exception("a notice could not be delivered", delivery=str(delivery.id))
            outcome, error = "failed", type(e).__name__
        if outcome == "failed" and delivery.attempt >= ATTEMPTS_MAX:
            outcome = "given_up"
        OUTCOMES.labels(delivery.channel, outcome).inc()
        if error is not None:
            _log.warning(
                "notice", outcome=outcome, channel=delivery.channel, delivery=str(delivery.id), reason=error
            )
        await self._record(delivery, outcome, error)

    async def _deliver(self, delivery: _Delivery) -> _Removed | None:
        match delivery.channel:
            case "email":
                message = compose(delivery.kind, delivery.payload)
                await self._mailer.send(
                    Mail(delivery.target, message.subject, message.text, str(delivery.id))
                )
                return None
            case _:
                return await self._call(delivery)

    async def _call(self, delivery: _Delivery) -> _Removed | None:
        webhook_id = UUID(delivery.target)
        async with transaction(self._engine) as conn:
            url = await url_of(conn, webhook_id)
        if url is None:
            return _Removed()
        body = msgspec.json.encode(
            {"type": delivery.kind, "timestamp": delivery.at, "data": delivery.payload}
        )
        headers = signed_headers(
            self._secret, webhook_id, delivery.notice_id, body, unix_s=int(self._clock.now().timestamp())
        )
        await self._caller.post(url, body, headers)
        return None

    async def _record(self, delivery: _Delivery, outcome: str, error: str | None) -> None:
        now = self._clock.now()
        t = notice_deliveries.c
        is_over = outcome != "failed"
        async with transaction(self._engine) as conn:
            await conn.execute(
                update(notice_deliveries)
                .where(t.id == delivery.id, t.status == "waiting", t.attempts == delivery.attempt)
                .values(
                    status=outcome if is_over else "waiting",
                    ended_at=now if is_over else None,
                    next_at=now if is_over else now + wait_after(delivery.attempt),
                    last_error=error[:500] if error else None,
                )
            )
