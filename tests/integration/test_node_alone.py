"""The agent by itself: without the rest of the product, without torch, without a Unix."""

import json
import os
import re
import subprocess
import sys
import sysconfig
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product as it is published."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-c", BUILD, folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return folder / built.stdout.strip().splitlines()[-1]


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the recipe is pinned for Python 3.11")
def test_an_installed_wheel_has_the_engines_recipe_whole(wheel: Path, tmp_path: Path) -> None:
    """`engine install` runs what the wheel brought: every file the recipe reads, and nothing of this tree."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PATH"] = "/nowhere"  # of a machine without a GPU
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = next((venv / "lib").glob("python3*/site-packages"))
    # As pip unpacks it; the agent's libraries are this environment's.
    zipfile.ZipFile(wheel).extractall(site)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    read = set(re.findall(r'HERE / "([^"]+)"', (ROOT / "engine" / "build.py").read_text()))
    assert {"requirements.lock", "llama.lock", "tiny_model.py", "gguf_to_hf.py"} <= read
    for name in (*read, "build.py"):
        assert (site / "node_agent" / "recipe" / name).read_bytes() == (ROOT / "engine" / name).read_bytes()
    python, blocked = venv / "bin" / "python", tmp_path / "file"
    blocked.touch()
    asked = [python, "-m", "node_agent.cli", "engine", "install", "--dir", blocked / "engine", "--json"]
    told = subprocess.run(
        asked, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert told.returncode == 1
    assert f"Cannot write to {blocked / 'engine'}" in told.stderr, told.stderr  # the recipe itself said so
    where = [python, "-c", "from node_agent.engine_recipe import find_recipe; print(find_recipe())"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == site / "node_agent" / "recipe" / "build.py"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_wheel_and_its_pinned_requirements_are_enough(wheel: Path, tmp_path: Path) -> None:
    """`pip install` of the hash-pinned lock and the wheel into an empty environment: help and doctor work."""
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
