"""The operator's account at the marketplace: what he earned, and asking to be paid.

A node's own key serves requests and can do nothing with money. These commands use an API key of the
operator with the scope `account`, given by $TOLLWAY_API_KEY or kept by `tollway-node login` in a
file of its owner only. With it a machine can ask for a withdrawal, but only to an address of the operator's
address book that is past its cooling time.

Amounts are integers: nano-dollars of earnings, micro-USDC on chains.
"""

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, Self, TypeVar

import aiohttp
import msgspec

from node_agent.engines.openai_stream import error_text
from node_agent.files import write_private
from node_agent.protocol import NOT_DECODED

KEY_VARIABLE: Final = "TOLLWAY_API_KEY"
ACCOUNT_KEY_FILE: Final = "account.key"
KEY_CHARS_MAX: Final = 200
ANSWER_BYTES_MAX: Final = 4 * 1024 * 1024
SECONDS_MAX: Final = 20.0
PAGE_MAX: Final = 100

_Answer = TypeVar("_Answer")
_Nano = Annotated[str, msgspec.Meta(pattern=r"^-?\d{1,24}$")]
_Hash = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
_Id = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F-]{36}$")]
_Micro = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class AccountError(Exception):
    """The marketplace did not do what was asked; the text says why, `code` in its own word."""

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code


# -- What the marketplace answers; fields not named here are ignored --------------------------------


class Earnings(msgspec.Struct, frozen=True):
    """Decimal dollars for people, nano-dollars as integer texts for programs."""

    posted: str
    posted_nano: _Nano
    held: str
    held_nano: _Nano
    maturing: str
    maturing_nano: _Nano
    matured: str
    matured_nano: _Nano
    reserve_s: int


class StatementLine(msgspec.Struct, frozen=True):
    id: _Id
    kind: str
    amount: str
    amount_nano: _Nano
    model: str | None = None
    tokens: int | None = None
    withdrawal_id: str | None = None
    batch_id: str | None = None
    tx: str | None = None


class Statement(msgspec.Struct, frozen=True):
    data: list[StatementLine]
    has_more: bool
    forecast_days: int
    forecast_earned_nano: _Nano
    forecast_per_day_nano: _Nano


class PayoutAddress(msgspec.Struct, frozen=True):
    id: _Id
    chain: str
    address: str
    usable_at: str
    retired_at: str | None = None


class Withdrawal(msgspec.Struct, frozen=True):
    id: _Id
    chain: str
    address: str
    amount: str
    amount_micro: _Micro
    status: str
    created_at: str
    batch_id: str | None = None
    tx: str | None = None
    refusal: str | None = None


class BankAccount(msgspec.Struct, frozen=True):
    id: _Id
    holder: str
    iban: str
    usable_at: str
    retired_at: str | None = None


class BankWithdrawal(msgspec.Struct, frozen=True):
    id: _Id
    account_id: _Id
    amount: str
    amount_micro: _Micro
    status: str
    created_at: str
    reason: str | None = None
    reference: str | None = None


class InclusionProof(msgspec.Struct, frozen=True):
    payout_id: _Id
    batch_id: _Id
    chain: str
    address: str
    amount_micro: _Micro
    position: int
    count: int
    proof: Annotated[list[_Hash], msgspec.Meta(max_length=64)]
    merkle_root: _Hash
    tx: str | None = None


class PublicBatch(msgspec.Struct, frozen=True):
    id: _Id
    chain: str
    status: str
    count: int
    merkle_root: _Hash
    tx: str | None = None


class PublicChain(msgspec.Struct, frozen=True):
    chain: str
    usdc: str
    escrow: str
    chain_id: int | None = None


class Loss(msgspec.Struct, frozen=True):
    """Why requests went to others; `message` is a sentence."""

    reason: str
    requests: int
    share_permille: int
    message: str


class ModelReport(msgspec.Struct, frozen=True):
    model: str
    considered: int
    chosen: int
    share_permille: int
    lost: list[Loss]


class NodeReport(msgspec.Struct, frozen=True):
    node_id: str
    name: str
    models: list[ModelReport]


class Report(msgspec.Struct, frozen=True):
    """How often each node was asked, out of a sample of the gateways' decisions."""

    hours: int
    nodes: list[NodeReport]


class StandingFinding(msgspec.Struct, frozen=True):
    kind: str
    severity: str
    message: str
    node_id: str = ""
    model: str = ""


class Dispute(msgspec.Struct, frozen=True):
    id: str
    state: str
    at: str
    text: str
    answer: str | None = None


class Standing(msgspec.Struct, frozen=True):
    """`standing`: good, warned or held; held earnings wait for a person's decision."""

    standing: str
    reason: str
    findings: list[StandingFinding]
    since: str | None = None
    dispute: Dispute | None = None


class _Addresses(msgspec.Struct, frozen=True):
    data: list[PayoutAddress]


class _Withdrawals(msgspec.Struct, frozen=True):
    data: list[Withdrawal]
    has_more: bool


class _BankAccounts(msgspec.Struct, frozen=True):
    data: list[BankAccount]


class _BankWithdrawals(msgspec.Struct, frozen=True):
    data: list[BankWithdrawal]
    has_more: bool


class _Transparency(msgspec.Struct, frozen=True):
    chains: list[PublicChain]


# -- The key ------------------------------------------------------------------------------------------


def load_key(folder: Path) -> str:
    """Give the operator's API key; raises `AccountError`, also if others may read the file."""
    given = os.environ.get(KEY_VARIABLE, "").strip()
    if given:
        return check_key(given)
    path = folder / ACCOUNT_KEY_FILE
    try:
        mode, text = path.stat().st_mode, path.read_text()
    except FileNotFoundError as error:
        raise AccountError(
            f"This needs an API key of your account with the scope `account`: "
            f"set {KEY_VARIABLE}, or store one with: tollway-node login"
        ) from error
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise AccountError(f"{path} is open to other users. Close it: chmod 600 {path}")
    return check_key(text.strip())


def store_key(folder: Path, key: str) -> Path:
    """Keep `key` in a file only its owner may read; gives back where."""
    path = folder / ACCOUNT_KEY_FILE
    write_private(path, check_key(key.strip()).encode() + b"\n")
    return path


def check_key(key: str) -> str:
    """Give back `key` if it can be one; raises `AccountError`, never quoting it."""
    if not key or len(key) > KEY_CHARS_MAX or not key.isascii() or not key.isprintable() or " " in key:
        raise AccountError("that is not an API key; keys begin with sk-")
    return key


# -- The client ---------------------------------------------------------------------------------------


class Account:
    """An open line to the marketplace's API, for `async with`. Every call raises `AccountError`."""

    def __init__(self, api: str, key: str) -> None:
        self._api = api.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}", "Accept": "application/json"}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=SECONDS_MAX))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def earnings(self) -> Earnings:
        return await self._ask("GET", "/api/earnings", Earnings)

    async def statement(self, *, limit: int = PAGE_MAX) -> Statement:
        return await self._ask("GET", f"/api/earnings/statement?limit={limit:d}", Statement)

    async def report(self, *, hours: int = 24) -> Report:
        return await self._ask("GET", f"/api/operator/report?hours={hours:d}", Report)

    async def standing(self) -> Standing:
        return await self._ask("GET", "/api/operator/standing", Standing)

    async def dispute(self, text: str) -> Dispute:
        return await self._ask("POST", "/api/operator/standing/dispute", Dispute, {"text": text})

    async def addresses(self) -> list[PayoutAddress]:
        return (await self._ask("GET", "/api/payout-addresses", _Addresses)).data

    async def add_address(self, chain: str, address: str) -> PayoutAddress:
        return await self._ask(
            "POST", "/api/payout-addresses", PayoutAddress, {"chain": chain, "address": address}
        )

    async def withdraw(self, *, chain: str, address: str, amount: str, key: str) -> Withdrawal:
        """Ask for a payout; the same `key` gives the same withdrawal, however often it is sent."""
        body = {"chain": chain, "address": address, "amount": amount}
        return await self._ask("POST", "/api/withdrawals", Withdrawal, body, {"Idempotency-Key": key})

    async def cancel(self, withdrawal_id: str) -> Withdrawal:
        return await self._ask("DELETE", f"/api/withdrawals/{_segment(withdrawal_id)}", Withdrawal)

    async def withdrawals(self, *, limit: int = PAGE_MAX) -> list[Withdrawal]:
        return (await self._ask("GET", f"/api/withdrawals?limit={limit:d}", _Withdrawals)).data

    async def bank_accounts(self) -> list[BankAccount]:
        return (await self._ask("GET", "/api/bank-accounts", _BankAccounts)).data

    async def bank_withdrawals(self, *, limit: int = PAGE_MAX) -> list[BankWithdrawal]:
        return (await self._ask("GET", f"/api/bank-withdrawals?limit={limit:d}", _BankWithdrawals)).data

    async def bank_withdraw(self, *, account_id: str, amount: str, key: str) -> BankWithdrawal:
        """Ask for a payout at the bank; the same `key` gives the same withdrawal."""
        body, headers = {"account_id": account_id, "amount": amount}, {"Idempotency-Key": key}
        return await self._ask("POST", "/api/bank-withdrawals", BankWithdrawal, body, headers)

    async def bank_cancel(self, withdrawal_id: str) -> BankWithdrawal:
        path = f"/api/bank-withdrawals/{_segment(withdrawal_id)}"
        return await self._ask("DELETE", path, BankWithdrawal)

    async def proof(self, withdrawal_id: str) -> InclusionProof:
        return await self._ask("GET", f"/api/withdrawals/{_segment(withdrawal_id)}/proof", InclusionProof)

    async def public_batch(self, batch_id: str) -> PublicBatch:
        return await self._ask("GET", f"/api/transparency/batches/{_segment(batch_id)}", PublicBatch)

    async def public_chains(self) -> list[PublicChain]:
        return (await self._ask("GET", "/api/transparency", _Transparency)).chains

    async def _ask(
        self,
        method: str,
        path: str,
        kind: type[_Answer],
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> _Answer:
        assert self._session is not None, "used outside `async with`"
        content = None if body is None else msgspec.json.encode(body)
        more = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with self._session.request(
                method,
                self._api + path,
                data=content,
                headers={**self._headers, **more, **(headers or {})},
                allow_redirects=False,
            ) as response:
                status, answer = response.status, await response.content.read(ANSWER_BYTES_MAX)
                while len(answer) < ANSWER_BYTES_MAX and (piece := await response.content.read(1 << 16)):
                    answer += piece
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise AccountError(f"{self._api} cannot be reached ({type(error).__name__})") from error
        if status not in (200, 201):
            raise _refused(status, answer)
        try:
            return msgspec.json.decode(answer, type=kind)
        except NOT_DECODED as error:
            raise AccountError(f"{self._api}{path} does not answer as this agent knows it") from error


def _segment(identifier: str) -> str:
    """A path segment of an id, refused unless it is one."""
    try:
        return msgspec.convert(identifier, _Id)
    except msgspec.ValidationError as error:
        raise AccountError(f"{identifier[:40]!r} is not an id; see: tollway-node payouts") from error


def _refused(status: int, answer: bytes) -> AccountError:
    try:
        body = msgspec.json.decode(answer)
        code = str(body["error"]["code"] or "")
        text = error_text(body)
    except (*NOT_DECODED, KeyError, TypeError):
        code, text = "", "no reason given"
    hint = ""
    if code == "missing_scope":
        hint = " Make a key with the scope `account` on the keys page."
    elif status == 401:
        hint = " Store a key that is in use: tollway-node login"
    return AccountError(f"the marketplace answers {status}: {text}.{hint}".replace("..", "."), code=code)
