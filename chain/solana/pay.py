"""Solana Pay: one escrow account for everybody, and a reference key per intent.

Nothing on chain until somebody pays, no sweep.
"""

from __future__ import annotations

import secrets
from urllib.parse import quote, urlencode

from chain.networks import SOLANA
from chain.solana import base58
from chain.units import MICRO_PER_USDC, Micro


def new_reference() -> str:
    """Make a reference key for one Solana Pay intent: 32 random bytes in base58, nobody's key."""
    return base58.encode(secrets.token_bytes(32))


def solana_pay_url(
    recipient_owner: str,
    *,
    reference: str,
    label: str,
    amount: Micro | None = None,
    mint: str = SOLANA.usdc_mint,
) -> str:
    """Write a Solana Pay transfer request (the solana: URL of the Solana Pay specification 1.0).

    `recipient_owner` is the *wallet* (the escrow's multisig), never its token account: the paying
    wallet derives the token account itself.
    """
    fields = {} if amount is None else {"amount": _decimal(amount)}
    fields |= {"spl-token": mint, "reference": reference, "label": label}
    return f"solana:{recipient_owner}?{urlencode(fields, quote_via=quote)}"


def _decimal(amount: Micro) -> str:
    """Decimal USDC without a trailing zero or point."""
    whole, part = divmod(amount.n, MICRO_PER_USDC)
    return f"{whole}.{part:06d}".rstrip("0").rstrip(".")
