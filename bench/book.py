"""Making big books: millions of charges in real batches with a real chain, so that `prove` accepts them."""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import asyncpg
from servers import say
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import accounts, templates
from marketplace.ledger.accounts import ensure_account, ensure_accounts, platform_revenue
from marketplace.ledger.charges import COLUMNS, COPY_HEADER, COPY_TRAILER, GENESIS, Charge, extend_chain, pack
from marketplace.ledger.ids import lowest_at
from marketplace.ledger.money import Nano, split
from marketplace.ledger.posting import post_transfers
from marketplace.ledger.rollups import roll_up
from marketplace.platform import database

BUYERS: Final = 10_000
BATCH: Final = 1_000
BATCHES_PER_COPY: Final = 50
MODELS: Final = ("small-1b", "middle-8b", "large-70b", "code-32b", "vision-12b")
RARE_MODEL: Final = "once-in-a-thousand"
MONTHS: Final = 12
_SECONDARY: Final = """
    SELECT c.relname AS name, pg_get_indexdef(c.oid) AS definition FROM pg_index i
    JOIN pg_class c ON c.oid = i.indexrelid
    WHERE i.indrelid = 'charges'::regclass AND NOT i.indisprimary AND c.relname <> 'charges_lane_batch'"""


@dataclass(frozen=True, slots=True)
class Cast:
    """Who plays in a book; the whale makes a fifth of all requests."""

    whale: int
    buyers: Sequence[int]
    operators: Sequence[int]
    keys: Sequence[UUID]
    nodes: Sequence[UUID]


async def people(engine: AsyncEngine, *, buyers: int = BUYERS) -> Cast:
    """Buyers with money, operators, keys, nodes; the same ones every time."""
    names = [f"buyer-{n}" for n in range(buyers)]
    gifts = [templates.coupon(person=name, amount=Nano(10**14), ref=f"start:{name}") for name in names]
    async with database.transaction(engine) as conn:
        ids = list((await ensure_accounts(conn, [accounts.buyer(name) for name in names])).values())
        await post_transfers(conn, gifts)
        operators = [await ensure_account(conn, accounts.operator_earnings(f"op-{n}")) for n in range(20)]
        await ensure_account(conn, platform_revenue(0))
    chance = random.Random(7)
    keys, nodes = ([UUID(int=chance.getrandbits(128)) for _ in range(count)] for count in (50, 40))
    return Cast(ids[0], ids[1:], operators, keys, nodes)


async def fill(url: str, rows: int) -> Cast:
    """Post `rows` charges over twelve months, as the poster would have; give back who played."""
    engine = database.connect(url, role=None, pool_size=2)
    began = time.perf_counter()
    cast = await people(engine)
    connection = await asyncpg.connect(url.replace("+asyncpg", ""), command_timeout=3_600)
    await connection.execute("SELECT ensure_partitions(14)")
    indexes = await connection.fetch(_SECONDARY)
    for index in indexes:
        await connection.execute(f'DROP INDEX "{index["name"]}"')
    moved = await _copy_all(connection, cast, rows)
    await connection.executemany("UPDATE balances SET posted = posted + $2 WHERE account_id = $1", moved)
    for index in indexes:
        await connection.execute(index["definition"].replace(" ON ONLY ", " ON "))
    async with engine.connect() as conn:
        await conn.commit()
        while await roll_up(conn, batches_max=500):
            await conn.commit()
    await connection.execute("VACUUM (ANALYZE) charges")
    await connection.execute("CHECKPOINT")
    await connection.close()
    await engine.dispose()
    say(f"prepared {rows:,} charges in {time.perf_counter() - began:.0f} s")
    return cast


async def _copy_all(
    connection: asyncpg.Connection[asyncpg.Record], cast: Cast, rows: int
) -> list[tuple[int, int]]:
    chance = random.Random(rows)
    now = datetime.now(UTC)
    start = lowest_at(now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)).int >> 80
    step = MONTHS * 30 * 86_400_000 / rows
    deltas: dict[int, int] = defaultdict(int)
    revenue = await connection.fetchval(
        "SELECT id FROM accounts WHERE kind = 'platform_revenue' AND owner = '0'"
    )
    head, n, made = GENESIS, 0, 0
    sending: asyncio.Task[object] | None = None
    while made < rows:
        packed: list[bytes] = []
        links = []
        for _ in range(BATCHES_PER_COPY):
            count = min(BATCH, rows - made)
            if not count:
                break
            charges = [_one(chance, cast, start + int((made + i) * step)) for i in range(count)]
            charges.sort(key=lambda charge: charge.id.int)
            n += 1
            batch = [pack(charge, 0, n) for charge in charges]
            previous, head = head, extend_chain(head, batch)
            total = sum(charge.amount.n for charge in charges)
            links.append((0, n, charges[0].id, charges[-1].id, count, total, previous, head))
            packed += batch
            made += count
            for charge in charges:
                deltas[charge.buyer] -= charge.amount.n
                if charge.operator is not None:
                    deltas[charge.operator] += charge.amount.n - charge.fee.n
                deltas[revenue] += charge.fee.n
        if sending is not None:
            await sending
        sending = asyncio.create_task(_send(connection, packed, links))
        await asyncio.sleep(0)
    if sending is not None:
        await sending
    return list(deltas.items())


async def _send(
    connection: asyncpg.Connection[asyncpg.Record], packed: list[bytes], links: list[tuple[object, ...]]
) -> None:
    source = io.BytesIO(b"".join((COPY_HEADER, *packed, COPY_TRAILER)))
    names = ("lane", "n", "first_id", "last_id", "rows", "sum", "prev_hash", "hash")
    async with connection.transaction():
        await connection.copy_to_table("charges", source=source, format="binary", columns=COLUMNS)
        await connection.copy_records_to_table("batches", records=links, columns=names)


def _one(chance: random.Random, cast: Cast, at_ms: int) -> Charge:
    dice = chance.random()
    tail = chance.getrandbits(62)
    identity = UUID(int=at_ms << 80 | 0x7 << 76 | int(dice * 4095) << 64 | 0x2 << 62 | tail)
    is_whale = dice < 0.2
    is_rare = tail % 1_000 == 0
    buyer = cast.whale if is_whale else cast.buyers[tail % len(cast.buyers)]
    amount = 1_000 + tail % 100_000
    failed = tail % 2_000 == 1
    # The whale's last key and node are seen once in a thousand of his requests.
    key = cast.keys[-1 if is_rare else tail % (len(cast.keys) - 1)]
    node = cast.nodes[-1 if is_rare else tail % (len(cast.nodes) - 1)]
    return Charge(
        id=identity, buyer=buyer, operator=cast.operators[tail % 20], amount=Nano(0 if failed else amount),
        fee=Nano(0) if failed else split(Nano(amount))[1], node=node,
        model=RARE_MODEL if is_rare else MODELS[tail % 5], key_id=key, tok_in=tail % 2_000,
        tok_out=tail % 500, price_version=1, latency_ms=900, ttft_ms=80,
        status=500 if failed else 200, finish="stop",
    )  # fmt: skip


def fingerprint(rows: int) -> str:
    """Names a prepared book: its size and the schema it was made for."""
    schema = b"".join(
        path.read_bytes() for path in sorted((database.MIGRATIONS / "versions").glob("ledger_*"))
    )
    return hashlib.sha256(schema + str(rows).encode()).hexdigest()[:8]
