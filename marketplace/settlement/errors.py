"""What settlement says no to.

SettlementError
├── SettlementRefusal       business says no; `code` names the rule, the message how to satisfy it
│   ├── NotEligible         a withdrawal breaks one or more rules (`eligibility`)
│   ├── KeyReused           the idempotency key was used with other inputs
│   ├── NotFound            no such withdrawal, address, batch, plan
│   ├── WrongState          too late (or too early) for that
│   ├── PlanRefused         no batch can be planned now
│   ├── ExportRefused       a signer's machine refuses to sign this
│   └── ApprovalRefused     the approval is not over this batch, or not a signer's
└── AnotherWon              another worker changed the batch first; look again
"""

from __future__ import annotations


class SettlementError(Exception):
    """Root of everything settlement raises on purpose."""


class SettlementRefusal(SettlementError):
    """Business says no; asking again gives the same answer."""

    code = "settlement_refused"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class NotEligible(SettlementRefusal):
    """A withdrawal breaks one or more rules."""


class KeyReused(SettlementRefusal):
    """The idempotency key was used with other inputs."""

    code = "idempotency_key_reused"


class NotFound(SettlementRefusal):
    """No such thing, or not the caller's."""

    code = "not_found"


class WrongState(SettlementRefusal):
    """Too late (or too early) for that."""

    code = "wrong_state"


class PlanRefused(SettlementRefusal):
    """No batch can be planned now; nothing was changed."""


class ExportRefused(SettlementRefusal):
    """A signer's machine refuses to sign this."""

    code = "export_refused"


class ApprovalRefused(SettlementRefusal):
    """The approval is not over this batch, or not a signer's."""

    code = "approval_refused"


class AnotherWon(SettlementError):
    """Another worker changed the batch first."""
