"""One pure function per business event; nothing else builds a transfer.

A transfer takes `amount` from the debited account and gives it to the credited one; with
posted = credits − debits, an *asset* grows when it is debited.  So:

=====================  =======================  ======================  ==============================
event                  debit                    credit                  in words
=====================  =======================  ======================  ==============================
deposit                unswept:c                buyer                   more on addresses, owed to the buyer
deposit_direct         escrow:c                 buyer                   the same, straight into the multisig
deposit_unattributed   unswept:c or escrow:c    unattributed:c          we hold more, for whom is unknown
attribution            unattributed:c           buyer                   now we know
sweep                  escrow:c                 unswept:c               multisig has more, addresses less
withdrawal_planned     operator_earnings        payouts_in_flight:c     still owed, no longer spendable
payout_final           payouts_in_flight:c      escrow:c                owed no more, the multisig holds less
payout_failed          payouts_in_flight:c      operator_earnings       owed as earnings again
uncollectable          loss                     buyer                   we carry what the buyer cannot
coupon                 promo                    buyer                   a gift
refund                 platform_revenue:lane    buyer                   goodwill out of our own share
charge_refund          operator_earnings and    buyer                   a charge is taken back from both
                       platform_revenue:lane                            who had shared it
top_up                 stripe_pending           buyer                   a card payment
top_up_available       stripe_available         stripe_pending          Stripe released it
card_refund            buyer                    stripe_available        unspent credit goes back to the card
dispute                buyer                    stripe_available        the bank took it back, spent or not
dispute_won            stripe_available         buyer                   the bank gave it back
card_fee               fees                     stripe_…                Stripe kept it
sweep_fee              fees                     unswept:c               a relayer kept it on the way
early_credit           early_credit             buyer                   lent against a deposit not yet final
early_credit_repaid    buyer                    early_credit            the deposit is final: the loan ends
dust                   operator_earnings        platform_revenue:lane   what no token carries, at the end
reversal               original's credit        original's debit        undoes a transfer, wholly or in part
correction             any                      any                     a person's decision, with its reason
=====================  =======================  ======================  ==============================

`ref` is the business key: the same event always gives the same one, so that it can happen only once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from marketplace.ledger import accounts
from marketplace.ledger.accounts import PERMITTED, Account, TransferKind
from marketplace.ledger.errors import FlowForbidden
from marketplace.ledger.money import NANO_PER_MICRO, Nano

REF_CHARACTERS_MAX: Final = 300
NOTE_CHARACTERS_MAX: Final = 1000

ON_CHAIN: Final = frozenset(
    {
        TransferKind.DEPOSIT,
        TransferKind.DEPOSIT_DIRECT,
        TransferKind.DEPOSIT_UNATTRIBUTED,
        TransferKind.SWEEP,
        TransferKind.SWEEP_FEE,
        TransferKind.WITHDRAWAL_PLANNED,
        TransferKind.PAYOUT_FINAL,
        TransferKind.PAYOUT_FAILED,
    },
)
"""Kinds that mirror a token movement: whole micros only."""

LIFTING: Final = frozenset(
    {
        TransferKind.DISPUTE,
        TransferKind.REVERSAL,
        TransferKind.CORRECTION,
        TransferKind.EARLY_CREDIT_REPAID,
    },
)
"""Kinds that may leave the debited account below its floor, if they say so: the money is gone anyway."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A balanced movement between two accounts, not yet posted."""

    kind: TransferKind
    debit: Account
    credit: Account
    amount: Nano
    ref: str
    reverses: UUID | None = None
    note: str = ""
    lifts_floor: bool = False

    def __post_init__(self) -> None:
        if (self.debit.kind, self.credit.kind) not in PERMITTED[self.kind] or self.debit == self.credit:
            raise FlowForbidden(f"{self.kind} may not move money from {self.debit} to {self.credit}")
        if self.amount.n <= 0:
            raise ValueError(f"a transfer moves a positive amount, not {self.amount}")
        if self.kind in ON_CHAIN and self.amount.n % NANO_PER_MICRO:
            raise ValueError(f"{self.kind} mirrors a chain: whole micros only, not {self.amount}")
        if not 0 < len(self.ref) <= REF_CHARACTERS_MAX:
            raise ValueError(f"a business key has 1 to {REF_CHARACTERS_MAX} characters")
        if len(self.note) > NOTE_CHARACTERS_MAX:
            raise ValueError(f"a note has at most {NOTE_CHARACTERS_MAX} characters")
        if (self.reverses is None) == (self.kind is TransferKind.REVERSAL):
            raise ValueError("a reversal, and only a reversal, names what it reverses")
        if self.lifts_floor and self.kind not in LIFTING:
            raise FlowForbidden(f"{self.kind} may not break a floor")
        if self.kind is TransferKind.DUST and self.amount.n >= NANO_PER_MICRO:
            raise ValueError("a whole micro is no dust: it can be paid out")

    @property
    def input_hash(self) -> bytes:
        """SHA-256 over all inputs: what tells a replay from another event under the same key."""
        inputs = [
            self.kind.value,
            [self.debit.kind.value, self.debit.owner],
            [self.credit.kind.value, self.credit.owner],
            self.amount.n,
            self.ref,
            str(self.reverses or ""),
            self.note,
            *(["lifts_floor"] if self.lifts_floor else []),
        ]
        return hashlib.sha256(json.dumps(inputs, separators=(",", ":")).encode()).digest()


def deposit(*, chain: str, person: str, amount: Nano, ref: str) -> Transfer:
    """Book USDC that became final on a person's deposit address; `ref` = chain and key of the movement.

    >>> t = deposit(chain="base", person="ann", amount=Nano(5_000_000_000), ref="base:0xabc:3")
    >>> str(t.debit), str(t.credit), str(t.amount)
    ('unswept:base', 'buyer:ann', '5.00')
    """
    return Transfer(TransferKind.DEPOSIT, accounts.unswept(chain), accounts.buyer(person), amount, ref)


def deposit_direct(*, chain: str, person: str, amount: Nano, ref: str) -> Transfer:
    """Book USDC that was paid straight into the escrow (Solana Pay).

    >>> t = deposit_direct(chain="solana", person="ann", amount=Nano(1_000), ref="solana:5xyz:ata")
    >>> str(t.debit), str(t.credit)
    ('escrow:solana', 'buyer:ann')
    """
    return Transfer(TransferKind.DEPOSIT_DIRECT, accounts.escrow(chain), accounts.buyer(person), amount, ref)


def deposit_unattributed(*, chain: str, amount: Nano, ref: str, in_escrow: bool = True) -> Transfer:
    """Book USDC that arrived without saying for whom, in the escrow or on a deposit address.

    >>> t = deposit_unattributed(chain="solana", amount=Nano(1_000), ref="solana:5xyz:ata")
    >>> str(t.debit), str(t.credit)
    ('escrow:solana', 'unattributed:solana')
    """
    holder = accounts.escrow(chain) if in_escrow else accounts.unswept(chain)
    return Transfer(TransferKind.DEPOSIT_UNATTRIBUTED, holder, accounts.unattributed(chain), amount, ref)


def attribution(*, chain: str, person: str, amount: Nano, ref: str) -> Transfer:
    """Give an unattributed deposit to its owner; `ref` = the deposit's own.

    >>> t = attribution(chain="solana", person="ann", amount=Nano(1_000), ref="solana:5xyz:ata")
    >>> str(t.debit), str(t.credit)
    ('unattributed:solana', 'buyer:ann')
    """
    return Transfer(
        TransferKind.ATTRIBUTION, accounts.unattributed(chain), accounts.buyer(person), amount, ref
    )


def sweep(*, chain: str, amount: Nano, ref: str) -> Transfer:
    """Book a final movement from deposit addresses to the escrow; `ref` = chain and key of the movement.

    Both are assets, so the escrow is *debited*: its posted balance becomes more negative.

    >>> t = sweep(chain="base", amount=Nano(1_000), ref="base:0xdef:0")
    >>> str(t.debit), str(t.credit)
    ('escrow:base', 'unswept:base')
    """
    return Transfer(TransferKind.SWEEP, accounts.escrow(chain), accounts.unswept(chain), amount, ref)


def withdrawal_planned(*, chain: str, person: str, amount: Nano, ref: str) -> Transfer:
    """Move earnings into flight when a payout joins a settlement batch; `ref` = the payout's id.

    >>> t = withdrawal_planned(chain="base", person="olga", amount=Nano(10_000_000_000), ref="payout-1")
    >>> str(t.debit), str(t.credit)
    ('operator_earnings:olga', 'payouts_in_flight:base')
    """
    source = accounts.operator_earnings(person)
    return Transfer(TransferKind.WITHDRAWAL_PLANNED, source, accounts.payouts_in_flight(chain), amount, ref)


def payout_final(*, chain: str, amount: Nano, ref: str) -> Transfer:
    """Book a payout that is final on chain; `ref` = the payout's id.

    >>> t = payout_final(chain="base", amount=Nano(10_000_000_000), ref="payout-1")
    >>> str(t.debit), str(t.credit)
    ('payouts_in_flight:base', 'escrow:base')
    """
    return Transfer(
        TransferKind.PAYOUT_FINAL, accounts.payouts_in_flight(chain), accounts.escrow(chain), amount, ref
    )


def payout_failed(*, chain: str, person: str, amount: Nano, ref: str) -> Transfer:
    """Give a payout that can never land back to the operator; `ref` = the payout's id.

    >>> t = payout_failed(chain="base", person="olga", amount=Nano(10_000_000_000), ref="payout-1")
    >>> str(t.debit), str(t.credit)
    ('payouts_in_flight:base', 'operator_earnings:olga')
    """
    target = accounts.operator_earnings(person)
    return Transfer(TransferKind.PAYOUT_FAILED, accounts.payouts_in_flight(chain), target, amount, ref)


def uncollectable(*, person: str, amount: Nano, ref: str) -> Transfer:
    """Carry what a buyer owes beyond the floor; `ref` = the charge that went beyond.

    >>> t = uncollectable(person="ann", amount=Nano(7), ref="charge-1")
    >>> str(t.debit), str(t.credit)
    ('loss', 'buyer:ann')
    """
    return Transfer(TransferKind.UNCOLLECTABLE, accounts.LOSS, accounts.buyer(person), amount, ref)


def coupon(*, person: str, amount: Nano, ref: str) -> Transfer:
    """Credit a coupon; `ref` = coupon and person, so that each is redeemed once.

    >>> t = coupon(person="ann", amount=Nano(1_000_000_000), ref="WELCOME:ann")
    >>> str(t.debit), str(t.credit)
    ('promo', 'buyer:ann')
    """
    return Transfer(TransferKind.COUPON, accounts.PROMO, accounts.buyer(person), amount, ref)


def refund(*, person: str, lane: int, amount: Nano, ref: str, note: str = "") -> Transfer:
    """Give a buyer something back out of the platform's own revenue; `ref` = the case.

    >>> t = refund(person="ann", lane=0, amount=Nano(20), ref="case-1")
    >>> str(t.debit), str(t.credit)
    ('platform_revenue:0', 'buyer:ann')
    """
    source = accounts.platform_revenue(lane)
    return Transfer(TransferKind.REFUND, source, accounts.buyer(person), amount, ref, note=note)


def top_up(*, person: str, amount: Nano, ref: str) -> Transfer:
    """Credit a card payment; `ref` = the payment's id at Stripe.

    >>> t = top_up(person="ann", amount=Nano(5_000_000_000), ref="pi_1")
    >>> str(t.debit), str(t.credit)
    ('stripe_pending', 'buyer:ann')
    """
    return Transfer(TransferKind.TOP_UP, accounts.STRIPE_PENDING, accounts.buyer(person), amount, ref)


def top_up_available(*, amount: Nano, ref: str) -> Transfer:
    """Stripe moved a payment from pending to available; `ref` = the payment's id at Stripe.

    >>> t = top_up_available(amount=Nano(5_000_000_000), ref="pi_1")
    >>> str(t.debit), str(t.credit)
    ('stripe_available', 'stripe_pending')
    """
    return Transfer(
        TransferKind.TOP_UP_AVAILABLE, accounts.STRIPE_AVAILABLE, accounts.STRIPE_PENDING, amount, ref
    )


def charge_refund(
    *, person: str, operator: str, lane: int, earned: Nano, fee: Nano, ref: str, note: str = ""
) -> tuple[Transfer, ...]:
    """Take a charge back from both who had shared it; `ref` = the charge's id, so only once.

    One transfer per share, posted together (`refunds.refund_charge`); a share of zero has none.

    >>> one, two = charge_refund(
    ...     person="ann", operator="olga", lane=0, earned=Nano(80), fee=Nano(20), ref="charge-1")
    >>> str(one.debit), str(two.debit), str(two.credit)
    ('operator_earnings:olga', 'platform_revenue:0', 'buyer:ann')
    """
    buyer = accounts.buyer(person)
    parts = (
        (TransferKind.CHARGE_REFUND_OPERATOR, accounts.operator_earnings(operator), earned),
        (TransferKind.CHARGE_REFUND_PLATFORM, accounts.platform_revenue(lane), fee),
    )
    return tuple(
        Transfer(kind, source, buyer, part, ref, note=note) for kind, source, part in parts if part.n
    )


def card_refund(*, person: str, amount: Nano, ref: str) -> Transfer:
    """Send unspent credit back to the card it came from; `ref` = the refund's id at Stripe.

    >>> t = card_refund(person="ann", amount=Nano(5_000_000_000), ref="re_1")
    >>> str(t.debit), str(t.credit)
    ('buyer:ann', 'stripe_available')
    """
    return Transfer(TransferKind.CARD_REFUND, accounts.buyer(person), accounts.STRIPE_AVAILABLE, amount, ref)


def dispute(*, person: str, amount: Nano, ref: str) -> Transfer:
    """The bank took a card payment back: from the buyer, spent or not; `ref` = the dispute's id at Stripe.

    It breaks the buyer's floor where it must, and says so: the money has left already.

    >>> t = dispute(person="ann", amount=Nano(5_000_000_000), ref="dp_1")
    >>> str(t.debit), str(t.credit), t.lifts_floor
    ('buyer:ann', 'stripe_available', True)
    """
    return Transfer(
        TransferKind.DISPUTE,
        accounts.buyer(person),
        accounts.STRIPE_AVAILABLE,
        amount,
        ref,
        lifts_floor=True,
    )


def dispute_won(*, person: str, amount: Nano, ref: str) -> Transfer:
    """The bank decided for us and gave the money back; `ref` = the dispute's id, so only once.

    >>> t = dispute_won(person="ann", amount=Nano(5_000_000_000), ref="dp_1")
    >>> str(t.debit), str(t.credit)
    ('stripe_available', 'buyer:ann')
    """
    return Transfer(TransferKind.DISPUTE_WON, accounts.STRIPE_AVAILABLE, accounts.buyer(person), amount, ref)


def card_fee(*, amount: Nano, ref: str, is_pending: bool = False) -> Transfer:
    """Stripe kept a fee of a payment or a dispute; `ref` = the balance transaction's id at Stripe.

    >>> t = card_fee(amount=Nano(15_000_000_000), ref="txn_1")
    >>> str(t.debit), str(t.credit)
    ('fees', 'stripe_available')
    """
    source = accounts.STRIPE_PENDING if is_pending else accounts.STRIPE_AVAILABLE
    return Transfer(TransferKind.CARD_FEE, accounts.FEES, source, amount, ref)


def sweep_fee(*, chain: str, amount: Nano, ref: str) -> Transfer:
    """USDC that a relayer kept when a deposit address was swept; `ref` = chain and key of the movement.

    >>> t = sweep_fee(chain="base", amount=Nano(2_000), ref="base:0xdef:1")
    >>> str(t.debit), str(t.credit)
    ('fees', 'unswept:base')
    """
    return Transfer(TransferKind.SWEEP_FEE, accounts.FEES, accounts.unswept(chain), amount, ref)


def early_credit(*, person: str, amount: Nano, ref: str) -> Transfer:
    """Lend a buyer a deposit that is seen and not yet final; `ref` = the deposit's own.

    >>> t = early_credit(person="ann", amount=Nano(1_000), ref="ethereum:0xabc:3")
    >>> str(t.debit), str(t.credit)
    ('early_credit', 'buyer:ann')
    """
    return Transfer(TransferKind.EARLY_CREDIT, accounts.EARLY_CREDIT, accounts.buyer(person), amount, ref)


def early_credit_repaid(*, person: str, amount: Nano, ref: str) -> Transfer:
    """End the loan; `ref` = the deposit's own.  Post it right after the deposit, in one transaction.

    Whatever was spent meanwhile: a deposit that is final must be booked, one that never came is no money.

    >>> t = early_credit_repaid(person="ann", amount=Nano(1_000), ref="ethereum:0xabc:3")
    >>> str(t.debit), str(t.credit), t.lifts_floor
    ('buyer:ann', 'early_credit', True)
    """
    return Transfer(
        TransferKind.EARLY_CREDIT_REPAID,
        accounts.buyer(person),
        accounts.EARLY_CREDIT,
        amount,
        ref,
        lifts_floor=True,
    )


def dust(*, person: str, lane: int, amount: Nano, ref: str) -> Transfer:
    """Keep what no token can carry when an operator's account is closed; `ref` = the case.

    >>> t = dust(person="olga", lane=0, amount=Nano(999), ref="closed:olga")
    >>> str(t.debit), str(t.credit)
    ('operator_earnings:olga', 'platform_revenue:0')
    >>> dust(person="olga", lane=0, amount=Nano(1_000), ref="closed:olga")
    Traceback (most recent call last):
    ValueError: a whole micro is no dust: it can be paid out
    """
    source = accounts.operator_earnings(person)
    return Transfer(TransferKind.DUST, source, accounts.platform_revenue(lane), amount, ref)


def reversal(
    *, of: UUID, original: Transfer, amount: Nano, ref: str, note: str = "", lifts_floor: bool = False
) -> Transfer:
    """Undo a posted transfer, wholly or in part; posting refuses more than the original in total.

    `lifts_floor`: even if the money is spent already, as for a deposit that its chain took back.

    >>> paid = top_up(person="ann", amount=Nano(500), ref="pi_1")
    >>> t = reversal(of=UUID(int=1), original=paid, amount=Nano(200), ref="dispute-1")
    >>> str(t.debit), str(t.credit), str(t.amount)
    ('buyer:ann', 'stripe_pending', '0.0000002')
    """
    return Transfer(
        TransferKind.REVERSAL,
        original.credit,
        original.debit,
        amount,
        ref,
        reverses=of,
        note=note,
        lifts_floor=lifts_floor,
    )


def correction(
    *, debit: Account, credit: Account, amount: Nano, ref: str, note: str, lifts_floor: bool = False
) -> Transfer:
    """Put right what no other event explains; `note` says why and who decided.

    >>> t = correction(debit=accounts.LOSS, credit=accounts.escrow("base"), amount=Nano(1_000),
    ...                ref="case-2", note="fee taken by the bridge; decided by treasury")
    >>> str(t.debit), str(t.credit)
    ('loss', 'escrow:base')
    """
    if not note:
        raise ValueError("a correction says why")
    return Transfer(TransferKind.CORRECTION, debit, credit, amount, ref, note=note, lifts_floor=lifts_floor)
