"""`tollway nats-config`: nats-server itself accepts what it prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nkeys
import pytest
from fabric_parts import make_tls
from typer.testing import CliRunner

from marketplace.cli import app
from marketplace.platform.embedded_nats import load_or_make_credentials

NATS_SERVER = Path(sys.executable).with_name("nats-server")


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = load_or_make_credentials(tmp_path / "secrets")
    monkeypatch.setenv("TOLLWAY_NATS_PASSWORD", credentials.password)
    monkeypatch.setenv("TOLLWAY_NATS_ISSUER_SEED", credentials.issuer_seed)
    monkeypatch.setenv("TOLLWAY_NATS_CLUSTER_PASSWORD", "p" * 24)


def test_nats_server_accepts_what_is_printed(tmp_path: Path, secrets: None) -> None:
    tls = make_tls(tmp_path)
    secured = ["--cert", str(tls.certificate), "--key", str(tls.key), "--ca", str(tls.ca)]
    clustered = ["--cluster-listen", "127.0.0.1:6222", "--route", "b:6222", "--route", "c:6222"]
    for options in ([], secured, clustered, [*secured, *clustered]):
        told = CliRunner().invoke(app, ["nats-config", "--name", "nats-1", *options])
        assert told.exit_code == 0, told.output
        file = tmp_path / "nats.conf"
        file.write_text(told.output)
        checked = subprocess.run(
            [NATS_SERVER, "-t", "-c", file], capture_output=True, text=True, check=False, timeout=20
        )
        assert checked.returncode == 0, checked.stderr
        assert ("verify: true" in told.output) is (len(options) == len(secured) + len(clustered))


def test_what_cannot_be_printed_is_refused_in_a_sentence(
    tmp_path: Path, secrets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, words in (
        (["--cert", "x.pem"], "come together"),
        (["--listen", 'a"b'], "quote"),
    ):
        told = CliRunner().invoke(app, ["nats-config", "--name", "n", *options])
        assert told.exit_code == 2
        assert words in told.output
    of_a_user = nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_USER).decode()
    for seed in ("nonsense", of_a_user):
        with monkeypatch.context() as another:
            another.setenv("TOLLWAY_NATS_ISSUER_SEED", seed)
            told = CliRunner().invoke(app, ["nats-config", "--name", "n"], env={"COLUMNS": "200"})
        assert told.exit_code == 2
        assert "TOLLWAY_NATS_ISSUER_SEED is no account seed" in told.output
    monkeypatch.delenv("TOLLWAY_NATS_PASSWORD")
    told = CliRunner().invoke(app, ["nats-config", "--name", "n"])
    assert told.exit_code == 2
    assert "TOLLWAY_NATS_PASSWORD" in told.output
