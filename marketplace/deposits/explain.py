"""What the system thinks of a transaction, and why; for `tollway deposits explain`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.networks import Chain
from chain.units import Micro
from marketplace.deposits.tables import (
    chain_cursors,
    deposit_decisions,
    deposits,
    early_credits,
    support_cases,
    sweeps,
    taken_back,
    unsupported_deposits,
)


@dataclass(frozen=True, slots=True)
class Said:
    """One sentence about one movement; `key` is empty for a sentence about the chain."""

    key: str
    verdict: str
    why: str


async def explain_transaction(
    conn: AsyncConnection, chain: Chain, tx: str, *, deposit_micro_min: int
) -> list[Said]:
    """Everything on record of transaction `tx`, and where the books stand; never empty."""
    cursor = (
        await conn.execute(select(chain_cursors).where(chain_cursors.c.chain == chain.value))
    ).one_or_none()
    if cursor is None:
        return [Said("", "unknown", f"no watcher of {chain.value} has ever started")]
    decided = await _decided(conn, chain, tx)
    said = [
        *[
            _deposit(row, cursor, deposit_micro_min, decided)
            for row in await _rows(conn, deposits, chain, tx)
        ],
        *[
            Said(
                row.key,
                "sweep",
                f"{Micro(row.amount_micro)} USDC moved from {row.from_address} to the escrow",
            )
            for row in await _rows(conn, sweeps, chain, tx)
        ],
        *[
            Said(
                row.key,
                "unsupported",
                f"{row.amount} units of {row.name} ({row.token}): not USDC, never credited",
            )
            for row in await _rows(conn, unsupported_deposits, chain, tx)
        ],
    ]
    said += await _about(conn, chain, tx)
    if not said:
        said.append(
            Said(
                "",
                "unknown",
                f"no movement of USDC to an address of ours is in it up to block {cursor.height} "
                f"(newest read); the books stand at final block {cursor.final_height}",
            )
        )
    if cursor.halted_at is not None:
        said.append(Said("", "halted", f"by {cursor.halted_by}: {cursor.halt_reason}"))
    return said


def _deposit(row: Row[Any], cursor: Row[Any], minimum: int, decided: Collection[str]) -> Said:
    amount = f"{Micro(row.amount_micro)} USDC to {row.to_address}"
    if row.status == "orphaned":
        return Said(
            row.key, "orphaned", f"{amount}: block {row.block_hash} left the chain; nothing was booked"
        )
    if row.status == "seen":
        return Said(
            row.key,
            "seen",
            f"{amount} in block {row.height}; credited when that is final, and {cursor.final_height} is",
        )
    if row.credited_at is not None:
        return Said(row.key, "credited", f"{amount}: to {row.person_id} at {row.credited_at.isoformat()}")
    if row.person_id is None and row.transfer_ref.partition(":")[2] in decided:
        return Said(row.key, "decided", f"{amount}: for nobody we know; a person has decided")
    if row.person_id is None:
        return Said(row.key, "unattributed", f"{amount}: for nobody we know; a person decides")
    if row.is_held:
        return Said(
            row.key, "held", f"{amount}: became final while {row.person_id} was frozen; a person decides"
        )
    return Said(
        row.key,
        "waiting",
        f"{amount}: final, and waits until the sum on this address reaches {Micro(minimum)} USDC",
    )


async def _decided(conn: AsyncConnection, chain: Chain, tx: str) -> set[str]:
    t = deposit_decisions.c
    statement = select(t.key).where(t.chain == chain.value, t.key.startswith(tx, autoescape=True))
    return set(await conn.scalars(statement))


async def _about(conn: AsyncConnection, chain: Chain, tx: str) -> list[Said]:
    """Cases, decisions and loans; their keys begin with the transaction."""
    said: list[Said] = []
    for table, verdict in (
        (support_cases, "case"),
        (deposit_decisions, "decision"),
        (early_credits, "early credit"),
        (taken_back, "taken back"),
    ):
        statement = select(table).where(
            table.c.chain == chain.value, table.c.key.startswith(tx, autoescape=True)
        )
        for row in await conn.execute(statement):
            match verdict:
                case "case":
                    why = f"{row.kind}: {row.detail}"
                case "decision":
                    why = f"{row.decision} {row.person_id or ''} by {row.actor}: {row.reason}"
                case "taken back":
                    why = f"{row.what} of {Micro(row.amount_micro)} USDC: final block {row.block_hash} "
                    why += f"left the chain, accepted by {row.actor}: {row.reason}"
                case _:
                    why = f"{Micro(row.amount_micro)} USDC lent to {row.person_id}, {row.status}"
            said.append(Said(row.key, verdict, why))
    return said


async def _rows(conn: AsyncConnection, table: Any, chain: Chain, tx: str) -> list[Row[Any]]:
    statement = select(table).where(table.c.chain == chain.value, table.c.tx == tx).order_by(table.c.key)
    return list(await conn.execute(statement))
