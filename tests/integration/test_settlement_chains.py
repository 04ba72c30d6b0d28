"""Request, plan, two of three sign from separate keystores, FINAL: on a real Safe and a real SPL multisig."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.evm import keystore as evm_keystore
from chain.networks import Chain
from chain.payouts import Payout
from chain.solana import keystore as solana_keystore
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction
from marketplace.settlement import address_book, batches, commands, service, withdrawals
from marketplace.settlement.errors import ApprovalRefused, ExportRefused
from marketplace.settlement.sanctions import BadList
from marketplace.settlement.service import Schedule
from marketplace.settlement.withdrawals import Status
from tests.settlement_parts import LIMITS, a_person, earn, posted
from tests.settlement_rigs import PASSPHRASE, Rig, a_base_rig, a_solana_rig

pytestmark = pytest.mark.chains


@pytest.fixture(params=[a_base_rig, a_solana_rig], ids=["base", "solana"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    (tmp_path / "vm").mkdir()
    async with request.param(tmp_path, 100_000_000) as made:
        made.chains_file.write_text(made.chains.model_dump_json())
        yield made


async def requested(engine: AsyncEngine, rig: Rig, micro: int) -> withdrawals.Withdrawal:
    person, clock = await a_person(engine), SystemClock()
    await earn(engine, person, 100, rig.chain)
    async with transaction(engine) as conn:
        entry, _ = await address_book.add(
            conn,
            person=person,
            chain=rig.chain,
            text=rig.wallet,
            forbidden=address_book.ours(rig.chains),
            cooling_s=0,
            now=clock.now(),
        )
        made, _ = await withdrawals.request(
            conn,
            person=person,
            chain=rig.chain,
            address=entry.address,
            amount=Micro(micro),
            key="one",
            limits=LIMITS,
            now=clock.now(),
        )
    return made


@asynccontextmanager
async def settling(engine: AsyncEngine, rig: Rig) -> AsyncIterator[None]:
    stop = asyncio.Event()
    running = asyncio.create_task(
        service.settle(
            engine,
            rig.chains,
            SystemClock(),
            stop,
            settler_dir=rig.folder,
            which=[rig.chain],
            schedule=Schedule(tick_s=0.05, standby_s=0.1),
        )
    )
    try:
        yield
    finally:
        stop.set()
        await running


async def until_over(engine: AsyncEngine, rig: Rig, batch_id: UUID) -> batches.Batch:
    for _ in range(300):
        batch, *_ = await commands.show(engine, batch_id)
        if batch.status not in (Payout.PLANNED, Payout.APPROVED, Payout.SIGNED, Payout.BROADCAST):
            return batch
        await rig.hurry()
        await asyncio.sleep(0.05)
    raise AssertionError(f"still {batch.status}: {batch.trouble}")


async def test_an_operator_is_paid_by_two_of_three(engine: AsyncEngine, rig: Rig) -> None:
    clock = SystemClock()
    made = await requested(engine, rig, 33_000_000)
    async with settling(engine, rig), settling(engine, rig):  # a second settler stands by
        asked = await commands.plan(engine, clock, rig.chain, asked_by="ada", wait_s=20)
        assert asked.code == "planned", asked.outcome
        assert asked.batch_id is not None
        export_file = rig.folder / "export.json"
        export_file.write_bytes(await commands.export(engine, asked.batch_id))
        seen: list[Micro] = []
        for keystore in (rig.keystores[2], rig.keystores[0]):
            _, approval = commands.sign(
                export_file,
                keystore,
                chains_file=rig.chains_file,
                passphrase=PASSPHRASE,
                limit=Micro(33_000_000),
                recipients=frozenset({rig.wallet}),
                confirm=lambda review: seen.append(review.total) or True,
            )
            raw = approval.read_bytes()
            _, status = await commands.approve(engine, rig.chains, clock, raw, pushed_by="bo")
        assert seen == [Micro(33_000_000)] * 2
        assert (
            rig.keystores[0].with_name(f"{rig.keystores[0].name}.recipients").read_text() == f"{rig.wallet}\n"
        )
        assert status is Payout.APPROVED
        batch = await until_over(engine, rig, asked.batch_id)
    assert batch.status is Payout.FINAL
    assert await rig.usdc_of(rig.wallet) == 33_000_000
    assert await rig.usdc_of(rig.escrow) == 67_000_000
    assert await posted(engine, ledger_accounts.escrow(rig.chain.value)) == -67_000_000 * 1000
    assert await posted(engine, ledger_accounts.payouts_in_flight(rig.chain.value)) == 0
    async with transaction(engine) as conn:
        paid = await withdrawals.find(conn, person=made.person_id, withdrawal_id=made.id)
        assert asked.batch_id in await batches.final_transactions(conn, [asked.batch_id])
    assert paid.status is Status.PAID


async def test_a_signer_refuses_what_his_own_settings_do_not_say(engine: AsyncEngine, rig: Rig) -> None:
    clock = SystemClock()
    await requested(engine, rig, 20_000_000)
    async with settling(engine, rig):
        asked = await commands.plan(engine, clock, rig.chain, asked_by="ada", wait_s=20)
    assert asked.batch_id is not None
    good = await commands.export(engine, asked.batch_id)
    other = "0x" + "77" * 20 if rig.chain is Chain.BASE else "4Nd1mYzVZ1cVqQz3zZJd5iHkVvJbQKq5Z5yq4n1JtKzA"
    tampered = {
        "recipient": good.replace(rig.wallet.encode(), other.encode()),
        "amount": good.replace(b"20000000,", b"20000001,"),
        "fence": good.replace(b'"fence": "', b'"fence": "1'),
        "context": good.replace(b'"context": {', b'"context": {"extra": "1",'),
        "escrow in context": good.replace(rig.escrow.encode(), other.encode()),
        "not json": good[:-10],
    }
    for name, raw in tampered.items():
        assert raw != good, name
        file = rig.folder / "tampered.json"
        file.write_bytes(raw)
        if name == "context" and rig.chain is Chain.SOLANA:
            continue  # notes in the context are not signed there; the terms are (`consents`)
        with pytest.raises(ExportRefused):
            commands.sign(file, rig.keystores[0], chains_file=rig.chains_file, passphrase=PASSPHRASE)
    file = rig.folder / "good.json"
    file.write_bytes(good)
    for expectation in ({"limit": Micro(19_999_999)}, {"recipients": frozenset({other})}):
        with pytest.raises(ExportRefused):
            commands.sign(
                file, rig.keystores[0], chains_file=rig.chains_file, passphrase=PASSPHRASE, **expectation
            )
    book = rig.keystores[0].with_name(f"{rig.keystores[0].name}.addresses")
    book.write_text(f"# whom I know\n{other}\n")
    with pytest.raises(ExportRefused, match="address book"):
        commands.sign(file, rig.keystores[0], chains_file=rig.chains_file, passphrase=PASSPHRASE)
    book.write_text("nobody!\n")
    with pytest.raises(BadList):
        commands.sign(file, rig.keystores[0], chains_file=rig.chains_file, passphrase=PASSPHRASE)
    own = rig.wallet.lower() if rig.chain is Chain.BASE else rig.wallet
    book.write_text(f"{own}  # ann\n")
    with pytest.raises(ExportRefused, match="declined"):
        commands.sign(
            file,
            rig.keystores[0],
            chains_file=rig.chains_file,
            passphrase=PASSPHRASE,
            confirm=lambda _: False,
        )
    stranger = rig.folder / "stranger.json"
    module = evm_keystore if rig.chain is Chain.BASE else solana_keystore
    module.create(stranger, PASSPHRASE, scrypt_n=2)
    with pytest.raises(ExportRefused, match="not a signer"):
        commands.sign(file, stranger, chains_file=rig.chains_file, passphrase=PASSPHRASE)
    document, approval = commands.sign(
        file, rig.keystores[0], chains_file=rig.chains_file, passphrase=PASSPHRASE
    )
    other_signer = next(signer for signer in rig.signers if signer != document.signer)
    forged = approval.read_bytes().replace(document.signer.encode(), other_signer.encode())
    with pytest.raises(ApprovalRefused):
        await commands.approve(engine, rig.chains, clock, forged, pushed_by="eve")
