"""Receipts on the operator's side: checked against the node's own journal, signed, kept, verified.

The marketplace shows the node pages of signed statements about what it served.  The node compares each with
what it journaled, signs the page (but for the statements it disputes) and keeps it: ids, counts, hashes and
money, never content.  `verify` needs nothing but a receipt and the keys; anybody can run it.
"""

import json
import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import nkeys

from node_agent import protocol
from node_agent.journal import FILES_KEPT, Entry, RotatingFile, find_entries
from node_agent.protocol import (
    NOT_DECODED,
    Countersigned,
    ProofInvalidError,
    ProtocolError,
    Receipts,
    Statement,
)

RECEIPTS_FILE: Final = "receipts.jsonl"
FILE_BYTES_MAX: Final = 32 * 1024 * 1024
RECENT_MAX: Final = 20_000
"""Finished requests remembered; older ones are looked up in the journal."""
PAGES_REMEMBERED: Final = 1_000
DRIFT_TOKENS: Final = 16
DRIFT_PERCENT: Final = 2
OPERATOR_PERCENT: Final = 80
DOCUMENT_BYTES_MAX: Final = 256 * 1024

_log = logging.getLogger(__name__)
Hex = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{2})*$", max_length=256)]


class ReceiptError(Exception):
    """There is no such receipt, or it cannot be read."""


# -- what is kept ---------------------------------------------------------------------------------


class KeptPage(msgspec.Struct, frozen=True):
    """One line of the file: a page as both sides signed it, and why the node disputes what it disputes."""

    page: str
    public_key: Hex
    signature: Hex
    countersignature: Hex
    disputed: list[int]
    reasons: list[str]
    statements: list[str]


class ReceiptBook:
    """Checks, signs and keeps pages. `close` at the end."""

    def __init__(
        self, folder: Path, *, seed: str, node_id: str, file_bytes_max: int = FILE_BYTES_MAX
    ) -> None:
        self._folder = folder
        self._pair = nkeys.from_seed(bytearray(seed.encode()))
        self._node_id = node_id
        self._file = RotatingFile(folder / RECEIPTS_FILE, file_bytes_max)
        self._recent: OrderedDict[str, Entry] = OrderedDict()
        self._pages: OrderedDict[str, Countersigned] = OrderedDict()

    def close(self) -> None:
        self._file.close()

    def remember(self, entry: Entry) -> None:
        """Note a finished request: its receipt will come within seconds."""
        self._recent[entry.id] = entry
        if len(self._recent) > RECENT_MAX:
            self._recent.popitem(last=False)

    def countersign(self, page: Receipts) -> Countersigned:
        """Check a page, keep it and sign it; raises `ProtocolError` for one that is not ours to sign."""
        leaves = [protocol.receipt_leaf(statement) for statement in page.statements]
        root = protocol.merkle_root(leaves)
        protocol.verify_page_signature(page.public_key, len(leaves), root, page.signature)
        known = self._pages.get(page.page)
        if known is not None:
            return known
        statements = [protocol.decode_statement(statement) for statement in page.statements]
        if any(statement.node != self._node_id for statement in statements):
            raise ProtocolError("a page of another node")
        reasons = self._reasons(statements)
        disputed = sorted(reasons)
        signature = self._pair.sign(protocol.countersigning_bytes(len(leaves), root, disputed))
        kept = KeptPage(
            page.page, page.public_key.hex(), page.signature.hex(), signature.hex(), disputed,
            [reasons[position] for position in disputed],
            [statement.decode() for statement in page.statements],
        )  # fmt: skip
        self._file.write(msgspec.json.encode(kept) + b"\n")
        for position in disputed:
            _log.warning("receipt %s is disputed: %s", statements[position].id, reasons[position])
        answer = self._pages[page.page] = Countersigned(signature, disputed)
        if len(self._pages) > PAGES_REMEMBERED:
            self._pages.popitem(last=False)
        return answer

    def _reasons(self, statements: list[Statement]) -> dict[int, str]:
        """What is wrong, by position in the page."""
        ids = [statement.id.replace("-", "") for statement in statements]
        entries = {each: self._recent[each] for each in ids if each in self._recent}
        missing = {each for each in ids if each not in entries}
        entries |= find_entries(self._folder, missing) if missing else {}
        found = {
            position: reason_to_dispute(statement, entries.get(each))
            for position, (each, statement) in enumerate(zip(ids, statements, strict=True))
        }
        return {position: reason for position, reason in found.items() if reason is not None}


def reason_to_dispute(statement: Statement, entry: Entry | None) -> str | None:
    """Compare what the marketplace states with what this node journaled; None if they agree.

    A request that was cancelled or failed is compared by its model only: who sees its last piece is a race.
    """
    if entry is None:
        return "this node's journal knows no such request"
    if entry.model != statement.model:
        return f"this node served {entry.model}"
    if statement.operator_nano != statement.cost_nano * OPERATOR_PERCENT // 100:
        return "the operator's share is not 80 % of the cost"
    if entry.outcome != "ok" or statement.status != 200:
        return None
    if entry.response_sha256 and statement.response_sha256 not in {None, entry.response_sha256}:
        return "the response is not the one this node sent"
    told, counted = entry.completion_tokens, statement.completion_tokens
    if told is not None and told - counted > max(DRIFT_TOKENS, counted * DRIFT_PERCENT // 100):
        return f"{counted} completion tokens are billed, the engine counted {told}"
    return None


# -- a receipt by itself --------------------------------------------------------------------------


class PagePlace(msgspec.Struct, frozen=True):
    """Where in which page a statement stands, and the siblings that lead to the page's root."""

    id: str
    count: Annotated[int, msgspec.Meta(ge=1, le=protocol.STATEMENTS_MAX)]
    position: Annotated[int, msgspec.Meta(ge=0, lt=protocol.STATEMENTS_MAX)]
    proof: Annotated[list[Hex], msgspec.Meta(max_length=16)]


class MarketplaceSignature(msgspec.Struct, frozen=True):
    public_key: Hex
    signature: Hex


class NodeSignature(msgspec.Struct, frozen=True):
    public_key: str
    """An nkey of the user kind."""
    signature: Hex
    disputed: list[int] = []
    """Positions in the page that the node does not agree with."""


class Receipt(msgspec.Struct, frozen=True):
    """A receipt as `GET /api/receipts/{id}` gives it; fields beside these are ignored."""

    statement: str
    page: PagePlace | None = None
    marketplace: MarketplaceSignature | None = None
    node: NodeSignature | None = None
    says: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET
    """The statement as people read it; nobody signs it, so it must be the same."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found true of a receipt."""

    statement: Statement
    is_countersigned: bool
    is_disputed: bool
    public_key: str
    """Of the marketplace, hex: compare it with the one it publishes."""


def verify(receipt: Receipt) -> Verdict:
    """Check signatures, place, what is shown and arithmetic; raises `ReceiptError` saying what is wrong."""
    if receipt.page is None or receipt.marketplace is None:
        raise ReceiptError("the receipt is not signed yet; ask again in a few seconds")
    place, by = receipt.page, receipt.marketplace
    try:
        statement = protocol.decode_statement(receipt.statement.encode())
        leaf = protocol.receipt_leaf(receipt.statement.encode())
        proof = [bytes.fromhex(sibling) for sibling in place.proof]
        root = protocol.root_from_proof(leaf, place.position, place.count, proof)
        key = bytes.fromhex(by.public_key)
        protocol.verify_page_signature(key, place.count, root, bytes.fromhex(by.signature))
        if receipt.node is not None:
            node = receipt.node
            protocol.verify_countersignature(
                node.public_key, place.count, root, node.disputed, bytes.fromhex(node.signature)
            )
    except (ProofInvalidError, ProtocolError, ValueError, OverflowError) as error:
        raise ReceiptError(f"the receipt is forged or damaged: {error}") from error
    if receipt.says is not msgspec.UNSET and receipt.says != json.loads(receipt.statement):
        raise ReceiptError(
            "`says` is not what the signed statement says: the receipt was changed, ask for it anew"
        )
    _check_arithmetic(statement)
    is_disputed = receipt.node is not None and place.position in receipt.node.disputed
    return Verdict(statement, receipt.node is not None, is_disputed, by.public_key)


def _check_arithmetic(statement: Statement) -> None:
    if statement.price_in is not None and statement.price_out is not None:
        exact = (
            statement.prompt_tokens * statement.price_in + statement.completion_tokens * statement.price_out
        )
        if statement.cost_nano > -(-exact // 1_000_000):
            raise ReceiptError("the cost is above tokens times prices")
    if statement.operator_nano != statement.cost_nano * OPERATOR_PERCENT // 100:
        raise ReceiptError("the operator's share is not 80 % of the cost")


def read_receipt(path: Path) -> Receipt:
    """Read a receipt from a file; raises `ReceiptError`."""
    try:
        with path.open("rb") as file:
            data = file.read(DOCUMENT_BYTES_MAX + 1)
        if len(data) > DOCUMENT_BYTES_MAX:
            raise ReceiptError(f"{path} is larger than any receipt")
        return msgspec.json.decode(data, type=Receipt)
    except OSError as error:
        raise ReceiptError(f"{path} cannot be read") from error
    except NOT_DECODED as error:
        raise ReceiptError(f"{path} is not a receipt: {error}") from error


def kept_receipt(folder: Path, request_id: str, *, public_key: str) -> Receipt:
    """Find a request's receipt in what this node of this `public_key` keeps; raises `ReceiptError`."""
    wanted = request_id.replace("-", "").lower()
    for page in _kept_pages(folder, _hyphenated(wanted)):
        for position, statement in enumerate(page.statements):
            if str(json.loads(statement).get("id", "")).replace("-", "") != wanted:
                continue
            leaves = [protocol.receipt_leaf(each.encode()) for each in page.statements]
            proof = [sibling.hex() for sibling in protocol.merkle_proof(leaves, position)]
            return Receipt(
                statement,
                PagePlace(page.page, len(leaves), position, proof),
                MarketplaceSignature(page.public_key, page.signature),
                NodeSignature(public_key, page.countersignature, page.disputed),
            )
    raise ReceiptError(f"this node keeps no receipt of {request_id}")


def marketplace_keys(folder: Path) -> set[str]:
    """The marketplace's keys this node has been shown over its own connection, hex."""
    return {page.public_key for page in _kept_pages(folder, "")}


def _hyphenated(wanted: str) -> str:
    return "-".join((wanted[:8], wanted[8:12], wanted[12:16], wanted[16:20], wanted[20:]))


def _kept_pages(folder: Path, text: str) -> Iterator[KeptPage]:
    """The kept pages whose line contains `text`, newest file first."""
    decoder = msgspec.json.Decoder(KeptPage)
    names = [RECEIPTS_FILE, *(f"{RECEIPTS_FILE}.{age}" for age in range(1, FILES_KEPT))]
    for path in (folder / name for name in names):
        if not path.exists():
            continue
        with path.open("rb") as file:
            for line in file:
                if text.encode() in line:
                    try:
                        yield decoder.decode(line)
                    except NOT_DECODED:
                        continue  # a line cut by a crash
