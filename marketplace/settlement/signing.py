"""Consent: what leaves for a signer's machine, what he checks there, and what comes back.

`Export` carries the batch *and* the ledger rows it was planned from.  A signer believes none of it: he
rebuilds each line from its ledger row, the digest from the lines, the messages from his own settings
(`consents`), and signs only if all agree (A39).  Then he reads totals and recipients and decides.

One thing cannot be rebuilt: that a Solana lookup table holds, on chain, what the lines need
(`chain.solana.tables`).  The signer asks his own providers on a machine with a network; the answer is a
`Witness`, a file that his offline machine reads.  A batch on a table that no witness confirms is refused.

Nothing here opens a socket or a database, but `store_approval`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final
from uuid import UUID

import msgspec
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.errors import ChainRefusal
from chain.networks import Chain
from chain.payouts import Approved, Payout
from chain.ports import Approval, PayoutLine, Unsigned
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import templates
from marketplace.ledger.accounts import TransferKind
from marketplace.ledger.money import from_micro
from marketplace.ledger.tables import accounts, transfers
from marketplace.settlement import payout_rules
from marketplace.settlement.batches import (
    Member,
    find_batch,
    lines_of,
    lock_chain,
    members,
    move,
    signatures_from_hex,
    signatures_to_hex,
    stored_approvals,
)
from marketplace.settlement.consents import Consent, lookup_tables
from marketplace.settlement.digest import batch_digest, merkle_root
from marketplace.settlement.errors import ApprovalRefused, ExportRefused, WrongState
from marketplace.settlement.sanctions import canonical
from marketplace.settlement.tables import approvals

EXPORT_FORMAT: Final = "tollway-batch-export-1"
APPROVAL_FORMAT: Final = "tollway-batch-approval-1"
WITNESS_FORMAT: Final = "tollway-table-witness-1"
DOCUMENT_BYTES_MAX: Final = 4 * 1024 * 1024
"""300 lines are some 300 kB."""

Text = Annotated[str, msgspec.Meta(max_length=4096)]
Amount = Annotated[int, msgspec.Meta(gt=0, le=2**63 - 1)]


class LedgerRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The transfer that moved one operator's earnings into flight."""

    transfer_id: Text
    kind: Text
    ref: Text
    debit: Text
    credit: Text
    amount_nano: Amount
    input_hash: Text
    """SHA-256 over the transfer's inputs, as the ledger stored it (hex)."""


class ExportLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One payout and what it was made from."""

    position: int
    payout_id: Text
    withdrawal_id: Text
    person_id: Text
    to: Text
    amount_micro: Amount
    ledger: LedgerRow


class Export(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a signer needs, in one file."""

    format: Text
    batch: Text
    chain: Chain
    escrow: Text
    fence: Text
    context: dict[str, Text]
    digest: Text
    merkle_root: Text
    total_micro: Amount
    count: int
    threshold: int
    planned_by: Text
    planned_at: Text
    lines: Annotated[list[ExportLine], msgspec.Meta(min_length=1, max_length=1000)]


class Witness(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a signer's own providers said of the lookup tables of a batch, at finality."""

    format: Text
    batch: Text
    tables: Annotated[
        dict[Text, Annotated[list[Text], msgspec.Meta(max_length=256)]], msgspec.Meta(max_length=8)
    ]
    """Content by table address, as confirmed."""
    providers: int
    """How many said so; none said otherwise."""


class ApprovalDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One signer's consent, as a file."""

    format: Text
    batch: Text
    chain: Chain
    digest: Text
    signer: Text
    signatures: Annotated[dict[Text, Text], msgspec.Meta(min_length=1, max_length=100)]
    """Hex, by message label."""


def encode(document: Export | ApprovalDocument | Witness) -> bytes:
    """Write a document as indented JSON: people read these."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def decode_export(raw: bytes) -> Export:
    """Read an export; ExportRefused if it is not one."""
    if len(raw) > DOCUMENT_BYTES_MAX:
        raise ExportRefused(f"the export is {len(raw)} bytes, over {DOCUMENT_BYTES_MAX}")
    try:
        export = msgspec.json.decode(raw, type=Export)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ExportRefused(f"this is not a batch export: {e}") from e
    if export.format != EXPORT_FORMAT:
        raise ExportRefused(f"export format {export.format!r}; this version reads {EXPORT_FORMAT}")
    return export


def decode_approval(raw: bytes) -> ApprovalDocument:
    """Read an approval; ApprovalRefused if it is not one."""
    if len(raw) > DOCUMENT_BYTES_MAX:
        raise ApprovalRefused(f"the approval is {len(raw)} bytes, over {DOCUMENT_BYTES_MAX}")
    try:
        document = msgspec.json.decode(raw, type=ApprovalDocument)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ApprovalRefused(f"this is not an approval: {e}") from e
    if document.format != APPROVAL_FORMAT:
        raise ApprovalRefused(f"approval format {document.format!r}; this version reads {APPROVAL_FORMAT}")
    return document


def decode_witness(raw: bytes) -> Witness:
    """Read what `tollway batch witness` wrote; ExportRefused if it is not that."""
    try:
        witness = msgspec.json.decode(raw[: DOCUMENT_BYTES_MAX + 1], type=Witness)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ExportRefused(f"this is not a witness of lookup tables: {e}") from e
    if witness.format != WITNESS_FORMAT:
        raise ExportRefused(f"witness format {witness.format!r}; this version reads {WITNESS_FORMAT}")
    return witness


# ── on the marketplace's side ─────────────────────────────────────────────────────────────────────────


async def export_batch(conn: AsyncConnection, batch_id: UUID) -> Export:
    """Read a batch and the ledger rows it was planned from; NotFound."""
    batch = await find_batch(conn, batch_id)
    joined = await members(conn, batch_id)
    rows = await _ledger_rows(conn, joined)
    return Export(
        format=EXPORT_FORMAT,
        batch=str(batch.id),
        chain=batch.chain,
        escrow=batch.escrow,
        fence=batch.fence,
        context=batch.context,
        digest=batch.digest.hex(),
        merkle_root=batch.merkle_root.hex(),
        total_micro=batch.total.n,
        count=batch.count,
        threshold=batch.threshold,
        planned_by=batch.planned_by,
        planned_at=batch.planned_at.isoformat(),
        lines=[
            ExportLine(
                position=m.position,
                payout_id=str(m.payout_id),
                withdrawal_id=str(m.withdrawal_id),
                person_id=str(m.person_id),
                to=m.address,
                amount_micro=m.amount.n,
                ledger=rows[str(m.payout_id)],
            )
            for m in joined
        ],
    )


async def _ledger_rows(conn: AsyncConnection, joined: list[Member]) -> dict[str, LedgerRow]:
    debit, credit = accounts.alias("debit"), accounts.alias("credit")
    t = transfers.c
    statement = (
        select(
            t.id, t.kind, t.ref, t.amount, t.input_hash,
            debit.c.kind, debit.c.owner, credit.c.kind, credit.c.owner,
        )
        .join(debit, debit.c.id == t.debit)
        .join(credit, credit.c.id == t.credit)
        .where(t.kind == TransferKind.WITHDRAWAL_PLANNED.value, t.ref.in_([str(m.payout_id) for m in joined]))
    )  # fmt: skip
    return {
        ref: LedgerRow(str(i), kind, ref, f"{dk}:{do}", f"{ck}:{co}", amount, inputs.hex())
        for i, kind, ref, amount, inputs, dk, do, ck, co in await conn.execute(statement)
    }


async def store_approval(
    conn: AsyncConnection, consent: Consent, document: ApprovalDocument, *, pushed_by: str, now: datetime
) -> Payout:
    """Check an approval against the batch on record and keep it; gives the batch's status then (P7).

    The same approval again changes nothing.  ApprovalRefused from whoever planned the batch (A47), for
    another digest, for a stranger's or a false signature; WrongState once the batch is signed or over.
    """
    try:
        batch = await find_batch(conn, UUID(document.batch))
        signatures = signatures_from_hex(document.signatures)
    except ValueError as e:
        raise ApprovalRefused("the approval's batch id or a signature is unreadable") from e
    await lock_chain(conn, batch.chain)
    batch = await find_batch(conn, batch.id)
    if pushed_by == batch.planned_by:
        raise ApprovalRefused(
            f"{pushed_by} planned this batch; another person brings the approvals",
            code="planner_may_not_approve",
        )
    if document.chain is not batch.chain or document.digest != batch.digest.hex():
        raise ApprovalRefused("the approval is over another batch: chain or digest differ")
    approval = Approval(document.signer, signatures)
    try:
        unsigned = consent.rebuild(lines_of(await members(conn, batch.id)), batch.fence, batch.context)
        if approval.signer not in consent.signers:
            raise ApprovalRefused(f"{approval.signer} is not a signer of {batch.escrow}")
        consent.verify(unsigned, approval)
    except ChainRefusal as e:
        raise ApprovalRefused(str(e)) from e
    on_record = {a.signer for a in await stored_approvals(conn, batch.id)}
    if approval.signer in on_record:
        return batch.status
    if batch.status not in (Payout.PLANNED, Payout.APPROVED):
        raise WrongState(f"the batch is {batch.status}; it takes no more approvals")
    row = insert(approvals).values(
        batch_id=batch.id,
        signer=approval.signer,
        signatures=signatures_to_hex(approval.signatures),
        pushed_by=pushed_by,
        created_at=now,
    )
    await conn.execute(row)
    rules = await payout_rules.in_force(conn)
    needed = rules.approvals_needed(batch.total, threshold=batch.threshold, signers=len(consent.signers))
    if batch.status is Payout.APPROVED or len(on_record) + 1 < needed:
        return batch.status  # one more than needed changes nothing
    return await move(conn, batch, Approved(), now=now)


# ── on a signer's own machine ─────────────────────────────────────────────────────────────────────────


class Review(msgspec.Struct, frozen=True):
    """What a signer reads before he decides; every number is rebuilt, none is copied."""

    batch: str
    chain: Chain
    escrow: str
    fence: str
    digest: str
    total: Micro
    recipients: tuple[tuple[str, Micro], ...]
    threshold: int
    planned_by: str
    new_recipients: frozenset[str]
    """Those this signer has never signed for before, by his own memory."""


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What a signer insists on besides the rebuild; each is optional."""

    limit: Micro | None = None
    """The largest total he signs."""
    recipients: frozenset[str] | None = None
    """His own address book, EVM addresses in any case: nobody else may be paid (A39)."""
    signed_before: frozenset[str] = frozenset()
    """Whom he has signed for before; others are pointed out to him, not refused."""
    witness: Witness | None = None
    """What his own providers said of the batch's lookup tables; needed only for a batch that has one."""


def check_export(
    export: Export, consent: Consent, expected: Expected | None = None
) -> tuple[Unsigned, Review]:
    """Rebuild everything in an export; ExportRefused, naming what does not agree, else what to sign."""
    if (export.chain, export.escrow) != (consent.chain, consent.escrow):
        raise ExportRefused(
            f"the export pays from {export.escrow} on {export.chain}, these settings know {consent.escrow} "
            f"on {consent.chain}"
        )
    lines = tuple(_line_from_ledger(export, i, line) for i, line in enumerate(export.lines))
    if len({line.payout_id for line in lines}) != len(lines):
        raise ExportRefused("a payout stands in the export twice")
    total = Micro(sum(line.amount.n for line in lines))
    if (export.count, export.total_micro) != (len(lines), total.n):
        raise ExportRefused(f"the lines are {len(lines)} payouts of {total}, the export says otherwise")
    digest = batch_digest(chain=export.chain, escrow=consent.escrow, fence=export.fence, lines=lines).hex()
    if (export.digest, export.merkle_root) != (digest, merkle_root(lines).hex()):
        raise ExportRefused("digest or Merkle root are not those of the lines")
    if export.threshold != consent.threshold:
        raise ExportRefused(f"the multisig's threshold is {consent.threshold}, not {export.threshold}")
    _check_expected(lines, total, expected or Expected())
    try:
        unsigned = consent.rebuild(lines, export.fence, export.context)
        _check_tables(export, lookup_tables(export.chain, unsigned.context), expected or Expected())
    except ChainRefusal as e:
        raise ExportRefused(str(e)) from e
    recipients = tuple((line.to, line.amount) for line in lines)
    review = Review(
        export.batch, export.chain, consent.escrow, export.fence, digest, total, recipients,
        consent.threshold, export.planned_by,
        frozenset({line.to for line in lines} - (expected or Expected()).signed_before),
    )  # fmt: skip
    return unsigned, review


def tables_of(export: Export, consent: Consent) -> dict[str, tuple[str, ...]]:
    """The lookup tables an export stands on, and what its lines need them to hold; ExportRefused."""
    lines = tuple(_line_from_ledger(export, i, line) for i, line in enumerate(export.lines))
    try:
        unsigned = consent.rebuild(lines, export.fence, export.context)
        return lookup_tables(export.chain, unsigned.context)
    except ChainRefusal as e:
        raise ExportRefused(str(e)) from e


def sign_export(
    export: Export,
    consent: Consent,
    *,
    keystore: Path,
    passphrase: str,
    expected: Expected | None = None,
    confirm: Callable[[Review], bool] = lambda _: True,
) -> ApprovalDocument:
    """Check an export, show it to `confirm`, and sign it with a keystore.

    ExportRefused if anything disagrees, the keystore is no signer's, or `confirm` says no; the keystore's
    own errors pass through.
    """
    unsigned, review = check_export(export, consent, expected)
    if not confirm(review):
        raise ExportRefused("not signed: declined by the signer")
    approval = _sign(unsigned, keystore, passphrase, consent)
    consent.verify(unsigned, approval)
    return ApprovalDocument(
        format=APPROVAL_FORMAT,
        batch=export.batch,
        chain=export.chain,
        digest=review.digest,
        signer=approval.signer,
        signatures=signatures_to_hex(approval.signatures),
    )


def _line_from_ledger(export: Export, position: int, line: ExportLine) -> PayoutLine:
    """Rebuild one line from its ledger row alone, then compare."""
    row = line.ledger
    person = row.debit.removeprefix(f"{ledger_accounts.Kind.OPERATOR_EARNINGS}:")
    micro, dust = divmod(row.amount_nano, 1000)
    if dust or micro == 0:
        raise ExportRefused(f"line {position}: {row.amount_nano} nano-dollars are no whole micro-USDC")
    rebuilt = templates.withdrawal_planned(
        chain=export.chain.value, person=person, amount=from_micro(micro), ref=row.ref
    )
    agrees = (
        line.position == position
        and row.kind == rebuilt.kind.value
        and (row.debit, row.credit) == (str(rebuilt.debit), str(rebuilt.credit))
        and row.input_hash == rebuilt.input_hash.hex()
        and (line.payout_id, line.person_id, line.amount_micro) == (row.ref, person, micro)
    )
    if not agrees:
        raise ExportRefused(f"line {position} (payout {line.payout_id}) is not what its ledger row says")
    return PayoutLine(row.ref, line.to, Micro(micro))


def _check_tables(export: Export, named: dict[str, tuple[str, ...]], expected: Expected) -> None:
    """Refuse a lookup table that this signer's own providers have not confirmed (A39)."""
    confirmed = expected.witness.tables if expected.witness is not None else {}
    for table, contents in named.items():
        if tuple(confirmed.get(table, ())) != contents:
            raise ExportRefused(
                f"nobody of yours has confirmed what lookup table {table} holds: run `tollway batch witness` "
                f"on this export ({export.batch}) on a machine of yours with a network, and give the file "
                "it writes with --witness"
            )


def _check_expected(lines: tuple[PayoutLine, ...], total: Micro, expected: Expected) -> None:
    if expected.limit is not None and total > expected.limit:
        raise ExportRefused(f"the batch pays {total} USDC, over your limit of {expected.limit}")
    if expected.recipients is not None:
        known = {canonical(address) for address in expected.recipients}
        strangers = sorted(line.to for line in lines if canonical(line.to) not in known)
        if strangers:
            raise ExportRefused(f"not in your address book: {', '.join(strangers)}")


def _sign(unsigned: Unsigned, keystore: Path, passphrase: str, consent: Consent) -> Approval:
    if unsigned.chain is Chain.SOLANA:
        from chain.solana import escrow
        from chain.solana import keystore as solana_keystore

        _require_signer(solana_keystore.address_of(keystore), consent)
        return escrow.approve(unsigned, solana_keystore.load(keystore, passphrase))
    from chain.evm import keystore as evm_keystore

    signer = evm_keystore.address(keystore)
    _require_signer(signer, consent)
    key = evm_keystore.unlock(keystore, passphrase)
    signed = {label: evm_keystore.sign_digest(key, message) for label, message in unsigned.messages.items()}
    return Approval(signer, signed)


def _require_signer(address: str, consent: Consent) -> None:
    if address not in consent.signers:
        raise ExportRefused(f"the keystore is {address}'s, who is not a signer of {consent.escrow}")
