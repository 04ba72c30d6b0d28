"""What a person mistypes ends in one plain sentence and exit code 1, not in a stack trace."""

from __future__ import annotations

import json
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from chain.errors import ChainRefusal
from chain.evm import keystore as evm_keystore
from chain.solana import keystore as solana_keystore
from marketplace import cli
from marketplace.deposits import solana_sweeps
from marketplace.platform import database
from marketplace.platform.errors import SetupFault
from marketplace.platform.settings import load_chains
from marketplace.settlement.sanctions import BadList, read_list

PASSWORD = "correct horse battery"
WALLET = "0x" + "11" * 20
EVM_HASH, SOLANA_SIGNATURE = "0x" + "ab" * 32, "5" * 87
EVM_CHAIN = {
    "rpc": [], "chain_id": 1, "usdc": "u", "escrow": "e", "forwarder_factory": "f", "multi_send": "m",
    "signers": [], "threshold": 2,
}  # fmt: skip
SOLANA_CHAIN = {
    "rpc": [], "usdc_mint": "u", "multisig": "m", "escrow": "e", "nonce_account": "n", "gas_payer": "g",
    "signers": [], "threshold": 2,
}  # fmt: skip
CHAINS = json.dumps({"ethereum": EVM_CHAIN, "base": EVM_CHAIN, "solana": SOLANA_CHAIN})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that the commands find."""
    (tmp_path / "chains.json").write_text(CHAINS)
    (tmp_path / "export.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOLLWAY_SIGNER_PASSPHRASE", PASSWORD)
    monkeypatch.setenv("TOLLWAY_SECRET", "s" * 40)
    monkeypatch.setenv("TOLLWAY_CHAINS_FILE", str(tmp_path / "chains.json"))
    return tmp_path


def refused(*arguments: str) -> str:
    """Run `tollway`, which must refuse in one line; gives it."""
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "1000"})
    assert (done.exit_code, type(done.exception)) == (1, SystemExit), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("tollway: ")
    return line


def test_the_other_chains_keystore_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evm, solana = folder / "evm.json", folder / "solana.json"
    evm_keystore.create(evm, PASSWORD, scrypt_n=2)
    solana_keystore.create(solana, PASSWORD, scrypt_n=2)
    with pytest.raises(ChainRefusal, match=r"evm\.json is an EVM keystore.* take the Solana one"):
        solana_keystore.address_of(evm)
    with pytest.raises(ChainRefusal, match=r"solana\.json is a Solana keystore.* take the EVM one"):
        evm_keystore.address(solana)

    monkeypatch.setattr(solana_sweeps, "decode_export", lambda _: SimpleNamespace(fence="", lines=()))
    monkeypatch.setattr(solana_sweeps, "pinned_terms", lambda _: None)
    monkeypatch.setattr(solana_sweeps, "_rebuild", lambda *_: None)
    files = ("export.json", "--chains-file", "chains.json", "--out", "approval.json")
    assert "take the Solana one" in refused("deposits", "sweep", "sign", *files, "--keystore", str(evm))


def test_any_mistake_about_a_keystore_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(cli.typer.Exit), cli._plain_errors():
        raise solana_keystore.WrongPassword("solana.json: wrong password")
    assert capsys.readouterr().err == "tollway: solana.json: wrong password\n"


SIGN = ("export.json", "--keystore", "k", "--chains-file", "chains.json")


@pytest.mark.parametrize(
    "arguments",
    [
        ("batch", "approve", "/nope/x", "--as", "ann"),
        ("batch", "export", "00000000-0000-7000-8000-000000000000", "--out", "/nope/x"),
        ("deposits", "sweep", "approve", "/nope/x", "--as", "ann"),
        ("deposits", "sweep", "export", "--out", "/nope/x"),
        ("deposits", "sweep", "sign", *SIGN, "--out", "/nope/x"),
    ],
    ids=lambda arguments: "-".join(arguments[:3]),
)
def test_a_file_that_is_not_there_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(cli, "_with_book", lambda *_: b"an export")
    monkeypatch.setattr(solana_sweeps, "decode_export", lambda _: None)
    monkeypatch.setattr(solana_sweeps, "sign_sweep", lambda *_: {})
    assert refused(*arguments) == "tollway: No such file or directory: /nope/x"


COMMANDS = (
    "prove", "batch show", "batch halt payouts --as ann --reason x", "batch plan --chain base --as ann",
    "deposits cases", f"deposits explain {EVM_HASH} --chain base", "ledger show loss", "models alias a b",
    "migrate",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_database_one_is_told_to_start_the_stack(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("TOLLWAY_DATABASE_URL", "")  # both: at the end of the test, what the command sets goes
    monkeypatch.delenv("TOLLWAY_DATABASE_URL")
    gone = {"database_url": "postgresql://somebody@/?host=/nope"}
    (folder / "environment.json").write_text(json.dumps(gone))
    said = refused(*command.split(), "--data-dir", str(folder))
    assert "the stack does not run; start it with `make up`" in said


@pytest.mark.parametrize("server", ["/?host=/elsewhere", "127.0.0.1:1/book"], ids=["socket", "port"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_database_of_somebody_else_is_not_started_by_the_stack(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, server: str
) -> None:
    monkeypatch.setenv("TOLLWAY_DATABASE_URL", f"postgresql://somebody@{server}")
    assert refused(*command.split()) == "tollway: the database of TOLLWAY_DATABASE_URL does not answer"


@pytest.mark.parametrize("command", ["deposits cases", "ledger show loss"])
def test_a_database_that_takes_calls_and_says_nothing_does_not_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(database, "connect", partial(database.connect, connect_seconds_max=0.2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("TOLLWAY_DATABASE_URL", f"postgresql://somebody@127.0.0.1:{port}/book")
        assert refused(*command.split()) == "tollway: the database does not answer in time"


def test_not_every_silence_is_the_databases(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(cli.typer.Exit), cli._plain_errors():
        raise TimeoutError
    assert capsys.readouterr().err == "tollway: something that was asked does not answer in time\n"


@pytest.mark.parametrize("arguments", ["batch show [/x]", "up --model [/x]", "demo --model [/x]"])
def test_what_was_typed_is_said_as_it_was_typed(folder: Path, arguments: str) -> None:
    done = CliRunner().invoke(cli.app, arguments.split(), env={"COLUMNS": "1000"})
    assert (done.exit_code, type(done.exception)) == (2, SystemExit), done.output
    assert "'[/x]'" in done.stderr


@pytest.mark.parametrize(
    ("usdc", "to", "said"),
    [
        ("abc", WALLET, "'abc' is not a USDC amount"),
        ("1e30", WALLET, "'1e30' is not a USDC amount"),
        ("9" * 23, WALLET, "is too much"),
        ("0", WALLET, "0 USDC cannot be minted"),
        ("1", "0x12", "'0x12' is not an EVM address"),
        ("1", "0x" + "00" * 20, "belongs to nobody"),
    ],
)
def test_the_faucet_says_what_it_cannot_give(folder: Path, usdc: str, to: str, said: str) -> None:
    arguments = ("--chain", "base", "--to", to, f"--usdc={usdc}", "--data-dir", str(folder))
    assert said in refused("faucet", *arguments)


@pytest.mark.parametrize(
    ("tx", "chain"),
    [("foo", "base"), ("0x12", "base"), (SOLANA_SIGNATURE, "base"), (EVM_HASH, "solana"), ("5", "solana")],
)
def test_what_is_no_transaction_is_not_explained(folder: Path, tx: str, chain: str) -> None:
    said = refused("deposits", "explain", tx, "--chain", chain)
    assert said.endswith(f"'{tx}' is not a transaction hash of {chain}")


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"keys": {}}', "ethereum: Field required"), ("x", "Invalid JSON"), ("[]", "object")],
)
def test_of_a_file_that_is_no_chains_file_one_thing_is_said(folder: Path, content: str, said: str) -> None:
    (folder / "chains.json").write_text(content)
    with pytest.raises(SetupFault, match=rf"^{folder}/chains\.json is not a chains file: .*{said}") as caught:
        load_chains(folder / "chains.json")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("line", ["0x12", "0x" + "g" * 40, "nonsense", "two words"])
def test_a_malformed_line_of_a_sanctions_list_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "list.txt"
    file.write_text(f"# ours\n{WALLET}\n{line}  # who\n")
    with pytest.raises(BadList, match=rf"list\.txt, line 3: '{line}' is not an address"):
        read_list(file)
