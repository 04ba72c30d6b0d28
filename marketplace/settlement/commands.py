"""What the command line calls; plain arguments in, plain values out, nothing printed.

`sign` is for a signer's own machine: no database, no network.  The rest works on the book.
"""

from __future__ import annotations

import asyncio
import getpass
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from chain.networks import Chain
from chain.payouts import Payout
from chain.units import Micro
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.platform.settings import ChainsConfig, load_chains
from marketplace.settlement import (
    batches,
    halts,
    kyc,
    payout_rules,
    plan_requests,
    sanctions,
    signing,
    treasury,
)
from marketplace.settlement.consents import consent_of
from marketplace.settlement.earnings import Reserve
from marketplace.settlement.errors import ExportRefused
from marketplace.settlement.payout_rules import PayoutRules
from marketplace.settlement.plan_requests import PlanRequest
from marketplace.settlement.rails import confirm_table, open_rails
from marketplace.settlement.settler import Settler
from marketplace.settlement.signing import ApprovalDocument, Expected, Review

PASSPHRASE_VARIABLE: Final = "TOLLWAY_SIGNER_PASSPHRASE"  # noqa: S105 - its name, not its value
PLAN_WAIT_S: Final = 60.0


def read_passphrase(keystore: Path) -> str:
    """The keystore's passphrase: TOLLWAY_SIGNER_PASSPHRASE, else asked for on the terminal."""
    given = os.environ.get(PASSPHRASE_VARIABLE)
    return given if given is not None else getpass.getpass(f"Passphrase of {keystore}: ")


def create_keystore(chain: Chain, path: Path, passphrase: str) -> str:
    """Make a signer's key for one chain's multisig and give its address; never overwrites a file."""
    if chain is Chain.SOLANA:
        from chain.solana import keystore as solana_keystore

        return solana_keystore.create(path, passphrase)
    from chain.evm import keystore as evm_keystore

    return evm_keystore.create(path, passphrase)


def sign(
    export_file: Path,
    keystore: Path,
    *,
    chains_file: Path,
    passphrase: str | None = None,
    limit: Micro | None = None,
    recipients: frozenset[str] | None = None,
    witness_file: Path | None = None,
    confirm: Callable[[Review], bool] = lambda _: True,
    approval_file: Path | None = None,
) -> tuple[ApprovalDocument, Path]:
    """Check an export against these settings and sign it; writes the approval beside it unless told where.

    `confirm` is shown what would be signed, rebuilt, and which recipients this signer never signed for: his
    memory is the file `<keystore>.recipients` on his own machine.  If he keeps an address book beside it,
    `<keystore>.addresses` (one a line, # starts a comment), nobody else is paid (A39); `recipients` takes
    its place.  `witness_file`: see `witness`.
    ExportRefused names what does not agree; sanctions.BadList, if it is the address book that cannot be read.
    """
    book = keystore.with_name(f"{keystore.name}.addresses")
    if recipients is None and book.exists():
        recipients = sanctions.read_list(book).addresses
    export = signing.decode_export(_read(export_file))
    witnessed = None if witness_file is None else signing.decode_witness(_read(witness_file))
    memory = keystore.with_name(f"{keystore.name}.recipients")
    before = frozenset(memory.read_text().split()) if memory.exists() else frozenset()
    document = signing.sign_export(
        export,
        consent_of(load_chains(chains_file), export.chain),
        keystore=keystore,
        passphrase=read_passphrase(keystore) if passphrase is None else passphrase,
        expected=Expected(limit=limit, recipients=recipients, signed_before=before, witness=witnessed),
        confirm=confirm,
    )
    target = approval_file or export_file.with_name(f"{export.batch}.{document.signer}.approval.json")
    target.write_bytes(signing.encode(document))
    memory.write_text("\n".join(sorted(before | {line.to for line in export.lines})) + "\n")
    return document, target


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(signing.DOCUMENT_BYTES_MAX + 1)
    except OSError as e:
        raise ExportRefused(f"{path} cannot be read: {e.strerror}") from e


async def witness(export_file: Path, *, chains_file: Path, witness_file: Path | None = None) -> Path:
    """Ask one's own providers what the lookup tables of an export hold; writes the answer for `sign`.

    For a machine of the signer's with a network; no key is needed.  The content asked about is derived
    from the export's lines, not read from it.  ExportRefused, or what `chain.solana.tables.agreed` raises.
    """
    export = signing.decode_export(await asyncio.to_thread(_read, export_file))
    chains = load_chains(chains_file)
    confirmed: dict[str, list[str]] = {}
    providers = 0
    for table, contents in signing.tables_of(export, consent_of(chains, export.chain)).items():
        providers = await confirm_table(chains, table, contents)
        confirmed[table] = list(contents)
    document = signing.Witness(signing.WITNESS_FORMAT, export.batch, confirmed, providers)
    target = witness_file or export_file.with_name(f"{export.batch}.witness.json")
    await asyncio.to_thread(target.write_bytes, signing.encode(document))
    return target


async def plan(
    engine: AsyncEngine, clock: Clock, chain: Chain, *, asked_by: str, wait_s: float = PLAN_WAIT_S
) -> PlanRequest:
    """Ask the settler to plan a batch and wait for its answer; `done_at` None if it gave none in time."""
    async with transaction(engine) as conn:
        asked = await plan_requests.ask(conn, chain=chain, asked_by=asked_by, now=clock.now())
    deadline = clock.monotonic() + wait_s
    while asked.done_at is None and clock.monotonic() < deadline:
        await asyncio.sleep(0.2)
        async with transaction(engine) as conn:
            asked = await plan_requests.find(conn, asked.id)
    return asked


async def show(
    engine: AsyncEngine, batch_id: UUID
) -> tuple[batches.Batch, list[batches.Member], list[str], list[batches.Broadcast]]:
    """A batch, its payouts, who has approved it, and what was sent."""
    async with transaction(engine) as conn:
        return (
            await batches.find_batch(conn, batch_id),
            await batches.members(conn, batch_id),
            [approval.signer for approval in await batches.stored_approvals(conn, batch_id)],
            await batches.stored_broadcasts(conn, batch_id),
        )


async def listing(engine: AsyncEngine, chain: Chain | None = None) -> list[batches.Batch]:
    """The newest batches."""
    async with transaction(engine) as conn:
        return await batches.listing(conn, chain=chain)


async def export(engine: AsyncEngine, batch_id: UUID) -> bytes:
    """The file signers need."""
    async with transaction(engine) as conn:
        return signing.encode(await signing.export_batch(conn, batch_id))


async def approve(
    engine: AsyncEngine, chains: ChainsConfig, clock: Clock, document: bytes, *, pushed_by: str
) -> tuple[UUID, Payout]:
    """Store a signer's approval; gives the batch and its status then."""
    approval = signing.decode_approval(document)
    async with transaction(engine) as conn:
        status = await signing.store_approval(
            conn, consent_of(chains, approval.chain), approval, pushed_by=pushed_by, now=clock.now()
        )
    return UUID(approval.batch), status


async def halt(engine: AsyncEngine, clock: Clock, rail: str, *, actor: str, reason: str) -> None:
    """Stop payouts on a chain, at the bank (`bank`), or all (`payouts`)."""
    async with transaction(engine) as conn:
        await halts.halt(conn, rail=rail, actor=actor, reason=reason, now=clock.now())


async def lift(engine: AsyncEngine, clock: Clock, rail: str, *, actor: str, reason: str) -> None:
    """Let payouts run again."""
    async with transaction(engine) as conn:
        await halts.lift(conn, rail=rail, actor=actor, reason=reason, now=clock.now())


async def status(engine: AsyncEngine, clock: Clock, reserve: Reserve) -> dict[str, Any]:
    """Per chain the batch under way, the halt and the cover; what is broken and what will be short."""
    async with transaction(engine) as conn:
        cover = await treasury.read_cover(conn, now=clock.now(), reserve=reserve)
        rows = []
        for one in cover.chains:
            live = await batches.live_batch(conn, one.chain)
            rows.append(
                {
                    "chain": one.chain.value,
                    "batch": None if live is None else str(live.id),
                    "status": None if live is None else live.status.value,
                    "trouble": "" if live is None else live.trouble,
                    "halted": await halts.halted(conn, one.chain),
                    "escrow": str(one.escrow),
                    "in_flight": str(one.in_flight),
                    "requested": str(one.requested),
                }
            )
    return {"chains": rows, "broken": list(cover.broken()), "warnings": list(cover.warnings())}


async def expire_unsigned(
    engine: AsyncEngine,
    chains: ChainsConfig,
    clock: Clock,
    chain: Chain,
    *,
    settler_dir: Path,
    actor: str,
    reason: str,
) -> None:
    """See `Settler.expire_unsigned`; needs the settler's keys, so it runs on his machine."""
    async with open_rails(chains, settler_dir, [chain]) as rails:
        await Settler(engine, rails[chain], clock).expire_unsigned(actor=actor, reason=reason)


async def rebalance(
    engine: AsyncEngine,
    clock: Clock,
    source: Chain | Literal["card"],
    target: Chain,
    amount: Micro,
    *,
    arrived: str,
    fee: Micro,
    ref: str,
    actor: str,
    reason: str,
) -> None:
    """Book USDC that people moved into a chain's escrow; see `treasury.rebalance`."""
    async with transaction(engine) as conn:
        await treasury.rebalance(
            conn,
            source=source,
            target=target,
            arrived=arrived,
            amount=amount,
            fee=fee,
            ref=ref,
            actor=actor,
            reason=reason,
            now=clock.now(),
        )


async def change_tier(
    engine: AsyncEngine,
    clock: Clock,
    tier: str,
    *,
    withdrawal_max: Micro | None,
    total_max: Micro | None,
    actor: str,
    reason: str,
) -> None:
    """Put other limits of a KYC tier in force; None: no limit."""
    async with transaction(engine) as conn:
        await kyc.change_tier(
            conn,
            tier,
            withdrawal_max=withdrawal_max,
            total_max=total_max,
            actor=actor,
            reason=reason,
            now=clock.now(),
        )


async def change_rules(
    engine: AsyncEngine, clock: Clock, rules: PayoutRules, *, actor: str, reason: str
) -> None:
    """Put other payout rules in force."""
    async with transaction(engine) as conn:
        await payout_rules.change(conn, rules, actor=actor, reason=reason, now=clock.now())
