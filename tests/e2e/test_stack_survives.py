"""`tollway up` is killed in every way a machine knows; nothing is lost and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from sqlalchemy import make_url
from stack_parts import Buyer, Up, assert_all_gone, eventually, processes_about, tollway

from chain.networks import Chain
from chain.units import Micro
from marketplace.platform.embedded_nats import EmbeddedNats, load_or_make_credentials
from marketplace.platform.embedded_postgres import EmbeddedPostgres
from marketplace.platform.huge_pages import collapse
from marketplace.platform.processes import free_port
from marketplace.stack.development_chains import usdc_of

pytestmark = [pytest.mark.chains, pytest.mark.timeout(400)]

SEED = bytes(range(32))
EVM = (Chain.ETHEREUM, Chain.BASE)
DEPOSITS = {Chain.ETHEREUM: "21.5", Chain.BASE: "12", Chain.SOLANA: "7.25"}


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not under pytest's own folder: as root, PostgreSQL runs as somebody else, whom pytest keeps out.
    with tempfile.TemporaryDirectory(prefix="tollway-e2e-") as name:
        Path(name).chmod(0o755)
        yield Path(name) / "data"


def prove(folder: Path) -> list[dict[str, object]]:
    done = tollway("prove", "--json", "--data-dir", str(folder))
    proofs: list[dict[str, object]] = json.loads(done.stdout)
    assert done.returncode == 0, [proof for proof in proofs if not proof["ok"]]
    return proofs


def child_of(up: Up, name: str) -> int:
    """The pid of one of the stack's processes, 0 while there is none."""
    found = processes_about(up.folder)
    return next((pid for pid, line in found.items() if line.endswith(f"-m marketplace {name}")), 0)


def huge_page_kib(pid: int) -> int:
    """How much of a process's memory lies in huge pages."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))


async def test_a_killed_stack_loses_nothing(folder: Path) -> None:
    first = Up(folder)
    with contextlib.closing(first), contextlib.ExitStack() as stack:
        facts = first.wait_until_up()
        assert set(facts) == {"api", "keys", "model", "rpc", "usdc", "escrow", "nats", "database"}
        assert set(facts["keys"]) == {"buyer", "operator", "admin"}
        assert set(facts["rpc"]) == set(facts["usdc"]) == set(facts["escrow"]) == set(Chain)
        assert (folder / "stack.json").stat().st_mode & 0o777 == 0o600
        assert all(key in first.output.read_text() for key in facts["keys"].values())

        buyer = stack.enter_context(Buyer(facts, seed=SEED))
        given = buyer.credited()
        assert list(given.values()) == [100_000_000]  # the demo buyer's own
        paid = {await buyer.deposit(chain, usdc): usdc for chain, usdc in DEPOSITS.items()}
        eventually(lambda: len(buyer.credited()) == 4)
        credited, available = buyer.credited(), buyer.available_nano
        assert {tx: str(Micro(n)) for tx, n in credited.items() if tx in paid} == {
            tx: f"{float(usdc):.6f}" for tx, usdc in paid.items()
        }
        assert available == sum(credited.values()) * 1000 == 140_750_000_000

        second = tollway("up", "--without-node", "--model", "tiny", "--data-dir", str(folder))
        assert second.returncode == 1
        assert f"a stack already runs in {folder} (pid {first.process.pid})" in second.stdout
        assert "Traceback" not in second.stdout

        gateway = child_of(first, "serve")
        if collapse():  # this kernel does it
            assert huge_page_kib(gateway) > 0
        os.kill(gateway, signal.SIGKILL)
        eventually(lambda: child_of(first, "serve") not in (0, gateway))
        eventually(lambda: _is_ready(facts["api"]))
        assert buyer.available_nano == available

        held = {chain: await usdc_of(buyer.wallet._rpc, chain, facts["escrow"][chain]) for chain in EVM}
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
        assert_all_gone(folder)

    again = Up(folder)
    with contextlib.closing(again), contextlib.ExitStack() as stack:
        facts_again = again.wait_until_up()
        assert facts_again["keys"] == facts["keys"]
        assert facts_again["escrow"] == facts["escrow"]
        buyer = stack.enter_context(Buyer(facts_again, seed=SEED))
        assert buyer.credited() == credited
        assert buyer.available_nano == available
        for chain in EVM:
            assert await usdc_of(buyer.wallet._rpc, chain, facts["escrow"][chain]) >= held[chain]
        assert sum(str(proof["name"]).startswith("S1 escrow:") for proof in prove(folder)) == 3

        tx = await buyer.deposit(Chain.SOLANA, "5")
        assert eventually(lambda: buyer.credited().get(tx)) == 5_000_000
        assert buyer.available_nano == available + 5_000_000_000
        prove(folder)

        assert again.send(signal.SIGINT) == 0
        assert_all_gone(folder, within_s=1)


def _is_ready(api: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{api}/readyz", timeout=5).status_code == 200
    return False


@pytest.mark.slow
def test_a_start_cut_short_is_finished_by_the_next(folder: Path) -> None:
    """The whole process group dies during the first start, make during the second; the third comes up."""
    group = Up(folder)
    with contextlib.closing(group):
        group.wait_until_it_says("development chains")
        os.killpg(group.process.pid, signal.SIGKILL)
        group.process.wait()
        assert_all_gone(folder)

    # `sh` stands for make: it starts us with MAKELEVEL set, waits, and can hand on no SIGKILL.
    through_make = Up(folder, through=("/bin/sh", "-c", '"$@"; exit $?', "make"), MAKELEVEL="1")
    with contextlib.closing(through_make):
        through_make.wait_until_it_says("people, model and keys")
        assert "up" in psutil.Process(through_make.process.pid).children()[0].cmdline()
        os.kill(through_make.process.pid, signal.SIGKILL)
        through_make.process.wait()
        # At once: this start must wait until that one's servers have let go of their files.
        third = Up(folder)
        with contextlib.closing(third):
            facts = third.wait_until_up()
            with Buyer(facts, seed=SEED) as buyer:
                assert buyer.available_nano == 100_000_000_000
            prove(folder)
            began = time.monotonic()
            done = tollway("down", "--data-dir", str(folder))
            assert (done.returncode, third.process.wait(5)) == (0, 0)
            assert "The stack has ended" in done.stdout
            assert time.monotonic() - began < 30
            assert_all_gone(folder, within_s=1)
    assert "No stack runs here" in tollway("down", "--data-dir", str(folder)).stdout


@pytest.mark.slow
def test_given_servers_are_used_instead_of_our_own(folder: Path) -> None:
    """TOLLWAY_DATABASE_URL and TOLLWAY_NATS_URL; they live on when the stack ends."""
    postgres = EmbeddedPostgres(folder.with_name("theirs") / "postgres")
    credentials = load_or_make_credentials(folder.with_name("theirs-nats") / "secrets")
    nats = EmbeddedNats(folder.with_name("theirs-nats") / "nats", free_port(), credentials)
    postgres.start()
    try:
        nats.start()
        given = {
            "TOLLWAY_DATABASE_URL": postgres.url("theirs").replace("+asyncpg", ""),
            "TOLLWAY_NATS_URL": nats.url,
        }
        refused = tollway("up", "--without-node", "--data-dir", str(folder), **given)
        assert (refused.returncode, "TOLLWAY_NATS_PASSWORD" in refused.stdout) == (1, True)
        given |= {
            "TOLLWAY_NATS_PASSWORD": credentials.password,
            "TOLLWAY_NATS_ISSUER_SEED": credentials.issuer_seed,
        }
        up = Up(folder, **given)
        with contextlib.closing(up):
            facts = up.wait_until_up()
            assert facts["nats"] == nats.url
            assert make_url(facts["database"]) == make_url(postgres.url("theirs"))
            assert not (folder / "postgres").exists()
            with Buyer(facts, seed=SEED) as buyer:
                assert buyer.available_nano == 100_000_000_000
            prove(folder)
            assert up.send(signal.SIGTERM) == 0
        assert postgres.is_alive()
        assert nats.is_alive()
        other = tollway("up", "--without-node", "--model", "tiny", "--data-dir", str(folder))
        assert other.returncode == 1
        assert "belongs to another book" in other.stdout
        assert_all_gone(folder, within_s=1)
    finally:
        nats.stop()
        postgres.stop()
