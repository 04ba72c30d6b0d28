from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from marketplace.ledger import accounts, templates
from marketplace.ledger.accounts import ASSETS, PERMITTED, Account, Kind, TransferKind
from marketplace.ledger.errors import FlowForbidden
from marketplace.ledger.money import Nano
from marketplace.ledger.templates import Transfer


def an_account(kind: Kind) -> Account:
    owner = "base" if kind in accounts.OWNED_BY_CHAIN else "somebody"
    return Account(kind, owner)


def test_only_flows_of_the_routing_table_can_be_built():
    for kind in TransferKind:
        if kind in {TransferKind.CORRECTION, TransferKind.REVERSAL}:
            continue
        for debit in Kind:
            for credit in Kind:
                if (debit, credit) not in PERMITTED[kind]:
                    with pytest.raises(FlowForbidden):
                        Transfer(kind, an_account(debit), an_account(credit), Nano(1_000), "ref")


def test_every_kind_of_transfer_is_in_the_routing_table():
    assert set(PERMITTED) == set(TransferKind)


def test_buyers_money_never_turns_into_earnings_but_by_a_charge():
    for kind, flows in PERMITTED.items():
        if kind not in {TransferKind.CORRECTION, TransferKind.REVERSAL}:
            assert (Kind.BUYER, Kind.OPERATOR_EARNINGS) not in flows
            assert not any(debit in ASSETS and credit is Kind.OPERATOR_EARNINGS for debit, credit in flows)


@pytest.mark.parametrize("amount", [0, -1_000, 1, 1_001])
def test_chain_facing_amounts_are_positive_whole_micros(amount):
    with pytest.raises(ValueError):
        templates.deposit(chain="base", person="ann", amount=Nano(amount), ref="r")


@pytest.mark.parametrize(
    "build",
    [
        lambda: templates.deposit(chain="dogecoin", person="ann", amount=Nano(1_000), ref="r"),
        lambda: templates.deposit(chain="base", person="", amount=Nano(1_000), ref="r"),
        lambda: templates.deposit(chain="base", person="a" * 101, amount=Nano(1_000), ref="r"),
        lambda: templates.deposit(chain="base", person="ann", amount=Nano(1_000), ref=""),
        lambda: templates.deposit(chain="base", person="ann", amount=Nano(1_000), ref="r" * 301),
        lambda: templates.correction(
            debit=accounts.LOSS, credit=accounts.PROMO, amount=Nano(1), ref="r", note=""
        ),
        lambda: Transfer(TransferKind.COUPON, accounts.PROMO, accounts.buyer("a"), Nano(1), "r", UUID(int=1)),
    ],
)
def test_nonsense_is_refused(build):
    with pytest.raises(ValueError):
        build()


def test_the_input_hash_tells_any_two_inputs_apart():
    base = templates.refund(person="ann", lane=0, amount=Nano(5), ref="r", note="n")
    others = [
        replace(base, amount=Nano(6)),
        replace(base, ref="s"),
        replace(base, note="m"),
        replace(base, credit=accounts.buyer("bob")),
        replace(base, debit=accounts.platform_revenue(1)),
    ]
    assert len({transfer.input_hash for transfer in (base, *others)}) == 6
    assert replace(base).input_hash == base.input_hash
