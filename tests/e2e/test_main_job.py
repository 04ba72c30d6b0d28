"""The main job on real vLLM: `tollway demo` as a child, its report judged by arithmetic of our own.

Then the demo's folder is started again, without an engine: what the report says must be in its book and on
its chains, which by then have been through a full stop.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from stack_parts import DEMO_S, Up, assert_all_gone, tollway

from chain.networks import Chain
from marketplace.ledger.accounts import Account, Kind, read_balance
from marketplace.platform import database
from marketplace.stack.development_chains import usdc_of

pytestmark = [pytest.mark.engine, pytest.mark.chains, pytest.mark.timeout(DEMO_S)]

NANO_IN, NANO_OUT = 20_000_000, 100_000_000
"""The demo's price list: $20,000 and $100,000 per million tokens, so nano-dollars for one."""
TX = re.compile(r"0x[0-9a-f]{64}|[1-9A-HJ-NP-Za-km-z]{86,88}")
SHAPES = {
    "deposits": {"chain": str, "tx": str, "amount_micro": int, "credited_nano": int},
    "requests": {
        "id": str,
        "stream": bool,
        "prompt_tokens": int,
        "completion_tokens": int,
        "cost_nano": int,
        "operator_nano": int,
        "platform_nano": int,
    },
    "payouts": {"chain": str, "tx": str, "to": str, "amount_micro": int},
    "escrow": {"chain": str, "onchain_micro": int, "books_micro": int},
}


@dataclass(frozen=True)
class Told:
    folder: Path
    said: str
    report: dict[str, Any]


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    """The demo, run once."""
    # Not under pytest's own folder: as root, PostgreSQL runs as somebody else, whom pytest keeps out.
    with tempfile.TemporaryDirectory(prefix="tollway-e2e-") as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "demo"
        done = tollway("demo", "--model", "tiny", "--data-dir", str(folder), within_s=DEMO_S - 10)
        assert done.returncode == 0, done.stdout
        # PostgreSQL, NATS, the anvils, the Solana node, our processes, the agent, vLLM and its workers.
        assert_all_gone(folder, within_s=1)
        yield Told(folder, done.stdout, json.loads((folder / "report.json").read_text()))


def test_the_report_has_its_shape(told: Told) -> None:
    report = told.report
    assert set(report) == {*SHAPES, "refused_402", "ledger_sum_nano", "seconds"}
    for name, shape in SHAPES.items():
        for row in report[name]:
            assert {key: type(value) for key, value in row.items()} == shape, name
    assert report["refused_402"] is True
    assert report["ledger_sum_nano"] == 0
    assert report["seconds"]["total"] > 0
    transactions = [row["tx"] for name in ("deposits", "payouts") for row in report[name]]
    assert all(TX.fullmatch(tx) for tx in transactions), transactions
    assert len(set(transactions)) == len(transactions) == 6
    assert all(tx in told.said for tx in transactions)


def test_deposits_are_credited_to_the_last_unit(told: Told) -> None:
    deposits = told.report["deposits"]
    assert Counter(row["chain"] for row in deposits) == {"ethereum": 1, "base": 1, "solana": 2}
    assert sorted(row["amount_micro"] for row in deposits) == [6_000_000, 35_000_000, 40_000_000, 45_000_000]
    assert all(row["credited_nano"] == row["amount_micro"] * 1000 for row in deposits)


def test_requests_cost_what_the_price_list_says(told: Told) -> None:
    requests = told.report["requests"]
    assert {row["stream"] for row in requests} == {True, False}
    assert len({row["id"] for row in requests}) == len(requests) >= 5
    for row in requests:
        assert row["prompt_tokens"] > 0
        assert 0 < row["completion_tokens"] <= 400
        assert row["cost_nano"] == row["prompt_tokens"] * NANO_IN + row["completion_tokens"] * NANO_OUT
        assert row["operator_nano"] == row["cost_nano"] * 80 // 100
        assert row["operator_nano"] + row["platform_nano"] == row["cost_nano"]
    # Two buyers had $126.00; neither was let below zero.
    assert sum(row["cost_nano"] for row in requests) <= 126 * 10**9


def test_the_operator_is_paid_all_he_earned_on_two_chains(told: Told) -> None:
    payouts = told.report["payouts"]
    assert sorted(row["chain"] for row in payouts) == ["base", "solana"]
    assert all(row["amount_micro"] >= 10_000_000 for row in payouts)
    earned = sum(row["operator_nano"] for row in told.report["requests"])
    assert sum(row["amount_micro"] for row in payouts) == earned // 1000


def test_escrow_holds_what_the_books_say(told: Told) -> None:
    escrow = told.report["escrow"]
    assert sorted(row["chain"] for row in escrow) == sorted(Chain)
    assert all(row["onchain_micro"] == row["books_micro"] for row in escrow)
    in_hand = defaultdict(int)
    for sign, name in ((1, "deposits"), (-1, "payouts")):
        for row in told.report[name]:
            in_hand[row["chain"]] += sign * row["amount_micro"]
    # The rest, if any, lies on deposit addresses still to be swept.
    assert all(0 <= row["onchain_micro"] <= in_hand[row["chain"]] for row in escrow)


async def test_the_book_and_the_chains_say_the_same_after_a_restart(told: Told) -> None:
    up = Up(told.folder)
    with contextlib.closing(up):
        facts = up.wait_until_up()
        rpc = {Chain(name): url for name, url in facts["rpc"].items()}
        for row in told.report["payouts"]:
            assert (await usdc_of(rpc, Chain(row["chain"]), row["to"])).n == row["amount_micro"]

        served = httpx.get(
            f"{facts['api']}/api/usage?role=operator&limit=1000",
            headers={"Authorization": f"Bearer {facts['keys']['operator']}"},
        ).json()["data"]
        columns = [*SHAPES["requests"]][2:]
        booked = {row["id"]: [row[name] for name in columns] for row in served}
        assert booked == {row["id"]: [row[name] for name in columns] for row in told.report["requests"]}

        in_hand = dict.fromkeys(Chain, 0)
        in_hand[Chain.BASE] = 100_000_000  # what `up` deposits for its own buyer
        for sign, name in ((1, "deposits"), (-1, "payouts")):
            for row in told.report[name]:
                in_hand[Chain(row["chain"])] += sign * row["amount_micro"]
        engine = database.connect(facts["database"], pool_size=1)
        try:
            async with engine.connect() as connection:
                for chain, micro in in_hand.items():
                    found = [
                        await read_balance(connection, Account(kind, chain.value))
                        for kind in (Kind.ESCROW, Kind.UNSWEPT)
                    ]
                    assert sum(-balance.posted.n for balance in found if balance) == micro * 1000, chain
        finally:
            await engine.dispose()

        proved = tollway("prove", "--json", "--data-dir", str(told.folder))
        proofs = json.loads(proved.stdout)
        assert proved.returncode == 0, proofs
        assert len(proofs) > 10
        assert all(set(proof) == {"name", "ok", "detail"} and proof["ok"] for proof in proofs)
