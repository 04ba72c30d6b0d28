"""Holding an operator's earnings, and his way out: the dispute.

A hold is a row of `standings`, where settlement looks before it pays; ours carry the actor `reputation`.
Whoever is held stays held until a person decides, since a cheat could wait out any window.  A decision for
the operator also forgives: what was counted before it is not counted again.

Somebody in bad standing for another reason is left as he is, and a good standing a person gave forgives too.
The operator is told of a hold and of a decision in the transaction that makes it (`standing_held`,
`dispute_decided`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.notices import outbox
from marketplace.platform.ids import uuid7
from marketplace.reputation.errors import DisputeRefused
from marketplace.reputation.standing import Standing, State

ACTOR: Final = "reputation"
REASON_CHARACTERS_MAX: Final = 1_000
TEXT_CHARACTERS_MAX: Final = 2_000
LISTED_MAX: Final = 200

_NEWEST: Final = text("""
    SELECT DISTINCT ON (person_id) person_id, is_good, reason, actor, at FROM standings
    WHERE CAST(:people AS uuid[]) IS NULL OR person_id = ANY(CAST(:people AS uuid[]))
    ORDER BY person_id, id DESC
""")
_LOCK: Final = text("SELECT id FROM people WHERE id = :person FOR NO KEY UPDATE")
_STAND: Final = text("""
    INSERT INTO standings (person_id, is_good, reason, actor, at)
    VALUES (:person, :is_good, :reason, :actor, :now)
""")
_NOTE: Final = text("""
    INSERT INTO reputation_journal (operator_id, action, actor, reason, at)
    VALUES (:person, :action, :actor, :reason, :now)
""")
_OPEN: Final = text("""
    INSERT INTO reputation_disputes (id, operator_id, text, at) VALUES (:id, :person, :text, :now)
    ON CONFLICT (operator_id) WHERE state = 'open' DO NOTHING
    RETURNING id
""")
_DECIDE: Final = text("""
    UPDATE reputation_disputes SET state = :state, answer = :reason, decided_by = :actor, decided_at = :now
    WHERE id = :id AND state = 'open'
    RETURNING operator_id
""")
_LAST: Final = text("""
    SELECT id, operator_id, state, at, text, answer FROM reputation_disputes
    WHERE operator_id = :person ORDER BY at DESC, id DESC LIMIT 1
""")
_LIST: Final = text("""
    SELECT id, operator_id, state, at, text, answer FROM reputation_disputes
    WHERE state = :state ORDER BY at, id LIMIT :rows
""")


@dataclass(frozen=True, slots=True)
class Decided:
    """The newest decision about somebody's standing."""

    is_good: bool
    reason: str
    actor: str
    at: datetime

    @property
    def is_ours(self) -> bool:
        """A hold of this package's."""
        return not self.is_good and self.actor == ACTOR


@dataclass(frozen=True, slots=True)
class Dispute:
    """What an operator says to his hold, and the answer."""

    id: UUID
    operator_id: UUID
    state: str
    at: datetime
    text: str
    answer: str | None


async def decided(connection: AsyncConnection, people: list[UUID] | None = None) -> dict[UUID, Decided]:
    """Give the newest decision about each of `people` (None: everybody) of whom there is one."""
    rows = await connection.execute(_NEWEST, {"people": people})
    return {row.person_id: Decided(row.is_good, row.reason, row.actor, row.at) for row in rows}


async def hold(connection: AsyncConnection, operator: UUID, standing: Standing, *, now: datetime) -> bool:
    """Hold the operator if his standing says so and nobody holds him yet; True if that is new."""
    if standing.state is not State.HELD:
        return False
    await connection.execute(_LOCK, {"person": operator})
    newest = (await decided(connection, [operator])).get(operator)
    if newest is not None and not newest.is_good:
        return False
    reason = standing.reason[:REASON_CHARACTERS_MAX]
    await _stand(connection, operator, is_good=False, action="held", actor=ACTOR, reason=reason, now=now)
    await outbox.enqueue(connection, "standing_held", operator, {"reason": reason}, now=now)
    return True


async def dispute(connection: AsyncConnection, operator: UUID, words: str, *, now: datetime) -> Dispute:
    """Say something to one's hold; raises DisputeRefused (`not_held`, `dispute_open`)."""
    await connection.execute(_LOCK, {"person": operator})
    newest = (await decided(connection, [operator])).get(operator)
    if newest is None or not newest.is_ours:
        raise DisputeRefused("not_held", "there is no hold to dispute")
    identity = uuid7()
    row = {"id": identity, "person": operator, "text": words, "now": now}
    if await connection.scalar(_OPEN, row) is None:
        raise DisputeRefused("dispute_open", "your dispute is open; a person will decide it")
    note = {"person": operator, "action": "disputed", "actor": f"person:{operator}", "reason": words}
    await connection.execute(_NOTE, {**note, "now": now})
    return Dispute(identity, operator, "open", now, words, None)


async def decide(
    connection: AsyncConnection,
    identity: UUID,
    *,
    is_accepted: bool,
    actor: str,
    reason: str,
    now: datetime,
) -> None:
    """Decide an open dispute, on record (K4): accepted, the hold ends; raises DisputeRefused `not_open`."""
    state = "accepted" if is_accepted else "rejected"
    operator = await connection.scalar(
        _DECIDE, {"id": identity, "state": state, "reason": reason, "actor": actor, "now": now}
    )
    if operator is None:
        raise DisputeRefused("not_open", "there is no open dispute of this id")
    newest = (await decided(connection, [operator])).get(operator)
    ends_hold = is_accepted and newest is not None and newest.is_ours
    if ends_hold:
        await _stand(connection, operator, is_good=True, action=state, actor=actor, reason=reason, now=now)
    else:
        note = {"person": operator, "action": state, "actor": actor, "reason": reason, "now": now}
        await connection.execute(_NOTE, note)
    is_good = ends_hold or newest is None or newest.is_good
    told = {
        "dispute_id": str(identity),
        "outcome": state,
        "standing": State.GOOD if is_good else State.HELD,
        "reason": reason,
    }
    await outbox.enqueue(connection, "dispute_decided", operator, told, now=now)


async def last_dispute(connection: AsyncConnection, operator: UUID) -> Dispute | None:
    row = (await connection.execute(_LAST, {"person": operator})).first()
    return None if row is None else _dispute(row)


async def disputes(connection: AsyncConnection, state: str) -> list[Dispute]:
    """Give the disputes in `state`, oldest first, at most `LISTED_MAX`."""
    rows = await connection.execute(_LIST, {"state": state, "rows": LISTED_MAX})
    return [_dispute(row) for row in rows]


async def _stand(
    connection: AsyncConnection,
    operator: UUID,
    *,
    is_good: bool,
    action: str,
    actor: str,
    reason: str,
    now: datetime,
) -> None:
    """Change a standing, in settlement's eyes and in our journal."""
    row: dict[str, Any] = {"person": operator, "actor": actor, "reason": reason, "now": now}
    await connection.execute(_STAND, {**row, "is_good": is_good})
    await connection.execute(_NOTE, {**row, "action": action})


def _dispute(row: Any) -> Dispute:
    return Dispute(row.id, row.operator_id, row.state, row.at, row.text, row.answer)
