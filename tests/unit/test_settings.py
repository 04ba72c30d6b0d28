"""What a process refuses to start with."""

from __future__ import annotations

import pytest
from sqlalchemy import make_url

from marketplace.platform.errors import SetupFault
from marketplace.platform.settings import load_settings


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLLWAY_SECRET", "s" * 32)
    monkeypatch.setenv("TOLLWAY_DATABASE_URL", "postgresql://paula:word@db.example/book?sslmode=require")


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg", "postgresql+psycopg"])
def test_a_database_is_named_as_people_name_it(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv(
        "TOLLWAY_DATABASE_URL", f"{scheme}://paula:p%40ss@db.example:6432/book?sslmode=require"
    )
    url = make_url(load_settings().database_url.get_secret_value())
    assert (url.drivername, url.username, url.password) == ("postgresql+asyncpg", "paula", "p@ss")
    assert (url.host, url.port, url.database) == ("db.example", 6432, "book")
    assert dict(url.query) == {"ssl": "require"}


@pytest.mark.parametrize(
    ("variable", "value", "because"),
    [
        ("TOLLWAY_DATABASE_URL", "", "is not set"),
        ("TOLLWAY_DATABASE_URL", "db.example/book", "is not a URL such as"),
        ("TOLLWAY_DATABASE_URL", "mysql://db.example/book", "names mysql; the book needs PostgreSQL"),
        ("TOLLWAY_SECRET", "short", "at least 32 random characters"),
        ("TOLLWAY_RESERVE_S", "5", "shortened in development only"),
        ("TOLLWAY_API_PORT", "eighty", "TOLLWAY_API_PORT"),
    ],
)
def test_a_bad_setting_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, because: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SetupFault, match=because) as refused:
        load_settings()
    assert "word" not in str(refused.value).replace("password", "")
