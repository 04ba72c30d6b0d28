"""Which webhook is Stripe's (A49, A50).

The message says that something happened to an object and names it; nothing else in it is believed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from pydantic import SecretStr

from marketplace.billing.errors import BadEvent

BYTES_MAX: Final = 256 * 1024
TOLERANCE_S: Final = 300
ABOUT_CHECKS: Final = "identity.verification_session."
"""How the kinds of events begin that are about identity checks."""
_ID_CHARACTERS_MAX: Final = 200


@dataclass(frozen=True, slots=True)
class StripeEvent:
    """One event: its id, what happened, and to which object."""

    id: str
    kind: str
    object_id: str


def read_event(raw: bytes, signature: str, *, secret: SecretStr, is_live: bool) -> StripeEvent:
    """Give the event; BadEvent says what is wrong with it."""
    import stripe  # 8 MB and 0.1 s, which gateways without Stripe do not spend

    if len(raw) > BYTES_MAX:
        raise BadEvent(f"an event of more than {BYTES_MAX} bytes")
    try:
        stripe.WebhookSignature.verify_header(
            raw.decode(), signature, secret.get_secret_value(), tolerance=TOLERANCE_S
        )
        event = json.loads(raw)
        found = StripeEvent(str(event["id"]), str(event["type"]), str(event["data"]["object"]["id"]))
        mode = event["livemode"]
    except (stripe.SignatureVerificationError, ValueError, LookupError, TypeError) as e:
        raise BadEvent(f"not an event signed by Stripe: {type(e).__name__}") from e
    if mode is not is_live:
        raise BadEvent(f"an event of Stripe's {'live' if mode else 'test'} mode; this key has the other")
    if max(len(found.id), len(found.kind), len(found.object_id)) > _ID_CHARACTERS_MAX:
        raise BadEvent("an event with an id longer than Stripe's")
    return found
