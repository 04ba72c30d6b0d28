"""The outbox: a notice is a row, written in the transaction of what it tells of.

What commits with the event cannot be lost, and what rolls back with it was never told.  Where it goes is
decided in the same moment: to the e-mail address the person has *then* (so the news of a change reaches
the old one) and to each of the webhooks there are then.  `delivery` carries it out, at least once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.notices.messages import compose
from marketplace.notices.tables import notice_deliveries, notices, webhooks
from marketplace.platform.database import is_among
from marketplace.platform.ids import uuid7

_EMAILS: Final = text(
    "SELECT id, email FROM people WHERE id = ANY(CAST(:people AS UUID[])) AND email IS NOT NULL"
)


async def enqueue(
    conn: AsyncConnection,
    kind: str,
    person_id: UUID,
    payload: Mapping[str, Any],
    *,
    now: datetime,
) -> UUID:
    """Leave a notice for a person; gives its id.  Never commits.

    `payload` is JSON: amounts as decimal strings.  Raises KeyError if `messages` has no such kind, or the
    payload lacks a field of its text: found in the transaction that writes it, not days later.
    """
    (notice_id,) = await enqueue_all(conn, kind, [(person_id, payload)], now=now)
    return notice_id


async def enqueue_all(
    conn: AsyncConnection, kind: str, told: Sequence[tuple[UUID, Mapping[str, Any]]], *, now: datetime
) -> list[UUID]:
    """`enqueue` for many people, in as few statements; gives the notices' ids in the order of `told`."""
    if not told:
        return []
    people = list({person_id for person_id, _ in told})
    made = [(uuid7(), person_id) for person_id, _ in told]
    rows = []
    for (notice_id, person_id), (_, payload) in zip(made, told, strict=True):
        compose(kind, payload)
        rows.append(
            {"id": notice_id, "kind": kind, "person_id": person_id, "payload": dict(payload), "at": now}
        )
    await conn.execute(insert(notices), rows)
    targets: dict[UUID, list[tuple[str, str]]] = {person_id: [] for person_id in people}
    there = select(webhooks.c.id, webhooks.c.person_id).where(
        is_among(webhooks.c.person_id, people), webhooks.c.removed_at.is_(None)
    )
    for webhook in await conn.execute(there):
        targets[webhook.person_id].append(("webhook", str(webhook.id)))
    if kind != "webhook_test":
        for person in await conn.execute(_EMAILS, {"people": people}):
            targets[person.id].append(("email", person.email))
    deliveries = [
        {
            "id": uuid7(),
            "notice_id": notice_id,
            "channel": channel,
            "target": target,
            "status": "waiting",
            "attempts": 0,
            "next_at": now,
        }
        for notice_id, person_id in made
        for channel, target in targets[person_id]
    ]
    if deliveries:
        await conn.execute(insert(notice_deliveries), deliveries)
    return [notice_id for notice_id, _ in made]
