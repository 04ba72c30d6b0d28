"""Withdrawals to a bank: the same rules, two people, money only where there is some; one sanctions list."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.units import Micro
from marketplace import screening
from marketplace.deposits import decisions
from marketplace.deposits.directory import _screened
from marketplace.deposits.errors import NoDecision
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import templates
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfer
from marketplace.platform.database import transaction
from marketplace.settlement import bank, halts, sanctions, statement
from marketplace.settlement.bank import BadIban, BankWithdrawal, Status
from marketplace.settlement.errors import KeyReused, NotEligible, NotFound, WrongState
from tests.settlement_parts import LIMITS, Desk, a_person

IBAN = "GB82 WEST 1234 5698 7654 32"


@pytest.fixture
async def desk(engine: AsyncEngine) -> Desk:
    return Desk(engine)


async def account_of(desk: Desk, person: UUID, *, cooled: bool = True) -> UUID:
    async with transaction(desk.engine) as conn:
        added = await bank.add_account(
            conn, person=person, holder="Ann", iban=IBAN, cooling_s=3600,
            now=desk.clock.now() - timedelta(seconds=3600 if cooled else 0),
        )  # fmt: skip
    return added.id


async def requested(desk: Desk, person: UUID, account: UUID, dollars: int, key: str = "k") -> BankWithdrawal:
    async with transaction(desk.engine) as conn:
        made, _ = await bank.request(
            conn, person=person, account_id=account, amount=Micro(dollars * 10**6), key=key, limits=LIMITS,
            now=desk.clock.now(),
        )  # fmt: skip
    return made


async def released(desk: Desk, dollars: int) -> None:
    """Card money that Stripe has given us."""
    buyer = await a_person(desk.engine)
    async with transaction(desk.engine) as conn:
        amount = Nano(dollars * 10**9)
        await post_transfer(conn, templates.top_up(person=str(buyer), amount=amount, ref=f"pi_{buyer}"))
        await post_transfer(conn, templates.top_up_available(amount=amount, ref=f"po_{buyer}"))


async def act(desk: Desk, what: str, made: BankWithdrawal, **how: str) -> BankWithdrawal:
    async with transaction(desk.engine) as conn:
        done: BankWithdrawal = await getattr(bank, what)(conn, made.id, now=desk.clock.now(), **how)
    return done


async def test_from_request_to_the_banks_reference(desk: Desk) -> None:
    ann = await desk.operator(100)
    made = await requested(desk, ann, await account_of(desk, ann), 60)
    assert await desk.available(ann) == 40 * 10**9
    with pytest.raises(WrongState, match="requested"):
        await act(desk, "paid", made, actor="bo", reference="B-1")
    await act(desk, "approve", made, actor="ada", reason="known, in good standing")
    with pytest.raises(WrongState) as own:
        await act(desk, "paid", made, actor="ada", reference="B-1")
    assert own.value.code == "approver_may_not_pay"
    with pytest.raises(WrongState) as short:
        await act(desk, "paid", made, actor="bo", reference="B-1")
    assert short.value.code == "bank_short", "an escrow's USDC is not the bank's money (S4)"
    await released(desk, 60)
    for _ in range(2):  # reported twice, booked once
        paid = await act(desk, "paid", made, actor="bo", reference="B-1")
    assert (paid.status, paid.reference) == (Status.PAID, "B-1")
    assert await desk.posted(ledger_accounts.operator_earnings(str(ann))) == 40 * 10**9
    assert await desk.posted(ledger_accounts.STRIPE_AVAILABLE) == 0
    await desk.check()
    for what in ("refuse", "approve"):
        with pytest.raises(WrongState):
            await act(desk, what, made, actor="ada", reason="late")
    async with transaction(desk.engine) as conn:
        told = await conn.scalar(text("SELECT note FROM transfers WHERE ref = :r"), {"r": f"bank:{made.id}"})
        assert told == "bo: bank transfer B-1"
        newest, *_ = await statement.lines(conn, ann)
    found = (newest.kind, newest.amount, newest.withdrawal_id, newest.batch_id, newest.tx)
    assert found == ("bank_payout", Nano(-60 * 10**9), made.id, None, "B-1")


async def test_the_rules_are_those_of_the_chain_and_both_count_for_kyc(desk: Desk) -> None:
    ann = await desk.operator(2000)
    hot = await account_of(desk, ann, cooled=False)
    with pytest.raises(NotEligible) as refused:
        await requested(desk, ann, hot, 20)
    assert refused.value.code == "address_cooling"
    desk.clock.pass_s(3600)
    await requested(desk, ann, hot, 300, "one")
    assert (await requested(desk, ann, hot, 300, "one")).amount == Micro(300 * 10**6)
    assert await desk.available(ann) == 1700 * 10**9, "the same key is the same withdrawal"
    with pytest.raises(KeyReused):
        await requested(desk, ann, hot, 301, "one")
    await desk.request(ann, 200, "exactly the rest")
    for again in (desk.request(ann, 10, "x"), requested(desk, ann, hot, 10, "y")):
        with pytest.raises(NotEligible) as refused:
            await again
        assert refused.value.code == "kyc_cumulative"
    with pytest.raises(NotEligible) as refused:
        await requested(desk, await desk.operator(20), hot, 20)
    assert refused.value.code == "address_unknown", "another's account"


async def test_refused_and_cancelled_money_is_earnings_again(desk: Desk) -> None:
    ann = await desk.operator(100)
    account = await account_of(desk, ann)
    first, second = [await requested(desk, ann, account, 30, key) for key in ("a", "b")]
    async with transaction(desk.engine) as conn:
        with pytest.raises(NotFound):
            await bank.cancel(
                conn, person=await desk.operator(10), withdrawal_id=first.id, now=desk.clock.now()
            )
        for _ in range(2):
            gone = await bank.cancel(conn, person=ann, withdrawal_id=first.id, now=desk.clock.now())
    assert gone.status is Status.CANCELLED
    async with transaction(desk.engine) as conn:
        for rail in ("payouts", "bank", "base"):
            await halts.halt(conn, rail=rail, actor="ada", reason=f"drill: {rail}", now=desk.clock.now())
        await halts.lift(conn, rail="payouts", actor="ada", reason="the bank's own", now=desk.clock.now())
    with pytest.raises(WrongState, match="drill: bank"):
        await act(desk, "approve", second, actor="ada", reason="ok")
    async with transaction(desk.engine) as conn:
        await halts.lift(conn, rail="bank", actor="ada", reason="over", now=desk.clock.now())
        assert await halts.halted(conn, "bank") is None, "a chain's halt is not the bank's"
        await halts.halt(conn, rail="payouts", actor="ada", reason="drill: all", now=desk.clock.now())
    with pytest.raises(WrongState, match="drill: all"):
        await act(desk, "approve", second, actor="ada", reason="ok")
    refused = await act(desk, "refuse", second, actor="ada", reason="the bank knows no such account")
    assert refused.status is Status.REFUSED
    assert await desk.available(ann) == 100 * 10**9
    await desk.check()
    async with transaction(desk.engine) as conn:
        kinds = await conn.scalars(
            text("SELECT kind FROM notices WHERE person_id = :p ORDER BY id"), {"p": ann}
        )
        assert list(kinds) == ["payout_address_added", "payout_address_added", "withdrawal_refused"]


async def test_a47_the_database_itself_knows_two_people(desk: Desk) -> None:
    ann = await desk.operator(100)
    made = await requested(desk, ann, await account_of(desk, ann), 30)
    await act(desk, "approve", made, actor="ada", reason="ok")
    with pytest.raises(IntegrityError):
        async with transaction(desk.engine) as conn:
            await conn.execute(
                text(
                    "UPDATE bank_withdrawals SET status = 'paid', hold_id = NULL, paid_by = 'ada',"
                    " reference = 'x'"
                )
            )


async def test_however_many_were_retired_those_in_use_are_counted_shown_and_paid_to(desk: Desk) -> None:
    ann = await desk.operator(100)
    retired = (
        "INSERT INTO bank_accounts (id, person_id, holder, iban, created_at, usable_at, retired_at)"
        " SELECT (lpad(g::text, 8, '0') || '-0000-7000-8000-000000000000')::uuid, :person, 'Ann',"
        " 'GB82WEST12345698765432', :now, :now, :now FROM generate_series(1, 500) g"
    )
    async with transaction(desk.engine) as conn:
        await conn.execute(text(retired), {"person": ann, "now": desk.clock.now()})
    account = await account_of(desk, ann)
    assert await account_of(desk, ann) == account, "one in use is given back"
    await requested(desk, ann, account, 60)
    async with transaction(desk.engine) as conn:
        shown = await bank.accounts_of(conn, ann)
        assert (shown[0].id, len(shown)) == (account, 500)
        for n in range(1, 10):
            iban = f"GB{98 - int(f'3214282912345698765{n:03d}161100') % 97:02d}WEST12345698765{n:03d}"
            await bank.add_account(
                conn, person=ann, holder="Ann", iban=iban, cooling_s=0, now=desk.clock.now()
            )
        with pytest.raises(WrongState, match="at most 10"):
            await bank.add_account(
                conn, person=ann, holder="Ann", iban="DE89370400440532013000", cooling_s=0,
                now=desk.clock.now(),
            )  # fmt: skip


@pytest.mark.parametrize("wrong", ["GB82WEST12345698765433", "GB00", "XX", "DE89370400440532013000€", ""])
def test_what_is_no_iban_is_refused(wrong: str) -> None:
    assert bank.parse_iban("de89 3704 0044 0532 0130 00") == "DE89370400440532013000"
    with pytest.raises(BadIban):
        bank.parse_iban(wrong)


async def test_one_list_screens_payouts_and_senders(desk: Desk, tmp_path: Path) -> None:
    evm, lower = "0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48", "0xa0b86991c6218b36c1d19d4a2e9eb0ce3606eb48"
    solana = "4Nd1mYzVZ1cVqQz3zZJd5iHkVvJbQKq5Z5yq4n1JtKzA"
    file = tmp_path / "list.txt"

    async def found() -> tuple[frozenset[str], frozenset[str]]:
        async with transaction(desk.engine) as conn:
            return await sanctions.listed(conn, [evm, solana]), await _screened(conn, [evm, solana])

    file.write_text(f"{lower}\n{solana} # both\n")
    file.write_text(file.read_text() + f"bc1q{'a' * 58}\n48{'B' * 93}  # of chains we do not pay on\n")
    assert await screening.refresh(desk.engine, desk.clock, file) == ({lower, solana}, 2)
    assert await found() == (frozenset({evm, solana}), frozenset({evm, solana}))
    file.write_text(f"{solana}\n")
    await screening.refresh(desk.engine, desk.clock, file)
    assert await found() == (frozenset({solana}), frozenset({solana}))
    file.write_text("# nobody today\n")
    with pytest.raises(sanctions.BadList):
        await screening.refresh(desk.engine, desk.clock, file)
    file.write_text("not an address!\n")
    with pytest.raises(sanctions.BadList):
        await screening.refresh(desk.engine, desk.clock, file)
    assert await found() == (frozenset({solana}), frozenset({solana}))
    await screening.empty(desk.engine, desk.clock)
    assert await found() == (frozenset(), frozenset())


async def test_a_person_who_screens_what_the_list_names_outlives_the_list(desk: Desk, tmp_path: Path) -> None:
    solana, file, now = (
        "4Nd1mYzVZ1cVqQz3zZJd5iHkVvJbQKq5Z5yq4n1JtKzA",
        tmp_path / "list.txt",
        desk.clock.now(),
    )
    file.write_text(solana)
    await screening.refresh(desk.engine, desk.clock, file)
    async with transaction(desk.engine) as conn:
        await decisions.screen_sender(conn, solana, actor="ann", reason="a letter", now=now)
    await screening.refresh(desk.engine, desk.clock, file)
    await screening.empty(desk.engine, desk.clock)
    async with transaction(desk.engine) as conn:
        assert await _screened(conn, [solana]) == {solana}
        journal = await conn.execute(text("SELECT action, actor FROM screening_decisions ORDER BY id"))
        assert [tuple(row) for row in journal] == [("screen", decisions.LIST), ("screen", "ann")]
        await decisions.unscreen_sender(conn, solana, actor=decisions.LIST, reason="a late refresh", now=now)
        assert await _screened(conn, [solana]) == {solana}
        await decisions.unscreen_sender(conn, solana, actor="ann", reason="cleared", now=now)
        with pytest.raises(NoDecision, match="is not screened"):
            await decisions.unscreen_sender(conn, solana, actor="ann", reason="again", now=now)
