"""The agent by itself: without the rest of the product, without torch, without a Unix."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WINDOWS = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"fcntl", "pwd", "grp", "resource", "termios", "tty", "uvloop"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
for name in ("fcntl", "pwd", "grp", "resource", "termios", "tty"):
    sys.modules.pop(name, None)
import node_agent
names = [m.name for m in pkgutil.walk_packages(node_agent.__path__, "node_agent.")]
for name in names:
    importlib.import_module(name)
from node_agent.core_files import forbid_core_files
forbid_core_files()
foreign = {"torch", "vllm", "numpy", "tokenizers", "sqlalchemy", "fastapi", "uvicorn", "web3", "solders"}
print(len(names), sorted(foreign & set(sys.modules)))
"""

BUILD = "import sys, hatchling.build as b; print(b.build_wheel(sys.argv[1]))"


def test_every_module_imports_without_what_windows_lacks() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WINDOWS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    count, _, foreign = done.stdout.partition(" ")
    assert int(count) > 20
    assert foreign.strip() == "[]"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_wheel_and_its_pinned_requirements_are_enough(tmp_path: Path) -> None:
    """`pip install` of the hash-pinned lock and the wheel into an empty environment: help and doctor work."""
    built = subprocess.run(
        [sys.executable, "-c", BUILD, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    wheel = tmp_path / built.stdout.strip().splitlines()[-1]
    packed = zipfile.ZipFile(wheel).namelist()
    assert "node_agent/protocol.py" in packed
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, env=environment)
    pip = [venv / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    lock = ROOT / "requirements" / "node.lock"
    subprocess.run([*pip, "--require-hashes", "-r", lock], check=True, env=environment)
    subprocess.run([*pip, "--no-deps", wheel], check=True, env=environment)
    node = venv / "bin" / "tollway-node"
    helped = subprocess.run([node, "--help"], capture_output=True, text=True, check=True, env=environment)
    for command in (
        "enroll",
        "run",
        "status",
        "prices",
        "earnings",
        "withdraw",
        "payouts",
        "doctor",
        "service",
    ):
        assert command in helped.stdout
    told = subprocess.run(
        [node, "doctor", "--json", "--data-dir", tmp_path / "node"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert told.returncode == 1
    findings = {finding["check"]: finding for finding in json.loads(told.stdout)["findings"]}
    assert "tollway-node enroll" in findings["settings"]["advice"]
    site = next((venv / "lib").glob("python3*/site-packages"))
    assert not (site / "torch").exists()
    assert not (site / "sqlalchemy").exists()
