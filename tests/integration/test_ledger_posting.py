from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import accounts, holds, templates
from marketplace.ledger.accounts import Account, Kind, TransferKind, ensure_account, read_balance
from marketplace.ledger.errors import InsufficientFunds, KeyReused, ReversalRefused
from marketplace.ledger.ids import lowest_at
from marketplace.ledger.money import Nano
from marketplace.ledger.partitions import ensure_partitions
from marketplace.ledger.posting import find_transfer, post_transfer
from marketplace.ledger.tables import ledger_metadata

DOLLAR = 1_000_000_000


@pytest.fixture
def ledger_engine(engine: AsyncEngine) -> AsyncEngine:
    return engine


async def posted(engine: AsyncEngine, account: Account) -> int | None:
    async with engine.connect() as conn:
        balance = await read_balance(conn, account)
    return None if balance is None else balance.posted.n


async def test_a_deposit_is_posted_once_and_a_changed_replay_is_refused(ledger_engine):
    deposit = templates.deposit(chain="base", person="ann", amount=Nano(5 * DOLLAR), ref="base:0xabc:1")
    altered = templates.deposit(chain="base", person="ann", amount=Nano(6 * DOLLAR), ref="base:0xabc:1")
    other_owner = templates.deposit(chain="base", person="bob", amount=Nano(5 * DOLLAR), ref="base:0xabc:1")
    async with ledger_engine.begin() as conn:
        assert await post_transfer(conn, deposit) is True
    async with ledger_engine.begin() as conn:
        assert await post_transfer(conn, deposit) is False
        for wrong in (altered, other_owner):
            with pytest.raises(KeyReused):
                await post_transfer(conn, wrong)
    assert await posted(ledger_engine, accounts.buyer("ann")) == 5 * DOLLAR
    assert await posted(ledger_engine, accounts.unswept("base")) == -5 * DOLLAR
    assert await posted(ledger_engine, accounts.buyer("bob")) == 0


async def fund(engine: AsyncEngine, person: str, amount: int) -> None:
    async with engine.begin() as conn:
        await post_transfer(
            conn, templates.top_up(person=person, amount=Nano(amount), ref=f"top-up-{person}")
        )


async def earn(engine: AsyncEngine, person: str, amount: int) -> None:
    async with engine.begin() as conn:
        debit, credit = Account(Kind.PROMO, ""), accounts.operator_earnings(person)
        await post_transfer(
            conn,
            templates.correction(
                debit=debit, credit=credit, amount=Nano(amount), ref=f"earn-{person}", note="test"
            ),
        )


async def test_a_withdrawal_stays_owed_until_it_is_final_on_chain(ledger_engine):
    await earn(ledger_engine, "olga", 12 * DOLLAR)
    async with ledger_engine.begin() as conn:
        await post_transfer(
            conn, templates.deposit_direct(chain="base", person="ann", amount=Nano(20 * DOLLAR), ref="d1")
        )
    ten = Nano(10 * DOLLAR)
    async with ledger_engine.begin() as conn:
        held = await holds.hold(conn, accounts.operator_earnings("olga"), ten, reason="withdrawal-1")
    async with ledger_engine.begin() as conn:
        with pytest.raises(InsufficientFunds) as refused:
            await holds.hold(conn, accounts.operator_earnings("olga"), ten, reason="withdrawal-2")
    assert refused.value.available_nano == 2 * DOLLAR
    async with ledger_engine.begin() as conn:
        assert await holds.release(conn, held) == ten
        assert await holds.release(conn, held) is None
        await post_transfer(
            conn, templates.withdrawal_planned(chain="base", person="olga", amount=ten, ref="payout-1")
        )
    assert await posted(ledger_engine, accounts.payouts_in_flight("base")) == 10 * DOLLAR
    async with ledger_engine.begin() as conn:
        await post_transfer(conn, templates.payout_final(chain="base", amount=ten, ref="payout-1"))
    assert await posted(ledger_engine, accounts.payouts_in_flight("base")) == 0
    assert await posted(ledger_engine, accounts.escrow("base")) == -10 * DOLLAR
    assert await posted(ledger_engine, accounts.operator_earnings("olga")) == 2 * DOLLAR


async def test_a_refused_transfer_leaves_nothing_even_if_the_caller_goes_on(ledger_engine):
    await earn(ledger_engine, "olga", DOLLAR)
    too_much = templates.withdrawal_planned(chain="base", person="olga", amount=Nano(2 * DOLLAR), ref="p")
    async with ledger_engine.begin() as conn:
        with pytest.raises(InsufficientFunds):
            await post_transfer(conn, too_much)
    async with ledger_engine.connect() as conn:
        assert await find_transfer(conn, TransferKind.WITHDRAWAL_PLANNED, "p") is None
    assert await posted(ledger_engine, accounts.operator_earnings("olga")) == DOLLAR


async def test_parallel_transfers_of_the_whole_balance_let_one_through(ledger_engine):
    await earn(ledger_engine, "olga", 10 * DOLLAR)
    async with ledger_engine.begin() as conn:  # else the eight would queue on creating it
        await ensure_account(conn, accounts.payouts_in_flight("base"))

    async def withdraw(n: int) -> bool:
        planned = templates.withdrawal_planned(
            chain="base", person="olga", amount=Nano(10 * DOLLAR), ref=f"payout-{n}"
        )
        try:
            async with ledger_engine.begin() as conn:
                return await post_transfer(conn, planned)
        except InsufficientFunds:
            return False

    assert sum(await asyncio.gather(*(withdraw(n) for n in range(8)))) == 1
    assert await posted(ledger_engine, accounts.operator_earnings("olga")) == 0


async def test_the_same_deposit_posted_by_two_watchers_at_once_counts_once(ledger_engine):
    deposit = templates.deposit(chain="base", person="new", amount=Nano(DOLLAR), ref="base:0x1:0")

    async def post() -> bool:
        async with ledger_engine.begin() as conn:
            return await post_transfer(conn, deposit)

    assert sum(await asyncio.gather(*(post() for _ in range(6)))) == 1
    assert await posted(ledger_engine, accounts.buyer("new")) == DOLLAR


async def test_reversals_never_exceed_the_original_nor_undo_a_reversal(ledger_engine):
    top_up = templates.top_up(person="ann", amount=Nano(500), ref="pi_1")
    async with ledger_engine.begin() as conn:
        await post_transfer(conn, top_up)
        original = await find_transfer(conn, TransferKind.TOP_UP, "pi_1")
        assert original is not None
        first = templates.reversal(of=original.id, original=top_up, amount=Nano(300), ref="dispute-1")
        assert await post_transfer(conn, first) is True
        with pytest.raises(ReversalRefused):
            await post_transfer(
                conn, templates.reversal(of=original.id, original=top_up, amount=Nano(201), ref="dispute-2")
            )
        undone = await find_transfer(conn, TransferKind.REVERSAL, "dispute-1")
        assert undone is not None
        with pytest.raises(ReversalRefused):
            await post_transfer(
                conn, templates.reversal(of=undone.id, original=first, amount=Nano(1), ref="dispute-3")
            )
    assert await posted(ledger_engine, accounts.buyer("ann")) == 200


@pytest.mark.parametrize("table", ["transfers", "charges", "batches", "charges_2026_11", "charges_default"])
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET lane = 1", "TRUNCATE {}"])
async def test_the_application_cannot_rewrite_what_is_posted(ledger_engine, table, statement):
    async with ledger_engine.connect() as conn:
        assert await conn.scalar(text("SELECT current_user")) == "tollway_app"
        with pytest.raises(ProgrammingError, match="permission denied"):
            await conn.execute(text(statement.format(table).replace("lane = 1", _a_column(table))))


def _a_column(table: str) -> str:
    return "amount = 1" if table != "batches" else "sum = 1"


async def test_the_tables_in_python_are_the_tables_in_the_database(ledger_engine):
    def differences(connection: Connection) -> list[str]:
        found = inspect(connection)
        wrong = []
        for table in ledger_metadata.sorted_tables:
            stored = {c["name"]: c for c in found.get_columns(table.name)}
            if list(stored) != [c.name for c in table.columns]:
                wrong.append(f"{table.name}: {list(stored)}")
            wrong += [
                f"{table.name}.{c.name}"
                for c in table.columns
                if c.nullable != stored[c.name]["nullable"]
                or c.type.compile(connection.dialect) != stored[c.name]["type"].compile(connection.dialect)
            ]
        return wrong

    async with ledger_engine.connect() as conn:
        assert await conn.run_sync(differences) == []


async def test_month_partitions_exist_ahead_and_take_the_charges_of_their_month(ledger_engine):
    async with ledger_engine.begin() as conn:
        assert await ensure_partitions(conn) == 0
        assert await ensure_partitions(conn, months_ahead=14) == 2
        statement = text(
            "INSERT INTO charges VALUES ('019a0000-0000-7000-8000-000000000000', 1, NULL, 0, 0, NULL, 'm',"
            " NULL, 0, 0, 0, 0, 0, NULL, 503, NULL, 0, 1, false) RETURNING tableoid::regclass::text"
        )
        assert await conn.scalar(statement) == "charges_default"  # October 2025: before the first month
        november = text("SELECT tableoid::regclass::text FROM charges WHERE id = :id")
        await conn.execute(
            text(
                "INSERT INTO charges SELECT CAST(:id AS UUID), 1, NULL, 0, 0, NULL, 'm', NULL,"
                " 0, 0, 0, 0, 0, NULL, 503, NULL, 0, 1, false"
            ),
            {"id": lowest_at(datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC))},
        )
        identity = lowest_at(datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC))
        assert await conn.scalar(november, {"id": identity}) == "charges_2026_11"
