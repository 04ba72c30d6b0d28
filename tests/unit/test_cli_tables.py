"""What is copied out of a table is whole: in a narrow terminal, in a pipe, whatever strangers wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from rich.console import Console
from typer.testing import CliRunner

from marketplace import cli, proof
from marketplace import terminal as marketplace_terminal
from marketplace.ledger.money import Nano
from node_agent import account_commands, status_view, terminal
from node_agent.cli import app as node_app

ID = "0198f3a1-0000-7000-8000-000000000001"
WALLET, EVM_HASH, SIGNATURE = "0x" + "ab" * 20, "0x" + "cd" * 32, "5" * 88
LONG = " ".join(f"word{number}" for number in range(60))

Print = Callable[[Sequence[str], Sequence[Sequence[str]]], None]


@pytest.fixture(params=["tollway", "tollway-node"])
def printer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Console], Print]:
    """Each program's own way to print a table, on a given console."""

    def on(console: Console) -> Print:
        if request.param == "tollway":
            return lambda columns, rows: marketplace_terminal.print_table(columns, rows, console=console)
        monkeypatch.setattr(terminal, "out", console)
        return terminal.print_table

    return on


def test_in_a_narrow_terminal_words_stay_whole_and_texts_fold(
    printer: Callable[[Console], Print], capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = Console(width=80, force_terminal=True, color_system=None)
    printer(narrow)(("id", "transaction", "why"), [(ID, SIGNATURE, LONG), ("", EVM_HASH, "[/x] :key:")])
    told = capsys.readouterr().out
    assert all(f" {word} " in told for word in (ID, SIGNATURE, EVM_HASH, "[/x]", ":key:", *LONG.split()))
    assert max(map(len, told.splitlines())) <= len(ID) + len(SIGNATURE) + 40 + 10


def test_a_table_that_fits_is_no_wider_than_it_was(
    printer: Callable[[Console], Print], capsys: pytest.CaptureFixture[str]
) -> None:
    printer(Console(width=80, force_terminal=True, color_system=None))(("id", "why"), [(ID, "because")])
    assert max(map(len, capsys.readouterr().out.splitlines())) == len(ID) + len("because") + 7


def test_in_a_pipe_each_row_is_one_line(
    printer: Callable[[Console], Print], capsys: pytest.CaptureFixture[str]
) -> None:
    printer(Console(width=80))(("id", "transaction", "why"), [(ID, SIGNATURE, LONG), ("", "", "")])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if ID in line)
    assert SIGNATURE in line
    assert LONG in line


BATCH = SimpleNamespace(
    id=ID, chain=SimpleNamespace(value="solana"), status=SimpleNamespace(value="final"), fence=SIGNATURE,
    trouble=LONG, count=1, total="1.000000",
)  # fmt: skip
MEMBER = SimpleNamespace(payout_id=UUID(ID), address=SIGNATURE[:44], amount="1.000000")
SWEEP = SimpleNamespace(
    id=UUID(ID), status="final", lines=(1,), amount_micro=1, approvals=2, tx=SIGNATURE, note=LONG
)
LINE = SimpleNamespace(
    made_at=datetime(2026, 1, 1, tzinfo=UTC), kind="deposit", amount=Nano(10**18), balance=Nano(10**18),
    other=f"buyer:{ID}", model=None, ref=SIGNATURE, id=UUID(ID), note=None,
)  # fmt: skip
PAGE = SimpleNamespace(lines=[LINE], next_before=None)
HEAD = dict.fromkeys(("account", "posted", "held", "available"), "0")
CASE = SimpleNamespace(
    id=UUID(ID), created_at=LINE.made_at, kind="no_reference", chain="solana", key=f"{SIGNATURE}:0",
    detail=LONG,
)  # fmt: skip


@pytest.mark.parametrize("terminal_at", [{}, {"FORCE_COLOR": "1"}], ids=["pipe", "terminal"])
@pytest.mark.parametrize(
    ("command", "answer", "words"),
    [
        ("batch show", [BATCH], (ID,)),
        (f"batch show {ID}", (BATCH, [MEMBER], ["ann"], [SWEEP]), (ID, MEMBER.address, SIGNATURE)),
        ("deposits sweep show", [SWEEP], (ID, SIGNATURE)),
        ("deposits cases", [CASE], (CASE.key,)),
        ("ledger show loss", PAGE, (LINE.other, SIGNATURE)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tollway_shows_what_is_copied_whole(
    monkeypatch: pytest.MonkeyPatch,
    terminal_at: dict[str, str],
    command: str,
    answer: Any,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(cli, "_with_book", lambda *_: answer)
    monkeypatch.setattr(cli, "_settings_or_exit", lambda _: None)
    monkeypatch.setattr(cli, "_run", lambda _: answer)
    monkeypatch.setattr(proof, "account_statement", lambda *_, **__: None)
    monkeypatch.setattr(proof, "statement_as_json", lambda _: HEAD)
    done = CliRunner().invoke(cli.app, command.split(), env={"COLUMNS": "80", **terminal_at})
    assert done.exit_code == 0, done.output
    assert all(word in done.stdout for word in words), done.stdout


PAYOUT = SimpleNamespace(
    id=ID, chain="base", amount="25.000000", status="paid", address=WALLET, tx=SIGNATURE, refusal=None
)
REFUSED = SimpleNamespace(
    id=ID, chain="base", amount="25.000000", status="refused", address=WALLET, tx=None, refusal="[/x]"
)
ADDRESS = SimpleNamespace(
    chain="base", address=WALLET, usable_at="2026-01-01T00:00:00.000+00:00", retired_at=""
)
EARNED = SimpleNamespace(matured="1.00", maturing="0.00", held="0.00", reserve_s=86400)
MOVED = SimpleNamespace(kind="payout", amount="-1.00", model="m" * 60, tokens=7, tx=SIGNATURE)
STATEMENT = SimpleNamespace(forecast_per_day_nano="1", forecast_days=7, data=[MOVED])


@pytest.mark.parametrize("terminal_at", [{}, {"FORCE_COLOR": "1"}], ids=["pipe", "terminal"])
@pytest.mark.parametrize(
    ("command", "answer", "words"),
    [
        ("payouts", [PAYOUT, REFUSED], (ID, WALLET, SIGNATURE, "[/x]")),
        ("addresses", [ADDRESS], (WALLET, ADDRESS.usable_at)),
        ("earnings", (EARNED, STATEMENT), (MOVED.model, SIGNATURE)),
    ],
)
def test_the_node_shows_what_is_copied_whole(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    terminal_at: dict[str, str],
    command: str,
    answer: Any,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(account_commands, "_with_account", lambda *_: answer)
    at = ("--data-dir", str(tmp_path))
    done = CliRunner().invoke(node_app, [command, *at], env={"COLUMNS": "80", **terminal_at})
    assert done.exit_code == 0, done.output
    assert all(word in done.stdout for word in words), done.stdout


def test_a_holder_of_a_bank_account_is_shown_as_he_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry = SimpleNamespace(iban="GB82", holder="[/x]", usable_at="now", retired_at=None, id=ID)
    told = SimpleNamespace(amount="1.00", status="refused", reference=None, reason="[/y]", id=ID)
    monkeypatch.setattr(account_commands, "_with_account", lambda *_: ([entry], [told]))
    done = CliRunner().invoke(node_app, ["bank", "--data-dir", str(tmp_path)])
    assert done.exit_code == 0, done.exception
    assert "GB82  [/x], usable from now" in done.stdout
    assert "refused [/y]; withdrawal" in done.stdout


def test_a_models_name_is_shown_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    model = SimpleNamespace(
        name="[/x]",
        is_ready=True,
        running=0,
        waiting=0,
        kv_used_permille=0,
        capacity=1,
        price_in=0,
        price_out=0,
    )
    Console(width=200).print(status_view._models(SimpleNamespace(models=[model])))
    assert "[/x]" in capsys.readouterr().out
