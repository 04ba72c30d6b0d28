"""The ledger on a real PostgreSQL against an independent model in plain dictionaries.

The model knows no SQL, no locks and none of the ledger's code but its value types; it says what every step
must answer and what every balance must be after it.  Steps are mostly right, often replayed, altered,
late or too much.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from marketplace.ledger import accounts, holds, leases, templates
from marketplace.ledger.accounts import TransferKind, ensure_account
from marketplace.ledger.charges import Charge
from marketplace.ledger.errors import InsufficientFunds, KeyReused, ReversalRefused
from marketplace.ledger.ids import uuid7
from marketplace.ledger.lease_book import Hold, Slice
from marketplace.ledger.money import Nano
from marketplace.ledger.poster import Poster
from marketplace.ledger.posting import find_transfer, post_transfer
from marketplace.ledger.reconcile import prove

BUYERS: Final = ("ann", "bob")
amounts = st.integers(1, 5_000)
buyers = st.sampled_from(BUYERS)


class Refused(Exception):
    """What the model says the ledger must refuse, by the name of its error."""


@dataclass
class Model:
    """Who has what, as anybody would write it down."""

    posted: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    held: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    floored: frozenset[str] = frozenset({*BUYERS, "olga"})
    transfers: dict[tuple[str, str], tuple[str, str, int]] = field(default_factory=dict)
    undone: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    charges: dict[UUID, tuple[str, int]] = field(default_factory=dict)
    leases: dict[UUID, tuple[str, int]] = field(default_factory=dict)
    holds: dict[UUID, tuple[str, int]] = field(default_factory=dict)

    def available(self, name: str) -> int:
        return self.posted[name] - self.held[name]

    def transfer(self, kind: str, ref: str, debit: str, credit: str, amount: int) -> bool:
        known = self.transfers.get((kind, ref))
        if known is not None:
            if known != (debit, credit, amount):
                raise Refused("KeyReused")
            return False
        if debit in self.floored and self.available(debit) < amount:
            raise Refused("InsufficientFunds")
        self.transfers[kind, ref] = (debit, credit, amount)
        self.posted[debit] -= amount
        self.posted[credit] += amount
        return True

    def reverse(self, ref: str, of: str, amount: int) -> bool:
        debit, credit, original = self.transfers["top_up", of]
        known = self.transfers.get(("reversal", ref))
        if known is not None:
            if known != (credit, debit, amount):
                raise Refused("KeyReused")
            return False
        if self.undone[of] + amount > original:
            raise Refused("ReversalRefused")
        done = self.transfer("reversal", ref, credit, debit, amount)
        self.undone[of] += amount
        return done

    def set_aside(self, name: str, amount: int) -> None:
        if self.available(name) < amount:
            raise Refused("InsufficientFunds")
        self.held[name] += amount

    def charge(self, identity: UUID, buyer: str, amount: int, lease: UUID | None, hold: int) -> bool:
        known = self.charges.get(identity)
        if known is not None:
            if known != (buyer, amount):
                raise Refused("KeyReused")
            return False
        before = self.available(buyer)
        if lease is not None and lease in self.leases:
            used = min(amount, hold, self.leases[lease][1])
            self.leases[lease] = (buyer, self.leases[lease][1] - used)
            self.held[buyer] -= used
        self.charges[identity] = (buyer, amount)
        fee = amount - amount * 80 // 100
        self.posted[buyer] -= amount
        self.posted["olga"] += amount - fee
        self.posted["revenue"] += fee
        missing = min(0, before) - self.available(buyer)
        if missing > 0:  # below zero by what no lease covered: the platform carries it
            self.posted[buyer] += missing
            self.posted["loss"] -= missing
        return True


class LedgerMachine(RuleBasedStateMachine):
    """Every step is taken by the ledger and by the model, and must end alike."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.engine: AsyncEngine = create_async_engine(self.url, poolclass=NullPool)
        self.model = Model()
        self.refs = 0
        self.open: list[Hold] = []
        self.past: list[tuple[Charge, Hold | None]] = []
        self.run(self.begin())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    async def begin(self) -> None:
        async with self.engine.begin() as conn:
            names = "charges, batches, transfers, leases, holds, overdrafts, usage_daily, rollup_marks"
            await conn.execute(text(f"TRUNCATE {names}, balances, accounts CASCADE"))
            self.ids = {name: await ensure_account(conn, accounts.buyer(name)) for name in BUYERS}
            self.ids["olga"] = await ensure_account(conn, accounts.operator_earnings("olga"))
        self.poster = Poster(self.engine, settle=lambda *_: None, lane=0)
        await self.poster.start()

    def teardown(self) -> None:
        self.run(self.poster.close())
        self.run(self.engine.dispose())
        self.loop.close()

    def both(self, work: Coroutine[Any, Any, Any], expected: Any) -> Any:
        """Run the ledger's step; `expected` is the model's answer, or its refusal's name."""
        try:
            answer = self.run(work)
        except (InsufficientFunds, KeyReused, ReversalRefused) as e:
            answer = type(e).__name__
        assert answer == expected
        return answer

    def say(self, step: Any, *values: Any) -> Any:
        try:
            return step(*values)
        except Refused as e:
            return str(e)

    async def post(self, transfer: templates.Transfer) -> bool:
        async with self.engine.begin() as conn:
            return await post_transfer(conn, transfer)

    @rule(buyer=buyers, amount=amounts, ref=st.integers(0, 6))
    def top_up(self, buyer: str, amount: int, ref: int) -> None:
        """Few refs: replays, and replays with another amount or buyer, are common."""
        expected = self.say(self.model.transfer, "top_up", str(ref), "stripe", buyer, amount)
        self.both(self.post(templates.top_up(person=buyer, amount=Nano(amount), ref=str(ref))), expected)

    @rule(again=st.data())
    def replay_a_top_up(self, again: st.DataObject) -> None:
        known = [(ref, to, n) for (kind, ref), (_, to, n) in self.model.transfers.items() if kind == "top_up"]
        if known:
            ref, buyer, amount = again.draw(st.sampled_from(sorted(known)))
            assert self.run(self.post(templates.top_up(person=buyer, amount=Nano(amount), ref=ref))) is False

    @rule(of=st.integers(0, 6), ref=st.integers(0, 4), amount=amounts)
    def reverse(self, of: int, ref: int, amount: int) -> None:
        original = self.model.transfers.get(("top_up", str(of)))
        if original is None:
            return
        stored = self.run(self._find(str(of)))
        transfer = templates.reversal(
            of=stored,
            original=templates.top_up(person=original[1], amount=Nano(original[2]), ref=str(of)),
            amount=Nano(amount),
            ref=f"{of}-{ref}",
        )
        self.both(self.post(transfer), self.say(self.model.reverse, f"{of}-{ref}", str(of), amount))

    async def _find(self, ref: str) -> UUID:
        async with self.engine.connect() as conn:
            found = await find_transfer(conn, TransferKind.TOP_UP, ref)
        assert found is not None
        return found.id

    @rule(buyer=buyers, amount=amounts)
    def hold(self, buyer: str, amount: int) -> None:
        async def act() -> None:
            async with self.engine.begin() as conn:
                found = await holds.hold(conn, accounts.buyer(buyer), Nano(amount), reason="r")
            self.model.holds[found] = (buyer, amount)

        self.both(act(), self.say(self.model.set_aside, buyer, amount))

    @rule(which=st.integers(0, 5))
    def void(self, which: int) -> None:
        for hold_id in list(self.model.holds)[which : which + 1]:
            buyer, amount = self.model.holds.pop(hold_id)
            self.model.held[buyer] -= amount

            async def act(hold_id: UUID = hold_id) -> tuple[Nano | None, Nano | None]:
                async with self.engine.begin() as conn:
                    return await holds.release(conn, hold_id), await holds.release(conn, hold_id)

            assert self.run(act()) == (Nano(amount), None)

    @rule(buyer=buyers, amount=amounts)
    def lease(self, buyer: str, amount: int) -> None:
        async def act() -> None:
            async with self.engine.begin() as conn:
                found = await leases.lease(conn, self.ids[buyer], "w", Nano(amount))
            self.model.leases[found] = (buyer, amount)
            self.open.append(Hold(Slice(found, self.ids[buyer], 0, amount), amount))

        self.both(act(), self.say(self.model.set_aside, buyer, amount))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 3), relation=st.sampled_from([-1, 0, 1]), by=amounts)
    def charge(self, which: int, relation: int, by: int) -> None:
        """Less than the hold, all of it, or more."""
        hold = self.open.pop(which % len(self.open))
        cost = max(0, hold.amount_nano + relation * by)
        buyer = next(name for name in BUYERS if self.ids[name] == hold.buyer)
        fee = cost - cost * 80 // 100
        charge = Charge(
            id=uuid7(),
            buyer=hold.buyer,
            operator=self.ids["olga"],
            amount=Nano(cost),
            fee=Nano(fee),
            model="m",
        )
        expected = self.model.charge(charge.id, buyer, cost, hold.lease_id, hold.amount_nano)
        self.both(self.poster.post(charge, hold), expected)
        self.past.append((charge, hold))

    @precondition(lambda self: self.past)
    @rule(which=st.integers(0, 20), more=st.sampled_from([0, 0, 1]))
    def replay_a_charge(self, which: int, more: int) -> None:
        charge, _ = self.past[which % len(self.past)]
        altered = replace(charge, amount=Nano(charge.amount.n + more))
        buyer = next(name for name in BUYERS if self.ids[name] == charge.buyer)
        expected = self.say(self.model.charge, charge.id, buyer, altered.amount.n, None, 0)
        self.both(self.poster.post(altered), expected)

    @rule(which=st.integers(0, 3))
    def expire(self, which: int) -> None:
        """A lease runs out and is reaped; its hold stays in somebody's hands, and may still be charged."""
        for lease_id in list(self.model.leases)[which : which + 1]:
            buyer, left = self.model.leases.pop(lease_id)
            self.model.held[buyer] -= left

            async def act(lease_id: UUID = lease_id) -> int:
                late = text("UPDATE leases SET expires = now() - interval '1 minute' WHERE id = :id")
                async with self.engine.begin() as conn:
                    await conn.execute(late, {"id": lease_id})
                    return await leases.reap(conn)

            assert self.run(act()) == 1

    @invariant()
    def balances_are_the_models(self) -> None:
        async def read() -> dict[str, tuple[int, int]]:
            async with self.engine.connect() as conn:
                rows = await conn.execute(
                    text("SELECT kind, owner, posted, held FROM accounts JOIN balances ON account_id = id")
                )
            names = {"stripe_pending": "stripe", "loss": "loss", "platform_revenue": "revenue"}
            return {names.get(row.kind, row.owner): (row.posted, row.held) for row in rows}

        for name, (posted, held) in self.run(read()).items():
            assert (name, posted, held) == (name, self.model.posted[name], self.model.held[name])
        assert sum(self.model.posted.values()) == 0

    @rule()
    def prove_it(self) -> None:
        async def broken() -> list[str]:
            async with self.engine.connect() as conn:
                return [check.name async for check in prove(conn) if not check.ok]

        assert self.run(broken()) == []


def test_the_ledger_does_what_a_plain_model_says(database_url: str) -> None:
    machine = type("Machine", (LedgerMachine,), {"url": database_url})
    few = settings(
        max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=few)


@pytest.fixture
def database_url(template_url: str) -> Any:
    """As the one in conftest, without an event loop: the machine runs its own."""
    from sqlalchemy import make_url

    from marketplace.platform import database

    url = make_url(template_url).set(database=f"machine_{uuid7().hex[-12:]}")
    rendered = url.render_as_string(hide_password=False)
    asyncio.run(database.create_database(rendered, template=make_url(template_url).database))
    yield rendered
    asyncio.run(database.drop_database(rendered))
