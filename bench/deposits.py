"""How fast deposits are read, and how soon they can be spent.  `make bench NAME=deposits`; about four minutes

What is measured, on real parts unless said otherwise:

- `logs_per_s`, `blocks_per_s`: the whole watcher catching up from anvil into PostgreSQL, 400 Transfer logs
  a block (one in 400 to a watched address, credited), and near-empty blocks.  The logs come from a contract
  that only emits them, put at USDC's address, each to another address.
- `vs_web3`: the same logs through web3.py's `contract.events.Transfer.get_logs`, in the same run, against
  our reader alone (web3 writes no database).
- `solana_tx_per_s`: `SolanaReader.blocks` over prepared getBlock answers (no HTTP).
- `addresses_1e6_vs_1e3`: time per block of the reader watching 10⁶ addresses, over 10³; runs interleaved.
- `final_to_spendable_p99_s`: from the moment the node calls a deposit's block final until its balance is in
  the book, on development Base and Solana with the default pace.  Seen by polling every 50 ms.
- `rss_growth_mb`: a watcher over 10⁶ empty blocks, from 100,000 to the end; the node is a small HTTP server
  in another process that makes headers up (anvil cannot make so many in time).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import math
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import structlog
from eth_hash.auto import keccak
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncEngine
from web3 import Web3

from chain.errors import ChainFault
from chain.evm.reader import BLOCKS_MAX, TRANSFER_TOPIC, EvmReader
from chain.evm.rpc import JsonRpc, quantity
from chain.localnet import artifacts
from chain.localnet import evm as localnet
from chain.localnet import settings as localnet_settings
from chain.localnet.evm import Anvil
from chain.localnet.solana import deploy, fund
from chain.localnet.solana_vm.server import serving
from chain.localnet.solana_wallet import SolanaWallet
from chain.networks import BASE, SOLANA, Chain
from chain.ports import ChainReader
from chain.solana import programs
from chain.solana.reader import BLOCKS_PER_REQUEST, SolanaReader
from chain.solana.rpc import SolanaRpc
from chain.units import Micro
from marketplace.deposits.booking import Rules
from marketplace.deposits.tables import deposit_addresses, solana_pool
from marketplace.deposits.watcher import Pace, Watcher
from marketplace.ledger import accounts
from marketplace.ledger.accounts import read_balance
from marketplace.platform import database
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction
from marketplace.platform.embedded_postgres import EmbeddedPostgres
from marketplace.platform.processes import free_port

LOGS_PER_BLOCK, LOG_BLOCKS, EMPTY_BLOCKS = 400, 50, 4_000
WEB3_BLOCKS = 5
MANY_BLOCKS, RSS_FROM_BLOCK = 1_000_000, 100_000
SOLANA_TRANSACTIONS_PER_BLOCK, SOLANA_BLOCKS = 1_000, 50
DEPOSITS_TIMED = 50
ESCROW = "0x" + "E5" * 20
CLOCK = SystemClock()
FAST = Pace(blocks_per_tick=BLOCKS_MAX)


@dataclass
class Watching:
    addresses: set[str]

    def is_watched(self, address: str) -> bool:
        return address in self.addresses  # in lower case, as readers ask

    def is_reference(self, _key: str) -> bool:
        return False


def say(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


def emitter() -> bytes:
    """Code that emits as many Transfer(0x55, number × 1000 + i, 5 USDC) as its calldata's first word says."""
    head = bytes.fromhex("600035")  # n
    loop = len(head)
    body = (
        bytes.fromhex("5b8015")
        + b"\x60\x00\x57"  # JUMPDEST; if n == 0 goto end (patched)
        + bytes.fromhex("624c4b40600052")  # mem[0] = 5_000_000
        + bytes.fromhex("80436103e80201")  # topic 3: number * 1000 + n
        + b"\x60\x55"  # topic 2
        + b"\x7f"
        + bytes.fromhex(TRANSFER_TOPIC[2:])
        + bytes.fromhex("60206000a3")  # LOG3(0, 32, …)
        + bytes.fromhex("60019003")  # n -= 1
        + bytes([0x60, loop, 0x56])
    )
    end = loop + len(body)
    return head + body.replace(b"\x60\x00\x57", bytes([0x60, end, 0x57]), 1) + b"\x5b\x00"


def emitted_address(block: int, index: int) -> str:
    """In lower case, as watch sets want it."""
    return f"0x{block * 1000 + index:040x}"


@contextlib.asynccontextmanager
async def an_anvil(folder: Path) -> AsyncIterator[tuple[Anvil, JsonRpc]]:
    settings = localnet_settings.read().evm(BASE)
    async with await Anvil.start(BASE, settings, folder) as node, JsonRpc(node.url, timeout_s=60) as rpc:
        yield node, rpc


async def a_person(engine: AsyncEngine, address: str) -> uuid.UUID:
    person = uuid.uuid4()
    async with transaction(engine) as conn:
        await conn.execute(
            insert(deposit_addresses).values(
                person_id=person,
                chain_family="evm",
                address=address,
                watched=address,
                salt=person.bytes * 2,
                created_at=CLOCK.now(),
            )
        )
    return person


async def balance_micro(engine: AsyncEngine, person: uuid.UUID) -> int:
    async with transaction(engine) as conn:
        found = await read_balance(conn, accounts.buyer(str(person)))
    return found.posted.n // 1000 if found else 0


async def catch_up(engine: AsyncEngine, rpc: JsonRpc, start: int) -> float:
    """Seconds a fresh watcher needs from `start` to the node's final block."""
    watcher = Watcher(
        Rules(Chain.BASE, ESCROW, 5_000_000),
        EvmReader(BASE, rpc),
        engine,
        CLOCK,
        start_height=start,
        pace=FAST,
    )
    await watcher.tick()  # the first start itself
    final = (await watcher.reader.final()).height
    began = time.perf_counter()
    while watcher._cursor is None or watcher._cursor.window.final.height < final:  # noqa: SLF001
        await watcher.tick()
    return time.perf_counter() - began


@contextlib.asynccontextmanager
async def a_bare_anvil() -> AsyncIterator[JsonRpc]:
    """A chain that is thrown away: blocks on demand only, nothing written to disk."""
    port = free_port()
    argv = [str(artifacts.anvil_binary()), "--port", str(port), "--chain-id", str(BASE.chain_id)]
    argv += ["--slots-in-an-epoch", "1", "--prune-history", "50", "--quiet"]
    process = subprocess.Popen(argv)  # noqa: ASYNC220  argv is ours, and it is quick
    try:
        async with JsonRpc(f"http://127.0.0.1:{port}", timeout_s=60) as rpc:
            while True:
                with contextlib.suppress(ChainFault):
                    await rpc.call("eth_chainId", shape=str)
                    break
                await asyncio.sleep(0.05)
            await rpc.call("anvil_setCode", BASE.usdc, "0x" + emitter().hex(), shape=msgspec.Raw)
            await localnet.mine(rpc, 5)
            yield rpc
    finally:
        process.kill()
        process.wait()


async def height_of(rpc: JsonRpc) -> int:
    return quantity(await rpc.call("eth_blockNumber", shape=str))


async def measure_logs(databases: Databases) -> dict[str, float]:
    async with a_bare_anvil() as rpc:
        first = await height_of(rpc)
        for _ in range(LOG_BLOCKS):
            await localnet.send_as(rpc, localnet.FAUCET, BASE.usdc, LOGS_PER_BLOCK.to_bytes(32))
        blocks = range(first + 1, await height_of(rpc) + 1)
        await localnet.mine(rpc, 3)
        reader = EvmReader(BASE, rpc)
        ours = Watching({emitted_address(block, 7) for block in blocks})
        found = [f for f in await reader.blocks(blocks[0], blocks[-1], ours) if f.inbound]
        assert len(found) == LOG_BLOCKS, "the emitter's logs are not read"
        total = LOG_BLOCKS * LOGS_PER_BLOCK
        ratio, alone = await against_web3(rpc.url, reader, ours, blocks, total)
        say(f"reader alone: {alone:,.0f} logs/s")
        slowdown = await many_addresses(reader, blocks)
        seconds = []
        for _ in range(3):
            engine = await databases.fresh()
            paid = [Web3.to_checksum_address(emitted_address(block, 7)) for block in blocks]
            people = [await a_person(engine, address) for address in paid]
            seconds.append(await catch_up(engine, rpc, first))
            assert await balance_micro(engine, people[-1]) == 5_000_000
        return {
            "logs_per_s": round(total / min(seconds)),
            "vs_web3": round(ratio, 1),
            "addresses_1e6_vs_1e3": round(slowdown, 2),
        }


async def measure_empty_blocks(databases: Databases) -> float:
    async with a_bare_anvil() as rpc:
        start = await height_of(rpc)
        for _ in range(0, EMPTY_BLOCKS, 500):
            await localnet.send_as(rpc, localnet.FAUCET, BASE.usdc, (1).to_bytes(32))
            await localnet.mine(rpc, 499)
        seconds = [await catch_up(await databases.fresh(), rpc, start) for _ in range(2)]
        return EMPTY_BLOCKS / min(seconds)


async def against_web3(
    url: str, reader: EvmReader, ours: Watching, blocks: range, total: int
) -> tuple[float, float]:
    """How many times web3's logs a second ours are, and ours; the same blocks, taken in turns."""
    node = Web3(Web3.HTTPProvider(url))
    event = {
        "anonymous": False,
        "name": "Transfer",
        "type": "event",
        "inputs": [
            {"indexed": i < 2, "name": name, "type": kind}
            for i, (name, kind) in enumerate((("from", "address"), ("to", "address"), ("value", "uint256")))
        ],
    }
    contract = node.eth.contract(address=Web3.to_checksum_address(BASE.usdc), abi=[event])
    theirs, mine = [], []
    for _ in range(2):
        began = time.perf_counter()
        logs = await asyncio.to_thread(
            contract.events.Transfer.get_logs, from_block=blocks[0], to_block=blocks[WEB3_BLOCKS - 1]
        )
        theirs.append(len(logs) / (time.perf_counter() - began))
        assert len(logs) == WEB3_BLOCKS * LOGS_PER_BLOCK
        for _ in range(2):
            began = time.perf_counter()
            await reader.blocks(blocks[0], blocks[-1], ours)
            mine.append(total / (time.perf_counter() - began))
    say(f"web3: {max(theirs):,.0f} logs/s")
    return max(mine) / max(theirs), max(mine)


async def many_addresses(reader: EvmReader, blocks: range) -> float:
    few = Watching({emitted_address(block, i) for block in blocks for i in range(1, 21)})
    many = Watching(
        few.addresses | {f"0x{i:040x}" for i in range(2**150, 2**150 + 1_000_000 - len(few.addresses))}
    )
    assert (len(few.addresses), len(many.addresses)) == (1_000, 1_000_000)
    taken: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(20):
        began = time.perf_counter()
        await reader.blocks(blocks[0], blocks[-1], (few, many)[turn % 2])
        taken[turn % 2].append(time.perf_counter() - began)
    return min(taken[1]) / min(taken[0])


# ── Solana ────────────────────────────────────────────────────────────────────────────────────────────


class Prepared(SolanaRpc):
    """A node whose answers are bytes made beforehand."""

    answers: dict[str, bytes]

    async def _post(self, body: bytes) -> bytes:
        return self.answers["getBlocks" if b'"getBlocks"' in body else "getBlock"]


def a_transaction(number: int) -> dict[str, Any]:
    def key(salt: str) -> str:
        return (keccak(f"{number}{salt}".encode()).hex() + "0" * 44)[:44]

    def balance(index: int, amount: int) -> dict[str, Any]:
        text = {"amount": str(amount), "decimals": 6, "uiAmount": amount / 1e6, "uiAmountString": str(amount)}
        return {
            "accountIndex": index,
            "mint": SOLANA.usdc_mint,
            "owner": key(f"owner{index}"),
            "programId": str(programs.TOKEN_PROGRAM),
            "uiTokenAmount": text,
        }

    keys = [
        {"pubkey": key(f"k{i}"), "signer": i == 0, "source": "transaction", "writable": i < 5}
        for i in range(12)
    ]
    meta = {
        "err": None,
        "status": {"Ok": None},
        "fee": 5000,
        "preBalances": [2_039_280] * 12,
        "postBalances": [2_039_280] * 12,
        "preTokenBalances": [balance(1, 10**9), balance(2, 10**6)],
        "postTokenBalances": [balance(1, 10**9 - 5), balance(2, 10**6 + 5)],
    }
    return {"transaction": {"signatures": [key("sig") * 2], "accountKeys": keys}, "meta": meta, "version": 0}


async def measure_solana_parsing() -> float:
    transactions = [a_transaction(i) for i in range(SOLANA_TRANSACTIONS_PER_BLOCK)]
    blocks = [
        {
            "jsonrpc": "2.0",
            "id": i,
            "result": {
                "blockhash": f"hash{i}",
                "previousBlockhash": f"hash{i - 1}",
                "parentSlot": i - 1,
                "blockTime": i,
                "transactions": transactions,
            },
        }
        for i in range(BLOCKS_PER_REQUEST)
    ]
    rpc = Prepared("http://127.0.0.1:1", response_bytes_max=2**31)
    rpc.answers = {
        "getBlocks": msgspec.json.encode(
            {"jsonrpc": "2.0", "id": 0, "result": list(range(BLOCKS_PER_REQUEST))}
        ),
        "getBlock": msgspec.json.encode(blocks),
    }
    reader = SolanaReader(rpc)
    watched = transactions[3]["transaction"]["accountKeys"][2]["pubkey"]
    best = math.inf
    for _ in range(SOLANA_BLOCKS // BLOCKS_PER_REQUEST):
        began = time.perf_counter()
        facts = await reader.blocks(0, BLOCKS_PER_REQUEST - 1, Watching({watched}))
        best = min(best, time.perf_counter() - began)
        assert [len(block.inbound) for block in facts] == [1] * BLOCKS_PER_REQUEST
    return BLOCKS_PER_REQUEST * SOLANA_TRANSACTIONS_PER_BLOCK / best


# ── from final to spendable ───────────────────────────────────────────────────────────────────────────


async def measure_spendable(databases: Databases, folder: Path) -> float:
    engine = await databases.fresh()
    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        _, rpc = await stack.enter_async_context(an_anvil(folder))
        settings = localnet_settings.read().evm(BASE)
        there = await localnet.deploy(
            rpc, BASE, settings, [localnet.address_of(bytes([i]) * 32) for i in (1, 2, 3)]
        )
        port, _ = await stack.enter_async_context(
            serving(
                folder / "solana",
                port=0,
                clock=lambda: int(time.time()),
                slot_ms=250,
                finalized_after=8,
                empty_every=8,
            )
        )
        solana = await stack.enter_async_context(SolanaRpc(f"http://127.0.0.1:{port}"))
        names = [SolanaWallet(solana).address for _ in range(4)]
        escrow = await deploy(solana, signers=names[:3], gas_payer=names[3])
        watchers = [
            Watcher(Rules(Chain.BASE, there.safe, 5_000_000), EvmReader(BASE, rpc), engine, CLOCK),
            Watcher(Rules(Chain.SOLANA, escrow.escrow, 5_000_000), SolanaReader(solana), engine, CLOCK),
        ]
        running = [asyncio.create_task(watcher.run(stop)) for watcher in watchers]
        await asyncio.sleep(3)
        waits = await asyncio.gather(
            time_deposits(engine, watchers[0].reader, rpc),
            time_solana_deposits(engine, watchers[1].reader, solana),
        )
        stop.set()
        await asyncio.gather(*running)
    for name, some in zip(("base", "solana"), waits, strict=True):
        say(f"{name}: median {statistics.median(some):.2f} s, worst {max(some):.2f} s of {len(some)}")
    everything = sorted(waits[0] + waits[1])
    return everything[math.ceil(0.99 * len(everything)) - 1]


async def time_deposits(engine: AsyncEngine, reader: ChainReader, rpc: JsonRpc) -> list[float]:
    timed = []
    for _ in range(DEPOSITS_TIMED):
        address = Web3.to_checksum_address("0x" + uuid.uuid4().hex + "00000000")
        person = await a_person(engine, address)
        await localnet.fund(rpc, BASE, address, usdc=Micro(6_000_000))
        height = (await reader.head()).height
        timed.append(asyncio.create_task(one_wait(engine, reader, height, person)))
        await asyncio.sleep(0.45)
    return list(await asyncio.gather(*timed))


async def time_solana_deposits(engine: AsyncEngine, reader: ChainReader, rpc: SolanaRpc) -> list[float]:
    timed = []
    for index in range(DEPOSITS_TIMED // 2):
        wallet, person = SolanaWallet(rpc), uuid.uuid4()
        async with transaction(engine) as conn:
            pool = {"pool_index": index, "owner": wallet.address, "token_account": wallet.token_account}
            await conn.execute(insert(solana_pool).values(**pool, ready_at=CLOCK.now(), person_id=person))
            await conn.execute(
                insert(deposit_addresses).values(
                    person_id=person,
                    chain_family="solana",
                    address=wallet.address,
                    watched=wallet.token_account,
                    pool_index=index,
                    created_at=CLOCK.now(),
                )
            )
        tx = await fund(rpc, wallet.address, usdc=Micro(6_000_000))
        status = await rpc.status(tx)
        assert status is not None
        timed.append(asyncio.create_task(one_wait(engine, reader, status.slot, person)))
        await asyncio.sleep(0.9)
    return list(await asyncio.gather(*timed))


async def one_wait(engine: AsyncEngine, reader: ChainReader, height: int, person: uuid.UUID) -> float:
    """Seconds from `height` being final at the node to the balance; neither has an event to wait for."""

    async def is_final() -> bool:
        return (await reader.final()).height >= height

    async def is_spendable() -> bool:
        return await balance_micro(engine, person) == 6_000_000

    await poll(is_final)
    began = time.perf_counter()
    await poll(is_spendable)
    return time.perf_counter() - began


async def poll(condition: Callable[[], Awaitable[bool]]) -> None:
    while True:
        if await condition():
            return
        await asyncio.sleep(0.05)


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────


def serve_headers(ready: Any) -> None:
    """A node of MANY_BLOCKS empty blocks, all final; runs in a process of its own."""
    from aiohttp import web

    bloom = "0x" + "00" * 256
    top = hex(MANY_BLOCKS)

    def answer(call: dict[str, Any]) -> str:
        method = call["method"]
        if method == "eth_getBlockByNumber":
            number = call["params"][0]
            height = int(top if number in ("latest", "finalized") else number, 16)
            result = (
                f'{{"number":"{height:#x}","hash":"0x{height:064x}",'
                f'"parentHash":"0x{max(height - 1, 0):064x}",'
                f'"timestamp":"{height:#x}","logsBloom":"{bloom}"}}'
            )
        else:
            result = "[]" if method == "eth_getLogs" else '"0x' + "0" * 64 + '"'
        return f'{{"jsonrpc":"2.0","id":{call["id"]},"result":{result}}}'

    async def handle(request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        many = isinstance(body, list)
        text = "[" + ",".join(map(answer, body)) + "]" if many else answer(body)
        return web.Response(text=text, content_type="application/json")

    async def main() -> None:
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ready.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(main())


async def measure_rss(databases: Databases) -> float:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve_headers, args=(theirs,), daemon=True)
    server.start()
    try:
        port = await asyncio.to_thread(ours.recv)
        engine = await databases.fresh()
        process = psutil.Process()
        async with JsonRpc(f"http://127.0.0.1:{port}", timeout_s=60) as rpc:
            rules = Rules(Chain.BASE, ESCROW, 5_000_000)
            watcher = Watcher(rules, EvmReader(BASE, rpc), engine, CLOCK, start_height=0, pace=FAST)
            height, before, told = 0, 0.0, time.monotonic()
            while height < MANY_BLOCKS:
                await watcher.tick()
                height = watcher._cursor.window.final.height if watcher._cursor else 0  # noqa: SLF001
                if not before and height >= RSS_FROM_BLOCK:
                    gc.collect()
                    before = process.memory_info().rss
                if time.monotonic() - told > 20:
                    told = time.monotonic()
                    say(f"{height:,} of {MANY_BLOCKS:,} blocks")
        gc.collect()
        return float(process.memory_info().rss - before) / 2**20
    finally:
        server.terminate()
        server.join()


class Databases:
    """Migrated databases on one embedded server."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self._server = server
        self._engines: list[AsyncEngine] = []

    async def fresh(self) -> AsyncEngine:
        url = self._server.url(f"bench_{uuid.uuid4().hex[:8]}")
        await database.create_database(url)
        await asyncio.to_thread(database.migrate, url)
        engine = database.connect(url)
        self._engines.append(engine)
        return engine

    async def close(self) -> None:
        for engine in self._engines:
            await engine.dispose()


async def main(folder: Path, server: EmbeddedPostgres) -> dict[str, float]:
    databases = Databases(server)
    try:
        result = await measure_logs(databases)
        result["blocks_per_s"] = round(await measure_empty_blocks(databases))
        say(f"{result}")
        result["solana_tx_per_s"] = round(await measure_solana_parsing())
        result["final_to_spendable_p99_s"] = round(await measure_spendable(databases, folder / "chains"), 2)
        say(f"{result}")
        result["rss_growth_mb"] = round(await measure_rss(databases), 1)
        return result
    finally:
        await databases.close()


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory(prefix="tollway-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        server = EmbeddedPostgres(folder / "postgres")
        server.start()
        try:
            print(json.dumps(asyncio.run(main(folder, server))))
        finally:
            server.stop()
