"""A value the database refuses ends in one sentence that names the rule, without the SQL."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest
import typer
from gateway_parts import chains_json, tokenizer_files
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from typer.testing import CliRunner

from marketplace import cli
from marketplace.catalog import models
from marketplace.platform import database
from marketplace.platform.database import connect, create_database, drop_database, transaction

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
        ("SELECT nothing FROM accounts", None),
        ("SELECT 1 FROM nowhere", 'relation "nowhere" does not exist): run `tollway migrate`'),
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


def said_of(url: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Run `tollway` on another database, which must refuse in one line; gives it."""
    monkeypatch.setenv("TOLLWAY_DATABASE_URL", url)
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "1000"})
    assert (done.exit_code, type(done.exception)) == (1, SystemExit), (done.output, done.exception)
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("command", ["deposits cases", "ledger show loss", "migrate"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"username": "nobody"}, "the database refuses the login of TOLLWAY_DATABASE_URL: "),
        ({"password": "wrong"}, "the database refuses the login of TOLLWAY_DATABASE_URL: "),
        ({"database": "nope"}, 'there is no such database: database "nope" does not exist'),
    ],
    ids=["user", "password", "database"],
)
async def test_a_database_that_lets_nobody_in_says_why(
    database_url: str, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], said: str, command: str
) -> None:
    url = make_url(database_url).set(**change).render_as_string(hide_password=False)
    told = await asyncio.to_thread(said_of, url, monkeypatch, *command.split())
    assert told.startswith(f"tollway: {said}")
    assert "wrong" not in told


@pytest.mark.parametrize("command", ["deposits cases", "batch show", "ledger show loss", "prove"])
async def test_an_empty_database_is_to_be_migrated(
    database_url: str, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    empty = make_url(database_url).set(database="empty").render_as_string(hide_password=False)
    await create_database(empty)
    try:
        told = await asyncio.to_thread(said_of, empty, monkeypatch, *command.split())
    finally:
        await drop_database(empty)
    assert told.startswith("tollway: the database has no tables yet")
    assert told.endswith("run `tollway migrate`")


async def test_a_new_server_is_to_be_migrated(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has not even the role that the commands work as."""
    monkeypatch.setattr(database, "APPLICATION_ROLE", "somebody")
    monkeypatch.setattr(database, "connect", partial(connect, role="somebody"))
    told = await asyncio.to_thread(said_of, database_url, monkeypatch, "deposits", "cases")
    assert told.endswith('no tables yet (role "somebody" does not exist): run `tollway migrate`')
