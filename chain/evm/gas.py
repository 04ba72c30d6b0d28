"""The gas payer: an ordinary key that holds a little ether and can move nothing else.

It wraps a call (a signed batch, a sweep) into an EIP-1559 transaction and sends it.  Losing this key
costs its ether; the money moves by the owners' signatures or the forwarders' code alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import msgspec
from eth_account import Account
from eth_account.typed_transactions.typed_transaction import TypedTransaction
from eth_hash.auto import keccak
from hexbytes import HexBytes

from chain.addresses import EvmAddress
from chain.errors import ChainFault, ChainRefusal, RpcUnavailable, UnknownResult
from chain.evm.addresses import from_bytes
from chain.evm.rpc import Call, JsonRpc, NodeError, quantity

GAS_MAX: Final = 1 << 24
"""Ethereum refuses more gas in one transaction since Osaka (EIP-7825)."""
GAS_MARGIN_PERCENT: Final = 20
FEE_CAP_WEI: Final = 200 * 10**9
"""Price per gas above which we would rather wait: 200 gwei, some $100 for a batch of 10."""


class FeesTooHigh(ChainFault):
    """Gas costs more than the cap now; asking later may help."""


class GasPayerEmpty(ChainFault):
    """The gas payer's ether does not cover the transaction: fund it."""


class OuterNonceTaken(ChainRefusal):
    """Another transaction of the gas payer took this one's nonce, so these bytes will never land.

    What they wrap is untouched: assemble again around the same approvals.  The fence still lets at
    most one of the two move money.
    """


class TooMuchGas(ChainRefusal):
    """The call needs more gas than a transaction may have: make it smaller."""


class _FeeHistory(msgspec.Struct):
    baseFeePerGas: list[str]  # noqa: N815  the protocol's spelling
    reward: list[list[str]] = []


@dataclass(frozen=True, slots=True)
class OuterTransaction:
    """A signed transaction of the gas payer."""

    raw: bytes
    tx: str


class GasPayer:
    """Wraps calls into transactions of one key on one chain.

    Give each sending process its own key: two processes with one key take each other's nonces.
    """

    def __init__(self, rpc: JsonRpc, chain_id: int, key: bytes, *, fee_cap_wei: int = FEE_CAP_WEI) -> None:
        self._rpc = rpc
        self._chain_id = chain_id
        self._account = Account.from_key(key)
        self._fee_cap_wei = fee_cap_wei
        self.address: EvmAddress = from_bytes(bytes.fromhex(self._account.address[2:]))

    async def price_wei(self) -> int:
        """What a unit of gas costs now, tip included; FeesTooHigh above the cap."""
        history = await self._rpc.call("eth_feeHistory", "0x1", "latest", [50], shape=_FeeHistory)
        base, tip = _price(history)
        self._require_below_cap(base + tip)
        return base + tip

    async def wrap(
        self, to: str, calldata: bytes, *, after: Literal["pending", "latest"] = "pending"
    ) -> OuterTransaction:
        """Dry-run and sign a call of `to`; Reverted if it would fail.  Sends nothing.

        `after` "latest" takes the place of whatever of this payer still waits to be mined.
        """
        call = {"from": self.address, "to": to, "data": "0x" + calldata.hex()}
        answers = await self._rpc.batch(
            [
                # Before what it takes the place of, which may have left less to do.
                Call("eth_estimateGas", (call, after) if after == "latest" else (call,)),
                Call("eth_feeHistory", ("0x1", "latest", [50])),
                Call("eth_getTransactionCount", (self.address, after)),
            ]
        )
        gas = quantity(answers[0].value(str)) * (100 + GAS_MARGIN_PERCENT) // 100
        if gas > GAS_MAX:
            raise TooMuchGas(f"the call needs {gas} gas of at most {GAS_MAX}")
        fee, tip = self._fees(answers[1].value(_FeeHistory))
        signed = self._account.sign_transaction(
            {
                "type": 2,
                "chainId": self._chain_id,
                "nonce": quantity(answers[2].value(str)),
                "to": to,
                "value": 0,
                "data": calldata,
                "gas": gas,
                "maxFeePerGas": fee,
                "maxPriorityFeePerGas": tip,
            }
        )
        raw = bytes(signed.raw_transaction)
        return OuterTransaction(raw, "0x" + keccak(raw).hex())

    async def replace(self, raw: bytes) -> OuterTransaction | None:
        """Sign the same call on the same nonce for a better fee, so that a stuck one need not land (A46).

        None if that nonce is used by now: nothing of ours waits on it.  FeesTooHigh above the cap.
        """
        old = TypedTransaction.from_bytes(HexBytes(raw)).as_dict()
        history, used = await self._rpc.batch(
            [
                Call("eth_feeHistory", ("0x1", "latest", [50])),
                Call("eth_getTransactionCount", (self.address, "latest")),
            ]
        )
        if quantity(used.value(str)) > old["nonce"]:
            return None
        fee, tip = self._fees(history.value(_FeeHistory))
        fee, tip = max(fee, _bumped(old["maxFeePerGas"])), max(tip, _bumped(old["maxPriorityFeePerGas"]))
        if fee > self._fee_cap_wei:
            raise FeesTooHigh(f"replacing costs {fee} wei per gas, the cap is {self._fee_cap_wei}")
        kept = ("type", "chainId", "nonce", "value", "data", "gas")
        again = {name: old[name] for name in kept} | {"to": from_bytes(bytes(old["to"]))}
        signed = self._account.sign_transaction(again | {"maxFeePerGas": fee, "maxPriorityFeePerGas": tip})
        bumped = bytes(signed.raw_transaction)
        return OuterTransaction(bumped, "0x" + keccak(bumped).hex())

    def _fees(self, history: _FeeHistory) -> tuple[int, int]:
        """(most per gas, tip per gas), so that the transaction survives the base fee doubling."""
        base, tip = _price(history)
        self._require_below_cap(base + tip)
        return min(2 * base + tip, self._fee_cap_wei), tip

    def _require_below_cap(self, price_wei: int) -> None:
        if price_wei > self._fee_cap_wei:
            raise FeesTooHigh(f"gas costs {price_wei} wei, the cap is {self._fee_cap_wei}")


def _price(history: _FeeHistory) -> tuple[int, int]:
    """(base fee, tip) of a unit of gas; a tip of at least one wei."""
    base = quantity(history.baseFeePerGas[-1]) if history.baseFeePerGas else 0
    tip = quantity(history.reward[-1][0]) if history.reward and history.reward[-1] else 0
    return base, max(tip, 1)


def _bumped(wei: int) -> int:
    """At least an eighth more: what nodes ask of a replacement is a tenth."""
    return wei + wei // 8 + 1


async def broadcast(rpc: JsonRpc, raw: bytes, tx: str) -> None:
    """Send these bytes; already known or already landed is success.

    Raises UnknownResult when the node may or may not have taken them (send the same bytes again),
    OuterNonceTaken and GasPayerEmpty when it certainly has not.
    """
    try:
        await rpc.call("eth_sendRawTransaction", "0x" + raw.hex(), shape=str)
    except NodeError as e:
        said = e.message.lower()
        if "already known" in said or "already imported" in said or "known transaction" in said:
            return
        if "nonce too low" in said or "underpriced" in said:
            if await _is_known(rpc, tx):
                return
            raise OuterNonceTaken(f"{tx}: {e.message}") from e
        if "insufficient funds" in said:
            raise GasPayerEmpty(f"{tx}: {e.message}") from e
        raise UnknownResult(f"{tx}: {e}") from e
    except RpcUnavailable as e:
        raise UnknownResult(f"{tx} may or may not have been sent: {e}") from e


async def _is_known(rpc: JsonRpc, tx: str) -> bool:
    try:
        found = await rpc.call("eth_getTransactionByHash", tx, shape=dict[str, object] | None)  # type: ignore[arg-type]  # a union is a shape too
    except RpcUnavailable as e:
        raise UnknownResult(f"{tx} may or may not have been sent: {e}") from e
    return found is not None
