"""Receipts of requests served by a real gateway: signed by us, by the node, and provable by anybody (B1)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import nkeys
import pytest
from gateway_parts import (
    DOLLAR,
    HELLO,
    MODEL,
    PRICE_IN,
    PRICE_OUT,
    STREAM,
    RunningGateway,
    StubNode,
    running_gateway,
    said,
    saying,
    whole,
)
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from marketplace.gateway import receipts_routes
from marketplace.gateway.receipts import HASHES_KEPT_DAYS, ReceiptSigner, signer_of, statement_of
from marketplace.gateway.receipts_commands import check
from marketplace.gateway.receipts_sealer import Sealer, forget_old_hashes
from marketplace.gateway.receipts_writer import Drift, Hashes
from marketplace.ledger.money import cost, split
from marketplace.metering.counting import CountedOn
from marketplace.platform.embedded_nats import EmbeddedNats
from node_agent import protocol
from node_agent.protocol import ChoiceDelta, ResponseDigest


@pytest.fixture
async def gateway(
    database_url: str, nats_server: EmbeddedNats, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with running_gateway(database_url, nats_server, tmp_path) as running:
        await running.fund(10 * DOLLAR)
        yield running


class Countersigner:
    """A node's side of the bargain: signs what it is shown, disputing what it is told to."""

    def __init__(self) -> None:
        self.pair = nkeys.from_seed(
            nkeys.encode_seed(hashlib.sha256(b"node").digest(), nkeys.PREFIX_BYTE_USER)
        )
        self.public_key = self.pair.public_key.decode().rstrip("=")
        self.pages: list[protocol.Receipts] = []
        self.disputed: list[int] = []
        self.is_silent = False
        self.forges = False

    async def ask(self, subject: str, payload: bytes) -> bytes | None:
        page = protocol.decode_receipts(payload)
        self.pages.append(page)
        if self.is_silent:
            return None
        leaves = [protocol.receipt_leaf(statement) for statement in page.statements]
        root = bytes(32) if self.forges else protocol.merkle_root(leaves)
        signature = self.pair.sign(protocol.countersigning_bytes(len(leaves), root, self.disputed))
        return protocol.encode(protocol.Countersigned(signature, self.disputed))


async def _enrol(gateway: RunningGateway, node: StubNode, countersigner: Countersigner) -> None:
    async with gateway.owner.begin() as connection:
        await connection.execute(
            text("UPDATE nodes SET public_key = :key WHERE id = :id"),
            {"key": countersigner.public_key, "id": node.node_id},
        )


def _sealer(gateway: RunningGateway, countersigner: Countersigner) -> Sealer:
    return Sealer(gateway.process.engine, signer_of(gateway.process.settings), countersigner.ask)


async def _statement(gateway: RunningGateway, request_id: str) -> protocol.Statement:
    async with gateway.process.engine.connect() as connection:
        stated = await statement_of(connection, UUID(request_id))
    assert stated is not None
    return protocol.decode_statement(stated.statement)


def _hashed(*deltas: ChoiceDelta) -> str:
    digest = ResponseDigest()
    for delta in deltas:
        digest.add(delta)
    return digest.digest().hex()


@pytest.mark.parametrize("body", [HELLO, STREAM], ids=["whole", "stream"])
async def test_a_served_request_has_a_receipt_that_says_everything(
    gateway: RunningGateway, body: dict[str, Any]
) -> None:
    node = await gateway.add_node(saying(["Hello", " there", "!"]))
    sent = json.dumps(body).encode()
    await gateway.chat(sent)
    row = await gateway.only_row()
    statement = await _statement(gateway, row["id"])
    expected = cost(tokens_in=row["prompt_tokens"], tokens_out=12, price_in=PRICE_IN, price_out=PRICE_OUT)
    assert statement == protocol.Statement(
        v=1, id=row["id"], time_ms=statement.time_ms, model=MODEL, node=node.node_id,
        operator=str(gateway.operator), request_sha256=hashlib.sha256(sent).hexdigest(),
        response_sha256=_hashed(ChoiceDelta(content="Hello there!")), prompt_tokens=row["prompt_tokens"],
        completion_tokens=12, counted_by="gateway", counted_on="ids", price_version=row["price_version"],
        price_in=PRICE_IN, price_out=PRICE_OUT, cost_nano=expected.n, operator_nano=split(expected)[0].n,
        status=200, finish_reason="stop",
    )  # fmt: skip
    assert UUID(row["id"]).int >> 80 == statement.time_ms


async def test_an_engine_without_ids_is_billed_on_our_count_and_marked(gateway: RunningGateway) -> None:
    await gateway.add_node(saying(["Hello", " there"], with_ids=False, reported=400))
    usage = (await gateway.chat(HELLO)).json()["usage"]
    assert (usage["completion_tokens"], usage["counted_by"], usage["counted_on"]) == (11, "gateway", "text")
    assert (await _statement(gateway, usage["receipt_id"])).counted_on == "text"


async def test_pages_are_signed_by_us_and_by_the_node(gateway: RunningGateway) -> None:
    countersigner = Countersigner()
    node = await gateway.add_node(whole(said("abc", finish="stop")))
    await _enrol(gateway, node, countersigner)
    for _ in range(5):
        await gateway.chat(HELLO)
    sealer = _sealer(gateway, countersigner)
    while await sealer.tick():
        pass
    ids = {row["id"] for row in await gateway.usage()}
    shown = [statement for page in countersigner.pages for statement in page.statements]
    assert {protocol.decode_statement(statement).id for statement in shown} == ids
    assert len(shown) == 5
    for page in countersigner.pages:
        leaves = [protocol.receipt_leaf(statement) for statement in page.statements]
        protocol.verify_page_signature(
            page.public_key, len(leaves), protocol.merkle_root(leaves), page.signature
        )
    async with gateway.owner.connect() as connection:
        unsigned = await connection.scalar(
            text("SELECT count(*) FROM receipt_pages WHERE countersignature IS NULL")
        )
    assert unsigned == 0
    assert not await sealer.tick()  # once is enough


async def test_refused_requests_have_no_receipt(gateway: RunningGateway) -> None:
    assert (await gateway.chat(HELLO)).status_code == 503
    countersigner = Countersigner()
    sealer = _sealer(gateway, countersigner)
    await gateway.only_row()
    assert not await sealer.tick()
    assert countersigner.pages == []


async def test_a_node_that_is_away_is_shown_its_page_again(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marketplace.gateway.receipts_sealer.OFFER_AGAIN_S", 0)
    countersigner = Countersigner()
    countersigner.is_silent = True
    node = await gateway.add_node(whole(said("abc", finish="stop")))
    await _enrol(gateway, node, countersigner)
    await gateway.chat(HELLO)
    sealer = _sealer(gateway, countersigner)
    assert await sealer.tick()
    countersigner.is_silent = False
    await sealer.tick()
    first, second = countersigner.pages
    assert first == second  # written again from the book, to the same bytes
    await sealer.tick()
    assert len(countersigner.pages) == 2


async def test_a_forged_countersignature_is_not_taken_and_a_dispute_is_on_record(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marketplace.gateway.receipts_sealer.OFFER_AGAIN_S", 0)
    countersigner = Countersigner()
    countersigner.forges = True
    node = await gateway.add_node(whole(said("abc", finish="stop")))
    await _enrol(gateway, node, countersigner)
    await gateway.chat(HELLO)
    sealer = _sealer(gateway, countersigner)
    await sealer.tick()

    async def state() -> Any:
        async with gateway.owner.connect() as connection:
            query = text("SELECT countersignature IS NOT NULL, disputed FROM receipt_pages")
            return tuple((await connection.execute(query)).one())

    assert await state() == (False, [])
    countersigner.forges, countersigner.disputed = False, [0]
    await sealer.tick()
    assert await state() == (True, [0])


async def test_a_charge_waits_for_its_hashes_but_not_for_ever(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway was killed between the charge and the hashes: the receipt says that it has none."""
    await gateway.add_node(whole(said("abc", finish="stop")))
    usage = (await gateway.chat(HELLO)).json()["usage"]
    async with gateway.owner.begin() as connection:
        await connection.execute(text("DELETE FROM receipts"))
    countersigner = Countersigner()
    sealer = _sealer(gateway, countersigner)
    assert not await sealer.tick()
    monkeypatch.setattr("marketplace.gateway.receipts_sealer.HASHES_S_MAX", 0)
    assert await sealer.tick()
    (statement,) = countersigner.pages[0].statements
    said_of_it = protocol.decode_statement(statement)
    assert said_of_it.id == usage["receipt_id"]
    assert (said_of_it.request_sha256, said_of_it.response_sha256) == (None, None)
    assert said_of_it.cost_nano == usage["cost_nano"]


async def test_hashes_that_come_after_the_sealing_keep_no_other_page_waiting(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("marketplace.gateway.receipts_sealer.OFFER_AGAIN_S", 0)
    monkeypatch.setattr("marketplace.gateway.receipts_sealer.HASHES_S_MAX", 0)
    countersigner = Countersigner()
    countersigner.is_silent = True
    node = await gateway.add_node(whole(said("abc", finish="stop")))
    await _enrol(gateway, node, countersigner)
    sealer = _sealer(gateway, countersigner)
    await gateway.chat(HELLO)
    async with gateway.owner.begin() as connection:
        await connection.execute(text("CREATE TABLE late AS SELECT * FROM receipts"))
        await connection.execute(text("DELETE FROM receipts"))
    assert await sealer.tick()
    async with gateway.owner.begin() as connection:
        await connection.execute(text("INSERT INTO receipts SELECT * FROM late"))
    await gateway.chat(HELLO)
    assert await sealer.tick()
    countersigner.pages.clear()
    countersigner.is_silent = False
    await sealer.tick()
    assert len(countersigner.pages) == 1, "only the page whose statements are as they were signed"
    assert "1 of 1 statements are not as they were signed" in caplog.text


async def test_a_row_the_database_refuses_holds_up_no_other(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """A node's count beyond a column's range: the drifts beside it are kept, and answers do not wait."""
    ids = [uuid4() for _ in range(9)]
    for at, drift in enumerate(ids):
        count = 2**31 if at in (2, 7) else 5
        gateway.process.receipts.drifted(Drift(drift, ids[0], "letters", 1, None, 1, count))
    async with asyncio.timeout(2):
        assert await gateway.process.receipts.note(Hashes(uuid4(), b"q" * 32, b"a" * 32, CountedOn.IDS))
        assert await gateway.process.receipts.note(Hashes(uuid4(), b"q" * 32, b"a" * 32, CountedOn.IDS))
    async with gateway.owner.connect() as connection:
        kept = (await connection.execute(text("SELECT id FROM metering_drift"))).scalars().all()
    assert set(kept) == {drift for at, drift in enumerate(ids) if at not in (2, 7)}
    refused = [record.getMessage() for record in caplog.records if "is refused" in record.getMessage()]
    assert [str(ids[2]) in refused[0], str(ids[7]) in refused[1], len(refused)] == [True, True, 2]


async def test_hashes_of_a_refused_row_are_told_to_be_missing_alone(gateway: RunningGateway) -> None:
    def hashes(counted_on: int) -> Hashes:
        return Hashes(uuid4(), b"q" * 32, b"a" * 32, cast("CountedOn", counted_on))

    async with asyncio.timeout(2):
        noted = [gateway.process.receipts.note(hashes(1 << 20 if at == 1 else 1)) for at in range(4)]
        assert await asyncio.gather(*noted) == [True, False, True, True]


async def test_two_sealers_share_the_work(gateway: RunningGateway) -> None:
    await gateway.add_node(whole(said("abc", finish="stop")))
    for _ in range(4):
        await gateway.chat(HELLO)
    first, second = Countersigner(), Countersigner()
    await asyncio.gather(_sealer(gateway, first).tick(), _sealer(gateway, second).tick())
    shown = [statement for page in (*first.pages, *second.pages) for statement in page.statements]
    assert len(shown) == len(set(shown)) == 4


async def test_another_key_may_sign_and_the_old_one_stays_known(gateway: RunningGateway) -> None:
    await gateway.add_node(whole(said("abc", finish="stop")))
    countersigner = Countersigner()
    signers = [signer_of(gateway.process.settings), ReceiptSigner(bytes(range(32)))]
    for signer in signers:
        await gateway.chat(HELLO)
        await Sealer(gateway.process.engine, signer, countersigner.ask).tick()
    assert [page.public_key for page in countersigner.pages] == [signer.public_key for signer in signers]
    async with gateway.owner.connect() as connection:
        known = set((await connection.execute(text("SELECT public_key FROM receipt_keys"))).scalars())
    assert known == {signer.public_key for signer in signers}


def _id_of(days: int) -> UUID:
    """An id of a request so many days ago."""
    at = datetime.now(UTC) - timedelta(days=days)
    return UUID(int=int(at.timestamp() * 1000) << 80 | secrets.randbits(62))


async def _note(gateway: RunningGateway, *ids: UUID) -> None:
    """Hashes of long ago."""
    row = text("INSERT INTO receipts VALUES (:id, :zeros, :zeros, 0)")
    async with gateway.owner.begin() as connection:
        await connection.execute(row, [{"id": each, "zeros": bytes(32)} for each in ids])


async def _kept(gateway: RunningGateway) -> set[UUID]:
    async with gateway.owner.connect() as connection:
        return set((await connection.execute(text("SELECT id FROM receipts"))).scalars())


async def test_old_hashes_are_forgotten_and_what_they_proved_still_holds(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    countersigner = Countersigner()
    await _enrol(gateway, await gateway.add_node(whole(said("abc", finish="stop"))), countersigner)
    receipt_id = (await gateway.chat(HELLO)).json()["usage"]["receipt_id"]
    await _sealer(gateway, countersigner).tick()
    document = await gateway.get(f"/api/receipts/{receipt_id}")
    young = [UUID(receipt_id), _id_of(HASHES_KEPT_DAYS - 1)]
    await _note(gateway, young[1], _id_of(HASHES_KEPT_DAYS + 1), _id_of(HASHES_KEPT_DAYS + 300))
    assert await forget_old_hashes(gateway.process.engine) == 2
    assert await forget_old_hashes(gateway.process.engine) == 0
    assert await _kept(gateway) == set(young)
    with pytest.raises(ProgrammingError, match="permission denied"):
        async with gateway.process.engine.begin() as connection:
            await connection.execute(text("DELETE FROM receipts"))

    # Much later: asked for again it cannot be written, but its page is there and its copy is good.
    async with gateway.owner.begin() as connection:
        await connection.execute(text("DELETE FROM receipts"))
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        unsigned = await http.get(f"/api/receipts/{receipt_id}")
        assert (unsigned.status_code, unsigned.json()["page"]) == (200, None)
        monkeypatch.setattr(receipts_routes, "HASHES_KEPT_DAYS", -1)
        gone = await http.get(f"/api/receipts/{receipt_id}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "receipt_expired")
    assert check(document).id == receipt_id
    async with gateway.owner.connect() as connection:
        leaves = await connection.scalar(text("SELECT leaves FROM receipt_pages"))
    assert protocol.receipt_leaf(document["statement"].encode()) == leaves


async def test_nothing_is_forgotten_before_it_is_sealed(gateway: RunningGateway) -> None:
    """The sealer stood still for more than a year: the hashes its receipts will need are kept."""
    old, zeros = _id_of(HASHES_KEPT_DAYS + 1), bytes(32)
    await _note(gateway, old)
    async with gateway.owner.begin() as connection:
        await connection.execute(
            text("INSERT INTO batches VALUES (63, 1, :id, :id, 1, 0, :zeros, :zeros)"),
            {"id": old, "zeros": zeros},
        )
    assert await forget_old_hashes(gateway.process.engine) == 0
    assert await _kept(gateway) == {old}
    async with gateway.owner.begin() as connection:
        await connection.execute(text("INSERT INTO receipt_marks VALUES (63, 1)"))
    assert await forget_old_hashes(gateway.process.engine) == 1


async def test_a_receipt_of_an_archived_month_is_gone_not_unknown(gateway: RunningGateway) -> None:
    async with gateway.owner.begin() as connection:
        row = "INSERT INTO archived_months (month, upper_id, rows) VALUES ('2020-01-01', :upper, 0)"
        await connection.execute(text(row), {"upper": _id_of(400)})
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        codes = [(await http.get(f"/api/receipts/{_id_of(days)}")).status_code for days in (401, 399)]
    assert codes == [410, 404]
