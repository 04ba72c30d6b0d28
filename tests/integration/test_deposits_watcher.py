"""The watcher between a simulated chain and the real database."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import timedelta
from typing import NoReturn

import pytest
from deposits_parts import ESCROW, STRANGER, Bench, a_known_person, final, start
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import RpcUnavailable
from chain.networks import Chain
from chain.ports import BlockFacts, WatchSet
from chain.simulated import Movement, SimulatedChain
from chain.units import Micro
from marketplace.deposits import service
from marketplace.deposits import watcher as watcher_module
from marketplace.deposits.booking import ledger_refs, orphan
from marketplace.deposits.cursor import halt_chain, load_cursor, resume_chain, save_cursor
from marketplace.deposits.decisions import attribute_deposit, leave_deposit, open_cases, screen_sender
from marketplace.deposits.early import EarlyCredit, end_loans
from marketplace.deposits.errors import NoDecision, Superseded
from marketplace.deposits.explain import explain_transaction
from marketplace.deposits.routes import _changes
from marketplace.deposits.tables import (
    chain_cursors,
    chain_halts,
    chain_headers,
    deposit_addresses,
    deposit_intents,
    deposits,
    solana_pool,
    support_cases,
    sweeps,
    unsupported_deposits,
)
from marketplace.ledger import accounts, templates
from marketplace.ledger.errors import InsufficientFunds
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.platform.database import transaction


@pytest.fixture
def bench(engine: AsyncEngine) -> Bench:
    return Bench(engine, SimulatedChain(chain=Chain.BASE))


async def test_a_deposit_is_seen_then_credited_at_finality(bench: Bench) -> None:
    watcher = bench.a_watcher()
    await bench.settle(watcher)
    person, address = await bench.a_buyer()
    payment = bench.pays(address, 12)
    bench.node.mine(payment)
    await bench.settle(watcher)
    assert await bench.statuses() == {payment.tx: "seen"}
    assert await bench.buyer(person) == 0
    bench.node.mine()
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.statuses() == {payment.tx: "final"}
    assert await bench.buyer(person) == 12_000_000_000
    assert await bench.balance(accounts.unswept("base")) == -12_000_000_000
    await bench.books_hold()


async def test_catching_up_in_ranges_credits_without_having_seen(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = bench.a_watcher()
    await bench.settle(watcher)
    for _ in range(23):
        bench.node.mine(bench.pays(address, 5))
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.buyer(person) == 23 * 5_000_000_000
    await bench.books_hold()


async def test_a14_reorg_drops_a_seen_deposit(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = bench.a_watcher()
    await bench.settle(watcher)
    lost = bench.pays(address, 9)
    bench.node.mine(lost)
    await bench.settle(watcher)
    bench.node.drop(1)
    bench.node.mine()
    bench.node.mine()
    await bench.settle(watcher)
    assert await bench.statuses() == {lost.tx: "orphaned"}
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.buyer(person) == 0
    await bench.books_hold()


async def test_a16_mined_again_in_another_block_is_one_credit(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = bench.a_watcher()
    await bench.settle(watcher)
    payment = bench.pays(address, 9)
    bench.node.mine(payment)
    await bench.settle(watcher)
    bench.node.drop(1)
    bench.node.mine()
    bench.node.mine(bench.pays(STRANGER, 1), payment)  # another block, another log index
    bench.node.finalize()
    await bench.settle(watcher)
    async with transaction(bench.engine) as conn:
        rows = await conn.execute(select(deposits.c.key, deposits.c.status))
        found = {row.key: row.status for row in rows}
    assert found == {f"{payment.tx}:0": "orphaned", f"{payment.tx}:1": "final"}
    assert await bench.buyer(person) == 9_000_000_000
    await bench.books_hold()


async def test_a15_finality_violated_halts_the_chain_until_resumed(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = bench.a_watcher()
    bench.node.mine()
    await bench.settle(watcher)
    bench.node.mine(bench.pays(address, 7))
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.buyer(person) == 7_000_000_000
    bench.node.drop(2)
    for _ in range(4):
        bench.node.mine(bench.pays(address, 100))
    bench.node.finalize()
    await bench.settle(watcher)
    async with transaction(bench.engine) as conn:
        cursor = await load_cursor(conn, Chain.BASE)
        assert cursor is not None
        assert cursor.halt is not None
        assert cursor.halt.by == "watcher"
    assert await bench.buyer(person) == 7_000_000_000
    assert not await bench.a_watcher().tick()
    async with transaction(bench.engine) as conn:
        await resume_chain(conn, Chain.BASE, actor="ann", reason="looked at it", now=bench.clock.now())
    await bench.settle(bench.a_watcher())  # the chain is still wrong: it halts again
    async with transaction(bench.engine) as conn:
        actions = list(await conn.scalars(select(chain_halts.c.action).order_by(chain_halts.c.id)))
    assert actions == ["halt", "resume", "halt"]
    assert await bench.buyer(person) == 7_000_000_000


async def test_a_person_can_halt_and_resume(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = bench.a_watcher()
    await bench.settle(watcher)
    async with transaction(bench.engine) as conn:
        await halt_chain(conn, Chain.BASE, actor="ann", reason="drill", now=bench.clock.now())
    bench.node.mine(bench.pays(address, 7))
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.buyer(person) == 0
    async with transaction(bench.engine) as conn:
        await resume_chain(conn, Chain.BASE, actor="ann", reason="drill over", now=bench.clock.now())
    await bench.settle(watcher)
    assert await bench.buyer(person) == 7_000_000_000


async def test_small_deposits_wait_until_their_sum_reaches_the_minimum(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    other, other_address = await bench.a_buyer()
    watcher = bench.a_watcher()
    await bench.settle(watcher)
    for usdc in (2, 2):
        bench.node.mine(bench.pays(address, usdc), bench.pays(other_address, 1))
        bench.node.finalize()
        await bench.settle(watcher)
        assert await bench.buyer(person) == 0
        assert set((await bench.statuses()).values()) == {"final"}
        await bench.books_hold()
    assert await bench.balance(accounts.unattributed("base")) == 6_000_000_000
    bench.node.mine(bench.pays(address, "999999"))
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.buyer(person) == 0
    bench.node.mine(bench.pays(address, "1"))
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.buyer(person) == 5_000_000_000
    assert await bench.buyer(other) == 0
    assert await bench.balance(accounts.unattributed("base")) == 2_000_000_000
    bench.node.mine(bench.pays(address, 1))  # the sum starts anew
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.buyer(person) == 5_000_000_000
    await bench.books_hold()


async def test_each_persons_waiting_sum_is_his_own_where_one_range_completes_several(bench: Bench) -> None:
    (ann, anns), (bob, bobs), (eve, eves) = [await bench.a_buyer() for _ in range(3)]
    watcher = bench.a_watcher()
    await bench.settle(watcher)
    bench.node.mine(bench.pays(anns, 3), bench.pays(bobs, 4), bench.pays(eves, 1))
    bench.node.finalize()
    await bench.settle(watcher)
    bench.node.mine(bench.pays(anns, 2), bench.pays(bobs, 2), bench.pays(eves, 3))
    bench.node.finalize()
    await bench.settle(watcher)
    credited = [await bench.buyer(person) for person in (ann, bob, eve)]
    assert credited == [5_000_000_000, 6_000_000_000, 0]
    assert await bench.balance(accounts.unattributed("base")) == 4_000_000_000
    async with bench.engine.connect() as conn:
        told = await conn.execute(text("SELECT person_id, payload ->> 'amount_micro' FROM notices"))
    assert {tuple(row) for row in told} == {(ann, "5000000"), (bob, "6000000")}
    await bench.books_hold()


async def test_a_sweep_moves_the_books_from_unswept_to_escrow(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = bench.a_watcher()
    await bench.settle(watcher)
    bench.node.mine(bench.pays(address, 20))
    bench.node.mine(bench.pays(ESCROW, 20, sender=address))
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.balance(accounts.unswept("base")) == 0
    assert await bench.balance(accounts.escrow("base")) == -20_000_000_000
    assert await bench.buyer(person) == 20_000_000_000
    assert await bench.cases() == []
    await bench.books_hold()


async def test_strangers_money_is_set_aside_with_a_case(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = bench.a_watcher()
    await bench.settle(watcher)
    async with transaction(bench.engine) as conn:
        retired = {"retired_at": bench.clock.now(), "retired_by": "ann", "retire_reason": "leaked"}
        await conn.execute(update(deposit_addresses).values(**retired))
    bench.node.mine(bench.pays(ESCROW, 3), bench.pays(address, 50))
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.buyer(person) == 0
    assert await bench.balance(accounts.unattributed("base")) == 53_000_000_000
    assert sorted(await bench.cases()) == ["no_reference", "retired_address"]
    await bench.books_hold()


async def test_a30_a_transfer_told_twice_in_one_answer_is_one_credit(bench: Bench) -> None:
    """A node's pages may overlap: what it repeats has the same key."""
    person, address = await bench.a_buyer()
    watcher = await start(bench)
    real = bench.node.blocks

    async def repeating(start: int, end: int, watch: WatchSet) -> list[BlockFacts]:
        return [replace(block, inbound=2 * block.inbound) for block in await real(start, end, watch)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SimulatedChain, "blocks", lambda _, *range_and_watch: repeating(*range_and_watch))
        bench.node.mine(bench.pays(address, 7), bench.pays(address, 2), bench.pays(ESCROW, 3))
        await bench.settle(watcher)
        await final(bench, watcher, bench.pays(ESCROW, 7, sender=address))
    assert await bench.buyer(person) == 7_000_000_000
    assert await bench.balance(accounts.unattributed("base")) == 5_000_000_000
    assert await bench.cases() == ["no_reference"]
    await bench.books_hold()


async def test_a18_cursor_from_an_old_backup_changes_nothing(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = bench.a_watcher()
    await bench.settle(watcher)
    async with transaction(bench.engine) as conn:
        old = (await conn.execute(select(chain_cursors))).one()
    bench.node.mine(bench.pays(address, 7), bench.pays(address, 2))
    bench.node.mine(bench.pays(ESCROW, 7, sender=address), bench.pays(ESCROW, 1))
    bench.node.finalize()
    await bench.settle(watcher)
    before = await _everything(bench.engine)
    async with transaction(bench.engine) as conn:
        await conn.execute(chain_headers.delete())
        await conn.execute(update(chain_cursors).values(**old._asdict()))
    await bench.settle(bench.a_watcher())
    assert await _everything(bench.engine) == before
    assert await bench.buyer(person) == 7_000_000_000  # the 2 that came after wait
    await bench.books_hold()


async def test_a05_zero_value_transfers_leave_no_row(bench: Bench) -> None:
    _, address = await bench.a_buyer()
    watcher = bench.a_watcher()
    await bench.settle(watcher)
    bench.node.mine(bench.pays(address, "0"), bench.pays(ESCROW, "0"))
    await bench.settle(watcher)
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.statuses() == {}
    assert await bench.cases() == []


async def test_an_escrow_that_was_funded_before_the_first_start_is_set_aside(bench: Bench) -> None:
    bench.node.mine(bench.pays(ESCROW, 1_000))
    bench.node.finalize()
    await bench.settle(bench.a_watcher())
    assert await bench.balance(accounts.unattributed("base")) == 1_000_000_000_000
    assert await bench.cases() == ["opening_balance"]
    await bench.books_hold()


async def test_a19_the_second_watcher_idles_and_takes_over(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    first, second = bench.a_watcher(), bench.a_watcher()
    stop_first, stop_second = asyncio.Event(), asyncio.Event()
    running_first = asyncio.create_task(first.run(stop_first))
    await _until(lambda: first._cursor is not None)
    running_second = asyncio.create_task(second.run(stop_second))
    bench.node.mine(bench.pays(address, 7))
    bench.node.finalize()
    await _until_async(lambda: bench.buyer(person), 7_000_000_000)
    await asyncio.sleep(0.2)
    assert second._cursor is None
    stop_first.set()
    await running_first
    bench.node.mine(bench.pays(address, 8))
    bench.node.finalize()
    await _until_async(lambda: bench.buyer(person), 15_000_000_000)
    assert second._cursor is not None
    stop_second.set()
    await running_second
    await bench.books_hold()


async def test_two_watchers_without_a_lock_still_credit_once(bench: Bench) -> None:
    """The lock is comfort; the compare-and-set and the unique keys are the safety."""
    person, address = await bench.a_buyer()
    rivals = [bench.a_watcher() for _ in range(3)]
    await bench.settle(rivals[0])
    for round_number in range(6):
        bench.node.mine(bench.pays(address, 5))
        bench.node.finalize(behind=round_number % 2)
        await asyncio.gather(*(rival.tick() for rival in rivals), return_exceptions=True)
    bench.node.finalize()
    for rival in rivals:
        await bench.settle(rival)
    assert await bench.buyer(person) == 30_000_000_000
    await bench.books_hold()


async def test_a19_a_cursor_that_another_moved_cannot_be_written(bench: Bench) -> None:
    await bench.settle(bench.a_watcher())
    async with transaction(bench.engine) as conn:
        cursor = await load_cursor(conn, Chain.BASE)
    assert cursor is not None
    bench.node.mine()
    bench.node.finalize()
    await bench.settle(bench.a_watcher())
    async with transaction(bench.engine) as conn:
        with pytest.raises(Superseded):
            await save_cursor(conn, cursor, cursor.window, head_height=9, now=bench.clock.now())
        assert (await conn.scalar(select(chain_cursors.c.final_height))) == 1


class Crash(Exception):
    """Stands for kill −9: nothing after it runs in this watcher."""


@pytest.mark.parametrize("dies_at", range(6))
async def test_a_watcher_killed_at_any_step_is_rebuilt_from_the_database(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    person, address = await bench.a_buyer()
    await bench.settle(bench.a_watcher())
    bench.node.mine(bench.pays(address, 3))
    bench.node.mine(bench.pays(address, 3), bench.pays(ESCROW, 2))
    bench.node.mine(bench.pays(ESCROW, 6, sender=address))
    bench.node.finalize()
    bench.node.mine(bench.pays(address, 4))
    steps = iter(range(1_000))

    def dying(name: str):
        real = getattr(__import__("marketplace.deposits.watcher", fromlist=[name]), name)

        async def step(*args, **kwargs):
            result = await real(*args, **kwargs)
            if next(steps) == dies_at:
                raise Crash
            return result

        return step

    with monkeypatch.context() as patched:
        for name in ("save_cursor", "look_up", "book_final", "record_seen"):
            patched.setattr(f"marketplace.deposits.watcher.{name}", dying(name))
        watcher = bench.a_watcher()
        with pytest.raises(Crash):
            await bench.settle(watcher)
    await bench.books_hold()
    bench.node.finalize()
    await bench.settle(bench.a_watcher())
    assert await bench.buyer(person) == 6_000_000_000
    assert await bench.balance(accounts.unattributed("base")) == 6_000_000_000  # a stranger's 2, a waiting 4
    await bench.books_hold()


async def test_an_answer_with_holes_or_another_final_block_credits_nothing(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = bench.a_watcher()
    await bench.settle(watcher)
    bench.node.mine(bench.pays(address, 7))
    bench.node.mine()
    bench.node.finalize()
    honest = bench.node.blocks
    watcher.reader = HidesTheFirst(bench.node)
    with pytest.raises(RpcUnavailable):
        await watcher.tick()
    assert await bench.buyer(person) == 0
    assert honest
    watcher.reader = bench.node
    await bench.settle(watcher)
    assert await bench.buyer(person) == 7_000_000_000


class HidesTheFirst(SimulatedChain):
    def __init__(self, node: SimulatedChain) -> None:
        super().__init__(node.chain, headers=node.headers, movements=node.movements)
        self.final_height = node.final_height

    async def blocks(self, start: int, end: int, watch: WatchSet) -> list[BlockFacts]:
        return self.facts(start, end, watch)[1:]


# Solana's shape: pool accounts, references, skipped slots.


async def test_solana_pay_pool_addresses_and_skipped_slots(engine: AsyncEngine) -> None:
    bench = Bench(engine, SimulatedChain(chain=Chain.SOLANA))
    person, rival, now = uuid.uuid4(), uuid.uuid4(), bench.clock.now()
    pool = [
        ("PoolOwner" + "1" * 30, "PoolAccount" + "1" * 30),
        ("PoolOwner" + "2" * 30, "PoolAccount" + "2" * 30),
    ]
    mine, theirs = "Reference" + "1" * 30, "Reference" + "2" * 30
    async with transaction(engine) as conn:
        for index, (owner, account) in enumerate(pool):
            await conn.execute(
                insert(solana_pool).values(pool_index=index, owner=owner, token_account=account, ready_at=now)
            )
        await conn.execute(
            insert(deposit_addresses).values(
                person_id=person,
                chain_family="solana",
                address=pool[0][0],
                watched=pool[0][1],
                pool_index=0,
                created_at=now,
            )
        )
        for reference, who in ((mine, person), (theirs, rival)):
            await conn.execute(
                insert(deposit_intents).values(
                    reference=reference, person_id=who, created_at=now, expires_at=now + timedelta(hours=1)
                )
            )
    watcher = bench.a_watcher()
    await bench.settle(watcher)
    bench.node.mine(Movement("sig1", ESCROW, STRANGER, 10_000_000, (mine,)), skip=3)
    bench.node.mine(Movement("sig2", pool[0][1], STRANGER, 20_000_000), skip=40)
    bench.node.mine(Movement("sig3", pool[1][1], STRANGER, 30_000_000))  # nobody's yet
    bench.node.mine(Movement("sig4", ESCROW, STRANGER, 40_000_000, (mine, theirs)))
    bench.node.mine(Movement("sig5", ESCROW, pool[0][1], 20_000_000), skip=17)  # a sweep
    await bench.settle(watcher)
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.buyer(person) == 30_000_000_000
    assert await bench.buyer(rival) == 0
    assert await bench.balance(accounts.unattributed("solana")) == 70_000_000_000
    assert await bench.balance(accounts.unswept("solana")) == -30_000_000_000
    assert await bench.balance(accounts.escrow("solana")) == -70_000_000_000
    assert sorted(await bench.cases()) == ["two_references", "unassigned_address"]


async def _everything(engine: AsyncEngine) -> list[object]:
    from marketplace.ledger.tables import balances, transfers

    async with transaction(engine) as conn:
        return [
            (await conn.execute(select(table).order_by(*table.primary_key.columns))).all()
            for table in (deposits, sweeps, support_cases, balances, transfers)
        ] + [await conn.scalar(select(func.count()).select_from(transfers))]


async def _until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def _until_async(read, expected: object) -> None:
    async with asyncio.timeout(10):
        while await read() != expected:
            await asyncio.sleep(0.01)


# Rules: what is never credited, what a person decides, what is lent.


async def test_a02_a_bridged_look_alike_is_a_row_and_a_case_and_no_credit(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = await start(bench)
    fake = replace(bench.pays(address, 90), token="0xd9aAEc86B65D86f6A7B5B1b0c42FFA531710b6CA")
    await final(bench, watcher, fake, bench.pays(address, 5))
    assert await bench.buyer(person) == 5_000_000_000
    assert await bench.cases() == ["unsupported_token"]
    async with transaction(bench.engine) as conn:
        row = (await conn.execute(select(unsupported_deposits))).one()
        said = await explain_transaction(conn, Chain.BASE, fake.tx, deposit_micro_min=5_000_000)
    assert (row.person_id, int(row.amount), row.to_address) == (person, 90_000_000, address)
    assert {s.verdict for s in said} == {"unsupported", "case"}
    await bench.books_hold()


async def test_a06_dust_waits_and_a_sweep_of_all_of_it_books_once(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = await start(bench)
    await final(bench, watcher, *(bench.pays(address, "1") for _ in range(500)))
    assert await bench.buyer(person) == 0
    assert await bench.balance(accounts.unattributed("base")) == 500_000
    assert await bench.cases() == []
    await bench.books_hold()


async def test_a08_new_code_behind_usdc_holds_every_deposit_until_acknowledged(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = await start(bench)
    await final(bench, watcher, bench.pays(address, 6))
    bench.node.code = "0xbad"
    await final(bench, watcher, bench.pays(address, 7))
    assert await bench.buyer(person) == 6_000_000_000
    async with transaction(bench.engine) as conn:
        cursor = await load_cursor(conn, Chain.BASE)
    assert cursor is not None
    assert cursor.halt is not None
    alarm = cursor.halt.reason.rpartition(" ")[2]
    assert alarm == "token-code:0xbad"
    await service.resume(bench.engine, bench.clock, Chain.BASE, actor="ann", reason="try")
    await bench.settle(watcher)
    assert await bench.buyer(person) == 6_000_000_000  # resumed without acknowledging: halted again
    await service.acknowledge_alarm(
        bench.engine, bench.clock, Chain.BASE, alarm, actor="ann", reason="read the new code"
    )
    await bench.settle(watcher)
    assert await bench.buyer(person) == 13_000_000_000
    await bench.books_hold()


async def test_a09_a_mint_is_credited_and_flagged(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = await start(bench)
    await final(bench, watcher, bench.pays(address, 8, sender="0x" + "0" * 40))
    assert await bench.buyer(person) == 8_000_000_000
    assert await bench.cases() == ["minted"]


async def test_a17_a_watcher_down_for_days_reads_every_block_once(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    await start(bench)
    for number in range(700):
        bench.node.mine(*([bench.pays(address, 5)] if number % 10 == 0 else []))
    bench.node.finalize()
    await bench.settle(bench.a_watcher())
    assert await bench.buyer(person) == 70 * 5_000_000_000
    async with transaction(bench.engine) as conn:
        cursor = await load_cursor(conn, Chain.BASE)
    assert cursor is not None
    assert cursor.window.final == bench.node.headers[-1]
    await bench.books_hold()


async def test_a20_money_from_a_screened_sender_waits_for_a_person(bench: Bench) -> None:
    person = await a_known_person(bench)
    _, address = await bench.a_buyer()
    watcher = await start(bench)
    async with transaction(bench.engine) as conn:
        await screen_sender(conn, STRANGER, actor="ann", reason="listed", now=bench.clock.now())
    await final(bench, watcher, bench.pays(address, 30))
    assert await bench.cases() == ["screened_sender"]
    assert await bench.balance(accounts.unattributed("base")) == 30_000_000_000
    async with transaction(bench.engine) as conn:
        (case,) = await open_cases(conn)
        give = {"actor": "ann", "reason": "cleared", "now": bench.clock.now()}
        with pytest.raises(NoDecision, match="no person"):
            await attribute_deposit(conn, Chain.BASE, case.key, uuid.uuid4(), **give)
        await attribute_deposit(conn, Chain.BASE, case.key, person, **give)
    assert await bench.buyer(person) == 30_000_000_000
    async with transaction(bench.engine) as conn:
        with pytest.raises(NoDecision, match="waits"):
            await attribute_deposit(conn, Chain.BASE, case.key, person, **give)
        assert await open_cases(conn) == []
    await bench.books_hold()


async def test_a_decision_to_leave_closes_the_case_and_moves_nothing(bench: Bench) -> None:
    watcher = await start(bench)
    await final(bench, watcher, bench.pays(ESCROW, 3))
    async with transaction(bench.engine) as conn:
        (case,) = await open_cases(conn)
        await leave_deposit(
            conn, Chain.BASE, case.key, actor="ann", reason="nobody asked", now=bench.clock.now()
        )
        assert await open_cases(conn) == []
        with pytest.raises(NoDecision):
            await leave_deposit(conn, Chain.BASE, "none", actor="a", reason="b", now=bench.clock.now())
    assert await bench.balance(accounts.unattributed("base")) == 3_000_000_000


CAPS = EarlyCredit(account_max=Micro(20_000_000), total_max=Micro(25_000_000))


async def test_early_credit_is_lent_within_both_caps_and_repaid_at_finality(bench: Bench) -> None:
    (ann, at), (bob, there) = await bench.a_buyer(), await bench.a_buyer()
    watcher = await start(bench, early=CAPS)
    bench.node.mine(bench.pays(at, 15), bench.pays(at, 6), bench.pays(at, 4), bench.pays(there, 11))
    await bench.settle(watcher)
    # 15 is lent; 6 would go over ann's 20; 4 is below the minimum; 11 would go over everybody's 25.
    assert (await bench.buyer(ann), await bench.buyer(bob)) == (15_000_000_000, 0)
    assert await bench.balance(accounts.EARLY_CREDIT) == -15_000_000_000
    bench.node.finalize()
    await bench.settle(watcher)
    assert (await bench.buyer(ann), await bench.buyer(bob)) == (21_000_000_000, 11_000_000_000)
    assert await bench.balance(accounts.EARLY_CREDIT) == 0
    assert await bench.cases() == []
    await bench.books_hold()


async def test_early_credit_is_called_in_when_a_reorg_takes_the_deposit(bench: Bench) -> None:
    ann, address = await bench.a_buyer()
    watcher = await start(bench, early=CAPS)
    lost = bench.pays(address, 15)
    bench.node.mine(lost)
    await bench.settle(watcher)
    assert await bench.buyer(ann) == 15_000_000_000
    bench.node.drop(1)
    bench.node.mine()
    bench.node.mine()
    await bench.settle(watcher)
    assert await bench.buyer(ann) == 0
    assert await bench.balance(accounts.EARLY_CREDIT) == 0
    assert await bench.cases() == ["early_credit_called_in"]
    bench.node.mine(lost)  # mined again: credited at finality, never lent twice
    await bench.settle(watcher)
    assert await bench.buyer(ann) == 0
    bench.node.finalize()
    await bench.settle(watcher)
    assert await bench.buyer(ann) == 15_000_000_000
    await bench.books_hold()


async def test_a_loan_ends_at_finality_even_if_more_than_it_was_spent(bench: Bench) -> None:
    (ann, at), (bob, there) = await bench.a_buyer(), await bench.a_buyer()
    watcher = await start(bench, early=CAPS)
    bench.node.mine(bench.pays(at, 15))
    await bench.settle(watcher)
    async with transaction(bench.engine) as conn:  # an older card payment is disputed
        await post_transfer(conn, templates.dispute(person=str(ann), amount=Nano(20_000_000_000), ref="dp"))
    await final(bench, watcher, bench.pays(there, 11))
    assert (await bench.buyer(ann), await bench.buyer(bob)) == (-5_000_000_000, 11_000_000_000)
    assert await bench.balance(accounts.EARLY_CREDIT) == 0
    await bench.books_hold()


async def test_what_the_ledger_refuses_halts_this_chain_and_ends_no_watcher(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, address = await bench.a_buyer()
    watcher = await start(bench)

    async def refused(*_: object, **__: object) -> NoReturn:
        raise InsufficientFunds("unattributed:base has 2.00 available", available_nano=2_000_000_000)

    with monkeypatch.context() as patch:
        patch.setattr(watcher_module, "book_final", refused)
        await final(bench, watcher, bench.pays(address, 10))
    async with transaction(bench.engine) as conn:
        cursor = await load_cursor(conn, Chain.BASE)
        assert cursor is not None
        assert cursor.halt is not None
        assert "2.00 available" in cursor.halt.reason
        assert [case.kind for case in await open_cases(conn)] == ["chain_halted"]
        await resume_chain(conn, Chain.BASE, actor="ann", reason="corrected", now=bench.clock.now())
    await bench.settle(watcher)
    assert await bench.buyer(ann) == 10_000_000_000


async def test_a06_lists_may_be_longer_than_a_statement_takes_arguments(bench: Bench) -> None:
    """PostgreSQL's protocol takes 32,767."""
    many, now = [f"0x{n}:0" for n in range(33_000)], bench.clock.now()
    async with transaction(bench.engine) as conn:
        assert len(await ledger_refs(conn, Chain.BASE, many)) == len(many)
        assert await orphan(conn, Chain.BASE, many, now) == 0
        assert await end_loans(conn, Chain.BASE, many, is_called_in=False, now=now) == []


@pytest.mark.slow
async def test_a06_more_dust_than_a_statement_takes_arguments(bench: Bench) -> None:
    """In one range, and waiting for the deposit that releases it."""
    (ann, at), (bob, there) = await bench.a_buyer(), await bench.a_buyer()
    watcher = await start(bench)
    dust = [bench.pays(at, "1") for _ in range(33_000)]
    await final(bench, watcher, *dust)
    await final(bench, watcher, bench.pays(at, 10), bench.pays(there, 50))
    assert (await bench.buyer(ann), await bench.buyer(bob)) == (10_033_000_000, 50_000_000_000)
    await bench.books_hold()


async def test_a06_dust_that_waits_costs_later_dust_nothing_but_a_sum(bench: Bench) -> None:
    """Read one by one (and locked, which the database writes down) it slowed every range with more of it."""
    ann, address = await bench.a_buyer()
    watcher = await start(bench)
    await final(bench, watcher, *(bench.pays(address, "1") for _ in range(200)))
    waiting = text("SELECT key, xmin::text, xmax::text FROM deposits WHERE amount_micro = 1 ORDER BY key")
    async with transaction(bench.engine) as conn:
        before = (await conn.execute(waiting)).all()
    await final(bench, watcher, bench.pays(address, "2"))
    async with transaction(bench.engine) as conn:
        assert (await conn.execute(waiting)).all() == before, "what waits was touched"
    await final(bench, watcher, bench.pays(address, 5))
    assert await bench.buyer(ann) == 5_000_202_000
    await bench.books_hold()


async def test_dust_for_nobody_asks_nobody(bench: Bench) -> None:
    watcher = await start(bench)
    await final(bench, watcher, *(bench.pays(ESCROW, "1") for _ in range(120)), bench.pays(ESCROW, 5_000))
    async with transaction(bench.engine) as conn:
        (case,) = await open_cases(conn)
    assert case.detail.startswith("5000.000000 USDC")
    assert await bench.balance(accounts.unattributed("base")) == 5_000_000_120_000
    await bench.books_hold()


async def test_nothing_is_lent_by_default(bench: Bench) -> None:
    ann, address = await bench.a_buyer()
    watcher = await start(bench)
    bench.node.mine(bench.pays(address, 15))
    await bench.settle(watcher)
    assert await bench.buyer(ann) == 0


async def test_every_state_is_explained(bench: Bench) -> None:
    _, address = await bench.a_buyer()

    async def verdicts(tx: str) -> list[str]:
        async with transaction(bench.engine) as conn:
            return [
                s.verdict
                for s in await explain_transaction(conn, Chain.BASE, tx, deposit_micro_min=5_000_000)
            ]

    assert await verdicts("0xnone") == ["unknown"]
    watcher = await start(bench)
    assert await verdicts("0xnone") == ["unknown"]
    lost, kept = bench.pays(address, 9), bench.pays(address, 8)
    bench.node.mine(lost)
    await bench.settle(watcher)
    assert await verdicts(lost.tx) == ["seen"]
    bench.node.drop(1)
    bench.node.mine()
    waits, stray = bench.pays(address, 1), bench.pays(ESCROW, 2)
    swept = bench.pays(ESCROW, 8, sender=address)
    await final(bench, watcher, kept, waits, stray, swept)
    assert await verdicts(lost.tx) == ["orphaned"]
    assert await verdicts(kept.tx) == ["credited"]
    assert await verdicts(waits.tx) == ["waiting"]
    assert await verdicts(stray.tx) == ["unattributed", "case"]
    assert await verdicts(swept.tx) == ["sweep"]
    await service.halt(bench.engine, bench.clock, Chain.BASE, actor="ann", reason="drill")
    assert await verdicts(kept.tx) == ["credited", "halted"]


async def test_the_status_stream_tells_each_change_once(bench: Bench) -> None:
    person, address = await bench.a_buyer()
    watcher = await start(bench)
    payment = bench.pays(address, 12)
    bench.node.mine(payment)
    await bench.settle(watcher)
    stream = _changes(bench.engine, bench.clock, person)
    first = await anext(stream)
    assert first.startswith("event: deposit\ndata: ")
    assert '"status":"seen"' in first
    bench.node.finalize()
    await bench.settle(watcher)
    second = await anext(stream)
    assert '"status":"final"' in second
    assert '"is_credited":true' in second
    await stream.aclose()
