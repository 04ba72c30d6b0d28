"""More than 13 payouts in one Solana transaction, and why a signer may believe the table they stand on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from solders.keypair import Keypair
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import ProvidersDisagree, RpcUnavailable
from chain.localnet.solana import deploy, fund
from chain.localnet.solana_vm.server import serving
from chain.networks import Chain
from chain.payouts import Payout
from chain.ports import PayoutLine, Unsigned
from chain.solana import escrow, tables
from chain.solana.payouts import LineReverted, MultisigRail
from chain.solana.rpc import SolanaRpc
from chain.units import Micro
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction
from marketplace.settlement import address_book, commands, service, signing, withdrawals
from marketplace.settlement.errors import ExportRefused
from marketplace.settlement.service import Schedule
from tests.settlement_parts import LIMITS, a_person, earn
from tests.settlement_rigs import PASSPHRASE, Rig, a_solana_rig

pytestmark = pytest.mark.chains

GAS, *SIGNERS = (Keypair.from_seed(bytes([n]) * 32) for n in (4, 1, 2, 3))
COUNT = 16
"""More than fit without a table."""


@pytest.fixture
async def rail(tmp_path: Path) -> AsyncIterator[MultisigRail]:
    async with AsyncExitStack() as stack:
        options = {"slot_ms": 4, "finalized_after": 8, "empty_every": 2}
        port, _ = await stack.enter_async_context(
            serving(tmp_path, port=0, clock=lambda: int(time.time()), **options)
        )
        rpc = await stack.enter_async_context(SolanaRpc(f"http://127.0.0.1:{port}"))
        placed = await deploy(rpc, signers=[str(s.pubkey()) for s in SIGNERS], gas_payer=str(GAS.pubkey()))
        await fund(rpc, placed.multisig, usdc=Micro(10**9))
        made = MultisigRail(rpc, placed.terms, GAS)
        while await rpc.account(placed.nonce_account, "finalized") is None:
            await asyncio.sleep(0.01)
        yield made


def some_lines() -> list[PayoutLine]:
    wallets = [Keypair.from_seed((1000 + n).to_bytes(32)) for n in range(COUNT)]
    return [
        PayoutLine(f"p{n}", str(wallet.pubkey()), Micro(10_000_000 + n)) for n, wallet in enumerate(wallets)
    ]


def the_table(unsigned: Unsigned) -> tuple[str, list[str]]:
    ((table, contents),) = json.loads(unsigned.context["lookup_tables"])
    return table, contents


async def test_a_table_is_made_confirmed_used_and_its_rent_comes_back(rail: MultisigRail) -> None:
    unsigned = await rail.prepare(some_lines())
    table, contents = the_table(unsigned)
    assert tuple(contents) == escrow.table_contents(rail.terms, some_lines())
    assert await tables.agreed([rail._rpc], table, contents) == 1
    signed = await rail.assemble(unsigned, [escrow.approve(unsigned, s) for s in SIGNERS[:2]])
    await rail.broadcast(signed)
    while (landed := await rail.landed(signed)) is None:
        await asyncio.sleep(0.01)
    assert landed.is_success
    payees = escrow.table_contents(rail.terms, some_lines())[3:]
    balances = await rail._rpc.accounts(list(payees), "finalized")
    assert [int.from_bytes(b.bytes()[64:72], "little") for b in balances if b] == [
        10_000_000 + n for n in range(COUNT)
    ]

    async def lamports() -> int:
        gas = await rail._rpc.account(str(GAS.pubkey()), "confirmed")
        assert gas is not None
        return gas.lamports

    before = await lamports()
    for _ in range(2000):
        if await rail.retire_tables(unsigned.context):
            break
        await asyncio.sleep(0.01)
    assert await rail._rpc.account(table, "confirmed") is None
    assert await lamports() - before > 5_000_000, "the rent of 19 addresses, less two fees"
    assert await rail.retire_tables(unsigned.context), "nothing is left to do"


async def test_a39_a_table_that_holds_somebody_else_is_signed_by_nobody(rail: MultisigRail) -> None:
    """A consistent export on a table whose entry is a thief's: the settler's own signature is missing."""
    lines = some_lines()
    right = escrow.table_contents(rail.terms, lines)
    thief = escrow.table_contents(rail.terms, [PayoutLine("t", str(Keypair().pubkey()), Micro(1))])[3]
    table = await tables.make(rail._rpc, GAS, (*right[:5], thief, *right[6:]))
    fence = await rail._settled_fence()
    terms = replace(rail.terms, lookup_tables=((table, right),))  # what the export claims
    unsigned = escrow.build(terms, escrow.PAYOUT, lines, fence)
    approvals = [escrow.approve(unsigned, s) for s in SIGNERS[:2]]
    with pytest.raises(tables.TableMismatch):
        await rail.assemble(unsigned, approvals)
    with pytest.raises(tables.TableMismatch):
        await tables.agreed([rail._rpc], str(Keypair().pubkey()), right)


class Says:
    """A provider that says one thing of every table."""

    def __init__(self, rpc: SolanaRpc, table: str | None) -> None:
        self.rpc, self.table = rpc, table

    async def account(self, key: str, commitment: str) -> object:
        if self.table is None:
            raise RpcUnavailable("no answer")
        return await self.rpc.account(self.table, commitment)


async def test_a_table_is_believed_of_more_than_half_and_of_nobody_who_differs(rail: MultisigRail) -> None:
    right = escrow.table_contents(rail.terms, some_lines())
    table, other = [
        await tables.make(rail._rpc, GAS, content) for content in (right, (*right[:-1], right[0]))
    ]
    true, silent, lying = (Says(rail._rpc, said) for said in (table, None, other))
    assert await tables.agreed([true, true, silent], table, right) == 2
    with pytest.raises(RpcUnavailable):
        await tables.agreed([true, silent], table, right)
    with pytest.raises(ProvidersDisagree):
        await tables.agreed([true, true, lying], table, right)
    with pytest.raises(tables.TableMismatch):
        await tables.agreed([lying, lying], table, right)


async def test_providers_some_slots_behind_a_new_table_are_waited_for(rail: MultisigRail) -> None:
    """They show no table, or its beginning: neither is another opinion, and nobody halts for it."""
    right = escrow.table_contents(rail.terms, some_lines())
    table, begun = [await tables.make(rail._rpc, GAS, content) for content in (right, right[:-3])]
    there, before, short = (Says(rail._rpc, one) for one in (table, str(Keypair().pubkey()), begun))
    for behind in (before, short):
        with pytest.raises(RpcUnavailable):
            await tables.agreed([there, behind, behind], table, right)
        assert await tables.agreed([there, there, behind], table, right) == 2
    catches_up = Says(rail._rpc, str(Keypair().pubkey()))
    waiting = asyncio.create_task(tables.agreed_soon([catches_up, catches_up], table, right))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    catches_up.table = table
    assert await asyncio.wait_for(waiting, 5) == 2


async def test_whoever_cannot_be_paid_is_named_before_a_table_is_made(rail: MultisigRail) -> None:
    lines = some_lines()
    lines[14] = replace(lines[14], amount=Micro(10**12))  # more than the escrow has; in the second part
    with pytest.raises(LineReverted) as caught:
        await rail.prepare(lines)
    assert caught.value.payout_id == "p14"
    assert rail._abandoned == []


async def test_a39_a_signer_needs_his_own_providers_word_on_a_table(
    engine: AsyncEngine, tmp_path: Path
) -> None:
    """From requests to FINAL with 14 payees: refused without a witness, or with another content."""
    (tmp_path / "vm").mkdir()
    clock = SystemClock()
    async with a_solana_rig(tmp_path, 14 * 10_000_000) as rig:
        rig.chains_file.write_text(rig.chains.model_dump_json())
        for n in range(14):
            await requested_by_somebody(engine, rig, rig.new_wallet(n))
        stop = asyncio.Event()
        running = asyncio.create_task(
            service.settle(
                engine,
                rig.chains,
                clock,
                stop,
                settler_dir=rig.folder,
                which=[Chain.SOLANA],
                schedule=Schedule(tick_s=0.05),
            )
        )
        asked = await commands.plan(engine, clock, Chain.SOLANA, asked_by="ada", wait_s=30)
        assert asked.batch_id is not None, asked.outcome
        export = tmp_path / "export.json"
        export.write_bytes(await commands.export(engine, asked.batch_id))
        sign = partial(commands.sign, export, chains_file=rig.chains_file, passphrase=PASSPHRASE)
        with pytest.raises(ExportRefused, match="tollway batch witness"):
            sign(rig.keystores[0])
        witness = await commands.witness(export, chains_file=rig.chains_file)
        true = witness.read_bytes()
        witness.write_bytes(true.replace(rig.escrow.encode(), rig.chains.solana.multisig.encode()))
        with pytest.raises(ExportRefused, match="tollway batch witness"):
            sign(rig.keystores[0], witness_file=witness)
        witness.write_bytes(true)
        for keystore in rig.keystores[:2]:
            document, _ = sign(keystore, witness_file=witness)
            await commands.approve(engine, rig.chains, clock, signing.encode(document), pushed_by="bo")
        for _ in range(400):
            batch, *_ = await commands.show(engine, asked.batch_id)
            if batch.status is Payout.FINAL:
                break
            await asyncio.sleep(0.05)
        stop.set()
        await running
        assert batch.status is Payout.FINAL, batch.trouble
        assert [await rig.usdc_of(rig.new_wallet(n)) for n in range(14)] == [10_000_000] * 14


async def requested_by_somebody(engine: AsyncEngine, rig: Rig, wallet: str) -> None:
    person, now = await a_person(engine), SystemClock().now()
    await earn(engine, person, 10, rig.chain)
    async with transaction(engine) as conn:
        await address_book.add(
            conn, person=person, chain=rig.chain, text=wallet, forbidden=(), cooling_s=0, now=now
        )
        await withdrawals.request(
            conn, person=person, chain=rig.chain, address=wallet, amount=None, key="k", limits=LIMITS, now=now
        )
