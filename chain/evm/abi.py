"""Calls to contracts: encoded and decoded from the ABIs in `contracts_abi/`, without web3's formatters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
from eth_abi.abi import decode as abi_decode
from eth_abi.abi import encode as abi_encode
from eth_abi.exceptions import DecodingError
from eth_hash.auto import keccak

from chain.errors import Malformed

ABI_FOLDER: Final = Path(__file__).resolve().parents[2] / "contracts_abi"


class _Parameter(msgspec.Struct):
    type: str


class _Entry(msgspec.Struct):
    type: str
    name: str = ""
    inputs: list[_Parameter] = []
    outputs: list[_Parameter] = []


@dataclass(frozen=True, slots=True)
class Function:
    """One function of a contract; no overloads among those we call."""

    signature: str
    selector: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def encode(self, *arguments: Any) -> bytes:
        """Calldata of this call."""
        return self.selector + abi_encode(self.inputs, arguments)

    def decode(self, returned: bytes) -> tuple[Any, ...]:
        """What the call returned; Malformed if it is not that."""
        return _decode(self.outputs, returned, self.signature)

    def arguments(self, calldata: bytes) -> tuple[Any, ...]:
        """Read the arguments back out of calldata; Malformed if it is another call."""
        if calldata[:4] != self.selector:
            raise Malformed(f"calldata is not a call of {self.signature}")
        return _decode(self.inputs, calldata[4:], self.signature)


@dataclass(frozen=True, slots=True)
class Abi:
    """The functions and event topics of one contract, by name."""

    functions: dict[str, Function]
    topics: dict[str, str]

    def __getitem__(self, name: str) -> Function:
        return self.functions[name]


def _decode(types: Sequence[str], data: bytes, what: str) -> tuple[Any, ...]:
    try:
        return tuple(abi_decode(types, data))
    except (DecodingError, OverflowError, UnicodeDecodeError) as e:
        raise Malformed(f"{what}: {len(data)} bytes do not decode: {e}") from e


@cache
def load(name: str) -> Abi:
    """Read ``contracts_abi/<name>.json``."""
    entries = msgspec.json.decode((ABI_FOLDER / f"{name}.json").read_bytes(), type=list[_Entry])
    functions: dict[str, Function] = {}
    topics: dict[str, str] = {}
    for entry in entries:
        inputs = tuple(p.type for p in entry.inputs)
        signature = f"{entry.name}({','.join(inputs)})"
        digest = keccak(signature.encode())
        if entry.type == "function":
            outputs = tuple(p.type for p in entry.outputs)
            functions[entry.name] = Function(signature, digest[:4], inputs, outputs)
        elif entry.type == "event":
            topics[entry.name] = "0x" + digest.hex()
    return Abi(functions, topics)
