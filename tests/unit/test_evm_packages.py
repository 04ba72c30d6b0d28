"""What we took from other people's packages is what SOURCE.md says, and the lock names no address."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from chain.evm.abi import ABI_FOLDER
from chain.evm.safe import MULTI_SEND_CALL_ONLY
from chain.localnet.artifacts import DEPLOYMENT_FILES, NODE_MODULES, PATHS, safe_deployment
from chain.localnet.settings import PROJECT_ROOT

SOURCES = re.findall(
    r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$", (ABI_FOLDER / "SOURCE.md").read_text(), re.MULTILINE
)
ORIGIN = {
    "usdc": "FiatTokenV2_2",
    "safe": "SafeL2",
    "safe_proxy_factory": "SafeProxyFactory",
    "multi_send_call_only": "MultiSendCallOnly",
}


def test_every_committed_file_is_in_the_table() -> None:
    committed = {str(p.relative_to(ABI_FOLDER)) for p in ABI_FOLDER.rglob("*") if p.is_file()} - {"SOURCE.md"}
    assert committed | {f"node_modules/{path}" for path in PATHS.values()} == {name for name, _ in SOURCES}


@pytest.mark.parametrize(("name", "digest"), SOURCES)
def test_a_file_is_the_one_described(name: str, digest: str) -> None:
    path = PROJECT_ROOT / name if name.startswith("node_modules/") else ABI_FOLDER / name
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", ORIGIN)
def test_every_entry_of_an_abi_is_its_authors(name: str) -> None:
    theirs = json.loads((NODE_MODULES / PATHS[ORIGIN[name]]).read_text())["abi"]
    ours = json.loads((ABI_FOLDER / f"{name}.json").read_text())
    assert all(entry in theirs for entry in ours)
    names = [entry["name"] for entry in ours]
    assert len(names) == len(set(names)), "overloads would be told apart by luck"


def test_the_delegatecall_target_is_safes_own() -> None:
    assert safe_deployment("MultiSendCallOnly").address == MULTI_SEND_CALL_ONLY
    assert "MultiSendCallOnly" in DEPLOYMENT_FILES


def test_the_lock_names_no_download_address() -> None:
    lock = json.loads((PROJECT_ROOT / "package-lock.json").read_text())
    assert "http" not in (PROJECT_ROOT / "package-lock.json").read_text()
    wanted = {f"node_modules/@foundry-rs/anvil-{p}" for p in ("linux-amd64", "linux-arm64", "darwin-arm64")}
    assert wanted <= lock["packages"].keys()
    assert (
        lock["packages"][""]["dependencies"]
        == json.loads((PROJECT_ROOT / "package.json").read_text())["dependencies"]
    )
