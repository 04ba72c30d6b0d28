"""`make test` runs the modules in two parts; each of them is in one, and only one."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import conftest

ROOT: Final = Path(__file__).resolve().parents[2]
MODULES: Final = sorted((ROOT / "tests").rglob("test_*.py"))
READS_THE_ENGINE: Final = re.compile(r'/ "\.engine"|\("TOLLWAY_ENGINE_DIR"\)')


def _left_out(module: Path, part: str | None) -> bool:
    config = SimpleNamespace(getoption={"part": part}.__getitem__)
    return conftest.pytest_ignore_collect(module, config) is True


def test_each_module_runs_in_one_part_and_all_run_without_a_part() -> None:
    assert MODULES
    early = {module for module in MODULES if not _left_out(module, "early")}
    late = {module for module in MODULES if not _left_out(module, "late")}
    assert early | late == set(MODULES)
    assert early & late == set()
    assert early
    assert late
    assert not any(_left_out(module, None) for module in MODULES)


def test_make_test_runs_both_parts() -> None:
    asked = re.findall(r"pytest .*--part (\w+)", (ROOT / "Makefile").read_text())
    assert sorted(asked) == ["early", "late"]


def test_an_early_module_reads_nothing_of_the_engine() -> None:
    """It is not there yet: a test that skips itself without it would never run. Mark it `engine`."""
    early = [module for module in MODULES if not _left_out(module, "early")]
    found = [module.name for module in early if READS_THE_ENGINE.search(module.read_text())]
    assert found == []
