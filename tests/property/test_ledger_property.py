from __future__ import annotations

from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from marketplace.ledger.charges import Charge, CountedBy, extend_chain, pack, pack_sparse
from marketplace.ledger.lease_book import Hold, HoldState, LeaseBook
from marketplace.ledger.money import NANO_MAX, Nano, cost, dollars, from_micro, parse_dollars, split, to_micro

amounts = st.integers(0, NANO_MAX)
tokens = st.integers(0, 2**24)
prices = st.integers(0, 10**12)


@given(amounts)
def test_a_split_sums_to_the_whole_and_errs_by_less_than_a_nano(n):
    operator, platform = split(Nano(n))
    assert operator + platform == Nano(n)
    assert 0 <= n * 80 - operator.n * 100 < 100


@given(tokens, tokens, prices, prices)
def test_a_cost_is_rounded_up_by_less_than_a_nano(tokens_in, tokens_out, price_in, price_out):
    exact = tokens_in * price_in + tokens_out * price_out
    billed = cost(tokens_in=tokens_in, tokens_out=tokens_out, price_in=price_in, price_out=price_out)
    assert 0 <= billed.n * 10**6 - exact < 10**6


@given(tokens, st.integers(0, 10**6))
def test_prices_on_the_tenth_of_a_cent_grid_are_never_rounded(count, tenths):
    price = tenths * 1_000_000  # $0.001 per million tokens
    billed = cost(tokens_in=count, tokens_out=0, price_in=price, price_out=0)
    assert billed.n * 10**6 == count * price


@given(amounts)
def test_dust_and_micros_make_the_whole(n):
    micro, dust = to_micro(Nano(n))
    assert from_micro(micro) + dust == Nano(n)
    assert 0 <= dust.n < 1_000


@given(st.integers(-NANO_MAX, NANO_MAX))
def test_printed_dollars_parse_back(n):
    assert parse_dollars(dollars(Nano(n))) == Nano(n)


uuids = st.integers(0, 2**128 - 1).map(lambda n: UUID(int=n))
int4 = st.integers(0, 2**31 - 1)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@st.composite
def a_charge(draw):
    amount = draw(amounts)
    return Charge(
        id=draw(uuids),
        buyer=draw(amounts),
        operator=draw(amounts),
        amount=Nano(amount),
        fee=Nano(draw(st.integers(0, amount))),
        node=draw(uuids),
        model=draw(texts),
        key_id=draw(uuids),
        tok_in=draw(int4),
        tok_out=draw(int4),
        counted_by=draw(st.sampled_from(CountedBy)),
        price_version=draw(amounts),
        latency_ms=draw(int4),
        ttft_ms=draw(int4),
        status=draw(st.integers(100, 599)),
        finish=draw(texts),
        stream=draw(st.booleans()),
    )


@given(a_charge())
def test_the_fast_packing_is_the_plain_one(charge):
    assert pack(charge, 3, 2**40) == pack_sparse(charge, 3, 2**40)


@given(a_charge(), a_charge())
def test_different_rows_pack_differently_and_chain_differently(one, two):
    if one != two:
        assert pack(one, 0, 1) != pack(two, 0, 1)
        assert extend_chain(bytes(32), [pack(one, 0, 1)]) != extend_chain(bytes(32), [pack(two, 0, 1)])
    without = replace(one, ttft_ms=None, finish=None, node=None)
    assert pack(without, 0, 1) != pack(one, 0, 1)


class LeaseBookMachine(RuleBasedStateMachine):
    """The book against a plain model of the database: rows of leases, and what was spent."""

    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 0
        self.next_lease = 0
        self.book = LeaseBook(lambda: self.now_ns)
        self.rows: dict[UUID, int] = {}
        self.expires: dict[UUID, int] = {}
        self.open: list[Hold] = []

    @rule(buyer=st.integers(1, 2), amount=st.integers(1, 1_000), lifetime=st.integers(1, 100))
    def lease(self, buyer: int, amount: int, lifetime: int) -> None:
        if self.book.slice_of(buyer) is not None:
            return
        self.next_lease += 1
        lease_id, until = UUID(int=self.next_lease), self.now_ns + lifetime
        self.rows[lease_id], self.expires[lease_id] = amount, until
        self.book.add(lease_id, buyer=buyer, amount_nano=amount, usual_nano=100, usable_until_ns=until)

    @rule(buyer=st.integers(1, 2), amount=st.integers(1, 500))
    def grow(self, buyer: int, amount: int) -> None:
        part = self.book.slice_of(buyer)
        if part is not None:
            self.rows[part.lease_id] += amount
            self.expires[part.lease_id] = max(self.expires[part.lease_id], self.now_ns + 50)
            self.book.grow(part, amount_nano=amount, usual_nano=100, usable_until_ns=self.now_ns + 50)

    @rule(target=holds, buyer=st.integers(1, 3), amount=st.integers(-5, 800))
    def authorise(self, buyer: int, amount: int) -> Hold | None:
        hold = self.book.authorise(buyer, amount)
        if hold is not None:
            assert amount >= 0
            assert self.now_ns < self.expires[hold.lease_id]
            self.open.append(hold)
        return hold

    @rule(hold=holds, cost=st.integers(0, 1_000))
    def settle(self, hold: Hold | None, cost: int) -> None:
        """A charge that is posted, sometimes twice, sometimes after its lease was reaped."""
        if hold is None:
            return
        if hold.state is not HoldState.ENDED and hold.lease_id in self.rows:
            self.rows[hold.lease_id] -= min(cost, hold.amount_nano)
        self.book.settle(hold, cost)
        self.book.settle(hold, cost)
        self.open = [each for each in self.open if each is not hold]

    @rule(hold=holds)
    def release(self, hold: Hold | None) -> None:
        if hold is not None:
            self.book.release(hold)
            self.open = [each for each in self.open if each is not hold]

    @rule(steps=st.integers(1, 60))
    def wait(self, steps: int) -> None:
        self.now_ns += steps

    @rule()
    def reap(self) -> None:
        gone = {lease_id for lease_id, until in self.expires.items() if until < self.now_ns}
        for lease_id in gone:
            self.rows.pop(lease_id, None)
        self.book.drop(gone)

    @rule(buyer=st.integers(1, 2))
    def return_excess(self, buyer: int) -> None:
        part = self.book.slice_of(buyer)
        if part is not None:
            self.rows[part.lease_id] -= self.book.take_excess(part)

    @rule(buyer=st.integers(1, 2))
    def return_idle(self, buyer: int) -> None:
        part = self.book.take_out_idle(buyer, unused_since_ns=self.now_ns)
        if part is not None:
            assert self.rows.pop(part.lease_id) == part.free_nano
            assert not [hold for hold in self.open if hold.slice is part]

    @invariant()
    def open_holds_never_exceed_what_the_database_holds(self) -> None:
        for lease_id, amount in self.rows.items():
            held = sum(hold.amount_nano for hold in self.open if hold.lease_id == lease_id)
            assert 0 <= held <= amount

    @invariant()
    def free_and_reserved_are_the_row(self) -> None:
        for part in self.book:
            assert part.free_nano >= 0
            assert part.free_nano + part.reserved_nano == self.rows[part.lease_id]


LeaseBookMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLeaseBook = LeaseBookMachine.TestCase
