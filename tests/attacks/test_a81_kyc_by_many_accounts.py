"""A81: KYC evaded by many accounts; what they withdraw to one wallet or IBAN counts together."""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chain.networks import Chain
from chain.units import Micro
from marketplace.ledger.money import Nano
from marketplace.platform.database import transaction
from marketplace.settlement import address_book, bank, kyc, withdrawals
from marketplace.settlement.errors import NotEligible, WrongState
from marketplace.settlement.withdrawals import Status, Withdrawal
from tests.settlement_parts import LIMITS, Desk, a_person, address, earn, run_out

WALLET, ANOTHER = address(777), address(778)
IBAN = "GB82WEST12345698765432"


@pytest.fixture
async def desk(engine: AsyncEngine) -> Desk:
    return Desk(engine)


async def account(desk: Desk, dollars: int = 500) -> UUID:
    """Somebody without KYC who earned this much and has both wallets and the IBAN."""
    person, now = await a_person(desk.engine), desk.clock.now()
    await earn(desk.engine, person, dollars, Chain.BASE)
    async with transaction(desk.engine) as conn:
        for chain, wallet in ((Chain.BASE, WALLET), (Chain.ETHEREUM, WALLET), (Chain.BASE, ANOTHER)):
            await address_book.add(
                conn, person=person, chain=chain, text=wallet, forbidden=(), cooling_s=0, now=now
            )
        await bank.add_account(conn, person=person, holder="Mule", iban=IBAN, cooling_s=0, now=now)
    return person


async def ask_on(
    conn: AsyncConnection,
    desk: Desk,
    person: UUID,
    dollars: int,
    *,
    chain: Chain = Chain.BASE,
    to: str = WALLET,
) -> Withdrawal:
    made, _ = await withdrawals.request(
        conn, person=person, chain=chain, address=to, amount=Micro(dollars * 10**6),
        key=f"{dollars} to {to} on {chain}", limits=LIMITS, now=desk.clock.now(),
    )  # fmt: skip
    return made


async def ask(
    desk: Desk, person: UUID, dollars: int, *, chain: Chain = Chain.BASE, to: str = WALLET
) -> Withdrawal:
    async with transaction(desk.engine) as conn:
        return await ask_on(conn, desk, person, dollars, chain=chain, to=to)


async def refusal(
    desk: Desk, person: UUID, dollars: int, *, chain: Chain = Chain.BASE, to: str = WALLET
) -> NotEligible:
    with pytest.raises(NotEligible) as refused:
        await ask(desk, person, dollars, chain=chain, to=to)
    return refused.value


async def ask_bank_on(conn: AsyncConnection, desk: Desk, person: UUID, dollars: int) -> bank.BankWithdrawal:
    (his,) = await bank.accounts_of(conn, person)
    made, _ = await bank.request(
        conn, person=person, account_id=his.id, amount=Micro(dollars * 10**6), key=f"{dollars}",
        limits=LIMITS, now=desk.clock.now(),
    )  # fmt: skip
    return made


async def tier(desk: Desk, person: UUID, name: str) -> None:
    async with transaction(desk.engine) as conn:
        await kyc.decide(conn, person=person, tier=name, reason="papers", actor="bo", now=desk.clock.now())


async def test_a81_three_accounts_get_500_to_one_wallet_not_1500(desk: Desk) -> None:
    mules = [await account(desk) for _ in range(3)]
    await ask(desk, mules[0], 300)
    await ask(desk, mules[1], 200)  # exactly $500.00 in all needs none
    for chain in (Chain.BASE, Chain.ETHEREUM):  # one wallet, whatever the chain
        refused = await refusal(desk, mules[2], 123, chain=chain)
        assert refused.code == "kyc_address"
    assert str(refused) == (
        "withdrawals over $500.00 in all, those of other accounts to the same address included, need a "
        "verified identity (verify your identity once (POST /api/kyc/checks), then request again)"
    ), "what to do, and nothing of the others"
    await desk.approved()
    await run_out(desk, desk.settler())
    assert desk.rail.balances == {WALLET: 500 * 10**6}
    assert (await refusal(desk, mules[2], 123)).code == "kyc_address", "what was paid counts"
    await ask(desk, mules[2], 123, to=ANOTHER)
    await tier(desk, mules[2], "identity")
    await ask(desk, mules[2], 123)


async def test_a81_what_he_withdrew_elsewhere_counts_beside_what_others_did_here(desk: Desk) -> None:
    ann, ben = await account(desk), await account(desk)
    await ask(desk, ann, 200)
    await ask(desk, ben, 200, to=ANOTHER)
    assert (await refusal(desk, ben, 101)).code == "kyc_address"
    await ask(desk, ben, 100)


async def test_a81_what_was_taken_back_does_not_count(desk: Desk) -> None:
    ann, ben = await account(desk), await account(desk)
    made = await ask(desk, ann, 500)
    assert (await refusal(desk, ben, 10)).code == "kyc_address"
    async with transaction(desk.engine) as conn:
        await withdrawals.cancel(conn, person=ann, withdrawal_id=made.id, now=desk.clock.now())
    await ask(desk, ben, 500)


async def test_a81_verified_people_share_a_treasury_and_do_not_count(desk: Desk) -> None:
    ann, ben, eve = await account(desk, 900), await account(desk, 900), await account(desk)
    for person in (ann, ben):
        await tier(desk, person, "identity")
        await ask(desk, person, 900)
    waiting = await ask(desk, eve, 500)
    assert (await desk.plan()).count == 3
    await tier(desk, ben, "none")  # his papers were forged: now he counts
    async with transaction(desk.engine) as conn:
        assert await withdrawals.withdrawn_before(conn, eve, WALLET) == (Nano(500 * 10**9), Nano(900 * 10**9))
    assert (await desk.status(eve, waiting)).status is Status.PLANNED


async def test_a81_of_two_who_ask_at_once_the_older_request_is_paid(desk: Desk) -> None:
    """Neither sees the other's request, which is not committed; planning sees both."""
    mules = [await account(desk, 600) for _ in range(2)]
    async with AsyncExitStack() as stack:
        conns = [await stack.enter_async_context(transaction(desk.engine)) for _ in mules]
        older, younger = [
            await ask_on(conn, desk, mule, 300) for conn, mule in zip(conns, mules, strict=True)
        ]
    planned = await desk.plan()
    assert (planned.total, [w for w, _ in planned.split_off]) == (Micro(300 * 10**6), [younger.id])
    left_out = await desk.status(mules[1], younger)
    assert left_out.status is Status.FAILED
    assert "those of other accounts to the same address included" in (left_out.refusal or "")
    assert (await desk.status(mules[0], older)).status is Status.PLANNED
    await ask(desk, mules[1], 200)  # as much as fits beside the older


async def test_a81_a_request_on_another_chain_is_older_too(desk: Desk) -> None:
    """The batch of one chain looks at what waits on the others."""
    mules = [await account(desk) for _ in range(2)]
    async with AsyncExitStack() as stack:
        conns = [await stack.enter_async_context(transaction(desk.engine)) for _ in mules]
        await ask_on(conns[0], desk, mules[0], 400, chain=Chain.ETHEREUM)
        younger = await ask_on(conns[1], desk, mules[1], 400)
    async with transaction(desk.engine) as conn:
        assert list(await withdrawals.over_limit(conn, [mules[1]])) == [younger.id]
        assert await withdrawals.over_limit(conn, [mules[0]]) == {}


async def test_a81_an_iban_is_an_address(desk: Desk) -> None:
    mules = [await account(desk) for _ in range(3)]
    async with AsyncExitStack() as stack:
        conns = [await stack.enter_async_context(transaction(desk.engine)) for _ in mules[:2]]
        older, younger = [
            await ask_bank_on(conn, desk, mule, 300) for conn, mule in zip(conns, mules, strict=False)
        ]
    async with transaction(desk.engine) as conn:
        with pytest.raises(NotEligible) as refused:
            await ask_bank_on(conn, desk, mules[2], 10)
        assert refused.value.code == "kyc_address"
        with pytest.raises(WrongState, match="verify your identity") as barred:
            await bank.approve(conn, younger.id, actor="ada", reason="ok", now=desk.clock.now())
        assert barred.value.code == "kyc"
        await bank.approve(conn, older.id, actor="ada", reason="ok", now=desk.clock.now())
        with pytest.raises(WrongState):
            await bank.approve(conn, younger.id, actor="ada", reason="ok", now=desk.clock.now())
        await bank.cancel(conn, person=mules[1], withdrawal_id=younger.id, now=desk.clock.now())
        await ask_bank_on(conn, desk, mules[2], 200)


async def test_a81_whoever_could_not_be_paid_there_learns_nothing_of_others(desk: Desk) -> None:
    await ask(desk, await account(desk), 500)
    stranger = await desk.operator(100)
    poor = await account(desk, 20)
    for person, dollars, code in ((stranger, 100, "address_unknown"), (poor, 21, "earnings")):
        refused = await refusal(desk, person, dollars)
        assert refused.code == code
        assert "other accounts" not in str(refused)
    async with transaction(desk.engine) as conn:
        new = await a_person(desk.engine)
        now = desk.clock.now()
        await earn(desk.engine, new, 100, Chain.BASE)
        await address_book.add(
            conn, person=new, chain=Chain.BASE, text=WALLET, forbidden=(), cooling_s=1, now=now
        )
    assert (await refusal(desk, new, 100)).code == "address_cooling"
    desk.clock.at += timedelta(seconds=1)
    assert (await refusal(desk, new, 100)).code == "kyc_address"
