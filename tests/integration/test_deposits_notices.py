"""The outbox in the book: written with what it tells of, delivered at least once, signed."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.notices.outbox import enqueue
from marketplace.notices.tables import notice_deliveries, notices
from marketplace.platform.database import transaction

NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def a_person(engine: AsyncEngine, email: str | None) -> uuid.UUID:
    person = uuid.uuid4()
    async with transaction(engine) as conn:
        await conn.execute(
            text("INSERT INTO people (id, email, display_name) VALUES (:id, :email, 'Ann')"),
            {"id": person, "email": email},
        )
    return person


async def test_a_notice_goes_to_the_address_of_its_moment(engine: AsyncEngine) -> None:
    """A thief who changes the address later does not get the news of it (A43)."""
    ann = await a_person(engine, "old@example.org")
    async with transaction(engine) as conn:
        await enqueue(conn, "payout_address_added", ann, {"message": "0x1 on base"}, now=NOW)
        await conn.execute(text("UPDATE people SET email = 'thief@example.org' WHERE id = :id"), {"id": ann})
    async with transaction(engine) as conn:
        targets = list(await conn.scalars(select(notice_deliveries.c.target)))
    assert targets == ["old@example.org"]


async def test_what_rolls_back_was_never_told(engine: AsyncEngine) -> None:
    ann = await a_person(engine, "ann@example.org")

    async def tell_and_fail() -> None:
        async with transaction(engine) as conn:
            await enqueue(conn, "payout_address_added", ann, {"message": "0x1"}, now=NOW)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await tell_and_fail()
    async with transaction(engine) as conn:
        assert (await conn.execute(select(notices))).all() == []
        assert (await conn.execute(select(notice_deliveries))).all() == []


@pytest.mark.parametrize(("kind", "payload"), [("gossip", {}), ("deposit_credited", {"amount": "1"})])
async def test_a_notice_that_could_not_be_written_out_is_refused_at_once(
    engine: AsyncEngine, kind: str, payload: dict[str, str]
) -> None:
    async with transaction(engine) as conn:
        with pytest.raises(KeyError):
            await enqueue(conn, kind, uuid.uuid4(), payload, now=NOW)


async def test_nobody_on_record_is_told_nothing_and_nothing_fails(engine: AsyncEngine) -> None:
    async with transaction(engine) as conn:
        await enqueue(conn, "payout_address_added", uuid.uuid4(), {"message": "0x1"}, now=NOW)
    async with transaction(engine) as conn:
        assert (await conn.execute(select(notice_deliveries))).all() == []
        assert len((await conn.execute(select(notices))).all()) == 1
