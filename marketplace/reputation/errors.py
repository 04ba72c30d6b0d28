"""What the reputation package raises.

ReputationError
├── ReferenceUnavailable    the reference engine did not answer; nothing is known about the answer checked
├── CanaryRefused           our own marketplace does not serve the canaries' account: no node is to blame
├── Unscorable              the reference engine, or we, cannot judge this answer
└── DisputeRefused          business says no: `code` tells why
"""

from __future__ import annotations


class ReputationError(Exception):
    """Root of everything this package raises on purpose."""


class ReferenceUnavailable(ReputationError):
    """No answer from the reference engine, or none that makes sense."""


class CanaryRefused(ReputationError):
    """The canaries' account has no money, or its key is not in use: somebody must see to it."""


class Unscorable(ReputationError):
    """This answer cannot be judged: too short, too long, or refused by the reference engine."""


class DisputeRefused(ReputationError):
    """A dispute, or its decision, that cannot be taken."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
