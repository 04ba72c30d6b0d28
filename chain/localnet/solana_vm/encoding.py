"""The JSON a validator answers with, built from solders objects."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from solders.account import Account
from solders.message import Message, MessageV0, MessageV1
from solders.pubkey import Pubkey
from solders.transaction import VersionedTransaction
from solders.transaction_metadata import FailedTransactionMetadata, TransactionMetadata

from chain.solana import base58

TOKEN_PROGRAM: Final = Pubkey.from_string("TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA")
TOKEN_2022_PROGRAM: Final = Pubkey.from_string("TokenzQdBNbLqP5VEhdkAS6EPFLC1PHnBqCXEpPxuEb")
LOOKUP_TABLE_PROGRAM: Final = Pubkey.from_string("AddressLookupTab1e1111111111111111111111111")
LOOKUP_TABLE_HEADER: Final = 56
"""Bytes before the addresses in a lookup table account."""
TOKEN_ACCOUNT_BYTES: Final = 165
TOKEN_2022_KIND_OFFSET: Final = 165
MINT_DECIMALS_OFFSET: Final = 44

AnyMessage = Message | MessageV0 | MessageV1

_SENTENCES: Final = {
    "AccountInUse": "Account in use",
    "AccountNotFound": "Attempt to debit an account but found no record of a prior credit.",
    "AlreadyProcessed": "This transaction has already been processed",
    "BlockhashNotFound": "Blockhash not found",
    "InsufficientFundsForFee": "Insufficient funds for fee",
    "InvalidAccountForFee": "This account may not be used to pay transaction fees",
    "SignatureFailure": "Transaction did not pass signature verification",
    "SanitizeFailure": "Transaction failed to sanitize accounts offsets correctly",
    "ProgramAccountNotFound": "Attempt to load a program that does not exist",
    "AddressLookupTableNotFound": "Transaction loads an address table account that doesn't exist",
}


def words(name: str) -> str:
    """Turn ``InvalidAccountData`` into ``invalid account data``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()


def error_sentence(error: Any) -> str:
    """Say a TransactionError (its JSON form) as the validator's log line does."""
    if isinstance(error, str):
        return _SENTENCES.get(error, words(error).capitalize())
    if isinstance(error, Mapping) and "InstructionError" in error:
        index, inner = error["InstructionError"]
        if isinstance(inner, Mapping) and "Custom" in inner:
            return f"Error processing Instruction {index}: custom program error: {inner['Custom']:#x}"
        name = inner if isinstance(inner, str) else next(iter(inner))
        return f"Error processing Instruction {index}: {words(name)}"
    return words(next(iter(error))).capitalize()


def error_json(failed: FailedTransactionMetadata) -> Any:
    """Give the TransactionError in the form RPC answers carry."""
    return json.loads(failed.to_json())["err"]


def looked_up(
    message: AnyMessage, tables: Mapping[Pubkey, Account | None]
) -> tuple[list[Pubkey], list[Pubkey]]:
    """Resolve a v0 message's lookups to (writable, read-only); indices beyond a table are left out."""
    writable: list[Pubkey] = []
    readonly: list[Pubkey] = []
    for lookup in message.address_table_lookups if isinstance(message, MessageV0) else ():
        account = tables.get(lookup.account_key)
        data = bytes(account.data)[LOOKUP_TABLE_HEADER:] if account is not None else b""
        addresses = [Pubkey(data[i : i + 32]) for i in range(0, len(data) - 31, 32)]
        writable += [addresses[i] for i in bytes(lookup.writable_indexes) if i < len(addresses)]
        readonly += [addresses[i] for i in bytes(lookup.readonly_indexes) if i < len(addresses)]
    return writable, readonly


def _instruction(instruction: Any, stack_height: int | None) -> dict[str, Any]:
    return {
        "programIdIndex": instruction.program_id_index,
        "accounts": list(bytes(instruction.accounts)),
        "data": base58.encode(bytes(instruction.data)),
        "stackHeight": stack_height,
    }


def transaction_json(transaction: VersionedTransaction) -> dict[str, Any]:
    """Write a transaction in RPC encoding `json`."""
    message = transaction.message
    body: dict[str, Any] = {
        "accountKeys": [str(k) for k in message.account_keys],
        "header": {
            "numRequiredSignatures": message.header.num_required_signatures,
            "numReadonlySignedAccounts": message.header.num_readonly_signed_accounts,
            "numReadonlyUnsignedAccounts": message.header.num_readonly_unsigned_accounts,
        },
        "recentBlockhash": str(message.recent_blockhash),
        "instructions": [_instruction(i, 1) for i in message.instructions],
    }
    if isinstance(message, MessageV0):
        body["addressTableLookups"] = [
            {
                "accountKey": str(lookup.account_key),
                "writableIndexes": list(bytes(lookup.writable_indexes)),
                "readonlyIndexes": list(bytes(lookup.readonly_indexes)),
            }
            for lookup in message.address_table_lookups
        ]
    return {"signatures": [str(s) for s in transaction.signatures], "message": body}


def accounts_json(transaction: VersionedTransaction, loaded: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Write a transaction as `transactionDetails: accounts` does: signatures and account keys only."""
    message = transaction.message
    signed = message.header.num_required_signatures
    keys = [
        {
            "pubkey": str(k),
            "signer": i < signed,
            "writable": message.is_maybe_writable(i),
            "source": "transaction",
        }
        if isinstance(message, MessageV0)
        else {
            "pubkey": str(k),
            "signer": i < signed,
            "writable": legacy_writable(message, i),
            "source": "transaction",
        }
        for i, k in enumerate(message.account_keys)
    ]
    for writable, name in ((True, "writable"), (False, "readonly")):
        keys += [
            {"pubkey": k, "signer": False, "writable": writable, "source": "lookupTable"}
            for k in loaded[name]
        ]
    return {"signatures": [str(s) for s in transaction.signatures], "accountKeys": keys}


def legacy_writable(message: AnyMessage, index: int) -> bool:
    """Tell whether the message asks to write its static key `index`."""
    header, count = message.header, len(message.account_keys)
    if index < header.num_required_signatures:
        return index < header.num_required_signatures - header.num_readonly_signed_accounts
    return index < count - header.num_readonly_unsigned_accounts


def version_of(transaction: VersionedTransaction) -> int | str:
    """Give ``"legacy"`` or 0."""
    return 0 if isinstance(transaction.message, MessageV0) else "legacy"


def token_balances(
    keys: Sequence[Pubkey], accounts: Sequence[Account | None], mints: Mapping[Pubkey, int]
) -> list[dict[str, Any]]:
    """List the token accounts among `accounts` with mint, owner and amount; `mints` gives decimals."""
    found: list[dict[str, Any]] = []
    for index, account in enumerate(accounts):
        parsed = token_account(account)
        if parsed is None:
            continue
        mint, owner, amount = parsed
        assert account is not None
        found.append(
            {
                "accountIndex": index,
                "mint": str(mint),
                "owner": str(owner),
                "programId": str(account.owner),
                "uiTokenAmount": ui_amount(amount, mints.get(mint, 0)),
            }
        )
    assert len(keys) == len(accounts)
    return found


def token_account(account: Account | None) -> tuple[Pubkey, Pubkey, int] | None:
    """Read (mint, owner, amount) of an initialised SPL token account; None for anything else."""
    if account is None or account.owner not in (TOKEN_PROGRAM, TOKEN_2022_PROGRAM):
        return None
    data = bytes(account.data)
    if len(data) < TOKEN_ACCOUNT_BYTES or data[108] == 0:
        return None
    if len(data) > TOKEN_ACCOUNT_BYTES and (
        account.owner == TOKEN_PROGRAM or data[TOKEN_2022_KIND_OFFSET] != 2
    ):
        return None
    return Pubkey(data[:32]), Pubkey(data[32:64]), int.from_bytes(data[64:72], "little")


def ui_amount(amount: int, decimals: int) -> dict[str, Any]:
    """Write a token amount as RPC does; `uiAmount` is the only inexact form and nobody of ours reads it."""
    whole, part = divmod(amount, 10**decimals)
    text = f"{whole}.{part:0{decimals}d}".rstrip("0").rstrip(".") if decimals else str(whole)
    return {"amount": str(amount), "decimals": decimals, "uiAmount": json.loads(text), "uiAmountString": text}


def account_json(account: Account | None) -> dict[str, Any] | None:
    """Write an account in RPC encoding `base64`."""
    if account is None:
        return None
    return {
        "lamports": account.lamports,
        "data": [base64.b64encode(bytes(account.data)).decode(), "base64"],
        "owner": str(account.owner),
        "executable": account.executable,
        "rentEpoch": account.rent_epoch,
        "space": len(account.data),
    }


def inner_instructions(meta: TransactionMetadata) -> list[dict[str, Any]]:
    """List the instructions programs called, by the outer instruction that caused them."""
    return [
        {"index": index, "instructions": [_instruction(i.instruction(), i.stack_height()) for i in inner]}
        for index, inner in enumerate(meta.inner_instructions())
        if inner
    ]
