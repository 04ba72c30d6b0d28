"""The chart of accounts, and which kinds may face each other.

posted = credits − debits.  What we owe is positive (buyer, operator_earnings, payouts_in_flight,
unattributed, platform_revenue); what we have is negative (escrow, unswept, stripe); what we gave up
(promo, loss, fees) and lent (early_credit) is negative too.  All balances together are zero.

An account is named by its kind and owner; the number it gets is for rows, not for people.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger.errors import UnknownAccount
from marketplace.ledger.money import Nano
from marketplace.ledger.tables import accounts, balances

OWNER_CHARACTERS_MAX: Final = 100
CHAINS: Final = frozenset({"ethereum", "base", "solana"})
THE_PLATFORM: Final = ""
"""Owner of the accounts that exist once."""


class Kind(StrEnum):
    """What an account stands for; the comment says who its owner is."""

    BUYER = "buyer"  # person id
    OPERATOR_EARNINGS = "operator_earnings"  # person id
    PAYOUTS_IN_FLIGHT = "payouts_in_flight"  # chain
    PLATFORM_REVENUE = "platform_revenue"  # poster lane
    UNSWEPT = "unswept"  # chain: USDC on deposit addresses
    ESCROW = "escrow"  # chain: USDC in the multisig
    UNATTRIBUTED = "unattributed"  # chain: received, owner not known yet
    STRIPE_PENDING = "stripe_pending"
    STRIPE_AVAILABLE = "stripe_available"
    PROMO = "promo"
    LOSS = "loss"
    EARLY_CREDIT = "early_credit"
    FEES = "fees"  # what card and chain services kept of money on its way


OWNED_BY_CHAIN: Final = frozenset({Kind.PAYOUTS_IN_FLIGHT, Kind.UNSWEPT, Kind.ESCROW, Kind.UNATTRIBUTED})
OWNED_BY_PERSON: Final = frozenset({Kind.BUYER, Kind.OPERATOR_EARNINGS})
ASSETS: Final = frozenset({Kind.UNSWEPT, Kind.ESCROW, Kind.STRIPE_PENDING, Kind.STRIPE_AVAILABLE})
FLOORED: Final = frozenset(
    {Kind.BUYER, Kind.OPERATOR_EARNINGS, Kind.PAYOUTS_IN_FLIGHT, Kind.UNATTRIBUTED},
)
"""Kinds with a floor: their available amount falls below zero by permission only (see `overdrafts`)."""


@dataclass(frozen=True, slots=True, order=True)
class Account:
    """The name of a ledger position.

    >>> str(escrow("base"))
    'escrow:base'
    """

    kind: Kind
    owner: str

    def __post_init__(self) -> None:
        if len(self.owner) > OWNER_CHARACTERS_MAX:
            raise ValueError(f"an owner has at most {OWNER_CHARACTERS_MAX} characters")
        if self.kind in OWNED_BY_CHAIN and self.owner not in CHAINS:
            raise ValueError(f"{self.owner!r} is not a chain")
        if self.kind in OWNED_BY_PERSON and not self.owner:
            raise ValueError(f"{self.kind} belongs to somebody")

    def __str__(self) -> str:
        return f"{self.kind}:{self.owner}" if self.owner else str(self.kind)


def buyer(person: str) -> Account:
    return Account(Kind.BUYER, person)


def operator_earnings(person: str) -> Account:
    return Account(Kind.OPERATOR_EARNINGS, person)


def payouts_in_flight(chain: str) -> Account:
    return Account(Kind.PAYOUTS_IN_FLIGHT, chain)


def platform_revenue(lane: int) -> Account:
    return Account(Kind.PLATFORM_REVENUE, str(lane))


def unswept(chain: str) -> Account:
    return Account(Kind.UNSWEPT, chain)


def escrow(chain: str) -> Account:
    return Account(Kind.ESCROW, chain)


def unattributed(chain: str) -> Account:
    return Account(Kind.UNATTRIBUTED, chain)


STRIPE_PENDING: Final = Account(Kind.STRIPE_PENDING, THE_PLATFORM)
STRIPE_AVAILABLE: Final = Account(Kind.STRIPE_AVAILABLE, THE_PLATFORM)
PROMO: Final = Account(Kind.PROMO, THE_PLATFORM)
LOSS: Final = Account(Kind.LOSS, THE_PLATFORM)
EARLY_CREDIT: Final = Account(Kind.EARLY_CREDIT, THE_PLATFORM)
FEES: Final = Account(Kind.FEES, THE_PLATFORM)


class TransferKind(StrEnum):
    """One per business event; `templates` has the function that builds each."""

    DEPOSIT = "deposit"
    DEPOSIT_DIRECT = "deposit_direct"
    DEPOSIT_UNATTRIBUTED = "deposit_unattributed"
    ATTRIBUTION = "attribution"
    SWEEP = "sweep"
    WITHDRAWAL_PLANNED = "withdrawal_planned"
    PAYOUT_FINAL = "payout_final"
    PAYOUT_FAILED = "payout_failed"
    UNCOLLECTABLE = "uncollectable"
    COUPON = "coupon"
    REFUND = "refund"
    CHARGE_REFUND_OPERATOR = "charge_refund_operator"
    CHARGE_REFUND_PLATFORM = "charge_refund_platform"
    CARD_REFUND = "card_refund"
    DISPUTE = "dispute"
    DISPUTE_WON = "dispute_won"
    CARD_FEE = "card_fee"
    SWEEP_FEE = "sweep_fee"
    EARLY_CREDIT = "early_credit"
    EARLY_CREDIT_REPAID = "early_credit_repaid"
    DUST = "dust"
    TOP_UP = "top_up"
    TOP_UP_AVAILABLE = "top_up_available"
    REVERSAL = "reversal"
    CORRECTION = "correction"


CHARGE_REFUNDS: Final = frozenset({TransferKind.CHARGE_REFUND_OPERATOR, TransferKind.CHARGE_REFUND_PLATFORM})
"""What takes a charge's shares back; their `ref` is the charge's id."""

Flow = tuple[Kind, Kind]
"""(debited kind, credited kind)."""

PERMITTED: Final[Mapping[TransferKind, frozenset[Flow]]] = {
    TransferKind.DEPOSIT: frozenset({(Kind.UNSWEPT, Kind.BUYER)}),
    TransferKind.DEPOSIT_DIRECT: frozenset({(Kind.ESCROW, Kind.BUYER)}),
    TransferKind.DEPOSIT_UNATTRIBUTED: frozenset(
        {(Kind.UNSWEPT, Kind.UNATTRIBUTED), (Kind.ESCROW, Kind.UNATTRIBUTED)},
    ),
    TransferKind.ATTRIBUTION: frozenset({(Kind.UNATTRIBUTED, Kind.BUYER)}),
    TransferKind.SWEEP: frozenset({(Kind.ESCROW, Kind.UNSWEPT)}),
    TransferKind.WITHDRAWAL_PLANNED: frozenset({(Kind.OPERATOR_EARNINGS, Kind.PAYOUTS_IN_FLIGHT)}),
    TransferKind.PAYOUT_FINAL: frozenset({(Kind.PAYOUTS_IN_FLIGHT, Kind.ESCROW)}),
    TransferKind.PAYOUT_FAILED: frozenset({(Kind.PAYOUTS_IN_FLIGHT, Kind.OPERATOR_EARNINGS)}),
    TransferKind.UNCOLLECTABLE: frozenset({(Kind.LOSS, Kind.BUYER)}),
    TransferKind.COUPON: frozenset({(Kind.PROMO, Kind.BUYER)}),
    TransferKind.REFUND: frozenset({(Kind.PLATFORM_REVENUE, Kind.BUYER)}),
    TransferKind.CHARGE_REFUND_OPERATOR: frozenset({(Kind.OPERATOR_EARNINGS, Kind.BUYER)}),
    TransferKind.CHARGE_REFUND_PLATFORM: frozenset({(Kind.PLATFORM_REVENUE, Kind.BUYER)}),
    TransferKind.CARD_REFUND: frozenset({(Kind.BUYER, Kind.STRIPE_AVAILABLE)}),
    TransferKind.DISPUTE: frozenset({(Kind.BUYER, Kind.STRIPE_AVAILABLE)}),
    TransferKind.DISPUTE_WON: frozenset({(Kind.STRIPE_AVAILABLE, Kind.BUYER)}),
    TransferKind.CARD_FEE: frozenset({(Kind.FEES, Kind.STRIPE_AVAILABLE), (Kind.FEES, Kind.STRIPE_PENDING)}),
    TransferKind.SWEEP_FEE: frozenset({(Kind.FEES, Kind.UNSWEPT)}),
    TransferKind.EARLY_CREDIT: frozenset({(Kind.EARLY_CREDIT, Kind.BUYER)}),
    TransferKind.EARLY_CREDIT_REPAID: frozenset({(Kind.BUYER, Kind.EARLY_CREDIT)}),
    TransferKind.DUST: frozenset({(Kind.OPERATOR_EARNINGS, Kind.PLATFORM_REVENUE)}),
    TransferKind.TOP_UP: frozenset({(Kind.STRIPE_PENDING, Kind.BUYER)}),
    TransferKind.TOP_UP_AVAILABLE: frozenset({(Kind.STRIPE_AVAILABLE, Kind.STRIPE_PENDING)}),
    # A correction is a person's decision with a reason, and may face any two kinds; so may undoing something.
    TransferKind.REVERSAL: frozenset((d, c) for d in Kind for c in Kind),
    TransferKind.CORRECTION: frozenset((d, c) for d in Kind for c in Kind),
}


@dataclass(frozen=True, slots=True)
class Balance:
    """One account's money, in nano-dollars."""

    account_id: int
    posted: Nano
    held: Nano
    floor: Nano | None

    @property
    def available(self) -> Nano:
        """What can still be spent or held: posted − held; spending stops at zero, wherever the floor is."""
        return self.posted - self.held


_FIND_MANY: Final = text(
    """
    SELECT a.id, a.kind, a.owner FROM accounts a
    JOIN unnest(CAST(:kinds AS TEXT[]), CAST(:owners AS TEXT[])) AS w (kind, owner)
      ON a.kind = w.kind AND a.owner = w.owner""",
)
_CREATE_MANY: Final = text(
    """
    INSERT INTO accounts (kind, owner)
    SELECT kind, owner FROM unnest(CAST(:kinds AS TEXT[]), CAST(:owners AS TEXT[]))
        WITH ORDINALITY AS w (kind, owner, place) ORDER BY place
    ON CONFLICT DO NOTHING""",
)
_CREATE_BALANCES: Final = text(
    """
    INSERT INTO balances (account_id, posted, held, floor)
    SELECT id, 0, 0, floor FROM unnest(CAST(:ids AS BIGINT[]), CAST(:floors AS BIGINT[])) AS w (id, floor)
    ON CONFLICT DO NOTHING""",
)


async def ensure_account(conn: AsyncConnection, account: Account) -> int:
    """Give back the account's id, creating it (and its zero balance) if the ledger has none yet.

    A floor of zero is set for the kinds in `FLOORED`.  Safe to call from many processes at once.
    """
    return (await ensure_accounts(conn, [account]))[account]


async def ensure_accounts(conn: AsyncConnection, wanted: Iterable[Account]) -> dict[Account, int]:
    """`ensure_account` for many, in as few statements; creates in order, so never in a circle."""
    names = sorted(set(wanted))
    found = await _find_many(conn, names)
    missing = [name for name in names if name not in found]
    if missing:
        await conn.execute(_CREATE_MANY, _by_column(missing))
        found |= await _find_many(conn, missing)
        if len(found) < len(names):
            vanished = [str(name) for name in names if name not in found]
            raise UnknownAccount(f"{vanished} appeared and vanished")  # needs READ COMMITTED
        created = sorted((found[name], 0 if name.kind in FLOORED else None) for name in missing)
        ids, floors = zip(*created, strict=True)
        await conn.execute(_CREATE_BALANCES, {"ids": list(ids), "floors": list(floors)})
    return found


async def _find_many(conn: AsyncConnection, names: Sequence[Account]) -> dict[Account, int]:
    rows = await conn.execute(_FIND_MANY, _by_column(names))
    return {Account(Kind(row.kind), row.owner): int(row.id) for row in rows}


def _by_column(names: Sequence[Account]) -> dict[str, list[str]]:
    return {"kinds": [name.kind.value for name in names], "owners": [name.owner for name in names]}


async def find_account(conn: AsyncConnection, account: Account) -> int | None:
    """The account's id, or None if nothing was ever booked on it."""
    statement = select(accounts.c.id).where(
        accounts.c.kind == account.kind.value,
        accounts.c.owner == account.owner,
    )
    found = await conn.scalar(statement)
    return None if found is None else int(found)


async def read_balance(conn: AsyncConnection, account: Account) -> Balance | None:
    """The account's balance as of the last commit, or None if nothing was ever booked on it."""
    statement = (
        select(balances.c.account_id, balances.c.posted, balances.c.held, balances.c.floor)
        .join(accounts, accounts.c.id == balances.c.account_id)
        .where(accounts.c.kind == account.kind.value, accounts.c.owner == account.owner)
    )
    row = (await conn.execute(statement)).one_or_none()
    if row is None:
        return None
    floor = None if row.floor is None else Nano(row.floor)
    return Balance(row.account_id, Nano(row.posted), Nano(row.held), floor)


async def total_by_kind(conn: AsyncConnection) -> dict[Kind, Nano]:
    """Σ posted of every kind that has an account; all of them together are zero."""
    statement = (
        select(accounts.c.kind, func.sum(balances.c.posted))
        .join(accounts, accounts.c.id == balances.c.account_id)
        .group_by(accounts.c.kind)
    )
    return {Kind(kind): Nano(int(total)) for kind, total in await conn.execute(statement)}
