"""A payout batch as a Safe 1.4.1 transaction, built without a node.

There is one kind: the Safe delegate-calls MultiSendCallOnly with plain USDC transfers.  No ether, no
gas refund, no other target, no other operation can be expressed here, so none can be signed
(the refund fields and a foreign delegatecall are how Safes have been drained).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from eth_abi.abi import encode as abi_encode
from eth_hash.auto import keccak

from chain.errors import Malformed
from chain.evm import abi
from chain.evm.addresses import to_bytes
from chain.ports import PayoutLine

MULTI_SEND_CALL_ONLY: Final = "0x9641d764fc13c8B624c04430C7356C1C7C8102e2"
"""Safe 1.4.1's, at its canonical address on Ethereum and Base (safe-deployments)."""
DELEGATECALL: Final = 1
_ZERO: Final = "0x" + "00" * 20
_DOMAIN_TYPE: Final = keccak(b"EIP712Domain(uint256 chainId,address verifyingContract)")
_SAFE_TX_TYPE: Final = keccak(
    b"SafeTx(address to,uint256 value,bytes data,uint8 operation,uint256 safeTxGas,uint256 baseGas,"
    b"uint256 gasPrice,address gasToken,address refundReceiver,uint256 nonce)"
)
_SAFE_TX_FIELDS: Final = (
    *("address", "uint256", "bytes32", "uint8"),
    *("uint256", "uint256", "uint256", "address", "address"),
    "uint256",
)
_FIXED: Final = (DELEGATECALL, 0, 0, 0, _ZERO, _ZERO)
"""operation, safeTxGas, baseGas, gasPrice, gasToken, refundReceiver."""


@dataclass(frozen=True, slots=True)
class BatchTransaction:
    """The SafeTx of one batch; every field that is not here is zero."""

    chain_id: int
    safe: str
    multi_send: str
    data: bytes
    nonce: int

    def digest(self) -> bytes:
        """EIP-712 hash which the owners sign; equals the contract's `getTransactionHash`."""
        domain = keccak(
            abi_encode(["bytes32", "uint256", "address"], [_DOMAIN_TYPE, self.chain_id, self.safe])
        )
        message = keccak(
            abi_encode(
                ["bytes32", *_SAFE_TX_FIELDS],
                [_SAFE_TX_TYPE, self.multi_send, 0, keccak(self.data), *_FIXED, self.nonce],
            )
        )
        return keccak(b"\x19\x01" + domain + message)

    def exec_calldata(self, signatures: bytes) -> bytes:
        """Calldata of `execTransaction`; `signatures` are 65 bytes each, ascending by owner."""
        return abi.load("safe")["execTransaction"].encode(self.multi_send, 0, self.data, *_FIXED, signatures)


def batch_transaction(
    lines: Sequence[PayoutLine], *, chain_id: int, safe: str, usdc: str, multi_send: str, nonce: int
) -> BatchTransaction:
    """The SafeTx that pays `lines` in their order."""
    transfer = abi.load("usdc")["transfer"]
    packed = b"".join(_packed_call(usdc, transfer.encode(line.to, line.amount.n)) for line in lines)
    data = abi.load("multi_send_call_only")["multiSend"].encode(packed)
    return BatchTransaction(chain_id, safe, multi_send, data, nonce)


def from_calldata(calldata: bytes, *, chain_id: int, safe: str, nonce: int) -> BatchTransaction:
    """Read a BatchTransaction back out of `execTransaction` calldata; Malformed if it is anything else."""
    to, value, data, *fixed, _signatures = abi.load("safe")["execTransaction"].arguments(calldata)
    if value != 0 or tuple(fixed) != _FIXED:
        raise Malformed("execTransaction with fields that Tollway never signs")
    return BatchTransaction(chain_id, safe, to, data, nonce)


def _packed_call(to: str, data: bytes) -> bytes:
    """MultiSend's packed form: operation 0 (call), target, value 0, length, data."""
    return b"\0" + to_bytes(to) + bytes(32) + len(data).to_bytes(32) + data
