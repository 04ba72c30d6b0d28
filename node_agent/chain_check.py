"""Ask a chain itself whether a payout arrived, through any JSON-RPC provider the operator trusts.

The marketplace's word is not used: from the transaction it takes only what the chain's finality covers,
and looks for the payout's amount of the very USDC contract: on EVM chains a transfer of exactly it from
the escrow to the address, on Solana the growth of the wallet's balance.
"""

from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import msgspec

ANSWER_BYTES_MAX: Final = 16 * 1024 * 1024
SECONDS_MAX: Final = 20.0
TRANSFER_TOPIC: Final = "0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"
"""keccak256 of Transfer(address,address,uint256), ERC-20."""


class ChainUnreachableError(Exception):
    """The provider did not give an answer that can be used."""


@dataclass(frozen=True, slots=True)
class Expected:
    """One payout as it should be on chain."""

    chain: str
    usdc: str
    escrow: str
    address: str
    amount_micro: int
    tx: str


async def is_paid_on_chain(rpc: str, expected: Expected) -> bool:
    """Tell whether the transaction is final and pays exactly this; raises `ChainUnreachableError`."""
    timeout = aiohttp.ClientTimeout(total=SECONDS_MAX)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        if expected.chain == "solana":
            options = {
                "commitment": "finalized",
                "encoding": "json",  # only the balances beside it are read
                "maxSupportedTransactionVersion": 0,
            }
            found = await _call(session, rpc, "getTransaction", [expected.tx, options])
            return found is not None and _solana_pays(found, expected)
        receipt = await _call(session, rpc, "eth_getTransactionReceipt", [expected.tx])
        final = await _call(session, rpc, "eth_getBlockByNumber", ["finalized", False])
        try:
            return (
                receipt is not None
                and final is not None
                and int(receipt["blockNumber"], 16) <= int(final["number"], 16)
                and _evm_pays(receipt, expected)
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ChainUnreachableError(f"{rpc} does not answer as an Ethereum node does") from error


def _evm_pays(receipt: dict[str, Any], expected: Expected) -> bool:
    if receipt.get("status") != "0x1":
        return False
    parties = (_topic(expected.escrow), _topic(expected.address))
    for log in receipt["logs"]:
        topics = [topic.lower() for topic in log["topics"]]
        if (
            log["address"].lower() == expected.usdc.lower()
            and topics == [TRANSFER_TOPIC, *parties]
            and int(log["data"], 16) == expected.amount_micro
        ):
            return True
    return False


def _topic(address: str) -> str:
    return "0x" + address.lower().removeprefix("0x").rjust(64, "0")


def _solana_pays(found: dict[str, Any], expected: Expected) -> bool:
    """By balances before and after, never by instructions; two payouts to one wallet add up."""
    try:
        meta = found["meta"]
        if meta["err"] is not None:
            return False
        delta = sum(
            sign * int(balance["uiTokenAmount"]["amount"])
            for sign, balances in ((1, meta["postTokenBalances"]), (-1, meta["preTokenBalances"]))
            for balance in balances
            if balance["mint"] == expected.usdc and balance["owner"] == expected.address
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ChainUnreachableError("the provider does not answer as a Solana node does") from error
    return delta >= expected.amount_micro


async def _call(session: aiohttp.ClientSession, rpc: str, method: str, params: list[Any]) -> Any:
    content = msgspec.json.encode({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
    try:
        async with session.post(
            rpc, data=content, headers={"Content-Type": "application/json"}, allow_redirects=False
        ) as response:
            answer = b""
            async for piece in response.content.iter_chunked(1 << 16):
                answer += piece
                if len(answer) > ANSWER_BYTES_MAX:
                    raise ChainUnreachableError(f"{method} answers more than {ANSWER_BYTES_MAX} bytes")
        body = msgspec.json.decode(answer)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, msgspec.MsgspecError) as error:
        raise ChainUnreachableError(f"{rpc} cannot be asked ({type(error).__name__})") from error
    if not isinstance(body, dict) or "result" not in body:
        raise ChainUnreachableError(f"{rpc} refuses {method}")
    return body["result"]
