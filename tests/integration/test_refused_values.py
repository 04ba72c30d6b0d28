"""A value the database refuses ends in one sentence that names the rule, without the SQL."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import typer
from gateway_parts import chains_json, tokenizer_files
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from typer.testing import CliRunner

from marketplace import cli
from marketplace.catalog import models
from marketplace.platform.database import connect, transaction

WHY = ("--as", "ann", "--reason", "a drill")
RULES = ("batch", "rules", "--large-above", "1", "--daily-max", "2", *WHY)


@pytest.fixture(autouse=True)
def book(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLLWAY_DATABASE_URL", database_url)
    monkeypatch.setenv("TOLLWAY_SECRET", "s" * 40)
    monkeypatch.setenv("TOLLWAY_CHAINS_FILE", str(chains_json(tmp_path)))
    monkeypatch.setattr(models, "read_model_folder", lambda _: (tokenizer_files(), 4096))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("batch", "halt", "payouts", "--as", "", "--reason", ""), 1, "payout_halts_actor_check"),
        (("batch", "tier", "t" * 300, *WHY), 1, "kyc_tiers_tier_check"),
        (("batch", "plan", "--chain", "base", "--as", "a" * 3000), 1, "plan_requests_asked_by_check"),
        (("deposits", "screen", "nonsense", *WHY), 1, "screened_senders_address_check"),
        (("models", "add", "m" * 300, "--path", "x", "--tier", "small"), 1, "models_name_check"),
        ((*RULES, "--large-approvals", "-3"), 2, "greater than or equal to 1"),
        ((*RULES, "--large-approvals", "9" * 14), 2, "less than or equal to 11"),
        (
            ("models", "add", "m", "--path", "x", "--tier", "small", "--context", "-5"),
            2,
            "greater than or equal to 1",
        ),
    ],
    ids=lambda value: "-".join(value[:3])[:40] if isinstance(value, tuple) else "",
)
async def test_a_value_the_database_refuses_is_told_plainly(
    arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = await asyncio.to_thread(CliRunner().invoke, cli.app, arguments, env={"COLUMNS": "1000"})
    assert (done.exit_code, type(done.exception)) == (code, SystemExit), (done.output, done.exception)
    assert said in done.stderr
    assert code == 2 or len(done.stderr.splitlines()) == 1
    assert not any(word in done.stderr for word in ("INSERT", "SELECT", "UPDATE", "asyncpg", "sqlalche"))


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("SELECT CAST(:given AS integer)", "value out of int32 range"),
        ("SELECT repeat('1', 20)::integer + length(:given ::text)", 'value "1'),
        ("SELECT pg_terminate_backend(pg_backend_pid())", None),
        ("SELECT 1 FROM nowhere", None),
    ],
)
async def test_only_a_refused_value_is_told_as_one(
    engine: AsyncEngine, capsys: pytest.CaptureFixture[str], statement: str, said: str | None
) -> None:
    given = {"given": 2**40 if "CAST" in statement else "x"} if ":given" in statement else {}

    async def ask() -> None:
        other = connect(engine.url.render_as_string(hide_password=False))
        try:
            async with transaction(other) as connection:
                await connection.execute(text(statement), given)
        finally:
            await other.dispose()

    expected = DBAPIError if said is None else typer.Exit
    with pytest.raises(expected):
        await asyncio.to_thread(lambda: cli._run(ask()))
    told = capsys.readouterr().err
    assert (said or "") in told
    assert "SELECT" not in told
