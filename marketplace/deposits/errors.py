"""What can go wrong between chain and book.

DepositError
├── DepositRefusal       business says no
│   ├── TooManyIntents   this person has enough open payment links
│   ├── NotHalted        the chain is not halted (or not known)
│   ├── NoDecision       there is nothing (more) to decide about this deposit
│   ├── HistoryRefused   not a block that the books can go back to
│   └── SweepRefused     an export or approval that is not this sweep's
└── DepositFault         the environment failed; asking again may help
    ├── Superseded       another process moved this chain's cursor: reload and go on
    ├── Unacknowledged   the chain did what a person must look at first; the watcher halts it
    └── ChainHalted      somebody halted this chain; nothing is credited until it is resumed
"""

from __future__ import annotations


class DepositError(Exception):
    """Root of everything this package raises on purpose."""


class DepositRefusal(DepositError):
    """Business says no; asking again gives the same answer."""


class TooManyIntents(DepositRefusal):
    """This person has enough open payment links."""


class NotHalted(DepositRefusal):
    """There is nothing to resume."""


class NoDecision(DepositRefusal):
    """There is nothing (more) to decide."""


class HistoryRefused(DepositRefusal):
    """Not a block that the books can go back to."""


class SweepRefused(DepositRefusal):
    """An export or approval that does not agree with this sweep or with the settings."""


class DepositFault(DepositError):
    """The environment failed; asking again may help."""


class Superseded(DepositFault):
    """Another process moved this chain's cursor."""


class Unacknowledged(DepositFault):
    """The chain did what a person must look at first."""


class ChainHalted(DepositFault):
    """Credits on this chain are stopped until a person resumes them."""
