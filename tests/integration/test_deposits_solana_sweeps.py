"""Money on pool addresses reaches the escrow: prepared, signed offline by two of three, sent, booked (S1)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from chain.errors import UnknownResult
from chain.localnet.solana import deploy, fund
from chain.localnet.solana_vm.server import serving
from chain.localnet.solana_wallet import SolanaWallet
from chain.networks import Chain
from chain.ports import SignedTransaction
from chain.solana import keystore, programs, sending
from chain.solana.deposits import derive_owner
from chain.solana.reader import SolanaReader
from chain.solana.rpc import SolanaRpc
from chain.units import Micro
from marketplace.deposits import solana_sweeps as module
from marketplace.deposits.addresses import solana_address
from marketplace.deposits.booking import Rules
from marketplace.deposits.cursor import load_cursor
from marketplace.deposits.errors import SweepRefused
from marketplace.deposits.pool import PoolKeeper, pool_keeper
from marketplace.deposits.reconcile import check_chain
from marketplace.deposits.service import acknowledge_alarm
from marketplace.deposits.solana_sweeps import SolanaSweeper, solana_sweeper
from marketplace.deposits.tables import solana_pool, support_cases
from marketplace.deposits.tables import solana_sweeps as table
from marketplace.deposits.tables import sweeps as booked
from marketplace.deposits.watcher import Watcher
from marketplace.ledger import accounts
from marketplace.ledger.accounts import read_balance
from marketplace.platform.clock import SystemClock
from marketplace.platform.database import transaction
from marketplace.platform.settings import SolanaChainConfig

POOL_SEED, GAS_SEED = bytes(range(32)), bytes([9]) * 32
PASSPHRASE = "correct horse battery staple"
CLOCK = SystemClock()


@dataclass
class Town:
    engine: AsyncEngine
    rpc: SolanaRpc
    config: SolanaChainConfig
    keys: list[Path]
    watcher: Watcher
    keeper: PoolKeeper
    wallet: SolanaWallet

    def sweeper(self) -> SolanaSweeper:
        return solana_sweeper(self.engine, CLOCK, self.rpc, self.config, gas_seed=GAS_SEED)

    async def person(self) -> tuple[uuid.UUID, str]:
        while await self.keeper.tick():
            pass
        person = uuid.uuid4()
        async with transaction(self.engine) as conn:
            address = await solana_address(conn, person, now=CLOCK.now())
        assert address is not None
        return person, address

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(30):
            while not await condition():
                await self.watcher.tick()
                await asyncio.sleep(0.01)

    async def balance(self, account: accounts.Account) -> int:
        async with transaction(self.engine) as conn:
            found = await read_balance(conn, account)
        return 0 if found is None else found.posted.n // 1000

    def has(self, account: accounts.Account, micro: int) -> Callable[[], Awaitable[bool]]:
        async def check() -> bool:
            return await self.balance(account) == micro

        return check

    async def approve(self, *which: int) -> None:
        async with transaction(self.engine) as conn:
            export = await module.export_sweep(conn)
        for index in which:
            document = module.sign_sweep(export, self.config, self.keys[index], PASSPHRASE)
            raw = msgspec.json.encode(document)
            async with transaction(self.engine) as conn:
                await module.store_approval(
                    conn, self.config, module.decode_approval(raw), brought_by="ann", clock=CLOCK
                )

    async def status(self) -> list[str]:
        async with transaction(self.engine) as conn:
            return list(await conn.scalars(select(table.c.status).order_by(table.c.id)))

    async def cases(self) -> list[str]:
        async with transaction(self.engine) as conn:
            return list(await conn.scalars(select(support_cases.c.kind)))

    async def books_hold(self) -> None:
        stop = asyncio.Event()
        watching = asyncio.create_task(self._keep_up(stop))
        for result in await check_chain(self.engine, self.watcher.reader, self.config.escrow, patience_s=2):
            assert result.is_equal, result
        stop.set()
        await watching

    async def _keep_up(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self.watcher.tick()
            await asyncio.sleep(0.005)


@pytest.fixture
async def town(engine: AsyncEngine, tmp_path: Path) -> AsyncIterator[Town]:
    keys = [tmp_path / f"signer-{i}.json" for i in range(3)]
    signers = [keystore.create(path, PASSPHRASE, scrypt_n=2**14) for path in keys]
    gas = keystore.from_seed(GAS_SEED)
    async with contextlib.AsyncExitStack() as stack:
        port, _ = await stack.enter_async_context(
            serving(
                tmp_path / "solana",
                port=0,
                clock=lambda: int(time.time()),
                slot_ms=25,
                finalized_after=6,
                empty_every=3,
            )
        )
        rpc = await stack.enter_async_context(SolanaRpc(f"http://127.0.0.1:{port}"))
        there = await deploy(rpc, signers=signers, gas_payer=str(gas.pubkey()))
        config = SolanaChainConfig(
            rpc=(rpc.url,),
            usdc_mint=there.usdc_mint,
            multisig=there.multisig,
            escrow=there.escrow,
            nonce_account=there.nonce_account,
            gas_payer=there.gas_payer,
            signers=there.signers,
            threshold=2,
        )
        wallet = SolanaWallet(rpc)
        await fund(rpc, wallet.address, usdc=Micro(500_000_000), lamports=10**10)
        keeper = pool_keeper(engine, CLOCK, rpc, config, pool_seed=POOL_SEED, gas_seed=GAS_SEED, ready=2)
        watcher = Watcher(Rules(Chain.SOLANA, there.escrow, 5_000_000), SolanaReader(rpc), engine, CLOCK)
        await watcher.tick()
        yield Town(engine, rpc, config, keys, watcher, keeper, wallet)


async def two_deposits(town: Town) -> None:
    (one, first), (two, second) = await town.person(), await town.person()
    await town.wallet.pay(first, Micro(6_000_001))
    await town.wallet.pay(second, Micro(8_000_000))
    await town.until(town.has(accounts.buyer(str(one)), 6_000_001))
    await town.until(town.has(accounts.buyer(str(two)), 8_000_000))


async def test_two_of_three_empty_the_pool_into_the_escrow(town: Town) -> None:
    await two_deposits(town)
    sweeper = town.sweeper()
    await sweeper.tick()
    assert await town.status() == ["prepared"]
    await town.approve(0)
    assert not await sweeper.tick()  # one of three is not enough
    assert await town.status() == ["prepared"]
    await town.approve(2)
    assert await sweeper.tick()
    assert await town.status() == ["signed"]  # bytes are durable, nothing was sent
    assert await town.balance(accounts.escrow("solana")) == 0

    # kill −9 here: another process finds the bytes and sends them.
    again = town.sweeper()

    async def is_final() -> bool:
        await again.tick()
        return await town.status() == ["final"]

    await town.until(is_final)
    assert await town.balance(accounts.escrow("solana")) == -14_000_001
    assert await town.balance(accounts.unswept("solana")) == 0
    async with transaction(town.engine) as conn:
        rows = (await conn.execute(select(booked).order_by(booked.c.amount_micro))).all()
    assert [row.amount_micro for row in rows] == [6_000_001, 8_000_000]
    assert len({row.from_address for row in rows}) == 2
    assert await town.cases() == []
    await town.books_hold()
    assert not await again.tick()  # nothing is due any more
    assert await town.status() == ["final"]


async def test_a_sweep_whose_answer_was_lost_is_sent_once(town: Town) -> None:
    await two_deposits(town)
    sweeper = town.sweeper()
    await sweeper.tick()
    await town.approve(0, 1)
    await sweeper.tick()
    send = sweeper.rail.broadcast

    async def lost(signed: SignedTransaction) -> None:
        await send(signed)
        raise UnknownResult("the answer was lost")

    sweeper.rail.broadcast = lost  # type: ignore[method-assign]
    with pytest.raises(UnknownResult):
        await sweeper.tick()
    again = town.sweeper()

    async def is_final() -> bool:
        await again.tick()
        return await town.status() == ["final"]

    await town.until(is_final)
    assert await town.balance(accounts.escrow("solana")) == -14_000_001
    await town.books_hold()


async def test_a_signer_signs_only_his_own_escrow_and_an_export_cannot_say_otherwise(town: Town) -> None:
    await two_deposits(town)
    await town.sweeper().tick()
    async with transaction(town.engine) as conn:
        export = await module.export_sweep(conn)
    elsewhere = town.config.model_copy(update={"escrow": str(Keypair().pubkey())})
    signed = module.sign_sweep(export, elsewhere, town.keys[0], PASSPHRASE)
    async with transaction(town.engine) as conn:
        with pytest.raises(SweepRefused, match="not his"):
            await module.store_approval(conn, town.config, signed, brought_by="eve", clock=CLOCK)
    for raw in (b"{}", b"x", b'{"format":"other","sweep":"1","fence":"2","lines":[]}', b" " * 100_000):
        with pytest.raises(SweepRefused):
            module.decode_export(raw)
    stranger = town.keys[0].with_name("stranger.json")
    keystore.create(stranger, PASSPHRASE, scrypt_n=2**14)
    with pytest.raises(SweepRefused, match="not a signer"):
        module.sign_sweep(export, town.config, stranger, PASSPHRASE)
    async with transaction(town.engine) as conn:
        await module.cancel_sweep(conn, uuid.UUID(export.sweep), actor="ann", reason="drill", clock=CLOCK)
    await town.sweeper().tick()
    assert await town.status() == ["void", "prepared"]


async def test_a_sweep_and_a_strangers_payment_in_one_transaction_are_told_apart(town: Town) -> None:
    """A pool key's holder and a stranger pay the escrow together: the escrow's one difference is split."""
    person, address = await town.person()
    await town.wallet.pay(address, Micro(9_000_000))
    await town.until(town.has(accounts.buyer(str(person)), 9_000_000))
    async with transaction(town.engine) as conn:
        row = (await conn.execute(select(solana_pool).where(solana_pool.c.owner == address))).one()
    pool_key, payer = derive_owner(POOL_SEED, row.pool_index), Keypair()
    await fund(town.rpc, str(payer.pubkey()), usdc=Micro(3_000_000), lamports=10**9)

    def move(owner: Keypair, to: str, amount: int) -> Instruction:
        mint = Pubkey.from_string(town.config.usdc_mint)
        return programs.transfer_checked(
            source=programs.associated_token_account(owner.pubkey(), mint),
            mint=mint,
            to=Pubkey.from_string(to),
            authority=owner.pubkey(),
            signers=(),
            amount=amount,
        )

    moves = [move(pool_key, town.config.escrow, 5_000_000), move(payer, town.config.escrow, 3_000_000)]
    await sending.send_and_confirm(town.rpc, moves, [payer, pool_key])
    await town.until(town.has(accounts.escrow("solana"), -8_000_000))
    assert await town.balance(accounts.unswept("solana")) == -4_000_000
    assert await town.balance(accounts.unattributed("solana")) == 3_000_000
    assert await town.cases() == ["no_reference"]

    # The rest is taken away with the pool's key: the books follow, we carry it, a person is told.
    thief = SolanaWallet(town.rpc)
    await fund(town.rpc, thief.address, usdc=Micro(1), lamports=10**9)
    stolen = move(pool_key, thief.token_account, 4_000_000)
    await sending.send_and_confirm(town.rpc, [stolen], [payer, pool_key])
    await town.until(town.has(accounts.LOSS, -4_000_000))
    assert await town.balance(accounts.unswept("solana")) == 0
    assert sorted(await town.cases()) == ["no_reference", "pool_money_left"]
    await town.books_hold()


async def halt_reason(town: Town) -> str | None:
    async with transaction(town.engine) as conn:
        cursor = await load_cursor(conn, Chain.SOLANA)
    return cursor.halt.reason if cursor is not None and cursor.halt is not None else None


async def test_a26_an_account_of_ours_that_changes_hands_halts_until_acknowledged(town: Town) -> None:
    person, address = await town.person()
    async with transaction(town.engine) as conn:
        row = (await conn.execute(select(solana_pool).where(solana_pool.c.owner == address))).one()
    key, payer, heir = derive_owner(POOL_SEED, row.pool_index), Keypair(), Keypair().pubkey()
    await fund(town.rpc, str(payer.pubkey()), lamports=10**9)
    tag_set_authority, account_owner, some = 6, 2, 1
    metas = [
        AccountMeta(Pubkey.from_string(row.token_account), is_signer=False, is_writable=True),
        AccountMeta(key.pubkey(), is_signer=True, is_writable=False),
    ]
    give = Instruction(
        programs.TOKEN_PROGRAM, bytes([tag_set_authority, account_owner, some]) + bytes(heir), metas
    )
    await sending.send_and_confirm(town.rpc, [give], [payer, key])

    async def is_halted() -> bool:
        return await halt_reason(town) is not None

    await town.until(is_halted)
    reason = await halt_reason(town)
    assert reason is not None
    alarm = reason.rpartition(" ")[2]
    assert alarm.startswith("owner:")
    await acknowledge_alarm(town.engine, CLOCK, Chain.SOLANA, alarm, actor="ann", reason="seen")

    async def is_noted() -> bool:
        return sorted(await town.cases()) == ["account_owner", "chain_halted"]

    await town.until(is_noted)
    assert await halt_reason(town) is None
    assert await town.balance(accounts.buyer(str(person))) == 0


async def test_a29_a_closed_account_is_reported_and_made_anew(town: Town) -> None:
    person, address = await town.person()
    async with transaction(town.engine) as conn:
        row = (await conn.execute(select(solana_pool).where(solana_pool.c.owner == address))).one()
    key, payer, close_account = derive_owner(POOL_SEED, row.pool_index), Keypair(), 9
    await fund(town.rpc, str(payer.pubkey()), lamports=10**9)
    metas = [
        AccountMeta(Pubkey.from_string(row.token_account), is_signer=False, is_writable=True),
        AccountMeta(payer.pubkey(), is_signer=False, is_writable=True),
        AccountMeta(key.pubkey(), is_signer=True, is_writable=False),
    ]
    close = Instruction(programs.TOKEN_PROGRAM, bytes([close_account]), metas)
    await sending.send_and_confirm(town.rpc, [close], [payer, key])

    async def is_noted() -> bool:
        return await town.cases() == ["account_closed"]

    await town.until(is_noted)
    assert await town.rpc.account(row.token_account, "confirmed") is None
    while await town.keeper.tick():
        pass
    await town.wallet.pay(address, Micro(7_000_000))
    await town.until(town.has(accounts.buyer(str(person)), 7_000_000))
    await town.books_hold()


async def test_a29_a_frozen_account_is_reported_and_does_not_stop_the_others(town: Town) -> None:
    await two_deposits(town)
    async with transaction(town.engine) as conn:
        account = await conn.scalar(select(solana_pool.c.token_account).where(solana_pool.c.pool_index == 0))
    assert account is not None
    state = await town.rpc.account(account, "confirmed")
    assert state is not None
    data = bytearray(state.bytes())
    data[108] = 2  # frozen, as the issuer's freezeAccount leaves it
    body = {"lamports": 10**8, "data": base64.b64encode(data).decode(), "owner": state.owner}
    await town.rpc.call("dev_setAccount", [account, body], int)
    await asyncio.sleep(0.5)  # until it is final
    await town.sweeper().tick()
    async with transaction(town.engine) as conn:
        lines = await conn.scalar(select(table.c.lines))
        details = list(await conn.scalars(select(support_cases.c.detail)))
    assert lines is not None
    assert account not in [line["account"] for line in lines]
    assert details == [f"{account}: frozen by the issuer"]
    await town.books_hold()


async def test_an_approval_that_was_lost_is_renewed_and_the_account_swept(town: Town) -> None:
    """A fork may take it after the address was given out; the revocation here stands for one."""
    await two_deposits(town)
    async with transaction(town.engine) as conn:
        row = (await conn.execute(select(solana_pool).where(solana_pool.c.pool_index == 0))).one()
    key, payer, revoke_delegate = derive_owner(POOL_SEED, 0), Keypair(), 5
    await fund(town.rpc, str(payer.pubkey()), lamports=10**9)
    metas = [
        AccountMeta(Pubkey.from_string(row.token_account), is_signer=False, is_writable=True),
        AccountMeta(key.pubkey(), is_signer=True, is_writable=False),
    ]
    revoke = Instruction(programs.TOKEN_PROGRAM, bytes([revoke_delegate]), metas)
    await sending.send_and_confirm(town.rpc, [revoke], [payer, key])
    await asyncio.sleep(0.5)  # until it is final

    async def lines() -> set[str]:
        async with transaction(town.engine) as conn:
            found = await conn.scalar(select(table.c.lines).where(table.c.status == "prepared"))
            return {line["account"] for line in found or ()}

    sweeper = town.sweeper()
    await sweeper.tick()
    assert row.token_account not in await lines()
    assert await town.cases() == ["account_unsweepable"]
    async with transaction(town.engine) as conn:
        (sweep,) = await conn.scalars(select(table.c.id))
        await module.cancel_sweep(conn, sweep, actor="ann", reason="wait for the other", clock=CLOCK)
    while await town.keeper.tick():
        pass
    await asyncio.sleep(0.5)  # until it is final
    await sweeper.tick()
    assert row.token_account in await lines()
