"""What can go wrong in the ledger.

LedgerError
├── LedgerRefusal            business says no; asking again gives the same answer
│   ├── InsufficientFunds    the account's available amount does not cover it
│   ├── KeyReused            this business key was used with other inputs
│   ├── FlowForbidden        these kinds of account may not face each other in this transfer
│   ├── AmountTooLarge       a balance would no longer fit 64 bits
│   ├── UnknownAccount       a charge or lease names an account the ledger does not have
│   ├── ReversalRefused      more than the original, of a reversal, or of nothing
│   └── ChargeRefused        the database refuses this one charge; its batch went through without it
├── LedgerFault              the environment failed; asking again may help
│   ├── LedgerUnavailable    nothing was written; the hold is still the caller's
│   └── UnknownResult        accepted, not yet known to be durable: ask by id, never repeat blindly
└── LedgerBroken             an invariant is violated: stop and page
    └── LaneBroken           a lane's stored chain is not the one this poster extended
"""

from __future__ import annotations


class LedgerError(Exception):
    """Root of everything the ledger raises on purpose."""


class LedgerRefusal(LedgerError):
    """Business says no; asking again gives the same answer."""


class InsufficientFunds(LedgerRefusal):
    """The account's available amount does not cover what was asked."""

    def __init__(self, message: str, *, available_nano: int) -> None:
        super().__init__(message)
        self.available_nano = available_nano


class KeyReused(LedgerRefusal):
    """This business key was used before, with other inputs."""


class FlowForbidden(LedgerRefusal):
    """These kinds of account may not face each other in this kind of transfer."""


class UnknownAccount(LedgerRefusal):
    """The ledger has no such account."""


class AmountTooLarge(LedgerRefusal):
    """A balance would leave int64: nine billion dollars."""


class ReversalRefused(LedgerRefusal):
    """A reversal of nothing, of a reversal, or of more than the original."""


class ChargeRefused(LedgerRefusal):
    """The database refuses this one charge; the rest of its batch went through."""


class LedgerFault(LedgerError):
    """The environment failed; asking again may help."""


class LedgerUnavailable(LedgerFault):
    """Nothing was written, nothing was accepted."""


class UnknownResult(LedgerFault):
    """Accepted for posting, not yet known to be durable."""


class LedgerBroken(LedgerError):
    """An invariant is violated: stop and page."""


class LaneBroken(LedgerBroken):
    """The lane's stored hash chain is not the one this poster extended."""
