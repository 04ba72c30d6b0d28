"""What a notice says in an e-mail: one subject and text per kind.  Pure.

A kind that is not here cannot be enqueued; its payload must have every field its text names.  Webhooks
carry kind and payload as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

LINE_CHARACTERS_MAX: Final = 2_000
"""Of one field in a text."""


@dataclass(frozen=True, slots=True)
class Message:
    """A plain-text message."""

    subject: str
    text: str


_TEXTS: Final[Mapping[str, Message]] = {
    "deposit_credited": Message(
        "Your deposit of {amount} USDC is on your balance",
        "{amount} USDC on {chain} became final and is on your balance.\nTransactions: {transactions}",
    ),
    "deposit_taken_back": Message(
        "A deposit of {amount} USDC was taken back by its chain",
        "{chain} no longer has a deposit of {amount} USDC that was final, so it left your balance.\n"
        "If the transaction is mined again, it will be credited again.\nTransactions: {transactions}",
    ),
    "payout_address_added": Message("A payout address was added to your account", "{message}"),
    "payout_address_retired": Message("A payout address was removed from your account", "{message}"),
    "withdrawal_refused": Message("A withdrawal could not be paid", "{message}"),
    "standing_held": Message(
        "Your earnings are held and your nodes get no requests",
        "Reason: {reason}\n\nThe findings: tollway-node standing\n"
        'What is wrong with them: tollway-node dispute "WHY". A person will decide.',
    ),
    "dispute_decided": Message(
        "Your dispute was {outcome}", "Your dispute was {outcome}; your standing is {standing}.\n{reason}"
    ),
    "kyc_decided": Message("Your identity check", "{message}"),
    "wallet_linked": Message("A wallet was linked to your account", "{message}"),
    "webhook_test": Message("A test of your webhook", "You asked for a test."),
}


def is_kind(kind: str) -> bool:
    return kind in _TEXTS


def compose(kind: str, payload: Mapping[str, object]) -> Message:
    """Fill the kind's text; raises KeyError for an unknown kind or a missing field."""
    template = _TEXTS[kind]
    fields = {name: _shown(value) for name, value in payload.items()}
    subject = template.subject.format_map(fields)
    return Message(" ".join(subject.split()), template.text.format_map(fields) + "\n")


def _shown(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text[:LINE_CHARACTERS_MAX]
