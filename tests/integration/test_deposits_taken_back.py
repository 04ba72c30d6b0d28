"""A15 to its end: a chain takes back what was final, a person accepts it, the books follow and go on."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from deposits_parts import ESCROW, Bench, final, start
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.networks import Chain
from chain.simulated import Movement, SimulatedChain
from marketplace.deposits.cursor import load_cursor
from marketplace.deposits.decisions import attribute_deposit, open_cases
from marketplace.deposits.errors import HistoryRefused, NoDecision, NotHalted
from marketplace.deposits.explain import explain_transaction
from marketplace.deposits.recovery import Accepted, accept_history
from marketplace.deposits.tables import sweeps
from marketplace.deposits.watcher import Watcher
from marketplace.ledger import accounts, templates
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.notices.tables import notices
from marketplace.platform.database import transaction

DOLLAR = 1_000_000_000


@pytest.fixture
def bench(engine: AsyncEngine) -> Bench:
    return Bench(engine, SimulatedChain(chain=Chain.BASE))


async def a_person(bench: Bench) -> tuple[uuid.UUID, str]:
    person, address = await bench.a_buyer()
    async with transaction(bench.engine) as conn:
        await conn.execute(text("INSERT INTO people (id, display_name) VALUES (:id, 'x')"), {"id": person})
    return person, address


async def is_frozen(bench: Bench, person: uuid.UUID) -> bool:
    async with transaction(bench.engine) as conn:
        statement = text("SELECT frozen_at IS NOT NULL FROM people WHERE id = :id")
        return bool(await conn.scalar(statement, {"id": person}))


async def is_halted(bench: Bench) -> bool:
    async with transaction(bench.engine) as conn:
        cursor = await load_cursor(conn, bench.node.chain)
    assert cursor is not None
    return cursor.halt is not None


async def accept(bench: Bench, height: int, **changed: Any) -> Accepted:
    said: dict[str, Any] = {"from_height": height, "actor": "ann", "reason": "the network rolled back"}
    rules = bench.a_watcher().rules
    return await accept_history(bench.engine, bench.clock, bench.node, rules, **said | changed)


async def break_the_promise(
    bench: Bench, watcher: Watcher, depth: int, *blocks: tuple[Movement, ...]
) -> None:
    """Take back the newest `depth` blocks, all final; then these, and enough to be noticed."""
    bench.node.drop(depth)
    for movements in blocks:
        bench.node.mine(*movements)
    for _ in range(depth):
        bench.node.mine()
    bench.node.finalize()
    await bench.settle(watcher)
    assert await is_halted(bench)
    async with transaction(bench.engine) as conn:
        assert [case.kind for case in await open_cases(conn)].count("chain_halted") == 1


async def test_a15_a_spent_deposit_that_was_taken_back_leaves_its_buyer_frozen_below_zero(
    bench: Bench,
) -> None:
    ann, annes = await a_person(bench)
    bob, bobs = await a_person(bench)
    watcher = await start(bench)
    await final(bench, watcher, bench.pays(annes, 6))
    untouched = bench.node.headers[-1].height
    lost, kept, again = bench.pays(annes, 7), bench.pays(bobs, 8), bench.pays(bobs, 20)
    await final(bench, watcher, kept, again, lost)
    async with transaction(bench.engine) as conn:
        spending = templates.correction(
            debit=accounts.buyer(str(ann)),
            credit=accounts.LOSS,
            amount=Nano(10 * DOLLAR),
            ref="spent",
            note="stands for what she bought",
        )
        assert await post_transfer(conn, spending)
    await break_the_promise(bench, watcher, 1, (), (kept,))

    accepted = await accept(bench, untouched)
    assert set(accepted.taken_back) == {f"{lost.tx}:2", f"{again.tx}:1"}
    assert (accepted.kept, accepted.frozen) == (1, (ann,))
    assert await bench.buyer(ann) == -4 * DOLLAR
    assert await bench.buyer(bob) == 8 * DOLLAR
    assert (await is_frozen(bench, ann), await is_frozen(bench, bob)) == (True, False)
    cases = await bench.cases()
    assert cases.count("deposit_taken_back") == 2
    assert {"chain_halted", "spent_before_taken_back"} <= set(cases)
    async with transaction(bench.engine) as conn:
        said = await explain_transaction(conn, Chain.BASE, lost.tx, deposit_micro_min=1)
        told = (await conn.execute(select(notices).where(notices.c.kind == "deposit_taken_back"))).all()
    assert {"orphaned", "taken back"} <= {one.verdict for one in said}
    assert {(row.person_id, row.payload["amount"]) for row in told} == {(ann, "7.000000"), (bob, "20.000000")}
    await bench.books_hold()

    async with transaction(bench.engine) as conn:
        assert "chain_halted" not in {case.kind for case in await open_cases(conn)}

    # The chain goes on, and what was taken back comes again under the same key: credited once more, once.
    assert not await is_halted(bench)
    await bench.settle(watcher)
    bench.node.mine(bench.pays(ESCROW, 1), again)
    bench.node.finalize()
    await bench.settle(watcher)
    await bench.settle(bench.a_watcher())
    assert await bench.buyer(bob) == 28 * DOLLAR
    await bench.books_hold()


async def test_what_waited_was_decided_or_swept_is_taken_back_too(bench: Bench) -> None:
    ann, annes = await a_person(bench)
    watcher = await start(bench)
    untouched = bench.node.headers[-1].height
    small, stranger, large = bench.pays(annes, 1), bench.pays(ESCROW, 9), bench.pays(annes, 30)
    await final(bench, watcher, small, stranger)
    async with transaction(bench.engine) as conn:
        decision = {"actor": "carol", "reason": "showed the receipt", "now": bench.clock.now()}
        await attribute_deposit(conn, Chain.BASE, f"{stranger.tx}:1", ann, **decision)
    await final(bench, watcher, large)
    swept = Movement("0xsweep", ESCROW, annes, 31_000_000)
    await final(bench, watcher, swept)
    assert await bench.buyer(ann) == 40 * DOLLAR
    await break_the_promise(bench, watcher, 3)

    accepted = await accept(bench, untouched)
    assert len(accepted.taken_back) == 4
    assert await bench.buyer(ann) == 0
    assert not await is_frozen(bench, ann)
    for account in (accounts.escrow("base"), accounts.unswept("base"), accounts.unattributed("base")):
        assert await bench.balance(account) == 0
    await bench.books_hold()

    # All of it once more, in the same places: every entry needs a second key, the sweep's too.
    for movements in ((small, stranger), (large,), (swept,)):
        await final(bench, watcher, *movements)
    assert await bench.buyer(ann) == 31 * DOLLAR  # the stranger's 9 wait for a decision again
    async with transaction(bench.engine) as conn:
        assert list(await conn.scalars(select(sweeps.c.key))) == ["0xsweep:0"]
        assert f"{stranger.tx}:1#2" in {case.key for case in await open_cases(conn)}
        with pytest.raises(NoDecision):
            await attribute_deposit(conn, Chain.BASE, f"{stranger.tx}:1", ann, **decision)
        await attribute_deposit(conn, Chain.BASE, f"{stranger.tx}:1#2", ann, **decision)
    assert await bench.buyer(ann) == 40 * DOLLAR
    await bench.books_hold()

    # And taken back a second time.
    await break_the_promise(bench, watcher, 1)
    assert (await accept(bench, bench.node.headers[-3].height)).taken_back == ("0xsweep:0",)
    await bench.books_hold()


async def test_a_history_is_refused_where_the_books_cannot_go_back_to(bench: Bench) -> None:
    _, address = await a_person(bench)
    watcher = await start(bench)
    await final(bench, watcher, bench.pays(address, 6))
    await final(bench, watcher, bench.pays(address, 7))
    with pytest.raises(NotHalted):
        await accept(bench, 1)
    await break_the_promise(bench, watcher, 1)
    with pytest.raises(HistoryRefused, match="choose a block"):
        await accept(bench, -1)
    with pytest.raises(HistoryRefused, match="choose a block"):
        await accept(bench, bench.node.headers[-1].height + 5)
    with pytest.raises(HistoryRefused, match="choose a block"):
        await accept(bench, 2)  # where the books stand: the fork is there
    bench.node.drop(2)  # deeper still: below 1
    for _ in range(4):
        bench.node.mine()
    bench.node.finalize()
    with pytest.raises(HistoryRefused, match="goes below 1"):
        await accept(bench, 1)
    assert await is_halted(bench)
    assert len((await accept(bench, 0)).taken_back) == 2
    await bench.books_hold()


async def test_a_person_who_resumes_meanwhile_wins(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    person, address = await a_person(bench)
    watcher = await start(bench)
    await final(bench, watcher, bench.pays(address, 6))
    await break_the_promise(bench, watcher, 1)
    real = SimulatedChain.blocks

    async def blocks(self: SimulatedChain, *range_and_watch: Any) -> Any:
        async with transaction(bench.engine) as conn:
            await conn.execute(text("UPDATE chain_cursors SET version = version + 1"))
        return await real(self, *range_and_watch)

    monkeypatch.setattr(SimulatedChain, "blocks", blocks)
    with pytest.raises(NotHalted):
        await accept(bench, 0)
    assert await bench.buyer(person) == 6 * DOLLAR
