"""Making big books: millions of charges in real batches with a real chain, so that `prove` accepts them.

PostgreSQL makes the rows (a pure function of their number, so every book is the same), month by month on two
connections; the chain is hashed over what binary COPY gives back.  Ten million in a few minutes.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import asyncpg
from servers import say
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import accounts, templates
from marketplace.ledger.accounts import ensure_account, platform_revenue
from marketplace.ledger.charges import COLUMNS, COPY_HEADER, COPY_TRAILER, GENESIS
from marketplace.ledger.money import Nano
from marketplace.ledger.posting import post_transfers
from marketplace.ledger.rollups import roll_up
from marketplace.platform import database

BUYERS: Final = 10_000
OPERATORS: Final = 20
BATCH: Final = 1_000
# All as long as each other: so are the rows, and a batch's bytes are found by counting.
MODELS: Final = ("small--1b", "middle-8b", "large-70b", "coder-32b", "vision-12")
RARE_MODEL: Final = "in-1-of-k"
MONTHS: Final = 12
_CONNECTIONS: Final = 2
_SECONDARY: Final = """
    SELECT c.relname AS name, pg_get_indexdef(c.oid) AS definition FROM pg_index i
    JOIN pg_class c ON c.oid = i.indexrelid
    WHERE i.indrelid = 'charges'::regclass AND NOT i.indisprimary"""
_MONTHS_BEFORE: Final = f"""
    DO $$
    DECLARE month TIMESTAMP;
    BEGIN
        FOR n IN 0..{MONTHS} LOOP
            month := date_trunc('month', now() AT TIME ZONE 'UTC') - make_interval(months => n);
            IF to_regclass('charges_' || to_char(month, 'YYYY_MM')) IS NULL THEN
                EXECUTE format('CREATE TABLE %I PARTITION OF charges FOR VALUES FROM (%L) TO (%L)',
                    'charges_' || to_char(month, 'YYYY_MM'), lowest_charge_id(month),
                    lowest_charge_id(month + interval '1 month'));
            END IF;
        END LOOP;
    END $$"""
_BUYERS: Final = text("SELECT id FROM accounts WHERE kind = 'buyer' ORDER BY id")
_MORE_BUYERS: Final = text(
    """
    WITH made AS (
        INSERT INTO accounts (kind, owner)
        SELECT 'buyer', 'buyer-' || n FROM generate_series(0, CAST(:buyers AS INTEGER) - 1) AS n
        ON CONFLICT DO NOTHING RETURNING id
    ) INSERT INTO balances (account_id, posted, held, floor) SELECT id, 0, 0, 0 FROM made"""
)
# Row i's dice: 63 bits of a hash of i.  The whale (account $5[1]) makes a fifth of all requests.  A buyer has
# his operator and model, the whale has all; his last key and node, and a model, are seen once in a thousand.
_ROWS: Final = f"""
    INSERT INTO charges ({", ".join(COLUMNS)})
    SELECT (lpad(to_hex(ms), 12, '0') || '7' || lpad(to_hex(dice & 4095), 3, '0') || '8'
            || lpad(to_hex(i), 15, '0'))::uuid,
           ($5::bigint[])[1 + who], ($6::bigint[])[1 + CASE who WHEN 0 THEN dice / 40 % 20 ELSE who % 20 END],
           amount, amount - amount * 80 / 100,
           ($8::uuid[])[CASE WHEN rare THEN {40} ELSE 1 + dice / 7 % 39 END],
           ($9::text[])[CASE WHEN rare THEN 6 WHEN who = 0 THEN 1 + dice / 11 % 5 ELSE 1 + who % 5 END],
           ($7::uuid[])[CASE WHEN rare THEN {50} ELSE 1 + dice / 13 % 49 END],
           dice % 2000, dice % 500, 0, 1, 900, 80, CASE WHEN amount = 0 THEN 500 ELSE 200 END, 'stop', 0,
           1 + i / {BATCH}, false
    FROM (
        SELECT i, ms, dice, dice / 17 % 1000 = 0 AS rare,
               CASE WHEN dice % 5 = 0 THEN 0 ELSE 1 + dice / 5 % {BUYERS - 1} END::int AS who,
               CASE WHEN dice / 19 % 2000 = 1 THEN 0 ELSE 1000 + dice % 100000 END AS amount
        FROM (SELECT i, $3::bigint + (i * $4::numeric)::bigint AS ms,
                     hashint8extended(i, 7) & 9223372036854775807 AS dice
              FROM generate_series($1::bigint, $2::bigint) AS i) AS counted
    ) AS diced"""
_BALANCES: Final = """
    UPDATE balances b SET posted = b.posted + m.delta
    FROM (SELECT id, sum(delta)::bigint AS delta FROM (
              SELECT buyer AS id, -sum(amount) AS delta FROM charges GROUP BY buyer
              UNION ALL SELECT operator, sum(amount - fee) FROM charges GROUP BY operator
              UNION ALL SELECT $1::bigint, sum(fee) FROM charges
          ) AS moves GROUP BY id) AS m WHERE b.account_id = m.id"""
_LINKS: Final = """
    SELECT batch, count(*)::int AS rows, sum(amount)::bigint AS sum,
           (array_agg(id ORDER BY id))[1] AS first, (array_agg(id ORDER BY id DESC))[1] AS last
    FROM charges GROUP BY batch ORDER BY batch"""


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
    async with database.transaction(engine) as conn:
        ids = list(await conn.scalars(_BUYERS))
        if len(ids) < buyers:
            await conn.execute(_MORE_BUYERS, {"buyers": buyers})
            ids = list(await conn.scalars(_BUYERS))
            names = [f"buyer-{n}" for n in range(buyers)]
            gifts = [
                templates.coupon(person=name, amount=Nano(10**14), ref=f"start:{name}") for name in names
            ]
            await post_transfers(conn, gifts)
        sellers = [accounts.operator_earnings(f"op-{n}") for n in range(OPERATORS)]
        operators = [await ensure_account(conn, seller) for seller in sellers]
        await ensure_account(conn, platform_revenue(0))
    chance = random.Random(7)
    keys, nodes = ([UUID(int=chance.getrandbits(128)) for _ in range(count)] for count in (50, 40))
    return Cast(ids[0], ids[1:], operators, keys, nodes)


async def fill(url: str, rows: int) -> Cast:
    """Post `rows` charges over the twelve months until now, as the poster would have; who played."""
    engine = database.connect(url, role=None, pool_size=2, statement_seconds_max=None)
    began = time.perf_counter()
    cast = await people(engine)
    pool = await asyncpg.create_pool(
        url.replace("+asyncpg", ""),
        min_size=_CONNECTIONS,
        max_size=_CONNECTIONS,
        server_settings={"maintenance_work_mem": "512MB", "work_mem": "128MB"},
    )
    await pool.execute(_MONTHS_BEFORE)
    indexes = await pool.fetch(_SECONDARY)
    for index in indexes:
        await pool.execute(f'DROP INDEX "{index["name"]}"')
    await _make_rows(pool, cast, rows)
    say(f"rows at {time.perf_counter() - began:.0f} s")
    revenue = await pool.fetchval("SELECT id FROM accounts WHERE kind = 'platform_revenue' AND owner = '0'")
    await pool.execute(_BALANCES, revenue)
    await _link(pool)
    say(f"hashed at {time.perf_counter() - began:.0f} s")
    definitions = [index["definition"].replace(" ON ONLY ", " ON ") for index in indexes]
    await asyncio.gather(*(pool.execute(definition) for definition in definitions))
    say(f"indexed at {time.perf_counter() - began:.0f} s")
    async with engine.connect() as conn:
        await conn.commit()
        while await roll_up(conn, batches_max=500):
            await conn.commit()
    say(f"summed at {time.perf_counter() - began:.0f} s")
    await pool.execute("VACUUM (ANALYZE) charges, usage_daily, batches, balances")
    await pool.execute("CHECKPOINT")
    await pool.close()
    await engine.dispose()
    say(f"prepared {rows:,} charges in {time.perf_counter() - began:.0f} s")
    return cast


async def _make_rows(pool: asyncpg.Pool[asyncpg.Record], cast: Cast, rows: int) -> None:
    """Each connection fills its own stretches of time."""
    until = int(datetime.now(UTC).timestamp() * 1000)
    step_ms = MONTHS * 30 * 86_400_000 / rows
    buyers, models = [cast.whale, *cast.buyers], [*MODELS, RARE_MODEL]
    stretch = BATCH * max(1, rows // BATCH // (MONTHS * _CONNECTIONS))
    starts = iter(range(0, rows, stretch))

    async def work() -> None:
        for start in starts:
            values = (start, min(rows, start + stretch) - 1, until - int(rows * step_ms), step_ms)
            cast_of = (buyers, list(cast.operators), list(cast.keys), list(cast.nodes), models)
            await pool.execute(_ROWS, *values, *cast_of)

    await asyncio.gather(*(work() for _ in range(_CONNECTIONS)))


async def _link(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    """Hash every batch onto the one before it."""
    links = await pool.fetch(_LINKS)
    hashes = _FixedRows([link["rows"] for link in links])
    query = f"SELECT {', '.join(COLUMNS)} FROM charges ORDER BY id"
    async with pool.acquire() as connection:
        await connection.copy_from_query(query, output=hashes.feed, format="binary", timeout=3_600)
    chain = [GENESIS, *hashes.done]
    records = [
        (0, link["batch"], link["first"], link["last"], link["rows"], link["sum"], chain[n], chain[n + 1])
        for n, link in enumerate(links)
    ]
    names = ("lane", "n", "first_id", "last_id", "rows", "sum", "prev_hash", "hash")
    async with pool.acquire() as connection:
        await connection.copy_records_to_table("batches", records=records, columns=names)


class _FixedRows:
    """Hashes a binary COPY of rows that are all as long as each other, batch by batch."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = iter(rows)
        self._waiting = bytearray()
        self._row_bytes = 0
        self._left = next(self._rows)
        self.done: list[bytes] = []

    async def feed(self, data: bytes) -> None:
        if not self._row_bytes:  # asyncpg passes on the server's messages whole: the header, then rows
            self._waiting += data
            if len(self._waiting) <= len(COPY_HEADER) + len(COPY_TRAILER):
                return
            data = bytes(self._waiting[len(COPY_HEADER) :])
            self._waiting.clear()
            self._row_bytes = _row_bytes(data)
        self._waiting += data
        while self._left and len(self._waiting) >= self._left * self._row_bytes:
            size = self._left * self._row_bytes
            previous = self.done[-1] if self.done else GENESIS
            self.done.append(hashlib.sha256(previous + self._waiting[:size]).digest())
            del self._waiting[:size]
            self._left = next(self._rows, 0)


def _row_bytes(data: bytes) -> int:
    """Length of the first row: two bytes of column count, then each column's length and bytes."""
    at = 2
    for _ in COLUMNS:
        at += 4 + max(0, int.from_bytes(data[at : at + 4], "big", signed=True))
    return at


def fingerprint(rows: int) -> str:
    """Names a prepared book: its size, and how and for which schema it was made."""
    made = [*sorted((database.MIGRATIONS / "versions").glob("ledger_*"))]
    schema = b"".join(path.read_bytes() for path in made)
    return hashlib.sha256(schema + f"{rows} {_ROWS} {datetime.now(UTC):%Y-%m}".encode()).hexdigest()[:8]
