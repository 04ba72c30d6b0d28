"""What settlement costs and how fast it is, on real anvil (Base), the Solana VM and PostgreSQL.

- `gas_per_payout`: gas of a Safe batch ÷ payouts, to holders who have USDC already; `plain_transfer_gas`
  is one USDC transfer from an ordinary wallet; a batch of 1 is what 1-by-1 Safe transactions cost.
- `solana_payouts_per_tx`, `solana_lamports_per_payout`: what the rail really sends, fees of all signatures;
  making and closing the lookup table is four or five more fees of 5,000 lamports, and its rent comes back.
- `plan_100k_s`: 100,000 operators with earnings and a waiting withdrawal each: read every operator's earnings
  and maturity in pages of constant size, then freeze the first batch of 300.
- `batch_300_s`: 300 requested withdrawals from plan to FINAL: dry run, two keystores, broadcast, finality.

    make bench NAME=settlement
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

sys.path.insert(0, str(Path(__file__).parent.parent))

import structlog

from chain.evm.gas import GasPayer
from chain.evm.keystore import sign_digest
from chain.evm.payouts import LABEL, SafeRail
from chain.evm.rpc import JsonRpc
from chain.localnet import evm as anvil
from chain.localnet import solana as solana_vm
from chain.networks import BASE, Chain
from chain.payouts import Payout
from chain.ports import Approval, PayoutLine
from chain.solana import escrow as solana_escrow
from chain.solana import keystore as solana_keystore
from chain.solana.payouts import MultisigRail
from chain.solana.rpc import SolanaRpc
from chain.units import Micro
from marketplace.platform import database
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction
from marketplace.platform.embedded_postgres import EmbeddedPostgres
from marketplace.settlement import batches, earnings, planner
from marketplace.settlement.planner import LINES_MAX
from marketplace.settlement.settler import Pace, Settler
from marketplace.settlement.signing import (
    APPROVAL_FORMAT,
    ApprovalDocument,
    check_export,
    export_batch,
    store_approval,
)
from marketplace.settlement.simulated_rail import SimulatedRail

SIZES: Final = (1, 10, 100, 300)
OPERATORS: Final = 100_000
OWNERS: Final = tuple(bytes([n]) * 32 for n in (1, 2, 3))
GAS_KEY: Final = bytes([4]) * 32
RESERVE: Final = earnings.Reserve(usdc_s=86_400, card_s=7 * 86_400)


def say(line: str) -> None:
    print(line, flush=True)


def wallet(n: int) -> str:
    return anvil.address_of((1_000_000 + n).to_bytes(32))


# ── EVM ───────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def base_chain(folder: Path) -> AsyncIterator[tuple[JsonRpc, SafeRail]]:
    from chain.localnet import settings as localnet_settings

    settings = localnet_settings.read().base
    owners = [anvil.address_of(key) for key in OWNERS]
    async with await anvil.Anvil.start(BASE, settings, folder) as node, JsonRpc(node.url) as rpc:
        placed = await anvil.deploy(rpc, BASE, settings, owners)
        await anvil.fund(rpc, BASE, anvil.address_of(GAS_KEY), eth_wei=10**20)
        await anvil.fund(rpc, BASE, placed.safe, usdc=Micro(10**12))
        yield rpc, SafeRail(placed.terms(), rpc, GasPayer(rpc, BASE.chain_id, GAS_KEY))


def approvals(unsigned: Any) -> list[Approval]:
    return [
        Approval(anvil.address_of(key), {LABEL: sign_digest(key, unsigned.messages[LABEL])})
        for key in OWNERS[:2]
    ]


async def gas_used(rpc: JsonRpc, tx: str) -> int:
    for _ in range(200):
        receipt = await rpc.call("eth_getTransactionReceipt", tx, shape=dict[str, Any] | None)  # type: ignore[arg-type]  # a union is a shape too
        if receipt is not None:
            assert receipt["status"] == "0x1"
            return int(receipt["gasUsed"], 16)
        await asyncio.sleep(0.02)
    raise AssertionError(f"{tx} is not mined")


async def measure_gas(rpc: JsonRpc, rail: SafeRail) -> tuple[dict[str, int], int]:
    async def pay(count: int) -> int:
        lines = [PayoutLine(f"p{n}", wallet(n), Micro(10_000_000 + n)) for n in range(count)]
        unsigned = await rail.prepare(lines)
        signed = await rail.assemble(unsigned, approvals(unsigned))
        await rail.broadcast(signed)
        return await gas_used(rpc, signed.tx)

    first = await pay(max(SIZES))
    say(f"300 payouts to new holders: {first // max(SIZES):,} gas each")
    found = {}
    for size in SIZES:
        found[str(size)] = await pay(size) // size
        say(f"{size} payouts to holders: {found[str(size)]:,} gas each")
    sender = bytes([7]) * 32
    await anvil.fund(rpc, BASE, anvil.address_of(sender), eth_wei=10**18, usdc=Micro(10**9))
    plain = await gas_used(rpc, await anvil.pay_usdc(rpc, BASE, sender, wallet(0), Micro(1_000_000)))
    say(f"a plain transfer: {plain:,} gas")
    return found, plain


# ── Solana ────────────────────────────────────────────────────────────────────────────────────────────────


async def measure_solana(folder: Path) -> tuple[int, int]:
    from chain.localnet.solana_vm.server import serving

    keys = [solana_keystore.from_seed(bytes([n]) * 32) for n in (1, 2, 3, 4)]
    options: Any = {"slot_ms": 10, "finalized_after": 8, "empty_every": 0}
    async with (
        serving(folder, port=0, clock=lambda: int(time.time()), **options) as (port, _),
        SolanaRpc(f"http://127.0.0.1:{port}") as rpc,
    ):
        gas = keys[3]
        placed = await solana_vm.deploy(
            rpc, signers=[str(k.pubkey()) for k in keys[:3]], gas_payer=str(gas.pubkey())
        )
        await solana_vm.fund(rpc, placed.multisig, usdc=Micro(10**10))
        rail = MultisigRail(rpc, placed.terms, gas)
        for _ in range(200):
            if await rpc.account(placed.nonce_account, "finalized") is not None:
                break
            await asyncio.sleep(0.05)
        wallets = [
            str(solana_keystore.from_seed((500 + n).to_bytes(32)).pubkey()) for n in range(rail.max_lines)
        ]
        lines = [PayoutLine(f"p{n}", to, Micro(10_000_000)) for n, to in enumerate(wallets)]
        unsigned = await rail.prepare(lines)
        before = await lamports(rpc, placed.gas_payer)
        signed = await rail.assemble(unsigned, [solana_escrow.approve(unsigned, key) for key in keys[:2]])
        await rail.broadcast(signed)
        for _ in range(200):
            if await rail.landed(signed) is not None:
                break
            await asyncio.sleep(0.05)
        spent = before - await lamports(rpc, placed.gas_payer)
    say(f"Solana: {len(lines)} payouts in one transaction, {spent} lamports in all (token accounts exist)")
    return len(lines), spent // len(lines)


async def lamports(rpc: SolanaRpc, key: str) -> int:
    account = await rpc.account(key, "confirmed")
    assert account is not None
    return int(account.lamports)


# ── the book ──────────────────────────────────────────────────────────────────────────────────────────────


SEED: Final = (
    "INSERT INTO people (id, display_name) SELECT person, 'bench' FROM seeds",
    "INSERT INTO accounts (kind, owner) SELECT 'operator_earnings', person::text FROM seeds",
    """
    UPDATE seeds s SET account = a.id FROM accounts a
    WHERE a.kind = 'operator_earnings' AND a.owner = s.person::text""",
    """
    INSERT INTO balances (account_id, posted, held, floor)
    SELECT account, 20000000000, 20000000000, 0 FROM seeds""",
    """
    INSERT INTO holds (id, account, amount, reason)
    SELECT hold, account, 20000000000, 'bench' FROM seeds""",
    """
    INSERT INTO withdrawals (id, person_id, chain, address, amount_micro, status, idempotency_key, input_hash,
                             hold_id, created_at, changed_at)
    SELECT gen_random_uuid(), person, :chain, address, 20000000, 'requested', 'k', sha256(address::bytea),
           hold, now(), now()
    FROM seeds""",
    "ANALYZE",
)


async def seed(engine: AsyncEngine, chain: Chain, count: int, addresses: bool) -> None:
    """Operators with $20 each, all of it requested; the escrow holds it."""
    from marketplace.ledger import accounts as ledger_accounts
    from marketplace.ledger.accounts import ensure_account

    async with transaction(engine) as conn:
        escrow = await ensure_account(conn, ledger_accounts.escrow(chain.value))
        await ensure_account(conn, ledger_accounts.payouts_in_flight(chain.value))
        await conn.execute(
            text("UPDATE balances SET posted = posted - :nano WHERE account_id = :id"),
            {"nano": count * 20 * 10**9, "id": escrow},
        )
        await conn.execute(text("DROP TABLE IF EXISTS seeds"))
        await conn.execute(
            text("CREATE TEMP TABLE seeds (n INTEGER, person UUID, hold UUID, address TEXT, account BIGINT)")
        )
        rows = [{"n": n, "address": wallet(n) if addresses else f"0x{n + 10**39:040d}"} for n in range(count)]
        for start in range(0, count, 10_000):
            await conn.execute(
                text("INSERT INTO seeds VALUES (:n, gen_random_uuid(), gen_random_uuid(), :address, NULL)"),
                rows[start : start + 10_000],
            )
        for statement in SEED:
            parameters = {"chain": chain.value} if ":chain" in statement else {}
            await conn.execute(text(statement), parameters)


async def measure_plan(engine: AsyncEngine) -> float:
    await seed(engine, Chain.BASE, OPERATORS, addresses=False)
    rail, clock = SimulatedRail(), SystemClock()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    seen = total = 0
    async with transaction(engine) as conn:
        async for page in earnings.pages(conn, now=clock.now(), reserve=RESERVE):
            seen += len(page)
            total += sum(found.posted.n for _, found in page)
    planned = await planner.plan(engine, rail, clock, planned_by="bench")
    took = time.perf_counter() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
    assert (seen, total, planned.count) == (OPERATORS, OPERATORS * 20 * 10**9, LINES_MAX)
    say(
        f"{seen:,} operators read and a batch of {planned.count} planned in {took:.2f} s; "
        f"memory grew {grown} KiB"
    )
    return took


async def measure_batch(engine: AsyncEngine, rpc: JsonRpc, rail: SafeRail) -> float:
    await seed(engine, Chain.BASE, LINES_MAX, addresses=True)
    clock = SystemClock()
    began = time.perf_counter()
    planned = await planner.plan(engine, rail, clock, planned_by="ada")
    say(f"  planned {planned.count} after {time.perf_counter() - began:.2f} s")
    async with transaction(engine) as conn:
        export = await export_batch(conn, planned.batch_id)
    unsigned, _ = check_export(export, rail)
    for approval in approvals(unsigned):
        document = ApprovalDocument(
            APPROVAL_FORMAT, export.batch, export.chain, export.digest, approval.signer,
            batches.signatures_to_hex(approval.signatures),
        )  # fmt: skip
        async with transaction(engine) as conn:
            await store_approval(conn, rail, document, pushed_by="bo", now=clock.now())
    settler = Settler(engine, rail, clock, pace=Pace())
    while True:
        await settler.tick()
        async with transaction(engine) as conn:
            batch = await batches.find_batch(conn, planned.batch_id)
        if batch.status is Payout.FINAL:
            break
        assert not batch.trouble, batch.trouble
        await anvil.mine(rpc, 8)
        await asyncio.sleep(0.05)
    took = time.perf_counter() - began
    say(f"a batch of {planned.count}: plan to FINAL in {took:.2f} s")
    return took


@asynccontextmanager
async def book(server: EmbeddedPostgres, name: str) -> AsyncIterator[AsyncEngine]:
    url = server.url(name)
    await database.create_database(url)
    await asyncio.to_thread(database.migrate, url)
    engine = database.connect(url, role=None)
    try:
        yield engine
    finally:
        await engine.dispose()


def prepare(folder: Path) -> None:
    folder.chmod(0o755)  # as root, the database server runs as somebody else
    for part in ("anvil", "vm"):
        (folder / part).mkdir()


async def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    with tempfile.TemporaryDirectory(prefix="tollway-bench-") as name:
        folder = Path(name)
        prepare(folder)
        server = EmbeddedPostgres(folder / "postgres")
        await asyncio.to_thread(server.start)
        try:
            per_tx, per_payout = await measure_solana(folder / "vm")
            async with base_chain(folder / "anvil") as (rpc, rail):
                gas, plain = await measure_gas(rpc, rail)
                async with book(server, "batch") as engine:
                    batch_s = await measure_batch(engine, rpc, rail)
            async with book(server, "plan") as engine:
                plan_s = await measure_plan(engine)
        finally:
            await asyncio.to_thread(server.stop)
    result = {
        "gas_per_payout": gas,
        "plain_transfer_gas": plain,
        "solana_payouts_per_tx": per_tx,
        "solana_lamports_per_payout": per_payout,
        "plan_100k_s": round(plan_s, 2),
        "batch_300_s": round(batch_s, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    asyncio.run(main())
