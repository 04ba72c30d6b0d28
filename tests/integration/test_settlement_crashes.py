"""A process dies before and after every commit and every send of a batch, on real chains.

The points are not listed by hand: every commit that writes something and every transaction given to a node
is one.  Round by round the process dies at the next of them, before it and after it, until a round is
survived; each time a new settler carries on, and the recipients' balances on chain alone say who was paid,
and how often.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.payouts import Payout
from chain.units import Micro
from marketplace.ledger import accounts as ledger_accounts
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction
from marketplace.settlement import address_book, batches, plan_requests, signing, withdrawals
from marketplace.settlement.consents import consent_of
from marketplace.settlement.rails import open_rails
from marketplace.settlement.settler import Pace, Settler
from tests.settlement_parts import LIMITS, Stop, a_person, earn, posted
from tests.settlement_rigs import PASSPHRASE, Rig, a_base_rig, a_solana_rig

pytestmark = [pytest.mark.slow, pytest.mark.chains, pytest.mark.timeout(300)]

PAYEES = 3
PACE = Pace(resend_s=3600, expire_s=0)
POINTS_MIN = 9
"""Commits: ask, plan, answer, two approvals, sign, record the send, book; and at least one send."""


@dataclass
class Death:
    """Counts commits and sends; dies at the `at`-th, before it or after it."""

    at: int | None = None
    is_before: bool = True
    seen: list[str] = field(default_factory=list)
    is_dead: bool = False

    def reach(self, what: str) -> None:
        """Something irreversible is about to happen."""
        self.check()
        self.seen.append(what)
        if self.at == len(self.seen):
            self.is_dead = True
            if self.is_before:
                raise Stop

    def check(self) -> None:
        """The dead do nothing more."""
        if self.is_dead:
            raise Stop

    def watch_book(self, engine: AsyncEngine) -> Callable[[], None]:
        """Reach every commit of a transaction that wrote; gives what ends the watch."""

        def began(conn: Any) -> None:
            conn.info["wrote"] = False
            self.check()

        def executes(conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if statement.lstrip().startswith(("INSERT", "UPDATE", "DELETE")):
                conn.info["wrote"] = True

        def commits(conn: Any) -> None:
            if conn.info.get("wrote"):
                self.reach("commit")

        watched = {"begin": began, "before_cursor_execute": executes, "commit": commits}
        for name, listener in watched.items():
            event.listen(engine.sync_engine, name, listener)

        def end() -> None:
            for name, listener in watched.items():
                event.remove(engine.sync_engine, name, listener)

        return end

    def watch_node(self, rpc: Any) -> None:
        """Reach every transaction given to the node."""
        call: Callable[..., Awaitable[Any]] = rpc.call

        async def watched(method: str, *arguments: Any, **options: Any) -> Any:
            is_send = method in ("eth_sendRawTransaction", "sendTransaction")
            if is_send:
                self.reach("send")
            answer = await call(method, *arguments, **options)
            if is_send:
                self.check()
            return answer

        rpc.call = watched


@dataclass
class Round:
    """One batch, from request to the last balance."""

    rig: Rig
    engine: AsyncEngine
    made: list[withdrawals.Withdrawal]

    async def run(self, death: Death) -> None:
        """Everything from asking for a plan until everybody is paid; a new process after each death."""
        for _ in range(3):
            end = death.watch_book(self.engine)
            try:
                await self._process(death)
            except Stop:
                death = Death()
            else:
                return
            finally:
                end()
        raise AssertionError("died more than once")

    async def _process(self, death: Death) -> None:
        async with open_rails(self.rig.chains, self.rig.folder, [self.rig.chain]) as rails:
            rail: Any = rails[self.rig.chain]
            death.watch_node(rail._rpc)
            settler = Settler(self.engine, rail, SystemClock(), pace=PACE)
            for _ in range(600):
                if await self._is_over():
                    death.check()
                    return
                await self._people()
                await settler.tick()
                await self.rig.hurry()
                await asyncio.sleep(0.01)
        raise AssertionError("never came to rest")

    async def _people(self) -> None:
        """Ask for a batch if none is under way; two signers sign one that waits."""
        now = SystemClock().now()
        async with transaction(self.engine) as conn:
            live = await batches.live_batch(conn, self.rig.chain)
            if live is None:
                await plan_requests.ask(conn, chain=self.rig.chain, asked_by="ada", now=now)
                return
        if live.status is not Payout.PLANNED:
            return
        consent = consent_of(self.rig.chains, self.rig.chain)
        async with transaction(self.engine) as conn:
            export = await signing.export_batch(conn, live.id)
        for keystore in self.rig.keystores[:2]:
            document = signing.sign_export(export, consent, keystore=keystore, passphrase=PASSPHRASE)
            async with transaction(self.engine) as conn:
                await signing.store_approval(conn, consent, document, pushed_by="bo", now=now)

    async def _is_over(self) -> bool:
        async with transaction(self.engine) as conn:
            statement = text("SELECT count(*) FROM withdrawals WHERE status <> 'paid'")
            return (await conn.execute(statement)).scalar_one() == 0


@pytest.fixture(params=[a_base_rig, a_solana_rig], ids=["base", "solana"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    (tmp_path / "vm").mkdir()
    async with request.param(tmp_path, 6_000_000_000) as made:
        yield made


async def test_a34_every_payout_once_whatever_the_moment_of_death(engine: AsyncEngine, rig: Rig) -> None:
    owed: dict[str, int] = {}

    async def one_round(number: int, death: Death) -> None:
        # Others each round: on Solana we open one token account an operator (A45).
        people = [await a_person(engine) for _ in range(PAYEES)]
        for person in people:
            await earn(engine, person, 20, rig.chain)
        made = [await _request(engine, rig, person, number, i) for i, person in enumerate(people)]
        owed.update({withdrawal.address: withdrawal.amount.n for withdrawal in made})
        await Round(rig, engine, made).run(death)
        for withdrawal in made:
            assert await rig.usdc_of(withdrawal.address) == withdrawal.amount.n, (number, death.seen)

    points = number = 0
    while True:
        deaths = [Death(points + 1, is_before) for is_before in (True, False)]
        for death in deaths:
            await one_round(number, death)
            number += 1
        if not any(death.is_dead for death in deaths):
            break
        points += 1
    assert points >= POINTS_MIN
    paid = sum([await rig.usdc_of(address) for address in owed])
    assert paid == sum(owed.values())
    assert await rig.usdc_of(rig.escrow) == 6_000_000_000 - paid
    assert await posted(engine, ledger_accounts.payouts_in_flight(rig.chain.value)) == 0


async def _request(
    engine: AsyncEngine, rig: Rig, person: UUID, number: int, payee: int
) -> withdrawals.Withdrawal:
    now = SystemClock().now()
    wallet = rig.new_wallet(number * PAYEES + payee)
    async with transaction(engine) as conn:
        entry, _ = await address_book.add(
            conn, person=person, chain=rig.chain, text=wallet, forbidden=(), cooling_s=0,
            now=now - timedelta(seconds=1),
        )  # fmt: skip
        made, _ = await withdrawals.request(
            conn, person=person, chain=rig.chain, address=entry.address,
            amount=Micro(10_000_000 + number * 10 + payee), key=f"round {number}", limits=LIMITS, now=now,
        )  # fmt: skip
        await address_book.retire(conn, person=person, address_id=entry.id, now=now)
    return made
