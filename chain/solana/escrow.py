"""What the 2-of-3 signs: messages on a durable nonce, one per combination of signers.

A Solana message names its signers, and nobody knows beforehand which two of three will come.  So a
batch is prepared once per combination; everybody signs those that name him, and the first complete
one is sent.  All combinations ride on the same nonce value (the fence), so at most one can land.

Everything here is pure: a signer's own machine rebuilds the messages from ledger rows with it, byte
for byte, without asking a node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final, Self

from solders.address_lookup_table_account import AddressLookupTableAccount
from solders.hash import Hash
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.message import MessageV0, to_bytes_versioned
from solders.pubkey import Pubkey
from solders.signature import Signature

from chain.errors import BadAddress, ChainRefusal, Malformed
from chain.networks import Chain
from chain.ports import Approval, PayoutLine, Unsigned
from chain.solana import programs
from chain.units import Micro

TRANSACTION_BYTES_MAX: Final = 1232
"""PACKET_DATA_SIZE of the validator."""
SIGNATURE_BYTES: Final = 64
PAYOUT: Final = "payout"
SWEEP: Final = "sweep"


class TooManyLines(ChainRefusal):
    """The batch does not fit into one transaction; `max_lines` fit."""

    def __init__(self, lines: int, max_lines: int) -> None:
        super().__init__(f"{lines} lines do not fit into one Solana transaction; at most {max_lines} do")
        self.max_lines = max_lines


class BadApproval(ChainRefusal):
    """A signature is missing, false, or by somebody who is not a signer."""


class NotEnoughApprovals(ChainRefusal):
    """No combination of signers is complete yet."""


@dataclass(frozen=True, slots=True)
class EscrowTerms:
    """The multisig and what its transactions are made of; a signer pins his own copy.

    `lookup_tables` (table address → its addresses, in order) shorten the message; a batch that fits without
    has none, a larger one has a table of its own whose content follows from its lines (`table_contents`).
    All addresses in base58.
    """

    mint: str
    multisig: str
    signers: tuple[str, ...]
    threshold: int
    escrow: str
    gas_payer: str
    """Pays the fee and is the nonce's authority: a key that can stall payouts but never direct them."""
    nonce_account: str
    lookup_tables: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= len(self.signers) <= programs.MULTISIG_SIGNERS_MAX:
            raise ValueError(f"{self.threshold} of {len(self.signers)} is not a multisig")
        if len(set(self.signers)) != len(self.signers):
            raise ValueError("a signer is named twice")

    def to_context(self, kind: str) -> dict[str, str]:
        """Write the terms as `Unsigned.context`."""
        return {
            "kind": kind,
            "mint": self.mint,
            "multisig": self.multisig,
            "signers": ",".join(self.signers),
            "threshold": str(self.threshold),
            "escrow": self.escrow,
            "gas_payer": self.gas_payer,
            "nonce_account": self.nonce_account,
            "lookup_tables": json.dumps([[t, list(a)] for t, a in self.lookup_tables]),
        }

    @classmethod
    def from_context(cls, context: Mapping[str, str]) -> Self:
        """Read terms back; Malformed if a part is missing or unreadable."""
        try:
            tables = json.loads(context["lookup_tables"])
            return cls(
                mint=context["mint"],
                multisig=context["multisig"],
                signers=tuple(context["signers"].split(",")),
                threshold=int(context["threshold"]),
                escrow=context["escrow"],
                gas_payer=context["gas_payer"],
                nonce_account=context["nonce_account"],
                lookup_tables=tuple((str(t), tuple(str(a) for a in addresses)) for t, addresses in tables),
            )
        except (KeyError, ValueError, TypeError) as e:
            raise Malformed(f"a Solana batch's context is incomplete: {e}") from e

    def combinations(self) -> list[tuple[str, ...]]:
        """Every set of `threshold` signers, each sorted, in sorted order."""
        return list(combinations(sorted(self.signers), self.threshold))


def build(terms: EscrowTerms, kind: str, lines: Sequence[PayoutLine], fence: str) -> Unsigned:
    """Build, without I/O, what must be signed for `lines`.

    `payout`: each line pays `to` (a wallet) from the escrow.  `sweep`: each line empties `amount` out of
    `to` (a deposit token account that has approved the multisig) into the escrow.
    Raises BadAddress, TooManyLines, Malformed.
    """
    if kind not in (PAYOUT, SWEEP):
        raise Malformed(f"unknown kind of Solana batch {kind!r}")
    if not lines:
        raise Malformed("a batch without lines")
    if terms.lookup_tables:
        _check_tables(terms, kind, lines)
    messages = {
        "+".join(chosen): _message(terms, kind, lines, fence, chosen) for chosen in terms.combinations()
    }
    largest = max(_transaction_bytes(m) for m in messages.values())
    if largest > TRANSACTION_BYTES_MAX:
        raise TooManyLines(len(lines), lines_max(terms, with_table=bool(terms.lookup_tables)))
    return Unsigned(
        chain=Chain.SOLANA,
        fence=fence,
        lines=tuple(lines),
        messages={label: to_bytes_versioned(m) for label, m in messages.items()},
        context=terms.to_context(kind),
    )


def rebuild(lines: Sequence[PayoutLine], fence: str, context: Mapping[str, str]) -> Unsigned:
    """Rebuild an export from its lines, fence and context: byte-identical to what was prepared."""
    terms = EscrowTerms.from_context(context)
    unsigned = build(terms, context.get("kind", ""), lines, fence)
    return Unsigned(unsigned.chain, unsigned.fence, unsigned.lines, unsigned.messages, dict(context))


def table_contents(terms: EscrowTerms, lines: Sequence[PayoutLine]) -> tuple[str, ...]:
    """What the lookup table of a batch holds, in order: the fixed accounts, then each payee's token account.

    It follows from the lines, so nobody has to be believed about it.  The nonce account stays in the
    message itself: the runtime takes a durable nonce from nowhere else.
    """
    mint = Pubkey.from_string(terms.mint)
    payees = [str(programs.associated_token_account(wallet(line.to), mint)) for line in lines]
    return tuple(dict.fromkeys([terms.escrow, terms.mint, terms.multisig, *payees]))


def _check_tables(terms: EscrowTerms, kind: str, lines: Sequence[PayoutLine]) -> None:
    """Malformed unless the one table holds exactly what these lines need, in order."""
    if kind != PAYOUT or len(terms.lookup_tables) != 1:
        raise Malformed("a batch has one lookup table at most, and a sweep has none")
    if terms.lookup_tables[0][1] != table_contents(terms, lines):
        raise Malformed("the lookup table is not the one these lines need")


def lines_max(terms: EscrowTerms, *, with_table: bool = False) -> int:
    """How many payouts to wallets we know nothing of fit into one transaction."""
    fence, table = str(Hash.default()), str(Pubkey.default())
    signers = terms.combinations()[0]
    count = 0
    lines: list[PayoutLine] = []
    while True:
        # Pubkeys on the curve, all different: the worst case for the size.
        to = str(Keypair.from_seed(count.to_bytes(32)).pubkey())
        lines.append(PayoutLine(str(count), to, Micro(1)))
        if with_table:
            terms = replace(terms, lookup_tables=((table, table_contents(terms, lines)),))
        if _transaction_bytes(_message(terms, PAYOUT, lines, fence, signers)) > TRANSACTION_BYTES_MAX:
            return count
        count += 1


def _message(
    terms: EscrowTerms, kind: str, lines: Sequence[PayoutLine], fence: str, signers: Sequence[str]
) -> MessageV0:
    gas = Pubkey.from_string(terms.gas_payer)
    consent = tuple(Pubkey.from_string(s) for s in signers)
    instructions = [programs.advance_nonce(Pubkey.from_string(terms.nonce_account), gas)]
    instructions += [_movement(terms, kind, line, consent) for line in lines]
    tables = [
        AddressLookupTableAccount(Pubkey.from_string(t), [Pubkey.from_string(a) for a in addresses])
        for t, addresses in terms.lookup_tables
    ]
    try:
        return MessageV0.try_compile(gas, instructions, tables, Hash.from_string(fence))
    except ValueError as e:
        raise Malformed(f"the batch cannot be compiled: {e}") from e


def _movement(terms: EscrowTerms, kind: str, line: PayoutLine, signers: tuple[Pubkey, ...]) -> Instruction:
    mint, escrow = Pubkey.from_string(terms.mint), Pubkey.from_string(terms.escrow)
    if kind == PAYOUT:
        source, to = escrow, programs.associated_token_account(wallet(line.to), mint)
    else:
        source, to = Pubkey.from_string(line.to), escrow
    return programs.transfer_checked(
        source=source,
        mint=mint,
        to=to,
        authority=Pubkey.from_string(terms.multisig),
        signers=signers,
        amount=line.amount.n,
    )


def wallet(text: str) -> Pubkey:
    """Parse a wallet somebody holds the key of; BadAddress for anything else (a program's address)."""
    try:
        key = Pubkey.from_string(text)
    except ValueError as e:
        raise BadAddress(f"{text[:60]!r} is not a Solana address") from e
    if not key.is_on_curve():
        raise BadAddress(f"{text} is a program's address; nobody holds its key")
    return key


def _transaction_bytes(message: MessageV0) -> int:
    return len(to_bytes_versioned(message)) + 1 + SIGNATURE_BYTES * message.header.num_required_signatures


def approve(unsigned: Unsigned, signer: Keypair) -> Approval:
    """Sign every message that names `signer`; BadApproval if none does."""
    name = str(signer.pubkey())
    signatures = {
        label: bytes(signer.sign_message(message))
        for label, message in unsigned.messages.items()
        if name in label.split("+")
    }
    if not signatures:
        raise BadApproval(f"{name} is not a signer of this batch")
    return Approval(name, signatures)


def verify(unsigned: Unsigned, approval: Approval) -> None:
    """Raise BadApproval unless `approval` signs exactly the messages that name its signer."""
    expected = {label for label in unsigned.messages if approval.signer in label.split("+")}
    if not expected:
        raise BadApproval(f"{approval.signer[:60]} is not a signer of this batch")
    if set(approval.signatures) != expected:
        raise BadApproval(f"{approval.signer} must sign each of the {len(expected)} messages that name him")
    key = Pubkey.from_string(approval.signer)
    for label, signature in approval.signatures.items():
        if len(signature) != SIGNATURE_BYTES or not Signature(signature).verify(
            key, unsigned.messages[label]
        ):
            raise BadApproval(f"{approval.signer}: the signature over {label} is not his")


def complete(unsigned: Unsigned, approvals: Sequence[Approval]) -> tuple[bytes, dict[str, bytes]]:
    """Choose the first combination all of whose signers approved: (message, signature by signer).

    Verifies every approval; raises BadApproval or NotEnoughApprovals.
    """
    by_signer: dict[str, Approval] = {}
    for approval in approvals:
        verify(unsigned, approval)
        by_signer[approval.signer] = approval
    for label, message in unsigned.messages.items():
        signers = label.split("+")
        if all(s in by_signer for s in signers):
            return message, {s: by_signer[s].signatures[label] for s in signers}
    threshold = EscrowTerms.from_context(unsigned.context).threshold
    raise NotEnoughApprovals(f"{len(by_signer)} of {threshold} approvals")
