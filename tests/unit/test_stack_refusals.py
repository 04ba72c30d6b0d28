"""What `tollway up` cannot work with ends in one sentence and exit code 1, with nothing left running."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from chain.localnet import artifacts
from marketplace.cli import app
from marketplace.platform.errors import PortInUse, SetupFault
from marketplace.platform.processes import processes_of
from marketplace.stack import folder as folders
from marketplace.stack import stack as stacks
from marketplace.stack.commands import stack_file
from marketplace.stack.demo import _require_ours
from marketplace.stack.development_chains import seed_in
from marketplace.stack.folder import StackFolder
from marketplace.stack.stack import TINY, People, Ports, Stack


class Usage(NamedTuple):
    total: int
    used: int
    free: int


PORTS = {"api": "the API", "nats": "NATS", "ethereum": "Ethereum", "base": "Base", "solana": "Solana"}


@pytest.fixture(autouse=True)
def an_installed_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `make setup`, with no server given and no patience."""
    for name in [name for name in os.environ if name.startswith("TOLLWAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(stacks, "anvil_binary", lambda: Path("anvil"))
    monkeypatch.setattr(stacks, "PORT_PATIENCE_S", 0)


def up(folder: Path, *arguments: str) -> str:
    """Run `tollway up`, which must refuse; gives what it said, on one line."""
    options = ["--data-dir", str(folder), "--model", "tiny", *arguments]
    done = CliRunner().invoke(app, ["up", *options], env={"COLUMNS": "1000"})
    assert done.exit_code == 1, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    assert processes_of(folder) == []
    return " ".join(done.output.split())


@pytest.mark.parametrize("name", PORTS)
async def test_each_port_in_use_is_named_with_its_purpose(tmp_path: Path, name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        chosen = dict.fromkeys(PORTS, 0) | {name: port}
        stack = Stack(StackFolder(tmp_path), Ports(**chosen), TINY, lambda _: None, has_node=False)
        with pytest.raises(PortInUse, match=rf"port {port} \(.*{PORTS[name]}.*\) is in use .*--port-base"):
            await stack._check_machine()


def test_up_with_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = up(tmp_path / "data", "--without-node", "--port-base", str(port))
    assert f"port {port} (the API) is in use on 127.0.0.1" in said


def test_a_missing_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "ENGINE", tmp_path / "nothing")
    said = up(tmp_path / "data", "--port-base", "0")
    assert "nothing/venv/bin/python is missing; `make setup` builds it" in said


def test_a_missing_chain_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "anvil_binary", artifacts.anvil_binary)
    monkeypatch.setattr(artifacts, "NODE_MODULES", tmp_path / "node_modules")
    said = up(tmp_path / "data", "--port-base", "0", "--without-node")
    assert "bin/anvil is missing" in said
    assert "`make setup`" in said


def test_another_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "runs on Linux; on darwin" in up(tmp_path / "data", "--port-base", "0", "--without-node")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 12_345_678))
    said = up(tmp_path / "data", "--port-base", "0", "--without-node")
    assert f"the disk of {tmp_path / 'data'} is full: 12 MB are free, 500 MB are needed" in said


async def test_a_running_stack_ends_before_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StackFolder(tmp_path)
    folder.make()
    stack = Stack(folder, Ports.any(), TINY, lambda _: None, has_node=False)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await stack.watch()
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 99 * 10**6))
    with pytest.raises(SetupFault, match=r"nearly full \(99 MB are free\): the stack ends before"):
        await stack.watch()


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full from the first server on: even then the end is in order."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "data" / "x"))

    monkeypatch.setattr(Stack, "_start_servers", full)
    monkeypatch.setattr(Path, "touch", full)
    said = up(tmp_path / "data", "--port-base", "0", "--without-node")
    assert f"No space left on device: {tmp_path / 'data' / 'x'}" in said


def test_a_data_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = up(tmp_path / "file" / "data", "--port-base", "0", "--without-node")
    assert f"cannot use {tmp_path / 'file' / 'data'} as data folder: Not a directory" in said


def test_a_data_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StackFolder(tmp_path).make()
    monkeypatch.setattr(folders.os, "access", lambda *_: False)
    with pytest.raises(SetupFault, match="it is not yours to write in"):
        StackFolder(tmp_path).make()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:secret@127.0.0.1:1/book", "127.0.0.1:1/book cannot be used: "),
        ("mysql://me:secret@127.0.0.1/book", "names mysql; the book needs PostgreSQL"),
        ("certainly not", "is not a URL such as postgresql://"),
    ],
)
def test_a_given_database_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, said: str
) -> None:
    monkeypatch.setenv("TOLLWAY_DATABASE_URL", url)
    answer = up(tmp_path / "data", "--port-base", "0", "--without-node")
    assert said in answer
    assert "secret" not in answer


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"keys": {}}', '{"keys": {"buyer": "k"}, "buyer": 1}', "null", '"x"']
)
def test_a_damaged_people_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "people.json").write_text(text)
    with pytest.raises(SetupFault, match=r"people\.json is damaged"):
        People.read(tmp_path / "people.json")


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_damaged_files_of_a_stack_are_named_by_other_commands(tmp_path: Path, text: str) -> None:
    for name, command in (
        ("environment.json", ["prove"]),
        ("chains.json", ["faucet", "--chain", "base", "--to", "0x" + "11" * 20]),
    ):
        (tmp_path / name).write_text(text)
        done = CliRunner().invoke(app, [*command, "--data-dir", str(tmp_path)], env={"COLUMNS": "1000"})
        assert done.exit_code == 1, done.output
        assert str(tmp_path / name) in done.output
        assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("text", ["", "xyz", "00" * 31])
def test_a_damaged_seed_is_named_and_never_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gas-evm.key"
    path.write_text(text)
    with pytest.raises(SetupFault, match=r"gas-evm\.key does not hold 32 bytes"):
        seed_in(path)
    assert path.read_text() == text


def test_a_seed_is_made_once(tmp_path: Path) -> None:
    made = seed_in(tmp_path / "seed")
    assert len(made) == 32
    assert seed_in(tmp_path / "seed") == made
    assert (tmp_path / "seed").stat().st_mode & 0o777 == 0o600


def test_the_demo_empties_no_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    done = CliRunner().invoke(app, ["demo", "--data-dir", str(tmp_path)], env={"COLUMNS": "1000"})
    assert done.exit_code == 1
    assert "holds something else than a demo" in done.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


async def test_a_demo_empties_its_own_folder_but_for_the_lock(tmp_path: Path) -> None:
    folder = StackFolder(tmp_path)
    folder.make()
    async with folder.owned():
        (folder.secrets / "people.json").write_text(json.dumps({}))
        (folder.root / "link").symlink_to(shutil.which("sh") or "/bin/sh")
        folder.forget()
        assert [entry.name for entry in tmp_path.iterdir()] == ["stack.lock"]
        assert folder.owner_pid() == os.getpid()
    _require_ours(folder)
    assert folder.owner_pid() is None


def test_stack_json_lies_beside_the_default_folder_and_inside_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    beside = tmp_path / "var" / "stack.json"
    assert stack_file(Path("var/stack")) == stack_file(tmp_path / "var" / "stack") == beside
    assert stack_file(Path("var/other")) == tmp_path / "var" / "other" / "stack.json"
