"""Keys that are used twice with different intent, and dumps of what they keep."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_parts import DOLLAR, HELLO, RunningGateway, running_gateway, saying
from sqlalchemy import text

from marketplace.accounts.people import create_key, create_person
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.ledger.templates import deposit
from marketplace.platform.database import transaction
from marketplace.platform.embedded_nats import EmbeddedNats

KEY = {"Idempotency-Key": "order-of-a-secret-customer"}
CANARY = "purple-elephant"


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


async def _another_key(gateway: RunningGateway, *, of_stranger: bool) -> str:
    async with transaction(gateway.owner) as connection:
        person = gateway.person
        if of_stranger:
            person = await create_person(connection, display_name="stranger")
            money = deposit(chain="base", person=str(person), amount=Nano(DOLLAR), ref="base:stranger")
            await post_transfer(connection, money)
        key = await create_key(
            connection, gateway.process.settings.secret, person, "another", {"inference", "account"}
        )
    await gateway.process.keys.refresh()
    return f"Bearer {key}"


async def test_a76_another_body_is_409_and_another_buyer_is_not_in_the_way(gateway: RunningGateway) -> None:
    node = await gateway.add_node(saying([CANARY]))
    first = await gateway.chat(HELLO, **KEY)
    for other in ({**HELLO, "max_tokens": 49}, {**HELLO, "stream": True}):
        refused = await gateway.chat(other, **KEY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert len(node.requests) == 1
    stranger = await _another_key(gateway, of_stranger=True)
    theirs = await gateway.chat(HELLO, **KEY, Authorization=stranger)
    assert theirs.status_code == 200
    assert theirs.json()["id"] != first.json()["id"]
    assert "idempotent-replayed" not in theirs.headers
    assert len(node.requests) == 2
    await gateway.assert_proved()


async def test_a76_another_key_of_the_same_buyer_does_not_open_the_answer(gateway: RunningGateway) -> None:
    """Nor is the request billed again under it."""
    node = await gateway.add_node(saying([CANARY]))
    await gateway.chat(HELLO, **KEY)
    other = await _another_key(gateway, of_stranger=False)
    refused = await gateway.chat(HELLO, **KEY, Authorization=other)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_other_credential")
    assert CANARY not in refused.text
    assert len(node.requests) == 1


async def test_a76_a_dump_shows_neither_keys_nor_answers(gateway: RunningGateway) -> None:
    await gateway.add_node(saying([CANARY]))
    answers = [await gateway.chat(HELLO, **KEY) for _ in range(2)]
    assert all(CANARY in answer.text for answer in answers)
    async with gateway.owner.connect() as connection:
        row = (await connection.execute(text("SELECT * FROM idempotency"))).one()
    dump = b"\n".join(value if isinstance(value, bytes) else str(value).encode() for value in row)
    assert row.state == "stored"
    for secret in (CANARY, KEY["Idempotency-Key"], gateway.key, "Hi"):
        assert secret.encode() not in dump


async def test_a76_a_changed_row_is_not_replayed(gateway: RunningGateway) -> None:
    """An answer moved to another key, or altered, does not open."""
    await gateway.add_node(saying([CANARY]))
    for key in ("one", "two"):
        await gateway.chat({**HELLO, "user": key}, **{"Idempotency-Key": key})
    async with gateway.owner.begin() as connection:
        swapped = text(
            "UPDATE idempotency a SET response = b.response FROM idempotency b WHERE a.ctid <> b.ctid"
        )
        await connection.execute(swapped)
    answer = await gateway.chat({**HELLO, "user": "one"}, **{"Idempotency-Key": "one"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_response_lost")
    assert CANARY not in answer.text
