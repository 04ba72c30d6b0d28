"""What arrives for a frozen account waits for a person; what is credited is told in the same transaction."""

from __future__ import annotations

import uuid

import pytest
from deposits_parts import ESCROW, Bench, final, start
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.networks import Chain
from chain.simulated import SimulatedChain
from chain.units import Micro
from marketplace.deposits import booking
from marketplace.deposits.decisions import attribute_deposit, open_cases
from marketplace.deposits.early import EarlyCredit
from marketplace.deposits.errors import NoDecision
from marketplace.deposits.explain import explain_transaction
from marketplace.deposits.tables import deposits
from marketplace.ledger import accounts
from marketplace.notices.tables import notices
from marketplace.platform.database import transaction


@pytest.fixture
def bench(engine: AsyncEngine) -> Bench:
    return Bench(engine, SimulatedChain(chain=Chain.BASE))


async def a_person(bench: Bench) -> tuple[uuid.UUID, str]:
    person, address = await bench.a_buyer()
    async with transaction(bench.engine) as conn:
        await conn.execute(text("INSERT INTO people (id, display_name) VALUES (:id, 'x')"), {"id": person})
    return person, address


async def freeze(bench: Bench, person: uuid.UUID, *, is_frozen: bool = True) -> None:
    statement = "UPDATE people SET frozen_at = CASE WHEN :frozen THEN now() END WHERE id = :id"
    async with transaction(bench.engine) as conn:
        await conn.execute(text(statement), {"id": person, "frozen": is_frozen})


async def told(bench: Bench) -> list[tuple[uuid.UUID, dict[str, object]]]:
    async with transaction(bench.engine) as conn:
        rows = await conn.execute(select(notices).order_by(notices.c.id))
        return [(row.person_id, row.payload) for row in rows if row.kind == "deposit_credited"]


async def test_a_deposit_to_a_frozen_account_is_recorded_and_held_until_released(bench: Bench) -> None:
    ann, address = await a_person(bench)
    bob, there = await a_person(bench)
    watcher = await start(bench)
    await final(bench, watcher, bench.pays(address, 2))  # waits for the minimum, before the freeze
    await freeze(bench, ann)
    payment = bench.pays(address, 30)
    await final(bench, watcher, payment, bench.pays(there, 9))
    assert (await bench.buyer(ann), await bench.buyer(bob)) == (0, 9_000_000_000)
    assert await bench.balance(accounts.unattributed("base")) == 32_000_000_000
    assert await bench.cases() == ["frozen_account"]
    async with transaction(bench.engine) as conn:
        said = await explain_transaction(conn, Chain.BASE, payment.tx, deposit_micro_min=5_000_000)
        (case,) = await open_cases(conn)
        release = {"actor": "carol", "reason": "checked", "now": bench.clock.now()}
        with pytest.raises(NoDecision, match="unfreeze"):
            await attribute_deposit(conn, Chain.BASE, case.key, ann, **release)
    assert [s.verdict for s in said] == ["held", "case"]
    await bench.books_hold()

    await freeze(bench, ann, is_frozen=False)
    # Unfreezing alone releases nothing, nor does a deposit that reaches the minimum together with the 2.
    await final(bench, watcher, bench.pays(address, 3))
    assert await bench.buyer(ann) == 5_000_000_000
    async with transaction(bench.engine) as conn:
        await attribute_deposit(conn, Chain.BASE, case.key, ann, **release)
        assert await open_cases(conn) == []
        decision = (
            await conn.execute(
                text("SELECT actor, reason FROM deposit_decisions WHERE key = :k"), {"k": case.key}
            )
        ).one()
    assert tuple(decision) == ("carol", "checked")
    assert await bench.buyer(ann) == 35_000_000_000
    assert await bench.balance(accounts.unattributed("base")) == 0
    await bench.books_hold()


async def test_nothing_is_lent_to_a_frozen_account_and_a_loan_is_called_in(bench: Bench) -> None:
    ann, address = await a_person(bench)
    watcher = await start(bench, early=EarlyCredit(Micro(100_000_000), Micro(100_000_000)))
    bench.node.mine(bench.pays(address, 10))
    await bench.settle(watcher)
    assert await bench.buyer(ann) == 10_000_000_000
    await freeze(bench, ann)
    bench.node.mine(bench.pays(address, 20))
    await bench.settle(watcher)
    assert await bench.buyer(ann) == 10_000_000_000
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.buyer(ann) == 0
    assert await bench.balance(accounts.EARLY_CREDIT) == 0
    assert sorted(await bench.cases()) == ["early_credit_called_in", "frozen_account", "frozen_account"]
    await bench.books_hold()


async def test_a_held_deposit_can_be_orphaned_and_come_back(bench: Bench) -> None:
    """Held is said at finality, not before."""
    ann, address = await a_person(bench)
    await freeze(bench, ann)
    watcher = await start(bench)
    lost = bench.pays(address, 10)
    bench.node.mine(lost)
    await bench.settle(watcher)
    bench.node.drop(1)
    bench.node.mine()
    await freeze(bench, ann, is_frozen=False)
    await final(bench, watcher, lost)
    assert await bench.buyer(ann) == 10_000_000_000
    async with transaction(bench.engine) as conn:
        assert not await conn.scalar(select(deposits.c.is_held))


async def test_a_credit_is_told_once_per_person_with_its_sum(bench: Bench) -> None:
    ann, address = await a_person(bench)
    bob, there = await a_person(bench)
    watcher = await start(bench)
    small, large = bench.pays(address, 2), bench.pays(address, 4)
    await final(bench, watcher, small, bench.pays(there, 1))
    assert await told(bench) == []  # nothing was credited
    await final(bench, watcher, large, bench.pays(there, 5), bench.pays(ESCROW, 50))
    found = dict(await told(bench))
    assert found[ann] == {
        "chain": "base",
        "amount": "6.000000",
        "amount_micro": 6_000_000,
        "count": 2,
        "transactions": sorted([small.tx, large.tx]),
    }
    assert found[bob]["amount_micro"] == 6_000_000
    assert len(found) == 2
    await bench.settle(bench.a_watcher())  # a restart tells nothing again
    assert len(await told(bench)) == 2


async def test_a_credit_and_its_notice_commit_together_or_not_at_all(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, address = await a_person(bench)
    watcher = await start(bench)

    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("killed after the notice")

    bench.node.mine(bench.pays(address, 10))
    bench.node.finalize()
    with monkeypatch.context() as patched:
        patched.setattr("marketplace.deposits.watcher.note_changes", fail)
        with pytest.raises(RuntimeError):
            await watcher.tick()
    assert (await bench.buyer(ann), await told(bench)) == (0, [])
    await bench.settle(watcher)
    assert await bench.buyer(ann) == 10_000_000_000
    assert len(await told(bench)) == 1


async def test_a_released_deposit_is_told_too(bench: Bench) -> None:
    ann, _ = await a_person(bench)
    watcher = await start(bench)
    await final(bench, watcher, bench.pays(ESCROW, 50))
    async with transaction(bench.engine) as conn:
        (case,) = await open_cases(conn)
        await attribute_deposit(
            conn, Chain.BASE, case.key, ann, actor="carol", reason="his", now=bench.clock.now()
        )
    ((person, payload),) = await told(bench)
    assert (person, payload["amount"]) == (ann, "50.000000")


def test_a_notice_names_so_many_transactions_at_most() -> None:
    assert booking.transaction_of("0xabc:7") == "0xabc"
    assert booking.TOLD_TRANSACTIONS_MAX * 90 < 20_000, "a notice's payload has at most 20,000 characters"
