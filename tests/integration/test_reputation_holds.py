"""From facts in the database to a hold settlement respects, its dispute and its end."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from fabric_parts import NodeKey, enrolled
from reputation_parts import a_person, answered, checked
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.fabric.node_ids import node_uuid
from marketplace.ledger.ids import lowest_at
from marketplace.platform.database import transaction
from marketplace.reputation import facts, holds
from marketplace.reputation.assess import assess, standings
from marketplace.reputation.errors import DisputeRefused
from marketplace.reputation.standing import Policy, State
from marketplace.settlement import people


class Frozen:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.at = datetime.now(UTC)

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return self.at.timestamp()


class Site:
    """Two operators with a node each, of the same model."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine, self.clock = engine, Frozen()
        self.cheat, self.honest = uuid4(), uuid4()
        self.cheats_node = self.honest_node = ""

    async def fill(self) -> None:
        for person in (self.cheat, self.honest):
            await a_person(self.engine, person)
        self.cheats_node = await enrolled(self.engine, NodeKey(), self.cheat)
        self.honest_node = await enrolled(self.engine, NodeKey(), self.honest)
        await checked(self.engine, self.honest_node, honest=20, suspicious=1, at=self.clock.at)
        await answered(self.engine, self.honest_node, 500, at=self.clock.at)

    async def swaps_model(self) -> None:
        await checked(self.engine, self.cheats_node, honest=1, suspicious=9, at=self.clock.at)

    async def is_paid(self, person: UUID) -> bool:
        """What settlement thinks."""
        async with transaction(self.engine) as connection:
            return person not in await people.bad_standings(connection, [person])

    async def dispute(self) -> holds.Dispute:
        async with transaction(self.engine) as connection:
            return await holds.dispute(connection, self.cheat, "a new driver", now=self.clock.at)

    async def decide(self, dispute: UUID, *, is_accepted: bool) -> None:
        async with transaction(self.engine) as connection:
            await holds.decide(
                connection, dispute, is_accepted=is_accepted, actor="person:root", reason="looked at it",
                now=self.clock.at,
            )  # fmt: skip

    async def state(self) -> State:
        async with transaction(self.engine) as connection:
            return (await standings(connection, now=self.clock.at))[self.cheat][0].state

    async def journal(self) -> list[tuple[str, str]]:
        async with transaction(self.engine) as connection:
            rows = await connection.execute(
                text("SELECT action, actor, reason FROM reputation_journal ORDER BY id")
            )
            found = rows.all()
        assert all(row.reason for row in found)
        return [(row.action, row.actor) for row in found]

    async def told(self, person: UUID) -> list[tuple[str, dict[str, str]]]:
        """The notices left for a person, oldest first."""
        async with transaction(self.engine) as connection:
            rows = await connection.execute(
                text("SELECT kind, payload FROM notices WHERE person_id = :person ORDER BY id"),
                {"person": person},
            )
            return [(row.kind, row.payload) for row in rows]


@pytest.fixture
async def site(engine: AsyncEngine) -> Site:
    site = Site(engine)
    await site.fill()
    return site


async def test_strikes_hold_earnings_and_stay_until_a_person_decides(site: Site) -> None:
    assert await assess(site.engine, site.clock) == []
    await site.swaps_model()
    assert await assess(site.engine, site.clock) == [site.cheat]
    assert await assess(site.engine, site.clock) == []
    assert not await site.is_paid(site.cheat)
    assert await site.is_paid(site.honest)
    site.clock.at += timedelta(days=60)  # nothing of it is in the window any more
    await assess(site.engine, site.clock)
    assert not await site.is_paid(site.cheat), "whoever waits is not forgiven"
    assert await site.journal() == [("held", holds.ACTOR)]


async def test_a_dispute_is_decided_by_a_person_with_a_reason(site: Site) -> None:
    with pytest.raises(DisputeRefused, match="no hold"):
        await site.dispute()
    await site.swaps_model()
    await assess(site.engine, site.clock)
    first = await site.dispute()
    with pytest.raises(DisputeRefused, match="open"):
        await site.dispute()
    await site.decide(first.id, is_accepted=False)
    assert not await site.is_paid(site.cheat)
    with pytest.raises(DisputeRefused):
        await site.decide(first.id, is_accepted=True)

    second = await site.dispute()
    site.clock.at += timedelta(minutes=1)
    await site.decide(second.id, is_accepted=True)
    assert await site.is_paid(site.cheat)
    assert await site.state() is State.GOOD, "what was before is forgiven"
    assert await assess(site.engine, site.clock) == []
    actors = [holds.ACTOR, f"person:{site.cheat}", "person:root", f"person:{site.cheat}", "person:root"]
    actions = ["held", "disputed", "rejected", "disputed", "accepted"]
    assert await site.journal() == list(zip(actions, actors, strict=True))
    held, *decisions = await site.told(site.cheat)
    assert held[0] == "standing_held"
    assert "9 of 10 checked answers" in held[1]["reason"]
    common = {"reason": "looked at it"}
    assert decisions == [
        (
            "dispute_decided",
            {"dispute_id": str(first.id), "outcome": "rejected", "standing": "held", **common},
        ),
        (
            "dispute_decided",
            {"dispute_id": str(second.id), "outcome": "accepted", "standing": "good", **common},
        ),
    ]
    assert await site.told(site.honest) == []

    site.clock.at += timedelta(minutes=1)
    await site.swaps_model()
    assert await assess(site.engine, site.clock) == [site.cheat], "what comes after is not"


async def test_somebody_elses_decisions_are_left_alone(site: Site) -> None:
    async with transaction(site.engine) as connection:
        await people.set_standing(
            connection, person=site.cheat, is_good=False, reason="court order", actor="person:root",
            now=site.clock.at,
        )  # fmt: skip
    await site.swaps_model()
    assert await assess(site.engine, site.clock) == []
    with pytest.raises(DisputeRefused, match="no hold"):
        await site.dispute()
    async with transaction(site.engine) as connection:
        (decided,) = (await holds.decided(connection, [site.cheat])).values()
    assert decided.reason == "court order"


async def test_two_processes_hold_once(site: Site) -> None:
    await site.swaps_model()
    held = await asyncio.gather(*(assess(site.engine, site.clock) for _ in range(4)))
    assert [operator for each in held for operator in each] == [site.cheat]
    assert await site.journal() == [("held", holds.ACTOR)]
    assert [kind for kind, _ in await site.told(site.cheat)] == ["standing_held"]


async def test_thresholds_are_data_on_record(site: Site) -> None:
    await checked(site.engine, site.cheats_node, honest=8, suspicious=2, at=site.clock.at)
    assert await site.state() is State.WARNED
    async with transaction(site.engine) as connection:
        await facts.set_policy(
            connection, Policy(suspicious_min=2, suspicious_permille=100), actor="person:root",
            reason="stricter", now=site.clock.at,
        )  # fmt: skip
    assert await site.state() is State.HELD


async def test_lengths_are_summed_once_from_settled_charges(site: Site) -> None:
    now = site.clock.at
    async with transaction(site.engine) as connection:
        await connection.execute(
            text("UPDATE reputation_mark SET up_to = :at"), {"at": now - timedelta(hours=5)}
        )

    async def charge(minutes_ago: int, tokens: int, status: int = 200) -> None:
        identity = UUID(int=lowest_at(now - timedelta(minutes=minutes_ago)).int | uuid4().int % (1 << 60))
        async with transaction(site.engine) as connection:
            await connection.execute(
                text(
                    "INSERT INTO charges (id, buyer, amount, fee, node, model, tok_in, tok_out, counted_by, "
                    "price_version, latency_ms, status, lane, batch, stream) "
                    "VALUES (:id, 1, 0, 0, :node, 'm', 1, :tokens, 0, 1, 1, :status, 0, 1, false)"
                ),
                {"id": identity, "node": node_uuid(site.cheats_node), "tokens": tokens, "status": status},
            )

    for minutes_ago, tokens, status in (
        (400, 7, 200), (250, 10, 200), (130, 20, 200), (20, 30, 200), (20, 99, 502), (5, 50, 200),
    ):  # fmt: skip
        await charge(minutes_ago, tokens, status)
    for _ in range(3):
        await assess(site.engine, site.clock)
    async with transaction(site.engine) as connection:
        (found,) = (await facts.read_facts(connection, since=now - timedelta(days=1)))[site.cheat]
    sums = found.lengths
    assert (sums.completions, sums.tokens, sums.tokens_squared) == (3, 60, 100 + 400 + 900)
    site.clock.at += timedelta(minutes=10)
    await assess(site.engine, site.clock)
    async with transaction(site.engine) as connection:
        (found,) = (await facts.read_facts(connection, since=now - timedelta(days=1)))[site.cheat]
    assert found.lengths.completions == 4
