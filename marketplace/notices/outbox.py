"""The outbox: a notice is a row, written in the transaction of what it tells of.

What commits with the event cannot be lost, and what rolls back with it was never told.  Where it goes is
decided in the same moment: to the e-mail address the person has *then* (so the news of a change reaches
the old one) and to each of the webhooks there are then.  `delivery` carries it out, at least once.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import bindparam, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.notices.messages import compose
from marketplace.notices.tables import notice_deliveries, notices, webhooks
from marketplace.platform.ids import uuid7

_EMAIL: Final = text("SELECT email FROM people WHERE id = :person").bindparams(bindparam("person"))


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
    compose(kind, payload)
    notice_id = uuid7()
    await conn.execute(
        insert(notices).values(id=notice_id, kind=kind, person_id=person_id, payload=dict(payload), at=now)
    )
    targets = [
        ("webhook", str(webhook))
        for webhook in await conn.scalars(
            select(webhooks.c.id).where(webhooks.c.person_id == person_id, webhooks.c.removed_at.is_(None))
        )
    ]
    email = await conn.scalar(_EMAIL, {"person": person_id})
    if email is not None and kind != "webhook_test":
        targets.append(("email", email))
    rows = [
        {
            "id": uuid7(),
            "notice_id": notice_id,
            "channel": channel,
            "target": target,
            "status": "waiting",
            "attempts": 0,
            "next_at": now,
        }
        for channel, target in targets
    ]
    if rows:
        await conn.execute(insert(notice_deliveries), rows)
    return notice_id
