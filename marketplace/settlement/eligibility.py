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
kyc_address       nor does splitting into several accounts: the same sum, with what others whose tier is
                  limited withdrew to the same wallet or IBAN (A81)
address_unknown   the address is in the person's address book, in use
address_cooling   the address has been there for the cooling time (A43)
earnings          the amount is at most the matured earnings
================  ====================================================================================

The rule of the address is asked last, of a request that breaks no other: whoever has neither the address nor
the earnings learns nothing of what others withdrew to it.

Standing and KYC are asked again before the money leaves: both may have lapsed (`withdrawals.over_limit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from marketplace.ledger.money import Nano

_NOTHING: Final = Nano(0)
_VERIFY: Final = "verify your identity once (POST /api/kyc/checks), then request again"


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
    withdrawn_by_others: Nano = _NOTHING
    """What others whose tiers are limited withdrew to the same address."""


@dataclass(frozen=True, slots=True)
class BrokenRule:
    """One reason why not, and what would help."""

    rule: str
    message: str
    remedy: str


def broken_rules(case: Case) -> tuple[BrokenRule, ...]:
    """Give every rule the withdrawal breaks; empty means it may be made."""
    total = case.withdrawn_before + case.amount
    kyc = kyc_rule(case.amount, total, withdrawal_max=case.withdrawal_max, total_max=case.total_max)
    found = (_minimum(case), _standing(case), kyc, _address(case), _earnings(case))
    if any(found):
        return tuple(rule for rule in found if rule is not None)
    shared = kyc_address_rule(total + case.withdrawn_by_others, total_max=case.total_max)
    return () if shared is None else (shared,)


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
    if withdrawal_max is not None and amount > withdrawal_max:
        message = f"withdrawals over ${withdrawal_max} need a verified identity"
        return BrokenRule("kyc_withdrawal", message, _VERIFY)
    if total_max is not None and total > total_max:
        message = f"withdrawals of ${total} in all, over ${total_max}, need a verified identity"
        return BrokenRule("kyc_cumulative", message, _VERIFY)
    return None


def kyc_address_rule(total: Nano, *, total_max: Nano | None) -> BrokenRule | None:
    """Whether `total`, a person's and others' to one address, is over his limit; says nothing of theirs."""
    if total_max is None or total <= total_max:
        return None
    message = (
        f"withdrawals over ${total_max} in all, those of other accounts to the same address included, "
        "need a verified identity"
    )
    return BrokenRule("kyc_address", message, _VERIFY)


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
