"""Whose a stack's folder is: one owner at a time, and nobody before the last one's processes are gone."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from marketplace.platform.errors import AlreadyRunning
from marketplace.platform.processes import STACK_MARK, processes_of
from marketplace.stack import folder as folders
from marketplace.stack.folder import StackFolder

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
)


@pytest.fixture
def folder(tmp_path: Path) -> StackFolder:
    made = StackFolder(tmp_path / "data")
    made.make()
    return made


def leftover(folder: StackFolder) -> subprocess.Popen[bytes]:
    """A process of an earlier stack that takes its time."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN],
        env={**os.environ, STACK_MARK: str(folder.root)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


async def take(folder: StackFolder) -> int | None:
    """Own the folder for a moment; gives whom it says it belongs to."""
    async with folder.owned():
        return folder.owner_pid()


async def test_a_start_waits_until_leftovers_are_gone(folder: StackFolder) -> None:
    process = leftover(folder)
    try:
        assert processes_of(folder.root) == [process.pid]
        assert processes_of(folder.root.parent) == []
        taking = asyncio.ensure_future(take(folder))
        await asyncio.sleep(0.3)
        assert not taking.done()
    finally:
        process.kill()
        process.wait()
    assert await asyncio.wait_for(taking, 5) == os.getpid()
    assert folder.owner_pid() is None


async def test_leftovers_that_do_not_end_are_killed(
    folder: StackFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "LEFTOVER_PATIENCE_S", 0.2)
    process = leftover(folder)
    ended = asyncio.get_running_loop().run_in_executor(None, process.wait)  # as init would
    async with asyncio.timeout(5), folder.owned():
        assert processes_of(folder.root) == []
    assert await ended == -signal.SIGKILL


async def test_all_that_is_started_under_an_owner_is_marked(folder: StackFolder) -> None:
    async with folder.owned():
        for _ in range(40):  # as soon as it runs, when the kernel often shows no environment yet
            child = subprocess.Popen(["sleep", "60"])
            try:
                assert processes_of(folder.root) == [child.pid]
            finally:
                child.kill()
                child.wait()
    assert STACK_MARK not in os.environ


async def test_a_folder_has_one_owner(folder: StackFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "NOTICE_PATIENCE_S", 0.2)
    async with folder.owned():
        with pytest.raises(
            AlreadyRunning, match=f"already runs .* \\(pid {os.getpid()}\\); `make down` ends"
        ):
            await take(StackFolder(folder.root))


async def test_an_owner_that_is_ending_is_waited_for(
    folder: StackFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "NOTICE_PATIENCE_S", 0.1)
    folder.mark_ending()
    with (folder.root / "stack.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        taking = asyncio.ensure_future(take(folder))
        await asyncio.sleep(0.5)
        assert not taking.done()
    await asyncio.wait_for(taking, 5)
    assert not (folder.root / "stack.ending").exists()  # a killed one's marker says nothing of us


def test_down_ends_what_a_killed_owner_left(folder: StackFolder) -> None:
    assert folder.end_owner() is False
    with subprocess.Popen(["sleep", "60"], env={**os.environ, STACK_MARK: str(folder.root)}) as process:
        ending = threading.Timer(0.3, process.kill)
        try:
            assert processes_of(folder.root) == [process.pid]
            ending.start()
            assert folder.end_owner() is True
            assert processes_of(folder.root) == []
        finally:
            ending.cancel()
            process.kill()
