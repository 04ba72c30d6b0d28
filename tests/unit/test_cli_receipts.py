"""A receipt is a stranger's file: what it says is printed as it is written, and breaks no verifier."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from nacl.signing import SigningKey
from typer import Typer
from typer.testing import CliRunner

from marketplace.cli import app as marketplace_app
from node_agent import protocol
from node_agent.cli import app as node_app
from node_agent.protocol import Statement

KEY = SigningKey(bytes(range(32)))
STATED = Statement(
    v=1, id="0198f3a1-0000-7000-8000-000000000000", time_ms=1, model="[/model]", node="[/node]", operator="o",
    request_sha256="cd" * 32, response_sha256="ab" * 32, prompt_tokens=5, completion_tokens=7,
    counted_by="[/who]", counted_on="ids", price_version=1, price_in=1_000_000, price_out=2_000_000,
    cost_nano=19, operator_nano=15, status=200, finish_reason="stop",
)  # fmt: skip

verifiers = pytest.mark.parametrize(
    ("app", "command"),
    [(marketplace_app, ("receipts", "verify")), (node_app, ("verify-receipt",))],
    ids=["tollway", "tollway-node"],
)


def receipt_in(folder: Path) -> Path:
    statement = protocol.encode_statement(STATED)
    root = protocol.merkle_root([protocol.receipt_leaf(statement)])
    receipt = {
        "statement": statement.decode(),
        "page": {"id": "p", "count": 1, "position": 0, "proof": []},
        "marketplace": {
            "public_key": bytes(KEY.verify_key).hex(),
            "signature": KEY.sign(protocol.page_signing_bytes(1, root)).signature.hex(),
        },
    }
    file = folder / "receipt.json"
    file.write_bytes(msgspec.json.encode(receipt))
    return file


@verifiers
def test_what_a_receipt_says_is_shown_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, app: Typer, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("TOLLWAY_NODE_DIR", str(tmp_path))
    done = CliRunner().invoke(app, [*command, str(receipt_in(tmp_path))], env={"COLUMNS": "1000"})
    assert done.exit_code == 0, (done.output, done.exception)
    assert all(word in done.stdout for word in (STATED.model, STATED.node, STATED.counted_by))


@verifiers
def test_a_refusal_names_the_file_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, app: Typer, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("TOLLWAY_NODE_DIR", str(tmp_path))
    folder = tmp_path / "["
    folder.mkdir()
    (folder / "x]").write_text("no receipt")
    done = CliRunner().invoke(app, [*command, str(folder / "x]")], env={"COLUMNS": "1000"})
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert f"{folder}/x] is not" in done.stderr
