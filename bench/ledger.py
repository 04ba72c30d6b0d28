"""The ledger against its peers: `make bench NAME=ledger`; the last line is one JSON object.

Ratios are taken in one run, round by round, since the machine's disk moves by the minute.  Peers: one
transaction per charge (asyncpg), pgbench with the same batch in SQL (C), pgbench's tpcb-like, Redis.
`--quick`, or TOLLWAY_BENCH_ROWS, makes the big book smaller than 10,000,000, for a look in less time: then
the keys that name a size hold what was seen at that smaller one.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import asyncpg
import psutil
import uvloop

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from book import RARE_MODEL, Cast, fill, fingerprint, people
from servers import HOME, fdatasync_ms, percentile, pgbench, postgres, redis, say

from marketplace.ledger.charges import Charge
from marketplace.ledger.ids import uuid7
from marketplace.ledger.lease_book import LeaseBook
from marketplace.ledger.money import Nano
from marketplace.ledger.poster import Poster
from marketplace.ledger.reconcile import prove
from marketplace.ledger.usage import Selection, page
from marketplace.platform import database
from marketplace.platform.embedded_postgres import EmbeddedPostgres
from marketplace.platform.garbage import collect_rarely

QUICK: Final = "--quick"
ROWS: Final = int(os.environ.get("TOLLWAY_BENCH_ROWS", "300000" if QUICK in sys.argv else "10000000"))
ROUNDS: Final = 3
ROUND_S: Final = 1.5
WORKER: Final = "--worker"
BATCH_C: Final = 1_024

ONE_PER_CHARGE: Final = """
    WITH row AS (
        INSERT INTO charges VALUES ($1, $2, $3, $4, $5, NULL, 'm', NULL, 10, 20, 0, 1, 5, 2,
                                    200, 'stop', 60, 1, false)
        ON CONFLICT DO NOTHING RETURNING buyer, operator, amount, fee
    )
    UPDATE balances b SET posted = b.posted + m.delta
    FROM (SELECT buyer AS id, -amount AS delta FROM row UNION ALL SELECT operator, amount - fee FROM row
          UNION ALL SELECT $6, fee FROM row) AS m WHERE b.account_id = m.id"""

SAME_IN_SQL: Final = """
BEGIN;
WITH made AS (
    INSERT INTO charges
    SELECT {new_id}, ($1::bigint[])[1 + (random() * 998)::int], ($2::bigint[])[1 + (random() * 18)::int],
           1001, 201,
           {node}, 'm', {node}, 10, 20, 0, 1, 5, 2, 200, 'stop', 61, 1, false
    FROM generate_series(1, :k) RETURNING buyer, operator, amount, fee
), moves AS (
    SELECT id, sum(delta)::bigint AS delta FROM (
        SELECT buyer AS id, -amount AS delta FROM made UNION ALL SELECT operator, amount - fee FROM made
        UNION ALL SELECT {revenue}, fee FROM made) AS m GROUP BY id
), locked AS (
    SELECT b.account_id, m.delta FROM balances b JOIN moves m ON m.id = b.account_id
    ORDER BY b.account_id FOR NO KEY UPDATE OF b
)
UPDATE balances b SET posted = b.posted + l.delta FROM locked l WHERE b.account_id = l.account_id;
INSERT INTO batches VALUES (61, nextval('bench_n'), {node}, {node}, :k, 1, {hash}, {hash});
COMMIT;
"""


def main() -> None:
    figures: dict[str, float | None] = {}
    with postgres("postgres") as server:
        uvloop.run(_commits(server, figures))
        uvloop.run(_leases(figures))
        uvloop.run(_big_books(server, figures))
    order = (
        "group_commit_16x", "group_commit_64x", "copy_vs_c", "two_processes_vs_c", "vs_tpcb",
        "p99_ms_at_2000", "fdatasync_ms", "lease_vs_redis", "usage_10m_vs_1m", "prove_10m_s",
    )  # fmt: skip
    print(json.dumps({key: figures[key] for key in order}))


# ---- charging


def _charge(cast: Cast) -> Charge:
    n = random.getrandbits(20)
    return Charge(
        id=uuid7(), buyer=cast.buyers[n % len(cast.buyers)], operator=cast.operators[n % 20],
        amount=Nano(1_001), fee=Nano(201), node=cast.nodes[n % 40], model="m", key_id=cast.keys[n % 50],
        tok_in=10, tok_out=20, price_version=1, latency_ms=5, ttft_ms=2, finish="stop",
    )  # fmt: skip


async def _closed_loop(clients: int, act: Callable[[], Awaitable[object]], seconds: float) -> float:
    """Actions a second by this many clients, each waiting for its own."""
    done, end = 0, time.perf_counter() + seconds

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await act()
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return done / (time.perf_counter() - began)


def _nothing_held(hold: object, cost: object) -> None:
    del hold, cost


@asynccontextmanager
async def _posting(url: str) -> AsyncIterator[Poster]:
    engine = database.connect(url, pool_size=3)
    async with Poster(engine, settle=_nothing_held, patience_s=60) as poster:
        collect_rarely()  # as `tollway serve` does: a walk over all objects is a pause of 50 ms
        yield poster
    await engine.dispose()


async def _commits(server: EmbeddedPostgres, figures: dict[str, float | None]) -> None:
    url = server.url("charging")
    await database.drop_database(url)
    await database.create_database(url)
    await asyncio.to_thread(database.migrate, url)
    engine = database.connect(url, role=None, pool_size=2)
    cast = await people(engine, buyers=1_000)
    await engine.dispose()
    pool = await asyncpg.create_pool(url.replace("+asyncpg", ""), min_size=64, max_size=64)
    revenue = await pool.fetchval("SELECT id FROM accounts WHERE kind = 'platform_revenue'")
    await pool.execute("CREATE SEQUENCE bench_n")

    async def one() -> None:
        charge = _charge(cast)
        values = (charge.id, charge.buyer, charge.operator, charge.amount.n, charge.fee.n, revenue)
        await pool.execute(ONE_PER_CHARGE, *values)

    async with _posting(url) as poster:

        async def grouped() -> None:
            await poster.post(_charge(cast))

        await _closed_loop(64, grouped, 1.0)
        for clients in (16, 64):
            ratios, rates = [], []
            for _ in range(ROUNDS):
                alone = await _closed_loop(clients, one, ROUND_S)
                together = await _closed_loop(clients, grouped, ROUND_S)
                ratios.append(together / alone)
                rates.append((alone, together))
            figures[f"group_commit_{clients}x"] = round(statistics.median(ratios), 2)
            alone, together = (statistics.median(pair) for pair in zip(*rates, strict=True))
            say(f"{clients} clients: one per charge {alone:,.0f}/s, group commit {together:,.0f}/s")
        await _against_c(server, url, cast, revenue, grouped, figures)
        await pool.execute("CHECKPOINT")  # what the rounds at full speed left to write is not this load's
        await _open_loop(poster, cast, figures)
    await pool.close()


async def _against_c(
    server: EmbeddedPostgres,
    url: str,
    cast: Cast,
    revenue: int,
    grouped: Callable[[], Awaitable[object]],
    figures: dict[str, float | None],
) -> None:
    tpcb = server.url("tpcb")
    await database.create_database(tpcb)
    pgbench(server, "tpcb", "-i", "-q", "-s", "10")
    newest = await _scalar(url, "SELECT count(*) FROM pg_proc WHERE proname = 'uuidv7'")
    sql = (
        SAME_IN_SQL.replace("$1", f"'{{{','.join(map(str, cast.buyers))}}}'")
        .replace("$2", f"'{{{','.join(map(str, cast.operators))}}}'")
        .replace("{new_id}", "uuidv7()" if newest else "gen_random_uuid()")
        .replace("{node}", f"'{cast.nodes[0]}'::uuid")
        .replace("{revenue}", str(revenue))
        .replace("{hash}", "sha256('bench')")
    )
    copy, two, tpc = [], [], []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        script = Path(folder) / "batch.sql"
        script.write_text("\n".join(" ".join(part.split()) + ";" for part in sql.split(";") if part.strip()))
        workers = [_Worker(url) for _ in range(2)]

        async def in_c(rows: int) -> float:
            """Batches a second of so many charges, by one client in C that computes nothing."""
            argv = ("-n", "-c", "1", "-T", "3", "-D", f"k={rows}", "-f", str(script))
            return await asyncio.to_thread(pgbench, server, "charging", *argv)

        for rows in (16, 64):  # the same statement in C, planned anew for each batch
            say(f"C, batches of {rows}: {await in_c(rows) * rows:,.0f}/s")
        for _ in range(ROUNDS):
            batches = await in_c(BATCH_C)
            single = await _closed_loop(1_024, grouped, ROUND_S * 2)
            double = sum(await asyncio.gather(*(asyncio.to_thread(w.run, ROUND_S * 2) for w in workers)))
            eight = await asyncio.to_thread(
                pgbench, server, "tpcb", "-n", "-M", "prepared", "-c", "8", "-j", "2", "-T", "3"
            )
            c = batches * BATCH_C
            copy.append(single / c)
            two.append(double / c)
            tpc.append(single / eight)
            say(
                f"C bound {c:,.0f}/s, one process {single:,.0f}/s, two {double:,.0f}/s, "
                f"tpcb-like {eight:,.0f}/s"
            )
        for worker in workers:
            worker.close()
    figures["copy_vs_c"] = round(statistics.median(copy), 3)
    figures["two_processes_vs_c"] = round(statistics.median(two), 3)
    figures["vs_tpcb"] = round(statistics.median(tpc), 2)


async def _scalar(url: str, query: str) -> Any:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


class _Worker:
    """Another process with a poster of its own; does a round when told to."""

    def __init__(self, url: str) -> None:
        argv = [sys.executable, __file__, WORKER, url]
        self._child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line()  # ready

    def _line(self) -> str:
        assert self._child.stdout is not None
        return self._child.stdout.readline()

    def run(self, seconds: float) -> float:
        assert self._child.stdin is not None
        print(seconds, file=self._child.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        self._child.communicate("0\n")


async def _work(url: str) -> None:
    engine = database.connect(url, role=None, pool_size=1)
    cast = await people(engine, buyers=1_000)
    await engine.dispose()
    async with _posting(url) as poster:
        await poster.post(_charge(cast))
        print("ready", flush=True)
        while seconds := float(await asyncio.to_thread(sys.stdin.readline) or 0):
            print(await _closed_loop(512, lambda: poster.post(_charge(cast)), seconds), flush=True)


async def _open_loop(
    poster: Poster, cast: Cast, figures: dict[str, float | None], rate: int = 2_000, seconds: float = 4.0
) -> None:
    """Arrivals at a fixed rate, exponential gaps: from arrival to durable; the middle of several rounds."""
    rounds = sorted([await _arrivals(poster, cast, rate, seconds) for _ in range(ROUNDS)])
    p99_ms, p50_ms = rounds[len(rounds) // 2]
    figures["p99_ms_at_2000"] = round(p99_ms, 2)
    figures["fdatasync_ms"] = round(fdatasync_ms(HOME), 3)
    say(
        f"{rate}/s: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms, in the worst of {ROUNDS} rounds "
        f"{rounds[-1][0]:.1f} ms"
    )
    say(f"fdatasync {figures['fdatasync_ms']} ms")


async def _arrivals(poster: Poster, cast: Cast, rate: int, seconds: float) -> tuple[float, float]:
    """(p99, p50) in milliseconds."""
    taken: list[float] = []

    async def one(arrived: float) -> None:
        await poster.post(_charge(cast))
        taken.append((time.perf_counter() - arrived) * 1e3)

    async with asyncio.TaskGroup() as tasks:
        due = began = time.perf_counter()
        while due - began < seconds:
            due += random.expovariate(rate)
            wait = due - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.create_task(one(due))
    return percentile(taken, 99), percentile(taken, 50)


# ---- authorising

_DECREASE: Final = (
    "local b = tonumber(redis.call('GET', KEYS[1]) or '0') "
    "if b < tonumber(ARGV[1]) then return -1 end return redis.call('DECRBY', KEYS[1], ARGV[1])"
)


def _lease_rate(seconds: float = 1.0) -> float:
    """Authorise and settle in memory, per second of CPU."""
    book = LeaseBook(time.monotonic_ns)
    for buyer in range(1_000):
        book.add(UUID(int=buyer), buyer=buyer, amount_nano=10**15, usual_nano=10**15, usable_until_ns=2**62)
    done, began = 0, time.process_time()
    while time.process_time() - began < seconds:
        for buyer in range(1_000):
            hold = book.authorise(buyer, 100)
            if hold is not None:
                book.settle(hold, 60)
        done += 1_000
    return done / (time.process_time() - began)


async def _redis_rate(path: Path, pid: int, clients: int = 16, seconds: float = 2.0) -> float:
    """One script call per authorisation over asyncio, per second of CPU, the server's included."""

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *words: str) -> bytes:
        writer.write(
            f"*{len(words)}\r\n".encode() + b"".join(f"${len(w)}\r\n{w}\r\n".encode() for w in words)
        )
        answer = await reader.readline()
        return await reader.readexactly(int(answer[1:]) + 2) if answer[:1] == b"$" else answer

    done, end = 0, time.perf_counter() + seconds

    async def client(n: int) -> None:
        nonlocal done
        reader, writer = await asyncio.open_unix_connection(path)
        script = (await ask(reader, writer, "SCRIPT", "LOAD", _DECREASE)).strip().decode()
        await ask(reader, writer, "SET", f"balance:{n}", str(10**15))
        while time.perf_counter() < end:
            await ask(reader, writer, "EVALSHA", script, "1", f"balance:{n}", "100")
            done += 1
        writer.close()

    other = psutil.Process(pid)
    before = sum(other.cpu_times()[:2]) + time.process_time()
    await asyncio.gather(*(client(n) for n in range(clients)))
    return done / (sum(other.cpu_times()[:2]) + time.process_time() - before)


async def _redis_py_rate(path: Path, pid: int, clients: int = 16, seconds: float = 2.0) -> float | None:
    """The same through redis-py, as a gateway would call it; None if Debian's python3-redis is missing."""
    sys.path.append("/usr/lib/python3/dist-packages")
    try:
        from redis.asyncio import Redis
    except ImportError:
        return None
    finally:
        sys.path.remove("/usr/lib/python3/dist-packages")
    done, end = 0, time.perf_counter() + seconds

    async def client(n: int) -> None:
        nonlocal done
        async with Redis(unix_socket_path=str(path), max_connections=1) as store:
            await store.set(f"balance:{n}", 10**15)
            decrease = store.register_script(_DECREASE)
            while time.perf_counter() < end:
                await decrease(keys=[f"balance:{n}"], args=[100])
                done += 1

    other = psutil.Process(pid)
    before = sum(other.cpu_times()[:2]) + time.process_time()
    await asyncio.gather(*(client(n) for n in range(clients)))
    return done / (sum(other.cpu_times()[:2]) + time.process_time() - before)


async def _leases(figures: dict[str, float | None]) -> None:
    with redis() as server:
        if server is None:
            say("Redis is not installed (apt-get install redis-server): no comparison")
            figures["lease_vs_redis"] = None
            say(f"lease {_lease_rate():,.0f}/s a core")
            return
        bare = await _redis_rate(*server)
        through = "redis-py" if await _redis_py_rate(*server) else "a bare client (no python3-redis here)"
        pairs = [(_lease_rate(), await _redis_py_rate(*server) or bare) for _ in range(ROUNDS)]
    figures["lease_vs_redis"] = round(statistics.median(one / other for one, other in pairs), 1)
    lease, peer = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    say(
        f"authorise and settle: lease {lease:,.0f}/s a core; Redis {peer:,.0f}/s a core through {through}, "
        f"{bare:,.0f}/s through a bare client; client and server counted"
    )


# ---- reading


async def _big_books(server: EmbeddedPostgres, figures: dict[str, float | None]) -> None:
    urls = {rows: await _prepared(server, rows) for rows in (ROWS // 10, ROWS)}
    pages: dict[int, list[float]] = {rows: [] for rows in urls}
    for _ in range(ROUNDS):
        for rows, url in urls.items():
            pages[rows].append(await _usage(url, "a page", _any_buyer, say_it=False))
    figures["usage_10m_vs_1m"] = round(
        statistics.median(big / small for small, big in zip(pages[ROWS // 10], pages[ROWS], strict=True)), 2
    )
    for rows in urls:
        say(f"a page of 50 at {rows:,} charges: p50 {statistics.median(pages[rows]):.2f} ms")
    for name, choose in _FILTERS.items():
        await _usage(urls[ROWS], name, choose)
    engine = database.connect(urls[ROWS], pool_size=2, statement_seconds_max=None)
    began = time.perf_counter()
    async with engine.connect() as conn, engine.connect() as beside:
        broken = [check async for check in prove(conn, beside=beside) if not check.ok]
    figures["prove_10m_s"] = round(time.perf_counter() - began, 1)
    await engine.dispose()
    if broken:
        sys.exit(f"the book is broken: {broken}")
    say(f"prove over {ROWS:,} charges: {figures['prove_10m_s']} s")


async def _prepared(server: EmbeddedPostgres, rows: int) -> str:
    url = server.url(f"book_{rows}_{fingerprint(rows)}")
    known = await _scalar(
        server.url("postgres"),
        f"SELECT count(*) FROM pg_database WHERE datname = 'book_{rows}_{fingerprint(rows)}'",
    )
    if not known:
        unfinished = server.url("unfinished")
        await database.drop_database(unfinished)
        await database.create_database(unfinished)
        await asyncio.to_thread(database.migrate, unfinished)
        await fill(unfinished, rows)
        await _scalar(
            server.url("postgres"), f'ALTER DATABASE unfinished RENAME TO "book_{rows}_{fingerprint(rows)}"'
        )
    return url


def _any_buyer(cast: Cast) -> Selection:
    return Selection(buyer=random.choice(cast.buyers))


_FILTERS: Final[dict[str, Callable[[Cast], Selection]]] = {
    "the largest buyer": lambda cast: Selection(buyer=cast.whale),
    "… model": lambda cast: Selection(buyer=cast.whale, model="large-70b"),
    "… rare model": lambda cast: Selection(buyer=cast.whale, model=RARE_MODEL),
    "… key": lambda cast: Selection(buyer=cast.whale, key_id=cast.keys[3]),
    "… rare key": lambda cast: Selection(buyer=cast.whale, key_id=cast.keys[-1]),
    "… node": lambda cast: Selection(buyer=cast.whale, node=cast.nodes[3]),
    "… rare node": lambda cast: Selection(buyer=cast.whale, node=cast.nodes[-1]),
    "… failed": lambda cast: Selection(buyer=cast.whale, only_failed=True),
    "… status 500": lambda cast: Selection(buyer=cast.whale, status=500),
    "operator's node": lambda cast: Selection(operator=cast.operators[0], node=cast.nodes[0]),
}


async def _usage(url: str, name: str, choose: Callable[[Cast], Selection], *, say_it: bool = True) -> float:
    """Median time of a first page of 50, in ms."""
    engine = database.connect(url, role=None, pool_size=1)
    cast = await people(engine)
    taken: list[float] = []
    async with engine.connect() as conn:
        for turn in range(60):
            selection = choose(cast)
            began = time.perf_counter()
            await page(conn, selection, limit=50)
            if turn >= 10:
                taken.append((time.perf_counter() - began) * 1e3)
    await engine.dispose()
    if say_it:
        say(f"{name}: p50 {percentile(taken, 50):.2f} ms, p99 {percentile(taken, 99):.1f} ms")
    return percentile(taken, 50)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        uvloop.run(_work(sys.argv[2]))
    else:
        main()
