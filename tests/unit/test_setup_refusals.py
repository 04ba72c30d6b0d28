"""`make setup` on a machine that lacks something: one sentence, exit code 1, nothing installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What set-up reads of a fresh clone."""
    for name in ("setup/setup.py", "pyproject.toml", "package.json", "package-lock.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    return tmp_path


def a_tool(folder: Path, name: str, text: str = "exit 0") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def set_up(checkout: Path, path: Path, *, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run it with only `path` as PATH; `before` is Python that changes the machine first."""
    script = checkout / "setup" / "setup.py"
    code = f"import sys, runpy\n{before}\nsys.argv = [{str(script)!r}, '--without-engine']\n"
    return subprocess.run(
        [sys.executable, "-c", f"{code}runpy.run_path({str(script)!r}, run_name='__main__')"],
        env={"PATH": str(path), "HOME": str(checkout)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("tools", "before", "said"),
    [
        ((), "", "node is missing: install Node.js 20+ with npm"),
        (("node",), "", "npm is missing: install Node.js 20+ with npm"),
        (("node", "npm"), "import platform; platform.system = lambda: 'Darwin'", "this is Darwin"),
        (("node", "npm"), "import platform; platform.system = lambda: 'Windows'", "this is Windows"),
        (("node", "npm"), "sys.version_info = (3, 10, 2)", "Python 3.11+ is needed"),
        (
            ("node", "npm"),
            "import importlib.util as u; u.find_spec = lambda name: None",
            "install its venv package (python3-venv)",
        ),
        (
            ("node", "npm"),
            "import shutil; shutil.disk_usage = lambda _: type('U', (), {'free': 5 * 10**8})",
            "500 MB of disk are free, 2000 MB are needed",
        ),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(
    checkout: Path, tmp_path: Path, tools: tuple[str, ...], before: str, said: str
) -> None:
    for tool in tools:
        a_tool(tmp_path / "bin", tool)
    done = set_up(checkout, tmp_path / "bin", before=before)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (checkout / ".venv").exists()
    assert not (checkout / "node_modules").exists()


def test_a_step_that_failed_is_done_again_and_one_that_was_done_is_not(
    checkout: Path, tmp_path: Path
) -> None:
    """With the environment's stamp in place, only npm is left to do; it fails, then works."""
    stamping = f"""
import pathlib, runpy
root = pathlib.Path({str(checkout)!r})
(root / ".venv").mkdir(exist_ok=True)
read = runpy.run_path(str(root / "setup" / "setup.py"))
wanted = read["fingerprint"]("requirements/bootstrap.lock", "requirements/dev.lock", "pyproject.toml")
(root / ".venv" / "tollway.stamp").write_text(wanted)
"""
    tools = tmp_path / "bin"
    a_tool(tools, "node")
    a_tool(tools, "npm", "echo the registry is down; exit 7")
    failed = set_up(checkout, tools, before=stamping)
    assert failed.returncode == 1
    assert "Python environment: up to date" in failed.stdout
    assert "npm ci failed (exit code 7)" in failed.stderr
    assert "the registry is down" in failed.stderr

    a_tool(tools, "npm", f"/bin/mkdir -p {checkout}/node_modules")
    nothing_brought = set_up(checkout, tools, before=stamping)
    assert nothing_brought.returncode == 1
    assert "npm brought no anvil binary" in nothing_brought.stderr

    binary = checkout / "node_modules/@foundry-rs/anvil-linux-amd64/bin/anvil"
    a_tool(tools, "npm", f"/bin/mkdir -p {binary.parent}; echo > {binary}; echo once >> {tmp_path}/calls")
    assert set_up(checkout, tools, before=stamping).returncode == 0
    again = set_up(checkout, tools, before=stamping)
    assert again.returncode == 0
    assert "chain parts (npm): up to date" in again.stdout
    assert (tmp_path / "calls").read_text() == "once\n"


def test_ending_it_ends_the_tool_it_runs(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    for name in ("node", "npm"):
        a_tool(tools, name)
    slow = tmp_path / "slow_venv.py"  # stands for `python -m venv`
    slow.write_text(
        f"import os, sys, time, pathlib\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    script = checkout / "setup" / "setup.py"
    code = (
        f"import runpy, sys\nread = runpy.run_path({str(script)!r})\n"
        f"work = lambda: read['run']([sys.executable, {str(slow)!r}], 'sleeping')\n"
        f"read['main'].__globals__['make_environment'] = work\n"
        f"sys.argv = ['setup.py', '--without-engine']\nsys.exit(read['main']())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={"PATH": str(tools), "HOME": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted; run it again to go on" in said
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
