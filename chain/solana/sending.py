"""Ordinary transactions, signed with a fresh blockhash: accounts and approvals, never payouts.

Repeating one of these is harmless by construction (CreateIdempotent, Approve), which is why they may
ride on a blockhash; whatever pays somebody rides on a durable nonce instead (`payouts`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from solders.hash import Hash
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.message import MessageV0, to_bytes_versioned
from solders.transaction import VersionedTransaction

from chain.errors import Reverted, UnknownResult
from chain.solana.rpc import PREFLIGHT_FAILURE, NodeError, SolanaRpc

POLL_S_MIN: Final = 0.02
POLL_S_MAX: Final = 1.0
CONFIRM_S_MAX: Final = 60
_TOKEN_ERRORS: Final = {
    0: "lamports below rent",
    1: "insufficient funds",
    3: "another mint",
    4: "owner does not match",
    17: "account is frozen",
}
"""SPL Token `error.rs`."""


def sign(message: MessageV0, signers: Sequence[Keypair]) -> VersionedTransaction:
    """Sign with `signers`, who must be all the message asks for."""
    raw = to_bytes_versioned(message)
    by_key = {s.pubkey(): s for s in signers}
    needed = message.account_keys[: message.header.num_required_signatures]
    return VersionedTransaction.populate(message, [by_key[k].sign_message(raw) for k in needed])


def explain(error: Any) -> str:
    """Say a TransactionError (its JSON form) in words, with the Token program's names for its codes."""
    detail = error.get("InstructionError") if isinstance(error, dict) else None
    if not isinstance(detail, list) or len(detail) != 2:
        return str(error)
    index, inner = detail
    code = inner.get("Custom") if isinstance(inner, dict) else None
    named = f" ({_TOKEN_ERRORS[code]}, if the Token program says it)" if code in _TOKEN_ERRORS else ""
    return f"instruction {index}: {inner}{named}"


def reason(error: NodeError) -> str:
    """Why a node refused a transaction."""
    told = error.data.get("err") if isinstance(error.data, dict) else None
    return f"{error.message}; {explain(told)}" if told is not None else error.message


async def send_and_confirm(
    rpc: SolanaRpc, instructions: Sequence[Instruction], signers: Sequence[Keypair]
) -> str:
    """Send one transaction paid by the first signer and wait for `confirmed`; gives its signature.

    Reverted if the chain refuses it; UnknownResult if it was not seen within 60 s.
    """
    latest = await rpc.latest_blockhash()
    message = MessageV0.try_compile(
        signers[0].pubkey(), list(instructions), [], Hash.from_string(latest.blockhash)
    )
    transaction = sign(message, signers)
    try:
        signature = await rpc.send(bytes(transaction))
    except NodeError as e:
        if e.code == PREFLIGHT_FAILURE:
            raise Reverted(reason(e)) from e
        raise
    await confirm(rpc, signature)
    return signature


async def confirm(rpc: SolanaRpc, signature: str) -> None:
    """Wait until a transaction is confirmed; Reverted if it failed, UnknownResult after 60 s."""
    waited_s, pause_s = 0.0, POLL_S_MIN
    while waited_s < CONFIRM_S_MAX:
        status = await rpc.status(signature)
        if status is not None and status.confirmation_status in ("confirmed", "finalized"):
            if status.err is not None:
                raise Reverted(f"{signature}: {explain(status.err)}")
            return
        await asyncio.sleep(pause_s)
        waited_s += pause_s
        pause_s = min(pause_s * 1.5, POLL_S_MAX)
    raise UnknownResult(f"{signature}: not confirmed within {CONFIRM_S_MAX} s")
