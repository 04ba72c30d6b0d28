from __future__ import annotations

import doctest
import uuid
from dataclasses import replace

import pytest

from chain.networks import Chain
from chain.ports import TransferSeen
from chain.units import Micro
from marketplace.deposits import booking
from marketplace.deposits.attribution import (
    Attribution,
    Directory,
    Owner,
    Swept,
    ToPerson,
    Unattributed,
    attribute,
)

ANN, BOB = uuid.UUID(int=1), uuid.UUID(int=2)
DIRECTORY = Directory(
    escrow="escrow",
    owners={
        "anns": Owner(ANN, is_retired=False),
        "old": Owner(ANN, is_retired=True),
        "free": Owner(None, is_retired=False),
    },
    our_senders=frozenset({"anns"}),
    intents={"ref-ann": ANN, "ref-ann-2": ANN, "ref-bob": BOB},
)


def a_transfer(to: str, sender: str = "them", *references: str) -> TransferSeen:
    return TransferSeen(Chain.SOLANA, "tx:0", "tx", 1, "hash", to, sender, Micro(1), references)


@pytest.mark.parametrize(
    ("transfer", "expected"),
    [
        (a_transfer("anns"), ToPerson(ANN, None, is_direct=False)),
        (a_transfer("anns", "them", "ref-bob"), ToPerson(ANN, None, is_direct=False)),
        (a_transfer("old"), Unattributed("retired_address", is_direct=False)),
        (a_transfer("free"), Unattributed("unassigned_address", is_direct=False)),
        (a_transfer("unheard of"), Unattributed("unassigned_address", is_direct=False)),
        (a_transfer("escrow"), Unattributed("no_reference", is_direct=True)),
        (a_transfer("escrow", "them", "ref-nobody"), Unattributed("no_reference", is_direct=True)),
        (a_transfer("escrow", "them", "ref-ann"), ToPerson(ANN, "ref-ann", is_direct=True)),
        (a_transfer("escrow", "them", "ref-ann-2", "ref-ann"), ToPerson(ANN, "ref-ann", is_direct=True)),
        (a_transfer("escrow", "them", "ref-ann", "ref-bob"), Unattributed("two_references", is_direct=True)),
        (a_transfer("escrow", "anns"), Swept()),
        (a_transfer("escrow", "anns", "ref-bob"), Swept()),
    ],
)
def test_whose_money_it_is(transfer: TransferSeen, expected: Attribution) -> None:
    assert attribute(transfer, DIRECTORY) == expected


@pytest.mark.parametrize(("sender", "also"), [("listed", ()), ("them", ("x", "listed"))])
@pytest.mark.parametrize(("to", "is_direct"), [("anns", False), ("escrow", True)])
def test_a20_a_listed_sender_does_not_hide_behind_another(
    sender: str, also: tuple[str, ...], to: str, is_direct: bool
) -> None:
    transfer = replace(a_transfer(to, sender, "ref-ann"), also_sent=also)
    directory = replace(DIRECTORY, screened=frozenset({"listed"}))
    assert attribute(transfer, directory) == Unattributed("screened_sender", is_direct=is_direct)
    assert isinstance(attribute(transfer, DIRECTORY), ToPerson)


def test_doctests() -> None:
    result = doctest.testmod(booking)
    assert result.attempted
    assert not result.failed
