"""What a node signs, and what it disputes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import nkeys
import pytest
from nacl.signing import SigningKey
from typer.testing import CliRunner

from marketplace.cli import app as marketplace_app
from node_agent import protocol
from node_agent.cli import app as node_app
from node_agent.journal import Entry, Journal, RotatingFile, find_entries
from node_agent.protocol import ProtocolError, Receipts, Statement
from node_agent.receipts import (
    RECEIPTS_FILE,
    ReceiptBook,
    ReceiptError,
    kept_receipt,
    marketplace_keys,
    reason_to_dispute,
    verify,
)

SEED = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER).decode()
NODE_KEY = nkeys.from_seed(bytearray(SEED.encode())).public_key.decode().rstrip("=")
KEY = SigningKey(bytes(range(32)))
ID = "0198f3a1-0000-7000-8000-00000000000{}"
SERVED = Entry(1, ID.format(0).replace("-", ""), "m", "ok", True, 5, 7, None, 5, 9, "ab" * 32)
STATED = Statement(
    v=1, id=ID.format(0), time_ms=1, model="m", node="n-1", operator="o", request_sha256="cd" * 32,
    response_sha256="ab" * 32, prompt_tokens=5, completion_tokens=7, counted_by="gateway", counted_on="ids",
    price_version=1, price_in=1_000_000, price_out=2_000_000, cost_nano=19, operator_nano=15, status=200,
    finish_reason="stop",
)  # fmt: skip


@pytest.fixture
def book(tmp_path: Path) -> Iterator[ReceiptBook]:
    made = ReceiptBook(tmp_path, seed=SEED, node_id="n-1")
    yield made
    made.close()


def page_of(*statements: Statement, name: str = "page", key: SigningKey = KEY) -> Receipts:
    encoded = [protocol.encode_statement(statement) for statement in statements]
    root = protocol.merkle_root([protocol.receipt_leaf(each) for each in encoded])
    signature = key.sign(protocol.page_signing_bytes(len(encoded), root)).signature
    return Receipts(1, name, bytes(key.verify_key), signature, encoded)


def changed(**fields: object) -> Statement:
    return msgspec.structs.replace(STATED, **fields)


def test_what_was_served_is_signed_kept_and_provable(book: ReceiptBook, tmp_path: Path) -> None:
    book.remember(SERVED)
    answer = book.countersign(page_of(STATED))
    assert answer.disputed == []
    verdict = verify(kept_receipt(tmp_path, STATED.id, public_key=NODE_KEY))
    assert (verdict.statement, verdict.is_countersigned, verdict.is_disputed) == (STATED, True, False)
    assert marketplace_keys(tmp_path) == {bytes(KEY.verify_key).hex()}
    with pytest.raises(ReceiptError):
        kept_receipt(tmp_path, ID.format(9), public_key=NODE_KEY)


@pytest.mark.parametrize(
    ("says", "is_valid"),
    [
        (msgspec.to_builtins(STATED), True),
        ({**msgspec.to_builtins(STATED), "cost_nano": 1}, False),
        ({}, False),
        (None, False),
    ],
)
def test_what_a_receipt_says_is_what_is_signed(
    book: ReceiptBook, tmp_path: Path, says: object, is_valid: bool
) -> None:
    book.remember(SERVED)
    book.countersign(page_of(STATED))
    receipt = msgspec.to_builtins(kept_receipt(tmp_path, STATED.id, public_key=NODE_KEY))
    file = tmp_path / "receipt.json"
    file.write_bytes(msgspec.json.encode({**receipt, "says": says}))
    for app, command in (
        (marketplace_app, ["receipts", "verify", str(file)]),
        (node_app, ["verify-receipt", str(file), "--data-dir", str(tmp_path)]),
    ):
        done = CliRunner().invoke(app, command, env={"COLUMNS": "1000"})
        assert done.exit_code == (0 if is_valid else 1), done.output
        assert ("`says` is not what the signed statement says" in done.output) is not is_valid


def test_a_receipt_is_looked_for_by_id_only_where_a_node_is_enrolled(tmp_path: Path) -> None:
    done = CliRunner().invoke(node_app, ["verify-receipt", "x", "--data-dir", str(tmp_path)])
    assert (done.exit_code, isinstance(done.exception, SystemExit)) == (1, True)
    assert "There is no file x" in done.output
    assert "Enrol this machine first" in done.output


def test_a_page_shown_again_is_signed_alike_and_kept_once(book: ReceiptBook, tmp_path: Path) -> None:
    book.remember(SERVED)
    assert book.countersign(page_of(STATED)) == book.countersign(page_of(STATED))
    assert len((tmp_path / RECEIPTS_FILE).read_bytes().splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"id": ID.format(5)}, "knows no such request"),
        ({"model": "other"}, "served m"),
        ({"response_sha256": "ef" * 32}, "not the one"),
        ({"response_sha256": None}, None),
        ({"completion_tokens": 3}, None),
        ({"operator_nano": 14}, "80 %"),
        ({"status": 499, "response_sha256": "ef" * 32}, None),
    ],
)
def test_what_differs_from_the_journal_is_disputed(
    book: ReceiptBook, tmp_path: Path, fields: dict[str, object], reason: str | None
) -> None:
    book.remember(SERVED)
    answer = book.countersign(page_of(STATED, changed(**fields)))
    assert answer.disputed == ([] if reason is None else [1])
    line = (tmp_path / RECEIPTS_FILE).read_text()
    assert reason is None or reason in line
    wanted = str(fields.get("id", STATED.id))
    verdict = verify(kept_receipt(tmp_path, wanted, public_key=NODE_KEY))
    assert verdict.is_disputed == (reason is not None and "id" in fields)


def test_tokens_missing_beyond_the_drift_are_disputed() -> None:
    served = msgspec.structs.replace(SERVED, completion_tokens=1_021)
    assert reason_to_dispute(changed(completion_tokens=1_001), served) is None
    assert "1021" in str(reason_to_dispute(changed(completion_tokens=1_000), served))
    assert reason_to_dispute(changed(completion_tokens=2_000), served) is None  # nobody disputes too much


def test_pages_that_are_not_ours_to_sign_are_not_signed(book: ReceiptBook, tmp_path: Path) -> None:
    book.remember(SERVED)
    good = page_of(STATED)
    for page in (
        page_of(STATED, changed(node="n-2")),
        msgspec.structs.replace(good, signature=bytes(64)),
        msgspec.structs.replace(good, public_key=bytes(SigningKey.generate().verify_key)),
        msgspec.structs.replace(good, statements=[b"{}"]),
        msgspec.structs.replace(good, statements=[*good.statements, good.statements[0]]),
    ):
        with pytest.raises(ProtocolError):
            book.countersign(page)
    assert (tmp_path / RECEIPTS_FILE).read_bytes() == b""


def test_a_restarted_node_finds_what_it_served_in_its_journal(book: ReceiptBook, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(SERVED)
    journal.close()
    assert book.countersign(page_of(STATED)).disputed == []


def test_files_are_private_bounded_and_survive_a_cut_line(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "lines", 100)
    for n in range(60):
        file.write(b"%040d\n" % n)
    file.close()
    kept = sorted(tmp_path.glob("lines*"))
    assert len(kept) == 4
    assert all(path.stat().st_size <= 100 and path.stat().st_mode & 0o077 == 0 for path in kept)
    journal = Journal(tmp_path)
    journal.write(SERVED)
    journal.close()
    with (tmp_path / "journal.jsonl").open("ab") as cut:
        cut.write(b'{"time_ms": 1, "id"')
        os.fsync(cut.fileno())
    assert find_entries(tmp_path, [SERVED.id]) == {SERVED.id: SERVED}
