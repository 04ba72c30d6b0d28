"""What anybody with the book and the chains' endpoints can check: `tollway prove`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import ChainError
from marketplace.deposits import service as deposits
from marketplace.deposits.reconcile import Reconciled
from marketplace.ledger import statements
from marketplace.ledger.accounts import Account, Kind, total_by_kind
from marketplace.ledger.chains import Tell
from marketplace.ledger.money import dollars
from marketplace.ledger.reconcile import prove as prove_ledger
from marketplace.ledger.statements import Statement
from marketplace.platform import database
from marketplace.platform.errors import SetupFault
from marketplace.platform.settings import Settings, load_chains


@dataclass(frozen=True, slots=True)
class Proof:
    """One invariant's verdict."""

    name: str
    ok: bool
    detail: str


async def prove_all(
    settings: Settings, show: Callable[[Proof], None], progress: Tell | None = None
) -> list[Proof]:
    """Check every ledger invariant (L, S2, V3, V4) and S1 on each chain.

    `show` gets verdicts as they fall, `progress` how far the re-hashing of charges is.
    """
    engine = database.connect(
        settings.database_url.get_secret_value(), pool_size=5, statement_seconds_max=None
    )
    proofs: list[Proof] = []

    def tell(proof: Proof) -> None:
        proofs.append(proof)
        show(proof)

    try:
        async with engine.connect() as connection, engine.connect() as beside:
            async for check in prove_ledger(connection, beside=beside, tell=progress):
                tell(Proof(check.name, check.ok, check.detail))
        try:
            for result in await reconciled(engine, settings):
                tell(
                    Proof(
                        f"S1 {result.account}",
                        result.is_equal,
                        f"{result.onchain_micro} micro on chain, {result.books_micro} in the books, "
                        f"at height {result.height}",
                    )
                )
        except (ChainError, LookupError, OSError) as e:
            tell(Proof("S1", ok=False, detail=f"the chains could not be asked: {e}"))
    finally:
        await engine.dispose()
    return proofs


async def reconciled(engine: AsyncEngine, settings: Settings) -> list[Reconciled]:
    """Escrow and deposit addresses of every chain, on chain and in the books."""
    return await deposits.reconcile(engine, load_chains(settings.chains_file))


async def ledger_sum_nano(engine: AsyncEngine) -> int:
    """Σ over all balances: zero, or the book is broken (L2)."""
    async with engine.connect() as connection:
        return sum(total.n for total in (await total_by_kind(connection)).values())


async def account_statement(
    settings: Settings, name: str, *, lines_max: int, before: UUID | None = None
) -> Statement:
    """A page of one account's statement by its name, `kind` or `kind:owner`; SetupFault for a wrong name."""
    kind, _, owner = name.partition(":")
    try:
        account = Account(Kind(kind), owner)
    except ValueError as e:
        kinds = ", ".join(sorted(Kind))
        raise SetupFault(f"{name!r} is not an account: {e}; kinds are {kinds}") from e
    engine = database.connect(settings.database_url.get_secret_value(), pool_size=1)
    try:
        async with asyncio.timeout(60), engine.connect() as connection:
            found = await statements.page(connection, account, limit=lines_max, before=before)
    finally:
        await engine.dispose()
    if found is None:
        raise SetupFault(f"nothing was ever booked on {account}")
    return found


def statement_as_json(found: Statement) -> dict[str, object]:
    """Decimal strings of dollars; `next_before` is the next page's `before`."""
    return {
        "account": str(found.account),
        "posted": dollars(found.balance.posted),
        "held": dollars(found.balance.held),
        "available": dollars(found.balance.available),
        "lines": [
            {
                "id": str(line.id),
                "made_at": line.made_at.isoformat(timespec="milliseconds"),
                "kind": line.kind,
                "amount": dollars(line.amount),
                "balance": dollars(line.balance),
                "other": None if line.other is None else str(line.other),
                "ref": line.ref,
                "note": line.note,
                "model": line.model,
            }
            for line in found.lines
        ],
        "brought_forward": dollars(found.brought_forward),
        "next_before": None if found.next_before is None else str(found.next_before),
    }
