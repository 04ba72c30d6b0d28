"""The JSON-RPC front of the development chain: what solana-py, wallets and our readers ask a validator.

Error codes and sentences follow the validator's (`rpc-client-api/src/custom_error.rs`), so that code
written against this node meets the same answers on the public network.  Methods that start with
`dev_` exist only here: `dev_tick`, `dev_fork`, `dev_setAccount`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web
from solders.account import Account
from solders.hash import Hash
from solders.message import Message, MessageV0, to_bytes_versioned
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer
from solders.transaction import VersionedTransaction

from chain.localnet.solana_vm import encoding
from chain.localnet.solana_vm.bank import (
    BLOCKHASH_AGE_MAX,
    FAUCET,
    TRANSACTION_BYTES_MAX,
    Bank,
    Block,
    Commitment,
    Landed,
    Rejected,
)
from chain.solana import base58

REQUEST_BYTES_MAX: Final = 4 * 1024 * 1024
BATCH_MAX: Final = 1000
KEYS_MAX: Final = 100
"""Addresses in one getMultipleAccounts, as on public nodes."""
STATUSES_MAX: Final = 256
SIGNATURES_MAX: Final = 1000
BLOCK_RANGE_MAX: Final = 500_000
AIRDROP_LAMPORTS_MAX: Final = 10**15
TICKS_MAX: Final = 100_000

INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
PREFLIGHT_FAILURE: Final = -32002
SIGNATURE_FAILURE: Final = -32003
BLOCK_NOT_AVAILABLE: Final = -32004
SLOT_SKIPPED: Final = -32007
VERSION_NOT_SUPPORTED: Final = -32015
MIN_CONTEXT_SLOT: Final = -32016

_VERSION: Final = {"solana-core": "3.0.0", "feature-set": 0}
_API_VERSION: Final = _VERSION["solana-core"]

Params = Sequence[Any]
Options = Mapping[str, Any]


class Refused(Exception):
    """A JSON-RPC error answer."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code, self.message, self.data = code, message, data


class Front:
    """The methods, over one bank."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._methods: dict[str, Callable[[Params], Any]] = {
            "getHealth": lambda _: "ok",
            "getVersion": lambda _: _VERSION,
            "getGenesisHash": lambda _: bank.genesis_hash,
            "getSlot": lambda p: self._slot(_commitment(_options(p, 0))),
            "getBlockHeight": lambda p: bank.newest_block(_commitment(_options(p, 0))).height,
            "getTransactionCount": lambda _: bank.transaction_count(),
            "getFirstAvailableBlock": lambda _: 0,
            "getBlocks": self._get_blocks,
            "getBlock": self._get_block,
            "getBlockTime": self._get_block_time,
            "getLatestBlockhash": self._get_latest_blockhash,
            "isBlockhashValid": self._is_blockhash_valid,
            "getBalance": self._get_balance,
            "getAccountInfo": self._get_account_info,
            "getMultipleAccounts": self._get_multiple_accounts,
            "getMinimumBalanceForRentExemption": lambda p: bank.rent_minimum(
                _integer(p, 0, 10 * 1024 * 1024)
            ),
            "getTokenAccountBalance": self._get_token_account_balance,
            "requestAirdrop": self._request_airdrop,
            "sendTransaction": self._send_transaction,
            "simulateTransaction": self._simulate_transaction,
            "getSignatureStatuses": self._get_signature_statuses,
            "getSignaturesForAddress": self._get_signatures_for_address,
            "getTransaction": self._get_transaction,
            "dev_tick": self._dev_tick,
            "dev_fork": self._dev_fork,
            "dev_setAccount": self._dev_set_account,
        }

    def answer(self, request: Any) -> dict[str, Any]:
        """Answer one JSON-RPC request object."""
        if not isinstance(request, dict) or not isinstance(request.get("method"), str):
            return _failure(None, Refused(INVALID_REQUEST, "Invalid request"))
        identity = request.get("id")
        params = request.get("params") or []
        try:
            return {"jsonrpc": "2.0", "id": identity, "result": self._call(request["method"], params)}
        except Refused as e:
            return _failure(identity, e)
        except OSError as e:
            return _failure(identity, Refused(INTERNAL_ERROR, f"Internal error: {e.strerror or e}"))

    def _call(self, name: str, params: Any) -> Any:
        method = self._methods.get(name)
        if method is None:
            raise Refused(METHOD_NOT_FOUND, "Method not found")
        if not isinstance(params, list):
            raise Refused(INVALID_PARAMS, "Invalid params: expected an array")
        return method(params)

    # ── chain ─────────────────────────────────────────────────────────────────────────────────────

    def _slot(self, commitment: Commitment) -> int:
        if commitment is Commitment.PROCESSED:
            return self._bank.slot
        return self._bank.newest_block(commitment).slot

    def _reached(self, options: Options) -> Commitment:
        """The commitment asked for, if it has reached the slot the client has already seen."""
        commitment = _commitment(options)
        wanted = options.get("minContextSlot") or 0
        if type(wanted) is not int or self._slot(commitment) < wanted:
            data = {"contextSlot": self._slot(commitment)}
            raise Refused(MIN_CONTEXT_SLOT, "Minimum context slot has not been reached", data)
        return commitment

    def _with_context(self, value: Any, commitment: Commitment) -> dict[str, Any]:
        return {"context": {"apiVersion": _API_VERSION, "slot": self._slot(commitment)}, "value": value}

    def _get_blocks(self, params: Params) -> list[int]:
        start = _integer(params, 0, 2**63)
        has_end = len(params) > 1 and isinstance(params[1], int)
        commitment = _closed(_commitment(_options(params, 2 if has_end else 1)))
        end = min(_integer(params, 1, 2**63) if has_end else 2**63, self._bank.last_slot(commitment))
        if end - start > BLOCK_RANGE_MAX:
            raise Refused(INVALID_PARAMS, f"Slot range too large; max {BLOCK_RANGE_MAX}")
        return [b.slot for b in self._bank.blocks_between(start, end)]

    def _get_block(self, params: Params) -> Any:
        slot, options = _integer(params, 0, 2**63), _options(params, 1)
        commitment = _closed(_commitment(options))
        if slot > self._bank.last_slot(commitment):
            raise Refused(BLOCK_NOT_AVAILABLE, f"Block not available for slot {slot}")
        block = self._bank.block_at(slot)
        if block is None:
            raise Refused(
                SLOT_SKIPPED, f"Slot {slot} was skipped, or missing due to ledger jump to recent snapshot"
            )
        return self._block_json(block, options)

    def _block_json(self, block: Block, options: Options) -> dict[str, Any]:
        body: dict[str, Any] = {
            "blockhash": block.hash,
            "previousBlockhash": block.parent_hash,
            "parentSlot": block.parent_slot,
            "blockHeight": block.height,
            "blockTime": block.time_s,
        }
        details = options.get("transactionDetails", "full")
        if details == "signatures":
            body["signatures"] = [t.signature for t in block.transactions]
        elif details in ("full", "accounts"):
            body["transactions"] = [_body(t, options, details) for t in block.transactions]
        elif details != "none":
            raise Refused(INVALID_PARAMS, f"Invalid params: unknown transactionDetails {details!r}")
        if options.get("rewards", True):
            body["rewards"] = []
        return body

    def _get_block_time(self, params: Params) -> int:
        block = self._bank.block_at(_integer(params, 0, 2**63))
        if block is None:
            raise Refused(BLOCK_NOT_AVAILABLE, f"Block not available for slot {params[0]}")
        return block.time_s

    def _get_latest_blockhash(self, params: Params) -> Any:
        commitment = _commitment(_options(params, 0))
        block = self._bank.newest_block(commitment)
        value = {"blockhash": block.hash, "lastValidBlockHeight": block.height + BLOCKHASH_AGE_MAX}
        return self._with_context(value, commitment)

    def _is_blockhash_valid(self, params: Params) -> Any:
        commitment = _commitment(_options(params, 1))
        return self._with_context(self._bank.is_blockhash_valid(_text(params, 0)), commitment)

    # ── accounts ──────────────────────────────────────────────────────────────────────────────────

    def _get_balance(self, params: Params) -> Any:
        commitment = _commitment(_options(params, 1))
        account = self._bank.account(_pubkey(params, 0), commitment)
        return self._with_context(account.lamports if account else 0, commitment)

    def _get_account_info(self, params: Params) -> Any:
        options = _options(params, 1)
        commitment = self._reached(options)
        _require_base64(options)
        account = self._bank.account(_pubkey(params, 0), commitment)
        return self._with_context(encoding.account_json(account), commitment)

    def _get_multiple_accounts(self, params: Params) -> Any:
        keys, options = params[0] if params else None, _options(params, 1)
        if not isinstance(keys, list) or len(keys) > KEYS_MAX:
            raise Refused(INVALID_PARAMS, f"Invalid params: expected at most {KEYS_MAX} addresses")
        commitment = self._reached(options)
        _require_base64(options)
        accounts = [self._bank.account(_pubkey(keys, i), commitment) for i in range(len(keys))]
        return self._with_context([encoding.account_json(a) for a in accounts], commitment)

    def _get_token_account_balance(self, params: Params) -> Any:
        commitment = _commitment(_options(params, 1))
        account = self._bank.account(_pubkey(params, 0), commitment)
        if account is None:
            raise Refused(INVALID_PARAMS, "Invalid param: could not find account")
        parsed = encoding.token_account(account)
        if parsed is None:
            raise Refused(INVALID_PARAMS, "Invalid param: not a Token account")
        mint = self._bank.account(parsed[0], commitment)
        decimals = bytes(mint.data)[encoding.MINT_DECIMALS_OFFSET] if mint else 0
        return self._with_context(encoding.ui_amount(parsed[2], decimals), commitment)

    # ── transactions in ───────────────────────────────────────────────────────────────────────────

    def _request_airdrop(self, params: Params) -> str:
        to, lamports = _pubkey(params, 0), _integer(params, 1, AIRDROP_LAMPORTS_MAX)
        block = self._bank.newest_block(Commitment.PROCESSED)
        # Two equal airdrops in one block need two signatures: the count makes the message differ.
        marker = transfer(
            TransferParams(
                from_pubkey=FAUCET.pubkey(),
                to_pubkey=FAUCET.pubkey(),
                lamports=self._bank.transaction_count(),
            )
        )
        give = transfer(TransferParams(from_pubkey=FAUCET.pubkey(), to_pubkey=to, lamports=lamports))
        message = MessageV0.try_compile(FAUCET.pubkey(), [give, marker], [], Hash.from_string(block.hash))
        signed = VersionedTransaction.populate(message, [FAUCET.sign_message(to_bytes_versioned(message))])
        return self._execute(signed, bytes(signed), preflight=True)

    def _send_transaction(self, params: Params) -> str:
        options = _options(params, 1)
        raw, transaction = _wire(params, options, default="base58")
        return self._execute(transaction, raw, preflight=not options.get("skipPreflight", False))

    def _execute(self, transaction: VersionedTransaction, raw: bytes, *, preflight: bool) -> str:
        try:
            return self._bank.send(transaction, raw, preflight=preflight)
        except Rejected as e:
            if e.error == "SignatureFailure":
                raise Refused(SIGNATURE_FAILURE, "Transaction signature verification failure") from e
            if not preflight:
                # A validator without preflight forwards anything and answers with the signature.
                return str(transaction.signatures[0])
            data = {
                "err": e.error,
                "logs": e.logs,
                "unitsConsumed": e.units,
                "accounts": None,
                "returnData": None,
            }
            raise Refused(PREFLIGHT_FAILURE, f"Transaction simulation failed: {e}", data) from e

    def _simulate_transaction(self, params: Params) -> Any:
        options = _options(params, 1)
        _, transaction = _wire(params, options, default="base58")
        commitment = _commitment(options)
        try:
            outcome = self._bank.simulate(
                transaction,
                verify=bool(options.get("sigVerify", False)),
                replace_blockhash=bool(options.get("replaceRecentBlockhash", False)),
            )
            error, logs, units = outcome.error, outcome.logs, outcome.units
        except Rejected as e:
            error, logs, units = e.error, e.logs, e.units
        value = {"err": error, "logs": logs, "unitsConsumed": units, "accounts": None, "returnData": None}
        return self._with_context(value, commitment)

    # ── transactions out ──────────────────────────────────────────────────────────────────────────

    def _get_signature_statuses(self, params: Params) -> Any:
        signatures = params[0] if params else None
        if not isinstance(signatures, list) or len(signatures) > STATUSES_MAX:
            raise Refused(INVALID_PARAMS, f"Invalid params: expected at most {STATUSES_MAX} signatures")
        found = [self._bank.find(str(s)) for s in signatures]
        return self._with_context([self._status(t) for t in found], Commitment.PROCESSED)

    def _status(self, landed: Landed | None) -> Any:
        if landed is None:
            return None
        level = self._level(landed.slot)
        age = self._bank.slot - landed.slot
        return {
            "slot": landed.slot,
            "confirmations": None if level is Commitment.FINALIZED else age,
            "err": landed.error,
            "status": {"Ok": None} if landed.error is None else {"Err": landed.error},
            "confirmationStatus": level.value,
        }

    def _level(self, slot: int) -> Commitment:
        for level in (Commitment.FINALIZED, Commitment.CONFIRMED):
            if slot <= self._bank.last_slot(level):
                return level
        return Commitment.PROCESSED

    def _get_signatures_for_address(self, params: Params) -> list[Any]:
        address, options = str(_pubkey(params, 0)), _options(params, 1)
        limit = options.get("limit") or SIGNATURES_MAX
        if not isinstance(limit, int) or not 0 < limit <= SIGNATURES_MAX:
            raise Refused(INVALID_PARAMS, f"Invalid limit; max {SIGNATURES_MAX}")
        last = self._bank.last_slot(_closed(_commitment(options)))
        newest_first = [t for t in reversed(self._bank.touching(address)) if t.slot <= last]
        signatures = [t.signature for t in newest_first]
        start = signatures.index(options["before"]) + 1 if options.get("before") in signatures else 0
        end = signatures.index(options["until"]) if options.get("until") in signatures else len(signatures)
        return [
            {
                "signature": t.signature,
                "slot": t.slot,
                "err": t.error,
                "memo": None,
                "blockTime": self._bank.time_of(t),
                "confirmationStatus": self._level(t.slot).value,
            }
            for t in newest_first[start : min(end, start + limit)]
        ]

    def _get_transaction(self, params: Params) -> Any:
        landed, options = self._bank.find(_text(params, 0)), _options(params, 1)
        if landed is None or landed.slot > self._bank.last_slot(_closed(_commitment(options))):
            return None
        body = _body(landed, options, "full")
        return {"slot": landed.slot, "blockTime": self._bank.time_of(landed), **body}

    # ── development only ──────────────────────────────────────────────────────────────────────────

    def _dev_tick(self, params: Params) -> int:
        for _ in range(_integer(params, 0, TICKS_MAX) if params else 1):
            self._bank.tick()
        return self._bank.slot

    def _dev_fork(self, params: Params) -> int:
        options = _options(params, 1)
        slots, last_kept = _integer(params, 0, 2**31), options.get("lastKept")
        if type(last_kept) is int:
            slots = self._bank.slot - last_kept
        try:
            self._bank.fork(slots, reuse=bool(options.get("reuse", False)))
        except ValueError as e:
            raise Refused(INVALID_PARAMS, f"Invalid params: {e}") from e
        return self._bank.slot

    def _dev_set_account(self, params: Params) -> int:
        key, options = _pubkey(params, 0), _options(params, 1)
        try:
            data = base64.b64decode(options["data"], validate=True)
            owner = Pubkey.from_string(options["owner"])
            account = Account(int(options["lamports"]), data, owner, bool(options.get("executable", False)))
        except (KeyError, ValueError, TypeError, OverflowError) as e:
            raise Refused(
                INVALID_PARAMS, f"Invalid params: lamports, data (base64), owner needed: {e}"
            ) from e
        self._bank.set_accounts([(key, account)])
        return self._bank.slot


def _body(landed: Landed, options: Options, details: str) -> dict[str, Any]:
    transaction = VersionedTransaction.from_bytes(landed.raw)
    version = encoding.version_of(transaction)
    newest_version = options.get("maxSupportedTransactionVersion")
    if newest_version is None and version != "legacy":
        raise Refused(
            VERSION_NOT_SUPPORTED,
            f"Transaction version ({version}) is not supported by the requesting client. Please try the "
            'request again with the following configuration parameter: "maxSupportedTransactionVersion": 0',
        )
    form = options.get("encoding", "json")
    written: Any
    if details == "accounts":
        loaded = msgspec.json.decode(landed.meta)["loadedAddresses"]
        written = encoding.accounts_json(transaction, loaded)
    elif form == "json":
        written = encoding.transaction_json(transaction)
    elif form == "base64":
        written = [base64.b64encode(landed.raw).decode(), "base64"]
    elif form == "base58":
        written = [base58.encode(landed.raw), "base58"]
    else:
        raise Refused(INVALID_PARAMS, f"Invalid params: encoding {form!r} is not served by this node")
    body = {"transaction": written, "meta": msgspec.Raw(landed.meta)}
    return body if newest_version is None else {**body, "version": version}


def _wire(params: Params, options: Options, *, default: str) -> tuple[bytes, VersionedTransaction]:
    text, form = _text(params, 0), options.get("encoding", default)
    try:
        raw = base64.b64decode(text, validate=True) if form == "base64" else base58.decode(text)
    except (ValueError, binascii.Error) as e:
        raise Refused(INVALID_PARAMS, f"invalid {form} encoding: {e}") from e
    if len(raw) > TRANSACTION_BYTES_MAX:
        message = f"decoded transaction too large: {len(raw)} bytes (max: {TRANSACTION_BYTES_MAX} bytes)"
        raise Refused(INVALID_PARAMS, message)
    try:
        transaction = VersionedTransaction.from_bytes(raw)
        transaction.sanitize()
    except Exception as e:
        raise Refused(INVALID_PARAMS, f"failed to deserialize transaction: {e}") from e
    if not transaction.signatures or not isinstance(transaction.message, Message | MessageV0):
        raise Refused(INVALID_PARAMS, "failed to deserialize transaction: legacy or version 0 expected")
    return raw, transaction


def _options(params: Params, index: int) -> Options:
    value = params[index] if index < len(params) else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refused(INVALID_PARAMS, f"Invalid params: parameter {index} must be an object")
    return {name: setting for name, setting in value.items() if setting is not None}


def _commitment(options: Options) -> Commitment:
    value = options.get("commitment") or options.get("preflightCommitment") or "finalized"
    try:
        return Commitment(value)
    except ValueError:
        raise Refused(INVALID_PARAMS, f"Invalid params: unknown commitment {value!r}") from None


def _closed(commitment: Commitment) -> Commitment:
    """Blocks and history are not served below confirmed."""
    return Commitment.CONFIRMED if commitment is Commitment.PROCESSED else commitment


def _require_base64(options: Options) -> None:
    if options.get("encoding", "base64") not in ("base64", "jsonParsed"):
        raise Refused(INVALID_PARAMS, "Invalid params: this node serves accounts in base64")


def _text(params: Params, index: int) -> str:
    if index >= len(params) or not isinstance(params[index], str):
        raise Refused(INVALID_PARAMS, f"Invalid params: parameter {index} must be a string")
    return str(params[index])


def _integer(params: Params, index: int, limit: int) -> int:
    value = params[index] if index < len(params) else None
    if type(value) is not int or not 0 <= value <= limit:
        raise Refused(INVALID_PARAMS, f"Invalid params: parameter {index} must be an integer in 0..{limit}")
    return value


def _pubkey(params: Params, index: int) -> Pubkey:
    try:
        return Pubkey.from_string(_text(params, index))
    except ValueError as e:
        raise Refused(INVALID_PARAMS, "Invalid param: Invalid") from e


def _failure(identity: Any, refused: Refused) -> dict[str, Any]:
    error: dict[str, Any] = {"code": refused.code, "message": refused.message}
    if refused.data is not None:
        error["data"] = refused.data
    return {"jsonrpc": "2.0", "id": identity, "error": error}


async def _handle(front: Front, request: web.Request) -> web.Response:
    raw = await request.read()
    try:
        body = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        answer: Any = _failure(None, Refused(-32700, "Parse error"))
    else:
        if not isinstance(body, list):
            answer = front.answer(body)
        elif 0 < len(body) <= BATCH_MAX:
            answer = [front.answer(one) for one in body]
        else:
            answer = _failure(None, Refused(INVALID_REQUEST, f"batch of {len(body)}, allowed 1..{BATCH_MAX}"))
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


async def _slots(bank: Bank, slot_ms: int) -> None:
    """Close a slot every `slot_ms`; late wake-ups are not made up for."""
    while True:
        await asyncio.sleep(slot_ms / 1000)
        bank.tick()


@contextlib.asynccontextmanager
async def serving(
    folder: Path,
    *,
    port: int,
    slot_ms: int,
    finalized_after: int,
    empty_every: int,
    clock: Callable[[], int],
) -> AsyncIterator[tuple[int, asyncio.Task[None] | None]]:
    """Serve a data folder on 127.0.0.1; gives (port, slot task).  With `slot_ms` 0 only dev_tick moves slots.

    Raises JournalError for a folder in use or damaged, OSError for a port in use.
    """
    bank = Bank(folder, finalized_after=finalized_after, empty_every=empty_every, clock=clock)
    try:
        app = web.Application(client_max_size=REQUEST_BYTES_MAX)
        front = Front(bank)

        async def handle(request: web.Request) -> web.Response:
            return await _handle(front, request)

        app.router.add_post("/", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
            await site.start()
            bound: int = runner.addresses[0][1]
            task = asyncio.create_task(_slots(bank, slot_ms)) if slot_ms else None
            try:
                yield bound, task
            finally:
                if task is not None:
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError, OSError):
                        await task
        finally:
            await runner.cleanup()
    finally:
        bank.close()
