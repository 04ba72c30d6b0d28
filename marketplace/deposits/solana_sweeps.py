"""Solana's sweeps: what lies on pool accounts reaches the escrow when enough signers agree.

    prepared ──threshold approvals──▶ signed (bytes stored, then sent) ──landed, watcher past it──▶ final
       │                                 │
       └────────────── void ◀────────────┘  cancelled, failed on chain, or its fence was spent by another

`SolanaSweeper.tick`, in the one process that settles Solana, prepares a sweep when it is worth it, and sends
it when it is approved; in between, signers take `export` to their own machines, `sign` it there (lines and
fence only: everything else comes from their own chains file, so a sweep can pay nobody but the pinned escrow)
and bring the approval back.  One sweep at a time, on a durable nonce of its own.  The ledger is moved by the
watcher alone, when it finds the movement final on chain (`attribution.part_sweeps`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import UUID

import msgspec
import structlog
from sqlalchemy import Row, func, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chain.errors import ChainRefusal
from chain.networks import Chain
from chain.ports import Approval, SignedTransaction, Unsigned
from chain.solana import escrow, keystore
from chain.solana import sweeps as chain_sweeps
from chain.solana.escrow import EscrowTerms
from chain.solana.payouts import MultisigRail
from chain.solana.rpc import SolanaRpc
from chain.units import Micro
from marketplace.deposits.booking import open_case
from marketplace.deposits.errors import SweepRefused
from marketplace.deposits.tables import (
    chain_cursors,
    deposits,
    solana_pool,
    solana_sweep_approvals,
    solana_sweeps,
    sweeps,
)
from marketplace.platform.clock import Clock
from marketplace.platform.database import transaction
from marketplace.platform.ids import uuid7
from marketplace.platform.settings import SolanaChainConfig

FORMAT: Final = "tollway-solana-sweep-1"
DOCUMENT_BYTES_MAX: Final = 64_000
T = TypeVar("T")

LIVE: Final = ("prepared", "signed")
SETTLER: Final = "settler"
REBROADCAST_S: Final = 30.0
_log: Final = structlog.get_logger("marketplace.deposits")


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One account and what leaves it."""

    account: str
    amount_micro: int


class SweepExport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a signer takes to his own machine."""

    format: str
    sweep: str
    fence: str
    lines: tuple[Line, ...]


class SweepApproval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What he brings back; signatures in hex, by message label."""

    format: str
    sweep: str
    signer: str
    signatures: dict[str, str]


@dataclass(frozen=True, slots=True)
class SolanaSweepPolicy:
    """When a sweep is worth its signers' trouble."""

    account_micro_min: int = 1_000_000
    total_micro_min: int = 5_000_000


def pinned_terms(config: SolanaChainConfig) -> EscrowTerms:
    """The escrow as these settings have it, on the sweeps' own nonce."""
    return EscrowTerms(
        mint=config.usdc_mint,
        multisig=config.multisig,
        signers=config.signers,
        threshold=config.threshold,
        escrow=config.escrow,
        gas_payer=config.gas_payer,
        nonce_account=chain_sweeps.sweep_nonce_address(config.gas_payer),
    )


# ── signing ───────────────────────────────────────────────────────────────────────────────────────────


async def export_sweep(conn: AsyncConnection, sweep_id: UUID | None = None) -> SweepExport:
    """The sweep that waits for signers; SweepRefused if there is none."""
    row = await _live(conn, sweep_id)
    if row is None or row.status != "prepared":
        raise SweepRefused("no sweep waits for signers")
    return SweepExport(FORMAT, str(row.id), row.fence, _lines(row))


def decode_export(raw: bytes) -> SweepExport:
    """Read an export file; SweepRefused if it is not one."""
    return _decode(raw, SweepExport)


def decode_approval(raw: bytes) -> SweepApproval:
    """Read an approval file; SweepRefused if it is not one."""
    return _decode(raw, SweepApproval)


def sign_sweep(
    export: SweepExport, config: SolanaChainConfig, key_file: Path, passphrase: str
) -> SweepApproval:
    """Sign a sweep offline, from the signer's own settings: it can only move money into their escrow.

    Raises SweepRefused, or the keystore's own errors (ValueError).
    """
    unsigned = _rebuild(pinned_terms(config), export.fence, export.lines)
    try:
        approval = escrow.approve(unsigned, keystore.load(key_file, passphrase))
    except ChainRefusal as e:
        raise SweepRefused(str(e)) from e
    signatures = {label: signature.hex() for label, signature in approval.signatures.items()}
    return SweepApproval(FORMAT, export.sweep, approval.signer, signatures)


async def store_approval(
    conn: AsyncConnection,
    config: SolanaChainConfig,
    document: SweepApproval,
    *,
    brought_by: str,
    clock: Clock,
) -> int:
    """Verify and keep an approval; gives how many there are now.  Raises SweepRefused."""
    row = await _live(conn, _uuid(document.sweep))
    if row is None or row.status != "prepared":
        raise SweepRefused(f"sweep {document.sweep[:60]} does not wait for signers")
    try:
        approval = Approval(document.signer, {k: bytes.fromhex(v) for k, v in document.signatures.items()})
        escrow.verify(_rebuild(pinned_terms(config), row.fence, _lines(row)), approval)
    except (ChainRefusal, ValueError) as e:
        raise SweepRefused(str(e)) from e
    await conn.execute(
        postgresql.insert(solana_sweep_approvals)
        .values(
            sweep_id=row.id,
            signer=document.signer,
            signatures=document.signatures,
            brought_by=brought_by,
            at=clock.now(),
        )
        .on_conflict_do_nothing()
    )
    return len(await _approvals(conn, row.id))


async def cancel_sweep(
    conn: AsyncConnection, sweep_id: UUID, *, actor: str, reason: str, clock: Clock
) -> None:
    """Give up a sweep nobody has sent; its money waits for the next.  SweepRefused once it is signed."""
    cancelled = await conn.scalar(
        update(solana_sweeps)
        .where(solana_sweeps.c.id == sweep_id, solana_sweeps.c.status == "prepared")
        .values(status="void", ended_at=clock.now(), note=f"cancelled by {actor}: {reason}"[:1000])
        .returning(solana_sweeps.c.id)
    )
    if cancelled is None:
        raise SweepRefused(f"sweep {sweep_id} does not wait for signers")


async def newest(conn: AsyncConnection, limit: int = 20) -> Sequence[Row[Any]]:
    """The newest sweeps with how many approvals each has."""
    approvals = (
        select(func.count())
        .where(solana_sweep_approvals.c.sweep_id == solana_sweeps.c.id)
        .scalar_subquery()
        .label("approvals")
    )
    statement = select(solana_sweeps, approvals).order_by(solana_sweeps.c.id.desc()).limit(limit)
    return (await conn.execute(statement)).all()


# ── the settler's part ────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class SolanaSweeper:
    """Prepares, sends and follows sweeps; call `tick` in a loop from the one process that settles Solana."""

    engine: AsyncEngine
    clock: Clock
    rpc: SolanaRpc
    rail: MultisigRail
    """On the sweeps' terms (`pinned_terms`)."""
    ensure_nonce: Callable[[], Awaitable[object]]
    """Makes the sweeps' nonce account; called before the first sweep of this process."""
    policy: SolanaSweepPolicy = field(default_factory=SolanaSweepPolicy)
    prepared_by: str = SETTLER
    _last_sent: float | None = None
    _is_nonce_there: bool = False

    async def tick(self) -> bool:
        """Make one step; False if there is nothing to do.  Raises ChainError; calling again is safe."""
        async with transaction(self.engine) as conn:
            row = await _live(conn, None)
        if row is None:
            return await self._prepare()
        if row.status == "prepared":
            return await self._assemble(row)
        return await self._follow(row)

    async def _prepare(self) -> bool:
        async with transaction(self.engine) as conn:
            accounts = await _filled_accounts(conn, self.policy.account_micro_min)
        if not accounts:
            return False
        terms = self.rail.terms
        minimum = Micro(self.policy.account_micro_min)
        moves = await chain_sweeps.due(self.rpc, terms, accounts, minimum=minimum)
        await self._report_obstacles(accounts)
        moves = chain_sweeps.fitting(terms, moves)
        total = sum(amount.n for _, amount in moves)
        if total < self.policy.total_micro_min or not moves:
            return False
        if not self._is_nonce_there:
            await self.ensure_nonce()
            self._is_nonce_there = True
        unsigned = await self.rail.prepare_sweep(moves)
        statement = (
            postgresql.insert(solana_sweeps)
            .values(
                id=uuid7(),
                status="prepared",
                fence=unsigned.fence,
                lines=[{"account": account, "amount_micro": amount.n} for account, amount in moves],
                amount_micro=total,
                prepared_by=self.prepared_by,
                prepared_at=self.clock.now(),
            )
            .on_conflict_do_nothing()
        )
        async with transaction(self.engine) as conn:
            await conn.execute(statement)
        _log.info("solana sweep waits for signers", accounts=len(moves), amount_micro=total)
        return False  # now it is the signers' turn

    async def _report_obstacles(self, accounts: Sequence[str]) -> None:
        for account, why in await chain_sweeps.obstacles(self.rpc, self.rail.terms, accounts):
            async with transaction(self.engine) as conn:
                await open_case(
                    conn,
                    Chain.SOLANA,
                    kind="account_unsweepable",
                    key=account,
                    detail=f"{account}: {why}",
                    now=self.clock.now(),
                )
                if (
                    why == chain_sweeps.NO_DELEGATE
                ):  # a fork may have taken the approval: the pool keeper renews it
                    await conn.execute(
                        update(solana_pool)
                        .where(solana_pool.c.token_account == account)
                        .values(ready_at=None)
                    )

    async def _assemble(self, row: Row[Any]) -> bool:
        """At the threshold, put the transaction together and store its bytes, before anything is sent."""
        async with transaction(self.engine) as conn:
            approvals = await _approvals(conn, row.id)
        if len(approvals) < self.rail.threshold:
            return False
        unsigned = _rebuild(self.rail.terms, row.fence, _lines(row))
        signed = await self.rail.assemble(unsigned, approvals)
        async with transaction(self.engine) as conn:
            await conn.execute(
                update(solana_sweeps)
                .where(solana_sweeps.c.id == row.id, solana_sweeps.c.status == "prepared")
                .values(status="signed", raw=signed.raw, tx=signed.tx)
            )
        self._last_sent = None
        return True

    async def _follow(self, row: Row[Any]) -> bool:
        signed = SignedTransaction(bytes(row.raw), row.tx, row.fence)
        landed = await self.rail.landed(signed)
        if landed is not None and not landed.is_success:
            await self._end(row.id, "void", "it failed on chain")
            return True
        if landed is not None:
            async with transaction(self.engine) as conn:
                height = await conn.scalar(
                    select(chain_cursors.c.final_height).where(chain_cursors.c.chain == Chain.SOLANA.value)
                )
            if height is None or height < landed.height:
                return False
            await self._end(row.id, "final", None)
            return True
        # Asked in this order: a fence seen unspent now was unspent when `landed` said no.
        if await self.rail.is_fence_spent(row.fence) and await self.rail.landed(signed) is None:
            await self._end(row.id, "void", "its fence was spent by another transaction")
            return True
        now = self.clock.monotonic()
        if self._last_sent is None or now - self._last_sent >= REBROADCAST_S:
            self._last_sent = now
            await self.rail.broadcast(signed)
            _log.info("solana sweep sent", tx=row.tx)
        return False

    async def _end(self, sweep_id: UUID, status: str, note: str | None) -> None:
        async with transaction(self.engine) as conn:
            await conn.execute(
                update(solana_sweeps)
                .where(solana_sweeps.c.id == sweep_id)
                .values(status=status, ended_at=self.clock.now(), note=note)
            )
        _log.info("solana sweep ended", sweep=str(sweep_id), status=status, note=note)


def solana_sweeper(
    engine: AsyncEngine,
    clock: Clock,
    rpc: SolanaRpc,
    config: SolanaChainConfig,
    *,
    gas_seed: bytes,
    policy: SolanaSweepPolicy | None = None,
) -> SolanaSweeper:
    """A sweeper on the real chain; `gas_seed` is the fee payer's and cannot move anything else."""
    gas_key = keystore.from_seed(gas_seed)
    rail = MultisigRail(rpc, pinned_terms(config), gas_key)

    async def ensure_nonce() -> str:
        return await chain_sweeps.ensure_sweep_nonce(rpc, gas_key)

    return SolanaSweeper(engine, clock, rpc, rail, ensure_nonce, policy or SolanaSweepPolicy())


async def _filled_accounts(conn: AsyncConnection, micro_min: int) -> list[str]:
    """Pool accounts on which the books say that at least so much lies."""
    received = (
        select(deposits.c.to_address.label("account"), func.sum(deposits.c.amount_micro).label("total"))
        .where(deposits.c.chain == Chain.SOLANA.value, deposits.c.status == "final", ~deposits.c.is_direct)
        .group_by(deposits.c.to_address)
        .subquery()
    )
    gone = (
        select(sweeps.c.from_address.label("account"), func.sum(sweeps.c.amount_micro).label("total"))
        .where(sweeps.c.chain == Chain.SOLANA.value)
        .group_by(sweeps.c.from_address)
        .subquery()
    )
    left = received.c.total - func.coalesce(gone.c.total, 0)
    statement = (
        select(solana_pool.c.token_account)
        .join(received, received.c.account == solana_pool.c.token_account)
        .outerjoin(gone, gone.c.account == solana_pool.c.token_account)
        .where(left >= max(micro_min, 1))
        .order_by(left.desc(), solana_pool.c.token_account)
        .limit(chain_sweeps.ACCOUNTS_PER_REQUEST)
    )
    return list(await conn.scalars(statement))


async def _live(conn: AsyncConnection, sweep_id: UUID | None) -> Row[Any] | None:
    statement = select(solana_sweeps).where(solana_sweeps.c.status.in_(LIVE))
    if sweep_id is not None:
        statement = statement.where(solana_sweeps.c.id == sweep_id)
    return (await conn.execute(statement)).one_or_none()


async def _approvals(conn: AsyncConnection, sweep_id: UUID) -> list[Approval]:
    rows = await conn.execute(
        select(solana_sweep_approvals.c.signer, solana_sweep_approvals.c.signatures)
        .where(solana_sweep_approvals.c.sweep_id == sweep_id)
        .order_by(solana_sweep_approvals.c.signer)
    )
    return [
        Approval(row.signer, {label: bytes.fromhex(text) for label, text in row.signatures.items()})
        for row in rows
    ]


def _lines(row: Row[Any]) -> tuple[Line, ...]:
    return msgspec.convert(row.lines, tuple[Line, ...])


def _rebuild(terms: EscrowTerms, fence: str, lines: Sequence[Line]) -> Unsigned:
    try:
        moves = [(line.account, Micro(line.amount_micro)) for line in lines]
        return escrow.build(terms, escrow.SWEEP, chain_sweeps.lines_of(moves), fence)
    except (ChainRefusal, ValueError) as e:
        raise SweepRefused(f"not a sweep: {e}") from e


def _decode(raw: bytes, shape: type[T]) -> T:
    if len(raw) > DOCUMENT_BYTES_MAX:
        raise SweepRefused("the file is too large")
    try:
        document = msgspec.json.decode(raw, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise SweepRefused(f"not such a file: {e}") from e
    if getattr(document, "format", None) != FORMAT:
        raise SweepRefused(f"not of format {FORMAT}")
    return document


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError as e:
        raise SweepRefused("not a sweep's id") from e
