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
from chain.evm.rpc import JsonRpc
from chain.networks import Chain
from chain.payouts import Payout
from chain.solana import keystore as solana_keystore
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction
from marketplace.platform.settings import ChainsConfig
from marketplace.settlement import address_book, batches, commands, halts, service, withdrawals
from marketplace.settlement.errors import ApprovalRefused, ExportRefused
from marketplace.settlement.sanctions import BadList
from marketplace.settlement.service import Schedule
from marketplace.settlement.withdrawals import Status
from tests.settlement_parts import LIMITS, a_person, earn, posted
from tests.settlement_rigs import PASSPHRASE, Rig, a_base_rig, a_solana_rig

pytestmark = pytest.mark.chains

SAFE_THRESHOLD_SLOT = "0x4"


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


@pytest.fixture
async def base(tmp_path: Path) -> AsyncIterator[Rig]:
    async with a_base_rig(tmp_path, 100_000_000) as made:
        yield made


@asynccontextmanager
async def settling(
    engine: AsyncEngine, rig: Rig, chains: ChainsConfig | None = None
) -> AsyncIterator[asyncio.Task[None]]:
    stop = asyncio.Event()
    running = asyncio.create_task(
        service.settle(
            engine,
            chains or rig.chains,
            SystemClock(),
            stop,
            settler_dir=rig.folder,
            which=[rig.chain],
            schedule=Schedule(tick_s=0.05, standby_s=0.1),
        )
    )
    try:
        yield running
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


async def test_a36_a_threshold_lowered_on_chain_halts_payouts_before_a_plan(
    engine: AsyncEngine, base: Rig
) -> None:
    """One stolen key would be enough by then: nothing is planned until a person has looked."""
    assert isinstance(base.rpc, JsonRpc)
    await requested(engine, base, 20_000_000)
    clock = SystemClock()
    await base.rpc.call("anvil_setStorageAt", base.escrow, SAFE_THRESHOLD_SLOT, word(1), shape=object)
    async with settling(engine, base):
        asked = await commands.plan(engine, clock, base.chain, asked_by="ada", wait_s=20)
        assert asked.code == "halted"
        async with transaction(engine) as conn:
            why = await halts.halted(conn, base.chain)
            assert await batches.listing(conn) == []
            assert why is not None
            assert why.startswith("WrongSafe: ")
            assert "its threshold is 1, configured 2" in why
        await base.rpc.call("anvil_setStorageAt", base.escrow, SAFE_THRESHOLD_SLOT, word(2), shape=object)
        async with transaction(engine) as conn:
            await halts.lift(conn, rail=base.chain.value, actor="ada", reason="put right", now=clock.now())
        asked = await commands.plan(engine, clock, base.chain, asked_by="ada", wait_s=20)
    assert asked.code == "planned", asked.outcome


async def test_a_settler_started_while_its_node_is_down_waits_for_it(engine: AsyncEngine, base: Rig) -> None:
    await requested(engine, base, 20_000_000)
    clock = SystemClock()
    down = base.chains.base.model_copy(update={"rpc": ("http://127.0.0.1:9",)})
    async with settling(engine, base, base.chains.model_copy(update={"base": down})) as running:
        asked = await commands.plan(engine, clock, base.chain, asked_by="ada", wait_s=1)
        assert asked.done_at is None
        assert not running.done()
        async with transaction(engine) as conn:
            assert await halts.halted(conn, base.chain) is None
    async with settling(engine, base):
        asked = await commands.plan(engine, clock, base.chain, asked_by="ada", wait_s=20)
    assert asked.code == "planned", asked.outcome


def word(n: int) -> str:
    return "0x" + n.to_bytes(32).hex()
