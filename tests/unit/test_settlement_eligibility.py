"""The rules of a withdrawal, one by one and together."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from marketplace.ledger.money import Nano
from marketplace.settlement.eligibility import Case, broken_rules

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
MICRO = 1_000


def usd(cents: int) -> Nano:
    return Nano(cents * 10**7)


GOOD = Case(
    amount=usd(20_00),
    matured=usd(20_00),
    withdrawn_before=Nano(0),
    bad_standing=None,
    address_usable_at=NOW,
    now=NOW,
    minimum=usd(10_00),
    withdrawal_max=usd(500_00),
    total_max=usd(500_00),
)
RICH = replace(GOOD, matured=usd(10_000_00))


def rules(case: Case) -> list[str]:
    return [broken.rule for broken in broken_rules(case)]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (GOOD, []),
        (replace(GOOD, amount=usd(10_00)), []),
        (replace(GOOD, amount=Nano(usd(10_00).n - MICRO)), ["minimum"]),
        (replace(GOOD, amount=Nano(0), matured=Nano(0)), ["minimum"]),
        (replace(GOOD, amount=Nano(usd(20_00).n + MICRO)), ["earnings"]),
        (replace(GOOD, bad_standing="over-reporting"), ["standing"]),
        (replace(GOOD, address_usable_at=None), ["address_unknown"]),
        (replace(GOOD, address_usable_at=NOW + timedelta(microseconds=1)), ["address_cooling"]),
        (replace(RICH, amount=usd(500_00)), []),  # exactly $500.00 needs none
        (replace(RICH, amount=Nano(usd(500_00).n + MICRO)), ["kyc_withdrawal"]),
        (replace(RICH, amount=Nano(usd(500_00).n + MICRO), withdrawal_max=None, total_max=None), []),
        (replace(RICH, amount=usd(100_00), withdrawn_before=usd(400_00)), []),
        (replace(RICH, amount=usd(100_00), withdrawn_before=Nano(usd(400_00).n + MICRO)), ["kyc_cumulative"]),
        (replace(RICH, amount=usd(100_00), withdrawn_before=usd(9_000_00), total_max=None), []),
        (
            replace(GOOD, amount=usd(5_00), matured=usd(1_00), bad_standing="x", address_usable_at=None),
            ["minimum", "standing", "address_unknown", "earnings"],
        ),
    ],
)
def test_rules(case: Case, expected: list[str]) -> None:
    assert rules(case) == expected


def test_every_refusal_says_what_would_help() -> None:
    worst = replace(
        GOOD, amount=usd(5_00), matured=Nano(0), bad_standing="x", withdrawn_before=usd(500_00),
        address_usable_at=None,
    )  # fmt: skip
    broken = broken_rules(worst)
    assert len(broken) == 5
    assert all(rule.message and rule.remedy for rule in broken)
    assert "$10.00" in broken[0].message
