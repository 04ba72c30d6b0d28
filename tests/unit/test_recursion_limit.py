"""No library may raise the recursion limit in our processes: parsers rely on it (A67)."""

from __future__ import annotations

import subprocess
import sys

import pytest

DEEP = """
import json, sys, msgspec
import {module}
assert sys.getrecursionlimit() == 1000, sys.getrecursionlimit()
for data in (b"[" * 1_000_000, b'{{"a":' * 300_000):
    for decode in (json.loads, msgspec.json.decode):
        try:
            decode(data)
        except RecursionError:
            continue
        raise SystemExit("decoded")
"""


@pytest.mark.parametrize(
    "module", ["marketplace.app", "marketplace.processes", "chain.evm.keystore", "node_agent.cli"]
)
def test_a67_deep_json_is_an_error_and_not_a_crash(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DEEP.format(module=module)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
