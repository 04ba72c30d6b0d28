from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self
from uuid import UUID, uuid4

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.ledger import accounts, leases, templates, usage
from marketplace.ledger.accounts import Account, Balance, ensure_account, read_balance
from marketplace.ledger.charges import Charge
from marketplace.ledger.errors import (
    ChargeRefused,
    KeyReused,
    LaneBroken,
    LedgerUnavailable,
    UnknownAccount,
    UnknownResult,
)
from marketplace.ledger.ids import uuid7
from marketplace.ledger.lane import ONE_CALL_ROWS_MAX
from marketplace.ledger.lease_keeper import LeaseKeeper
from marketplace.ledger.money import Nano, split
from marketplace.ledger.poster import BATCH_ROWS_MAX, Poster
from marketplace.ledger.posting import post_transfer
from marketplace.ledger.reconcile import Check, prove
from marketplace.platform.database import connect

DOLLAR = 1_000_000_000
NODE, KEY = uuid4(), uuid4()
_FORGED_BATCH = """
    INSERT INTO batches SELECT lane, 3, first_id, last_id, 1, 1, hash, hash FROM batches WHERE n = 2"""


@pytest.fixture
def ledger_engine(engine: AsyncEngine) -> AsyncEngine:
    return engine


@pytest.fixture
async def owner_engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = connect(database_url, role=None)
    yield engine
    await engine.dispose()


class CuttingProxy:
    """Stands between the client and the database; cuts a connection in the middle of what commits."""

    def __init__(self, database_url: str) -> None:
        self._target = make_url(database_url)
        self._folder = Path(tempfile.mkdtemp(prefix="ledger-proxy-"))
        self._armed: tuple[bytes, bool] | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._clients: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.cuts = 0

    @property
    def url(self) -> str:
        query = {"host": str(self._folder)}
        return self._target.set(query=query).render_as_string(hide_password=False)

    @property
    def _socket(self) -> Path:
        return self._folder / f".s.PGSQL.{self._target.port or 5432}"

    async def __aenter__(self) -> Self:
        await self.come_back()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.go_away()
        shutil.rmtree(self._folder)

    async def come_back(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._socket)

    async def go_away(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0.05)
        self._socket.unlink(missing_ok=True)

    def cut_at(self, message: bytes, *, reaches_the_server: bool) -> None:
        """Cut where the client next sends these bytes."""
        self._armed = message, reaches_the_server

    def say(self, message: bytes) -> None:
        """Say this to every client, as a server may at any moment."""
        for writer in self._clients:
            writer.write(message)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        url = self._target
        if url.host:
            server, to_server = await asyncio.open_connection(url.host, url.port)
        else:
            path = f"{url.query['host']}/.s.PGSQL.{url.query.get('port', url.port or 5432)}"
            server, to_server = await asyncio.open_unix_connection(path)
        self._writers |= {to_client, to_server}
        self._clients.add(to_client)
        try:
            await asyncio.gather(
                self._pump(client, to_server, to_client), self._pump(server, to_client, None)
            )
        finally:
            self._writers -= {to_client, to_server}
            self._clients.discard(to_client)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, back: asyncio.StreamWriter | None
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                if back is not None and self._armed is not None and self._armed[0] in data:
                    (_, reaches), self._armed = self._armed, None
                    self.cuts += 1
                    back.transport.abort()
                    if not reaches:
                        sink.transport.abort()
                        return
                sink.write(data)
                await sink.drain()
        with contextlib.suppress(OSError):
            sink.close()


async def a_buyer(engine: AsyncEngine, *, balance: int, person: str = "ann") -> int:
    async with engine.begin() as conn:
        account = await ensure_account(conn, accounts.buyer(person))
        if balance:
            deposit = templates.top_up(person=person, amount=Nano(balance), ref=f"top-up-{person}")
            await post_transfer(conn, deposit)
    return account


async def an_operator(engine: AsyncEngine, person: str = "olga") -> int:
    async with engine.begin() as conn:
        return await ensure_account(conn, accounts.operator_earnings(person))


async def balance_of(engine: AsyncEngine, account: Account) -> Balance:
    async with engine.connect() as conn:
        balance = await read_balance(conn, account)
    assert balance is not None
    return balance


def a_charge(
    buyer: int, operator: int | None, amount: int, *, charge_id: UUID | None = None, model: str = "m"
) -> Charge:
    return Charge(
        id=charge_id or uuid7(), buyer=buyer, operator=operator, amount=Nano(amount),
        fee=split(Nano(amount))[1], node=NODE, model=model, key_id=KEY, tok_in=10, tok_out=20,
        price_version=1, latency_ms=5, ttft_ms=2, finish="stop",
    )  # fmt: skip


@asynccontextmanager
async def serving(engine: AsyncEngine, **options: object) -> AsyncIterator[tuple[LeaseKeeper, Poster]]:
    async with (
        LeaseKeeper(engine, worker=f"w-{uuid4()}") as keeper,
        Poster(engine, settle=keeper.settle, **options) as poster,
    ):
        yield keeper, poster


async def test_a_served_request_moves_money_three_ways_and_gives_the_rest_of_its_hold_back(ledger_engine):
    buyer, operator = await a_buyer(ledger_engine, balance=DOLLAR), await an_operator(ledger_engine)
    async with serving(ledger_engine) as (keeper, poster):
        hold = await keeper.authorise(buyer, Nano(1_000_000))
        assert (await balance_of(ledger_engine, accounts.buyer("ann"))).held.n >= 1_000_000
        assert await poster.post(a_charge(buyer, operator, 101), hold) is True
        keeper.release(hold)
        held = (await balance_of(ledger_engine, accounts.buyer("ann"))).held.n
        assert keeper.book.free(buyer) == held
    after = await balance_of(ledger_engine, accounts.buyer("ann"))
    assert (after.posted.n, after.held.n) == (DOLLAR - 101, 0)
    assert (await balance_of(ledger_engine, accounts.operator_earnings("olga"))).posted.n == 80
    assert (await balance_of(ledger_engine, accounts.platform_revenue(0))).posted.n == 21


async def proofs(engine: AsyncEngine) -> dict[str, Check]:
    async with engine.connect() as conn, engine.connect() as beside:
        return {check.name: check async for check in prove(conn, beside=beside)}


async def everything_holds(engine: AsyncEngine) -> bool:
    broken = [check for check in (await proofs(engine)).values() if not check.ok]
    assert broken == []
    return True


async def test_many_charges_share_few_commits_and_the_book_proves_itself(ledger_engine):
    operators = [await an_operator(ledger_engine, f"operator-{n}") for n in range(3)]
    buyers = [await a_buyer(ledger_engine, balance=DOLLAR, person=f"buyer-{n}") for n in range(5)]
    async with serving(ledger_engine) as (keeper, poster):

        async def serve(n: int) -> bool:
            hold = await keeper.authorise(buyers[n % 5], Nano(10_000))
            return await poster.post(a_charge(buyers[n % 5], operators[n % 3], 1_001 + n % 7), hold)

        assert all(await asyncio.gather(*(serve(n) for n in range(3_000))))
    async with ledger_engine.connect() as conn:
        assert await conn.scalar(text("SELECT count(*) FROM charges")) == 3_000
        # 7 on a quiet machine, 22 on a busy one: how soon the next begins is the machine's.
        assert await conn.scalar(text("SELECT count(*) FROM batches")) <= 100
        assert await conn.scalar(text("SELECT sum(rows) FROM batches")) == 3_000
        seen = {row.id for row in (await conn.execute(text("SELECT id FROM charges"))).all()}
        first = await usage.page(conn, usage.Selection(buyer=buyers[0]), limit=400)
        second = await usage.page(conn, usage.Selection(buyer=buyers[0]), limit=400, before=first[-1].id)
        total = await usage.totals(conn, usage.Selection(buyer=buyers[0]))
    assert len(seen) == 3_000
    assert (len(first), len(second), total.requests) == (400, 200, 600)
    ids = [charge.id.bytes for charge in (*first, *second)]
    assert ids == sorted(ids, reverse=True)
    assert total.amount.n == sum(charge.amount.n for charge in (*first, *second))
    assert await everything_holds(ledger_engine)
    assert (await balance_of(ledger_engine, accounts.buyer("buyer-0"))).held.n == 0


async def test_those_of_a_durable_batch_are_told_while_the_next_one_is_stuck(ledger_engine, owner_engine):
    """They are told late, so that the database works meanwhile; not as late as the next commit."""
    buyer = await a_buyer(ledger_engine, balance=DOLLAR)
    quick = await an_operator(ledger_engine, "olga")
    stuck = await an_operator(ledger_engine, "oscar")
    async with serving(ledger_engine) as (_, poster):
        lock = text("SELECT FROM balances WHERE account_id = :id FOR UPDATE")
        async with owner_engine.begin() as conn:
            await conn.execute(lock, {"id": stuck})
            first = [
                asyncio.ensure_future(poster.post(a_charge(buyer, quick, 1))) for _ in range(BATCH_ROWS_MAX)
            ]
            second = [asyncio.ensure_future(poster.post(a_charge(buyer, stuck, 1))) for _ in range(100)]
            assert all(await asyncio.wait_for(asyncio.gather(*first), 4))
            assert not any(posting.done() for posting in second)
            assert poster.waiting == 100
        assert all(await asyncio.gather(*second))
    assert await everything_holds(ledger_engine)


async def test_a_replayed_charge_changes_nothing_and_an_altered_one_is_refused(ledger_engine):
    buyer, operator = await a_buyer(ledger_engine, balance=DOLLAR), await an_operator(ledger_engine)
    charge = a_charge(buyer, operator, 1_000)
    altered = a_charge(buyer, operator, 999, charge_id=charge.id)
    async with serving(ledger_engine) as (keeper, poster):
        assert await poster.post(charge) is True
        before = await balance_of(ledger_engine, accounts.buyer("ann"))
        hold = await keeper.authorise(buyer, Nano(5_000))
        outcomes = await asyncio.gather(
            poster.post(charge, hold),
            poster.post(altered),
            poster.post(a_charge(buyer, operator, 7)),
            poster.post(charge),
            return_exceptions=True,
        )
        assert outcomes[0] is False
        assert isinstance(outcomes[1], KeyReused)
        assert outcomes[2] is True
        assert outcomes[3] is False
        assert keeper.book.free(buyer) == (await balance_of(ledger_engine, accounts.buyer("ann"))).held.n
    after = await balance_of(ledger_engine, accounts.buyer("ann"))
    assert after.posted.n == before.posted.n - 7
    assert await everything_holds(ledger_engine)


async def test_a_refused_charge_fails_alone(ledger_engine, owner_engine):
    buyer, operator = await a_buyer(ledger_engine, balance=DOLLAR), await an_operator(ledger_engine)
    async with owner_engine.begin() as conn:
        await conn.execute(text("ALTER TABLE charges ADD CONSTRAINT poison CHECK (model <> 'poison')"))
    async with serving(ledger_engine) as (keeper, poster):
        holds = [await keeper.authorise(buyer, Nano(2_000)) for _ in range(40)]
        charges = [
            a_charge(buyer, operator, 1_000, model="poison" if n in {7, 31} else "m") for n in range(40)
        ]
        charges[3] = a_charge(buyer, 999_999, 1_000)
        posts = (poster.post(charge, hold) for charge, hold in zip(charges, holds, strict=True))
        outcomes = await asyncio.gather(*posts, return_exceptions=True)
        assert [type(outcomes[n]) for n in (3, 7, 31)] == [UnknownAccount, ChargeRefused, ChargeRefused]
        assert sum(outcome is True for outcome in outcomes) == 37
        for hold in holds:
            keeper.release(hold)
        assert keeper.book.free(buyer) == (await balance_of(ledger_engine, accounts.buyer("ann"))).held.n
    assert (await balance_of(ledger_engine, accounts.operator_earnings("olga"))).posted.n == 37 * 800
    assert await everything_holds(ledger_engine)


async def test_failed_requests_are_logged_without_moving_money(ledger_engine):
    buyer = await a_buyer(ledger_engine, balance=0)
    async with serving(ledger_engine) as (_, poster):
        await poster.post(Charge(id=uuid7(), buyer=buyer, model="none", status=503))
    async with ledger_engine.connect() as conn:
        (row,) = await usage.page(conn, usage.Selection(buyer=buyer, only_failed=True))
    assert (row.status, row.amount.n, row.operator, row.node) == (503, 0, None, None)
    assert await everything_holds(ledger_engine)


@pytest.mark.parametrize("beside", [0, ONE_CALL_ROWS_MAX], ids=["one call", "copy"])
async def test_a_charge_whose_lease_was_reaped_is_posted_and_its_shortfall_carried(ledger_engine, beside):
    buyer, operator = await a_buyer(ledger_engine, balance=10_000), await an_operator(ledger_engine)
    async with serving(ledger_engine) as (keeper, poster):
        hold = await keeper.authorise(buyer, Nano(8_000))
        async with ledger_engine.begin() as conn:
            await conn.execute(text("UPDATE leases SET expires = now() - interval '1 minute'"))
            assert await leases.reap(conn) == 1
            await leases.lease(conn, buyer, "another", Nano(7_000))  # spends what the dead lease had held
        free = (poster.post(a_charge(buyer, operator, 0)) for _ in range(beside))
        posted = await asyncio.gather(poster.post(a_charge(buyer, operator, 5_000), hold), *free)
        assert posted == [True] * (beside + 1)
    after = await balance_of(ledger_engine, accounts.buyer("ann"))
    assert (after.posted.n, after.held.n) == (7_000, 7_000)  # 10,000 − 5,000 + 2,000 carried
    assert (await balance_of(ledger_engine, accounts.LOSS)).posted.n == -2_000
    assert await everything_holds(ledger_engine)


async def test_a_cost_above_its_hold_takes_the_rest_from_the_balance_not_from_other_holds(ledger_engine):
    buyer, operator = await a_buyer(ledger_engine, balance=10_000), await an_operator(ledger_engine)
    async with serving(ledger_engine) as (keeper, poster):
        small, other = await keeper.authorise(buyer, Nano(100)), await keeper.authorise(buyer, Nano(4_000))
        await poster.post(a_charge(buyer, operator, 150), small)
        row = "SELECT coalesce(sum(amount), 0) FROM leases"
        async with ledger_engine.connect() as conn:
            leased = await conn.scalar(text(row))
        assert leased == keeper.book.free(buyer) + other.amount_nano
        keeper.release(other)
    assert (await balance_of(ledger_engine, accounts.buyer("ann"))).posted.n == 9_850
    assert await everything_holds(ledger_engine)


@pytest.mark.parametrize(
    ("tampering", "found_by"),
    [
        ("UPDATE charges SET amount = amount + 1000", {"L4 chained lane 0", "L5 posted"}),
        ("UPDATE charges SET model = 'cheaper'", {"L4 chained lane 0"}),
        ("DELETE FROM charges", {"L4 chained lane 0", "L5 posted"}),
        ("DELETE FROM batches", {"L4 chained lane 0"}),
        ("UPDATE batches SET hash = prev_hash", {"L4 chained lane 0"}),
        (
            "UPDATE balances SET posted = posted + 5 WHERE floor = 0",
            {"L2 closed", "L5 posted", "S2 in-flight stays owed"},
        ),
        ("UPDATE balances SET held = held + 5 WHERE posted > 5 AND floor = 0", {"L5 held"}),
        ("UPDATE transfers SET amount = amount + 1", {"L5 posted"}),
        ("UPDATE transfers SET kind = 'sweep'", {"L8 permitted"}),
        ("GRANT UPDATE ON charges TO tollway_app", {"L3 immutable"}),
    ],
)  # fmt: skip
async def test_prove_finds_what_somebody_with_full_rights_changed(
    ledger_engine, owner_engine, tampering, found_by
):
    buyer, operator = await a_buyer(ledger_engine, balance=DOLLAR), await an_operator(ledger_engine)
    async with serving(ledger_engine) as (_, poster):
        await poster.post(a_charge(buyer, operator, 1_000))
    assert await everything_holds(ledger_engine)
    async with owner_engine.begin() as conn:
        await conn.execute(text(tampering))
    assert {name for name, check in (await proofs(ledger_engine)).items() if not check.ok} == found_by


@pytest.mark.parametrize("reaches_the_server", [True, False])
@pytest.mark.parametrize("rows", [10, ONE_CALL_ROWS_MAX + 1])
async def test_a_connection_lost_in_the_commit_posts_exactly_once(
    ledger_engine, database_url, reaches_the_server, rows
):
    buyer, operator = await a_buyer(ledger_engine, balance=DOLLAR), await an_operator(ledger_engine)
    async with CuttingProxy(database_url) as proxy:
        engine = connect(proxy.url)
        try:
            async with serving(engine, patience_s=10) as (keeper, poster):
                assert await poster.post(a_charge(buyer, operator, 1)) is True
                hold = await keeper.authorise(buyer, Nano(5_000))
                charges = [a_charge(buyer, operator, 1_000) for _ in range(rows)]
                call = charges[0].id.bytes  # among the arguments of the one call
                proxy.cut_at(
                    call if rows <= ONE_CALL_ROWS_MAX else b"COMMIT", reaches_the_server=reaches_the_server
                )
                posts = [poster.post(charges[0], hold), *(poster.post(charge) for charge in charges[1:])]
                assert await asyncio.gather(*posts) == [True] * rows
                assert proxy.cuts == 1
        finally:
            await engine.dispose()
    assert (await balance_of(ledger_engine, accounts.buyer("ann"))).posted.n == DOLLAR - rows * 1_000 - 1
    assert (await balance_of(ledger_engine, accounts.buyer("ann"))).held.n == 0
    assert await everything_holds(ledger_engine)


def last_word() -> bytes:
    """What a server's process says when its postmaster was killed, before it closes the connection."""
    fields = b"SFATAL\0VFATAL\0C57P02\0Mterminating connection due to unexpected postmaster exit\0\0"
    return b"E" + (len(fields) + 4).to_bytes(4, "big") + fields


async def test_a_batch_sent_after_a_dying_servers_last_word_is_posted(ledger_engine, database_url):
    buyer, operator = await a_buyer(ledger_engine, balance=DOLLAR), await an_operator(ledger_engine)
    async with CuttingProxy(database_url) as proxy:
        engine = connect(proxy.url)
        try:
            async with serving(engine, patience_s=20) as (_, poster):
                assert await poster.post(a_charge(buyer, operator, 1)) is True
                proxy.say(last_word())
                await asyncio.sleep(0.05)  # it is read; the connection stays open a moment longer
                assert await poster.post(a_charge(buyer, operator, 10)) is True
                assert poster.is_ready
        finally:
            await engine.dispose()
    assert (await balance_of(ledger_engine, accounts.buyer("ann"))).posted.n == DOLLAR - 11
    assert await everything_holds(ledger_engine)


async def test_while_the_database_is_away_posts_end_in_time_and_nothing_is_lost(ledger_engine, database_url):
    buyer, operator = await a_buyer(ledger_engine, balance=DOLLAR), await an_operator(ledger_engine)
    async with CuttingProxy(database_url) as proxy:
        engine = connect(proxy.url)
        try:
            async with serving(engine, patience_s=0.6, queue_max=5) as (keeper, poster):
                assert await poster.post(a_charge(buyer, operator, 1)) is True
                hold = await keeper.authorise(buyer, Nano(5_000))
                await proxy.go_away()
                posts = [
                    poster.post(a_charge(buyer, operator, 10), hold if n == 0 else None) for n in range(8)
                ]
                outcomes = await asyncio.gather(*posts, return_exceptions=True)
                kinds = [type(outcome) for outcome in outcomes]
                assert set(kinds) == {UnknownResult, LedgerUnavailable}
                accepted = kinds.count(UnknownResult)
                free = keeper.book.free(buyer)
                keeper.release(hold)  # its charge is still to come: this must not free it
                assert keeper.book.free(buyer) == free
                with pytest.raises(LedgerUnavailable):
                    await keeper.authorise(buyer, Nano(DOLLAR // 2))
                await proxy.come_back()
                async with asyncio.timeout(10):
                    while poster.waiting:
                        await asyncio.sleep(0.05)
        finally:
            await engine.dispose()
    assert (await balance_of(ledger_engine, accounts.buyer("ann"))).posted.n == DOLLAR - 1 - 10 * accepted
    assert await everything_holds(ledger_engine)


async def test_two_posters_write_to_two_lanes(ledger_engine):
    buyer, operator = await a_buyer(ledger_engine, balance=DOLLAR), await an_operator(ledger_engine)
    async with serving(ledger_engine) as (_, one), serving(ledger_engine) as (_, two):
        posts = [poster.post(a_charge(buyer, operator, 100)) for poster in (one, two) for _ in range(300)]
        assert all(await asyncio.gather(*posts))
        assert {one.lane, two.lane} == {0, 1}
    assert (await balance_of(ledger_engine, accounts.platform_revenue(0))).posted.n == 6_000
    assert (await balance_of(ledger_engine, accounts.platform_revenue(1))).posted.n == 6_000
    assert await everything_holds(ledger_engine)


async def test_a_poster_that_lost_its_lane_to_another_goes_on_with_a_free_one(ledger_engine, database_url):
    buyer, operator = await a_buyer(ledger_engine, balance=DOLLAR), await an_operator(ledger_engine)
    async with CuttingProxy(database_url) as proxy:
        engine = connect(proxy.url)
        try:
            async with serving(engine, patience_s=10) as (_, one):
                assert await one.post(a_charge(buyer, operator, 1)) is True
                await proxy.go_away()
                posting = asyncio.create_task(one.post(a_charge(buyer, operator, 10)))
                async with serving(ledger_engine, lane=0) as (_, two):
                    assert await two.post(a_charge(buyer, operator, 100)) is True
                    await proxy.come_back()
                    assert await posting is True
                    assert (one.lane, two.lane) == (1, 0)
        finally:
            await engine.dispose()
    assert (await balance_of(ledger_engine, accounts.buyer("ann"))).posted.n == DOLLAR - 111
    assert await everything_holds(ledger_engine)


async def test_a_chain_that_lost_its_head_stops_the_poster(ledger_engine, owner_engine):
    buyer, operator = await a_buyer(ledger_engine, balance=DOLLAR), await an_operator(ledger_engine)
    async with serving(ledger_engine) as (_, poster):
        for _ in range(2):
            await poster.post(a_charge(buyer, operator, 1))
        async with owner_engine.begin() as conn:
            await conn.execute(text("UPDATE batches SET hash = sha256('x') WHERE n = 2"))
            await conn.execute(text(_FORGED_BATCH))
        with pytest.raises(LaneBroken):
            await poster.post(a_charge(buyer, operator, 1))
        with pytest.raises(LaneBroken):
            await poster.post(a_charge(buyer, operator, 1))
        assert not poster.is_ready
