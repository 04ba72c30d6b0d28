"""The port through which somebody else checks who a person is.

`marketplace.settlement.kyc` asks and records; an adapter (`marketplace.billing.stripe_identity`) speaks to a
provider.  Neither knows the other; the composition root joins them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol
from uuid import UUID


class CheckStatus(StrEnum):
    """Where one check of one person stands."""

    ASKED = "asked"
    """On record here; the provider may not know of it yet."""
    OPEN = "open"
    """The person has something to do, or the provider has."""
    VERIFIED = "verified"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Started:
    """A provider's side of a check."""

    session: str
    """Its id there."""
    url: str
    """Where the person does it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a provider says of a session now."""

    session: str
    status: CheckStatus
    reason: str = ""
    """Why not, in the provider's words."""


class IdentityUnavailable(Exception):
    """The provider did not answer, or refused; asking again may help."""


class IdentityProvider(Protocol):
    """Starts checks.  Outcomes come by webhook, and are read from the provider, never from the message."""

    name: str

    async def start(self, *, check_id: UUID, person: UUID) -> Started:
        """Start a check, or give the one that `check_id` has started before; IdentityUnavailable."""
        ...
