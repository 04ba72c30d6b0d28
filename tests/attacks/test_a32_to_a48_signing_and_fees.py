"""Attacks on what signers sign, where they sign it for, and what the chain charges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import ChainRefusal, RpcUnavailable
from chain.evm.keystore import sign_digest
from chain.evm.payouts import LABEL, SafeTerms
from chain.evm.rpc import JsonRpc
from chain.evm.safe import from_calldata
from chain.localnet import evm as anvil
from chain.networks import BASE, ETHEREUM, Chain
from chain.payouts import Payout
from chain.ports import Approval, PayoutLine
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.ledger import templates
from marketplace.ledger.holds import hold
from marketplace.ledger.money import Nano, from_micro
from marketplace.ledger.posting import post_transfers
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction
from marketplace.platform.ids import uuid7
from marketplace.settlement import address_book, batches, people, planner, signing, tables, withdrawals
from marketplace.settlement.consents import consent_of
from marketplace.settlement.errors import ExportRefused, NotEligible, PlanRefused
from marketplace.settlement.rails import open_rails
from marketplace.settlement.settler import Pace, Settler
from marketplace.settlement.signing import Expected, check_export, export_batch
from marketplace.settlement.withdrawals import Status
from tests.settlement_parts import LIMITS, Desk, a_person, earn, run_out
from tests.settlement_rigs import PASSPHRASE, Rig, a_base_rig

OWNERS = [bytes([n]) * 32 for n in (1, 2, 3)]
SAFE = "0x" + "22" * 20
LINES = (PayoutLine("p1", "0x" + "1" * 40, Micro(10_000_000)),)
HALF_N = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0
N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


@pytest.fixture
async def desk(engine: AsyncEngine) -> AsyncIterator[Desk]:
    desk = Desk(engine)
    yield desk
    await desk.check()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with a_base_rig(tmp_path, 10_000_000_000) as made:
        yield made


def terms(network: Any = BASE, safe: str = SAFE) -> SafeTerms:
    return SafeTerms(network, safe, tuple(anvil.address_of(key) for key in OWNERS), 2)


def signed_by(key: bytes, message: bytes) -> Approval:
    return Approval(anvil.address_of(key), {LABEL: sign_digest(key, message)})


async def test_a35_called_dead_too_early_it_lands_and_is_counted_once(desk: Desk) -> None:
    """The fence is seen spent and nothing landed; before the doubt is over the payment turns up."""
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    batch_id = await desk.approved()
    settler = Settler(desk.engine, desk.rail, desk.clock, pace=Pace(expire_s=60))
    await settler.tick()
    await settler.tick()
    desk.rail.mine()
    landed, desk.rail.finalized = desk.rail.finalized, {}  # a node that lags in one of two answers
    for _ in range(3):
        desk.clock.pass_s(15)
        await settler.tick()
        assert (await desk.batch(batch_id)).status is Payout.BROADCAST
    desk.rail.finalized = landed
    await settler.tick()
    assert (await desk.batch(batch_id)).status is Payout.FINAL
    assert await desk.posted(ledger_accounts.operator_earnings(str(ann))) == 0
    assert desk.rail.balances == {desk.address_of(ann): 40_000_000}


@pytest.mark.parametrize("other", [terms(ETHEREUM), terms(safe="0x" + "33" * 20)])
def test_a36_an_approval_is_good_for_one_safe_on_one_chain(other: SafeTerms) -> None:
    ours = terms()
    mine = ours.rebuild(LINES, "7", ours.context())
    theirs = other.rebuild(LINES, "7", other.context())
    approval = signed_by(OWNERS[0], mine.messages[LABEL])
    ours.verify(mine, approval)
    with pytest.raises(ChainRefusal):
        other.verify(theirs, approval)
    with pytest.raises(ChainRefusal):
        other.rebuild(LINES, "7", ours.context())


def test_a38_one_signature_counts_once_in_one_form() -> None:
    ours = terms()
    unsigned = ours.rebuild(LINES, "7", ours.context())
    good = signed_by(OWNERS[0], unsigned.messages[LABEL])
    raw = good.signatures[LABEL]
    s = int.from_bytes(raw[32:64])
    assert s <= HALF_N
    malleable = raw[:32] + (N - s).to_bytes(32) + bytes([55 - raw[64]])
    for wrong in (malleable, raw[:64] + bytes([raw[64] - 27]), raw[:64] + b"\x01", raw + b"\0", raw[:64]):
        with pytest.raises(ChainRefusal):
            ours.verify(unsigned, Approval(good.signer, {LABEL: wrong}))
    other = anvil.address_of(OWNERS[1])
    with pytest.raises(ChainRefusal):  # the same signature under a second owner's name
        ours.verify(unsigned, replace(good, signer=other))


async def test_a39_a_consistent_lie_about_a_recipient_meets_the_signers_own_address_book(desk: Desk) -> None:
    """Whoever owns our servers can redo digest and root; what he cannot reach is the signer's own list."""
    ann = await desk.operator(40)
    await desk.request(ann, 40)
    planned = await desk.plan()
    async with transaction(desk.engine) as conn:
        export = await export_batch(conn, planned.batch_id)
    known = Expected(recipients=frozenset({desk.address_of(ann)}))
    check_export(export, desk.rail, known)
    thief = "0x" + "7" * 40
    line = signing.msgspec.structs.replace(export.lines[0], to=thief)
    shown = signing.msgspec.structs.replace(export, lines=[line])
    with pytest.raises(ExportRefused, match="digest"):  # a UI that shows one batch and exports another
        check_export(shown, desk.rail, known)
    lines = (PayoutLine(line.payout_id, thief, Micro(line.amount_micro)),)
    lie = signing.msgspec.structs.replace(
        shown,
        digest=signing.batch_digest(
            chain=export.chain, escrow=export.escrow, fence=export.fence, lines=lines
        ).hex(),
        merkle_root=signing.merkle_root(lines).hex(),
    )
    with pytest.raises(ExportRefused, match="address book"):
        check_export(lie, desk.rail, known)


@pytest.mark.parametrize("word", ["operation", "gas_token", "refund_receiver", "gas_price", "target"])
def test_a40_no_delegatecall_elsewhere_and_no_refund_is_ever_sent(word: str) -> None:
    """Every field of execTransaction that could drain the Safe, changed in bytes we would accept."""
    ours = terms()
    batch = ours.transaction(LINES, "7")
    calldata = batch.exec_calldata(b"\x11" * 130)
    read = {"chain_id": BASE.chain_id, "safe": SAFE, "nonce": 7}
    assert from_calldata(calldata, **read).digest() == batch.digest()
    # execTransaction(to, value, data, operation, safeTxGas, baseGas, gasPrice, gasToken, refundReceiver, …)
    index = {"target": 0, "operation": 3, "gas_price": 6, "gas_token": 7, "refund_receiver": 8}[word]
    at = 4 + 32 * index + 31
    changed = calldata[:at] + bytes([calldata[at] ^ 1]) + calldata[at + 1 :]
    try:
        found = from_calldata(changed, **read)
    except Exception as refused:
        assert type(refused).__module__.startswith("chain.")  # noqa: PT017 - see above
    else:
        assert found.digest() != batch.digest()


async def test_a43_a_new_address_waits_is_told_of_and_changes_nothing_under_way(desk: Desk) -> None:
    ann = await desk.operator(40)
    made = await desk.request(ann, 20)
    batch_id = await desk.approved()
    thief = "0x" + "7" * 40
    async with transaction(desk.engine) as conn:
        entry = await desk.add_address(conn, ann, thief)
        for old in await address_book.listing(conn, ann):
            if old.id != entry.id:
                await address_book.retire(conn, person=ann, address_id=old.id, now=desk.clock.now())
        told = set(await conn.scalars(text("SELECT kind FROM notices WHERE person_id = :ann"), {"ann": ann}))
    assert told == {"payout_address_added", "payout_address_retired"}

    async def to_the_thief() -> Any:
        async with transaction(desk.engine) as conn:
            return await withdrawals.request(
                conn, person=ann, chain=Chain.BASE, address=thief, amount=Micro(20_000_000), key="k2",
                limits=LIMITS, now=desk.clock.now(),
            )  # fmt: skip

    desk.clock.pass_s(3599)
    with pytest.raises(NotEligible) as refused:
        await to_the_thief()
    assert refused.value.code == "address_cooling"
    await run_out(desk, desk.settler())
    assert (await desk.batch(batch_id)).status is Payout.FINAL
    assert desk.rail.balances == {made.address: 20_000_000}


async def test_a45_a_token_account_is_opened_once_per_wallet(desk: Desk) -> None:
    ann = await desk.operator(60)
    desk.rail.without_account.add(desk.address_of(ann))
    await desk.request(ann, 20)
    await desk.approved()  # the first payout opens it, at our cost
    await run_out(desk, desk.settler())
    desk.rail.without_account.add(desk.address_of(ann))  # closed since: the rent was his
    again = await desk.request(ann, 20, "k2")
    with pytest.raises(PlanRefused) as refused:
        await desk.plan()
    assert refused.value.code == "nobody_payable"
    assert "closed" in ((await desk.status(ann, again)).refusal or "")
    assert await desk.available(ann) == 40 * 10**9
    desk.rail.without_account.clear()
    await desk.request(ann, 20, "k3")
    assert (await desk.plan()).count == 1


@pytest.mark.parametrize("how", ["cancel", "suspend", "refuse"])
async def test_a45_a_plan_that_comes_to_nothing_opens_no_second_account(desk: Desk, how: str) -> None:
    """Cancelling while the dry run has just opened the account: its rent could be had again and again."""
    ann = await desk.operator(60)
    made = await desk.request(ann, 20)
    desk.rail.without_account.add(desk.address_of(ann))

    async def end_it() -> None:
        if how == "refuse":
            raise RpcUnavailable("the node went away")
        async with transaction(desk.engine) as conn:
            if how == "suspend":
                await people.set_standing(
                    conn, person=ann, is_good=False, reason="canary", actor="ada", now=desk.clock.now()
                )
            else:
                await withdrawals.cancel(conn, person=ann, withdrawal_id=made.id, now=desk.clock.now())

    desk.rail.meanwhile = [end_it]
    with pytest.raises((PlanRefused, RpcUnavailable)):
        await desk.plan()
    desk.rail.without_account.add(desk.address_of(ann))  # closed: the rent is his
    if how == "cancel":
        made = await desk.request(ann, 20, "k2")
    elif how == "suspend":
        async with transaction(desk.engine) as conn:
            await people.set_standing(
                conn, person=ann, is_good=True, reason="fine", actor="ada", now=desk.clock.now()
            )
    with pytest.raises(PlanRefused):
        await desk.plan()
    assert "opened one for you before" in ((await desk.status(ann, made)).refusal or "")
    assert desk.rail.opened == [desk.address_of(ann)]


async def test_a45_an_operator_with_many_wallets_is_opened_one(desk: Desk) -> None:
    """Nor is an account opened a second time when the batch it was opened for came to nothing."""
    ann = await desk.operator(60)
    first, second = desk.address_of(ann), "0x" + "7" * 40
    desk.rail.without_account.update({first, second})
    made = await desk.request(ann, 20)
    desk.rail.is_paused = True
    with pytest.raises(PlanRefused):
        await desk.plan()
    desk.rail.is_paused = False
    await desk.approved()  # the same wallet again: nothing had been paid for it
    await run_out(desk, desk.settler())
    assert (await desk.status(ann, made)).status is Status.PAID
    async with transaction(desk.engine) as conn:
        await desk.add_address(conn, ann, second)
    desk.clock.pass_s(3600)
    async with transaction(desk.engine) as conn:
        other, _ = await withdrawals.request(
            conn, person=ann, chain=Chain.BASE, address=second, amount=Micro(20_000_000), key="k2",
            limits=LIMITS, now=desk.clock.now(),
        )  # fmt: skip
    with pytest.raises(PlanRefused):
        await desk.plan()
    assert "opened one for you before" in ((await desk.status(ann, other)).refusal or "")


# ── on a real Safe ────────────────────────────────────────────────────────────────────────────────────────


async def requested(engine: AsyncEngine, rig: Rig, number: int) -> withdrawals.Withdrawal:
    person, now = await a_person(engine), SystemClock().now()
    await earn(engine, person, 20, rig.chain)
    async with transaction(engine) as conn:
        entry, _ = await address_book.add(
            conn, person=person, chain=rig.chain, text=rig.new_wallet(number), forbidden=(), cooling_s=0,
            now=now - timedelta(seconds=1),
        )  # fmt: skip
        made, _ = await withdrawals.request(
            conn, person=person, chain=rig.chain, address=entry.address, amount=Micro(10_000_000 + number),
            key="one", limits=LIMITS, now=now,
        )  # fmt: skip
    return made


async def many_requested(engine: AsyncEngine, rig: Rig, count: int) -> list[withdrawals.Withdrawal]:
    """As `requested`, in one transaction and without the address book: what the planner reads."""
    now, persons = SystemClock().now(), [uuid7() for _ in range(count)]
    found: list[withdrawals.Withdrawal] = []
    async with transaction(engine) as conn:
        await conn.execute(
            text("INSERT INTO people (id, display_name) VALUES (:id, 'somebody')"),
            [{"id": p} for p in persons],
        )
        amount, chain = Nano(20 * 10**9), rig.chain.value
        paid = [
            templates.deposit_direct(chain=chain, person=str(p), amount=amount, ref=str(p)) for p in persons
        ]
        earned = [
            templates.correction(
                debit=ledger_accounts.buyer(str(p)), credit=ledger_accounts.operator_earnings(str(p)),
                amount=amount, ref=str(p), note="test",
            )
            for p in persons
        ]  # fmt: skip
        await post_transfers(conn, [*paid, *earned])
        for number, person in enumerate(persons):
            micro, account = Micro(10_000_000 + number), ledger_accounts.operator_earnings(str(person))
            made = withdrawals.Withdrawal(
                uuid7(),
                person,
                rig.chain,
                rig.new_wallet(number),
                micro,
                Status.REQUESTED,
                now,
                now,
                None,
                None,
            )
            held = await hold(conn, account, from_micro(micro.n), reason=f"withdrawal {made.id}")
            await conn.execute(
                tables.withdrawals.insert().values(
                    id=made.id, person_id=person, chain=chain, address=made.address,
                    amount_micro=micro.n, status=made.status.value, idempotency_key="one",
                    input_hash=bytes(32), hold_id=held, created_at=now, changed_at=now,
                )
            )  # fmt: skip
            found.append(made)
    return found


async def approve(engine: AsyncEngine, rig: Rig, batch_id: Any) -> None:
    consent = consent_of(rig.chains, rig.chain)
    async with transaction(engine) as conn:
        export = await signing.export_batch(conn, batch_id)
    for keystore in rig.keystores[:2]:
        document = signing.sign_export(export, consent, keystore=keystore, passphrase=PASSPHRASE)
        async with transaction(engine) as conn:
            await signing.store_approval(conn, consent, document, pushed_by="bo", now=SystemClock().now())


async def settle(engine: AsyncEngine, rig: Rig, settlers: list[Settler], batch_id: Any) -> batches.Batch:
    for _ in range(200):
        await asyncio.gather(*(settler.tick() for settler in settlers))
        async with transaction(engine) as conn:
            batch = await batches.find_batch(conn, batch_id)
        if batch.status is Payout.FINAL:
            return batch
        await rig.hurry()
    raise AssertionError(f"{batch.status}: {batch.trouble}")


async def as_circle(rpc: JsonRpc, call: bytes) -> None:
    await anvil.wait_mined(rpc, [await anvil.send_as(rpc, anvil.FAUCET, BASE.usdc, call)])


@pytest.mark.chains
async def test_a41_one_blacklisted_recipient_among_300_is_left_out(engine: AsyncEngine, rig: Rig) -> None:
    assert isinstance(rig.rpc, JsonRpc)
    made = await many_requested(engine, rig, 300)
    listed = made[137]
    from chain.evm import abi

    await as_circle(rig.rpc, abi.load("usdc")["blacklist"].encode(listed.address))
    clock = SystemClock()
    async with open_rails(rig.chains, rig.folder, [rig.chain]) as rails:
        rail = rails[rig.chain]
        planned = await planner.plan(engine, rail, clock, planned_by="ada")
        assert planned.count == 299
        assert [withdrawal for withdrawal, _ in planned.split_off] == [listed.id]
        await approve(engine, rig, planned.batch_id)
        await settle(engine, rig, [Settler(engine, rail, clock)], planned.batch_id)
    paid = await asyncio.gather(*(rig.usdc_of(w.address) for w in made))
    assert paid == [0 if w is listed else w.amount.n for w in made]


@pytest.mark.chains
async def test_a42_usdc_paused_plans_nothing_and_burns_no_gas(engine: AsyncEngine, rig: Rig) -> None:
    assert isinstance(rig.rpc, JsonRpc)
    from chain.evm import abi

    made = await requested(engine, rig, 1)
    clock = SystemClock()
    usdc = abi.load("usdc")
    async with open_rails(rig.chains, rig.folder, [rig.chain]) as rails:
        rail: Any = rails[rig.chain]
        planned = await planner.plan(engine, rail, clock, planned_by="ada")
        await approve(engine, rig, planned.batch_id)
        await as_circle(rig.rpc, usdc["pause"].encode())
        payer = rail._gas_payer.address
        before = await rig.rpc.call("eth_getBalance", payer, "latest", shape=str)
        settler = Settler(engine, rail, clock)
        for _ in range(3):
            await settler.tick()
        async with transaction(engine) as conn:
            batch = await batches.find_batch(conn, planned.batch_id)
        assert batch.status is Payout.APPROVED
        assert batch.trouble
        assert await rig.rpc.call("eth_getBalance", payer, "latest", shape=str) == before
        await as_circle(rig.rpc, usdc["unpause"].encode())
        await settle(engine, rig, [settler], planned.batch_id)
        await as_circle(rig.rpc, usdc["pause"].encode())
        again = await requested(engine, rig, 2)
        with pytest.raises(PlanRefused) as refused:
            await planner.plan(engine, rail, clock, planned_by="ada")
        assert refused.value.code == "dry_run_failed"
    assert await rig.usdc_of(made.address) == made.amount.n
    assert await rig.usdc_of(again.address) == 0


@pytest.mark.chains
async def test_a46_a_stuck_transaction_is_replaced_with_the_same_payload(
    engine: AsyncEngine, rig: Rig
) -> None:
    """The first envelope waits in the mempool; the second takes its nonce, and only one can ever pay."""
    assert isinstance(rig.rpc, JsonRpc)
    made, clock = await requested(engine, rig, 1), SystemClock()
    async with open_rails(rig.chains, rig.folder, [rig.chain]) as rails:
        rail: Any = rails[rig.chain]
        planned = await planner.plan(engine, rail, clock, planned_by="ada")
        await approve(engine, rig, planned.batch_id)
        await rig.rpc.call("evm_setAutomine", False, shape=object)
        await rig.rpc.call("evm_setIntervalMining", 0, shape=object)
        patient = Settler(engine, rail, clock)
        await patient.tick()
        await patient.tick()
        settler = Settler(engine, rail, clock, pace=Pace(resend_s=0, new_envelope_s=0))
        await settler.tick()  # wraps anew
        impatient = Settler(engine, rail, clock, pace=Pace(resend_s=0, new_envelope_s=3600))
        await impatient.tick()  # sends it
        async with transaction(engine) as conn:
            first, second = await batches.stored_broadcasts(conn, planned.batch_id)
        assert first.fence == second.fence
        assert (await nonce_and_fee(rig.rpc, second.tx))[0] == nonce_of(first.raw)
        assert (await nonce_and_fee(rig.rpc, second.tx))[1] > fee_of(first.raw)
        await anvil.mine(rig.rpc, 1)
        await settle(engine, rig, [impatient], planned.batch_id)
        async with transaction(engine) as conn:
            final = await batches.final_transactions(conn, [planned.batch_id])
    assert final == {planned.batch_id: second.tx}
    assert await rig.usdc_of(made.address) == made.amount.n


@pytest.mark.chains
async def test_a34_two_settlers_and_a_reorganised_block_pay_once(engine: AsyncEngine, rig: Rig) -> None:
    assert isinstance(rig.rpc, JsonRpc)
    made, clock = [await requested(engine, rig, n) for n in range(3)], SystemClock()
    async with (
        open_rails(rig.chains, rig.folder, [rig.chain]) as one,
        open_rails(rig.chains, rig.folder, [rig.chain]) as other,
    ):
        planned = await planner.plan(engine, one[rig.chain], clock, planned_by="ada")
        await approve(engine, rig, planned.batch_id)
        settlers = [Settler(engine, rails[rig.chain], clock, pace=Pace(resend_s=0)) for rails in (one, other)]
        await rig.hurry()  # what the test did to the chain is out of the reorg's reach
        for _ in range(3):  # signed, sent, mined, not final
            await asyncio.gather(*(settler.tick() for settler in settlers))
        assert await rig.usdc_of(made[0].address) == made[0].amount.n
        await rig.rpc.call("anvil_reorg", 3, [], shape=object)  # its block is gone, and the payment with it
        assert await rig.usdc_of(made[0].address) == 0
        batch = await settle(engine, rig, settlers, planned.batch_id)
    assert batch.status is Payout.FINAL
    assert [await rig.usdc_of(w.address) for w in made] == [w.amount.n for w in made]
    assert await rig.usdc_of(rig.escrow) == 10_000_000_000 - sum(w.amount.n for w in made)


def outer(raw: bytes) -> dict[str, Any]:
    from eth_account.typed_transactions.typed_transaction import TypedTransaction
    from hexbytes import HexBytes

    return TypedTransaction.from_bytes(HexBytes(raw)).as_dict()


def nonce_of(raw: bytes) -> int:
    return int(outer(raw)["nonce"])


def fee_of(raw: bytes) -> int:
    return int(outer(raw)["maxPriorityFeePerGas"])


async def nonce_and_fee(rpc: JsonRpc, tx: str) -> tuple[int, int]:
    found = await rpc.call("eth_getTransactionByHash", tx, shape=dict[str, Any])
    return int(found["nonce"], 16), int(found["maxPriorityFeePerGas"], 16)
