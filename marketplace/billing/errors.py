"""What billing says no to.

BillingError
└── BadEvent      not an event of our Stripe account, in our mode, signed by Stripe in the last minutes
"""

from __future__ import annotations


class BillingError(Exception):
    """Root of everything billing raises on purpose."""


class BadEvent(BillingError):
    """Not signed by Stripe, too old, of the other mode, or not an event at all."""
