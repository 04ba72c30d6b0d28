"""May this withdrawal be made?  Pure: facts in, every broken rule out, each with its remedy.

================  ====================================================================================
rule              satisfied when
================  ====================================================================================
minimum           the amount is at least $10.00 (R15); smaller sums stay in earnings (A48)
standing          no decision has put the operator in bad standing
kyc_withdrawal    the amount is at most what the person's KYC tier lets out at once (R16: over $500.00 needs a
                  verified identity; exactly $500.00 needs none)
kyc_cumulative    this and all earlier withdrawals together are at most what the tier lets out in all:
                  splitting does not evade the limit
address_unknown   the address is in the person's address book, in use
address_cooling   the address has been there for the cooling time (A43)
earnings          the amount is at most the matured earnings
================  ====================================================================================

Standing and KYC are asked again before the money leaves: both may have lapsed (`withdrawals.over_limit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from marketplace.ledger.money import Nano


@dataclass(frozen=True, slots=True)
class Case:
    """Everything the decision depends on."""

    amount: Nano
    matured: Nano
    withdrawn_before: Nano
    """Earlier withdrawals that were paid or may still be."""
    bad_standing: str | None
    """Why the operator is not in good standing."""
    address_usable_at: datetime | None
    """End of its cooling time; None: the person's address book does not have it."""
    now: datetime
    minimum: Nano
    withdrawal_max: Nano | None
    """What the person's KYC tier lets out at once; None: no limit."""
    total_max: Nano | None
    """The same of all withdrawals together."""


@dataclass(frozen=True, slots=True)
class BrokenRule:
    """One reason why not, and what would help."""

    rule: str
    message: str
    remedy: str


def broken_rules(case: Case) -> tuple[BrokenRule, ...]:
    """Give every rule the withdrawal breaks; empty means it may be made."""
    kyc = kyc_rule(
        case.amount,
        case.withdrawn_before + case.amount,
        withdrawal_max=case.withdrawal_max,
        total_max=case.total_max,
    )
    found = (_minimum(case), _standing(case), kyc, _address(case), _earnings(case))
    return tuple(rule for rule in found if rule is not None)


def _minimum(case: Case) -> BrokenRule | None:
    if case.amount >= case.minimum:
        return None
    return BrokenRule(
        "minimum",
        f"${case.amount} is below the smallest withdrawal, ${case.minimum}",
        f"withdraw at least ${case.minimum}; what you have earned stays yours",
    )


def _standing(case: Case) -> BrokenRule | None:
    if case.bad_standing is None:
        return None
    return BrokenRule(
        "standing",
        f"this account is not in good standing: {case.bad_standing}",
        "answer the open case with support; withdrawals open again when it is settled",
    )


def kyc_rule(
    amount: Nano, total: Nano, *, withdrawal_max: Nano | None, total_max: Nano | None
) -> BrokenRule | None:
    """Which KYC limit `amount` breaks, being the last part of `total`."""
    remedy = "verify your identity once (POST /api/kyc/checks), then request again"
    if withdrawal_max is not None and amount > withdrawal_max:
        message = f"withdrawals over ${withdrawal_max} need a verified identity"
        return BrokenRule("kyc_withdrawal", message, remedy)
    if total_max is not None and total > total_max:
        message = f"withdrawals of ${total} in all, over ${total_max}, need a verified identity"
        return BrokenRule("kyc_cumulative", message, remedy)
    return None


def _address(case: Case) -> BrokenRule | None:
    if case.address_usable_at is None:
        return BrokenRule(
            "address_unknown",
            "the address is not in your address book",
            "add it (POST /api/payout-addresses, /api/bank-accounts) and wait for its cooling time",
        )
    if case.now < case.address_usable_at:
        when = case.address_usable_at.isoformat(timespec="seconds")
        return BrokenRule(
            "address_cooling",
            f"the address is new; it can be used from {when}",
            f"request again after {when}",
        )
    return None


def _earnings(case: Case) -> BrokenRule | None:
    if case.amount <= case.matured:
        return None
    return BrokenRule(
        "earnings",
        f"${case.amount} is more than your matured earnings, ${case.matured}",
        "withdraw less, or wait until newer earnings have matured",
    )
