"""Identity checks by Stripe Identity: a document, looked at on Stripe's pages; we see only the outcome."""

from __future__ import annotations

from typing import Final
from uuid import UUID

import stripe
from pydantic import SecretStr

from marketplace.platform.identity_checks import CheckStatus, IdentityUnavailable, Outcome, Started

TIMEOUT_S: Final = 20
RETRIES: Final = 2
_STATUS: Final = {
    "requires_input": CheckStatus.OPEN,
    "processing": CheckStatus.OPEN,
    "verified": CheckStatus.VERIFIED,
    "canceled": CheckStatus.CANCELLED,
}
"""VerificationSession.status; whatever else Stripe may say one day is open."""


class StripeIdentity:
    """`platform.identity_checks.IdentityProvider` on Stripe."""

    name = "stripe_identity"

    def __init__(self, key: SecretStr, *, api_base: str = "") -> None:
        self._key = key.get_secret_value()
        self._api_base = api_base
        self._http: stripe.AIOHTTPClient | None = None
        self._client: stripe.StripeClient | None = None

    @property
    def is_live(self) -> bool:
        """Which of Stripe's two worlds the key is of."""
        return "_live_" in self._key[:8]

    async def start(self, *, check_id: UUID, person: UUID) -> Started:
        """Start a session; the same `check_id` gives the same one (Stripe's idempotency key)."""
        try:
            made = await self._sessions.create_async(
                {
                    "type": "document",
                    "client_reference_id": str(check_id),
                    "metadata": {"check_id": str(check_id), "person_id": str(person)},
                },
                {"idempotency_key": f"tollway-identity-{check_id}"},
            )
        except stripe.StripeError as e:
            raise IdentityUnavailable(_reason(e)) from e
        if made.url is None:
            raise IdentityUnavailable("Stripe gave no page for this check")
        return Started(made.id, made.url)

    async def read(self, session: str) -> Outcome:
        """What Stripe says of a session now; IdentityUnavailable."""
        try:
            found = await self._sessions.retrieve_async(session)
        except stripe.StripeError as e:
            raise IdentityUnavailable(_reason(e)) from e
        error = found.last_error
        reason = "" if error is None else str(error.reason or error.code or "")
        return Outcome(found.id, _STATUS.get(found.status, CheckStatus.OPEN), reason[:500])

    @property
    def _sessions(self) -> stripe.identity.VerificationSessionService:
        if self._client is None:  # its connections belong to the running loop
            self._http = stripe.AIOHTTPClient(timeout=TIMEOUT_S)
            self._client = stripe.StripeClient(
                self._key,
                base_addresses={"api": self._api_base} if self._api_base else {},
                max_network_retries=RETRIES,
                http_client=self._http,
            )
        return self._client.v1.identity.verification_sessions

    async def close(self) -> None:
        """Close the connections."""
        http, self._http, self._client = self._http, None, None
        if http is not None:
            await http.close_async()  # type: ignore[no-untyped-call]  # stripe leaves it untyped


def _reason(error: stripe.StripeError) -> str:
    return f"Stripe: {type(error).__name__} (request {error.request_id or 'none'})"
