"""`tollway up` and `tollway demo` as a person runs them: child processes, watched from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from chain.networks import Chain
from chain.units import parse_usdc
from marketplace.platform.processes import die_with_parent
from marketplace.stack.development_chains import DevelopmentWallet

ROOT = Path(__file__).parents[1]
TOLLWAY = (sys.executable, "-m", "marketplace")
IS_UP = "Ctrl-C or `make down` ends it"
END_S = 20
"""A killed stack may take so long to be gone."""
DEMO_S = 600
"""Of the whole demo with the tiny model; 100 s on a quiet machine."""
PATIENCE_S = 200
"""Of a start on two cores that do other things too; 10 s on a quiet machine."""


def clean_environment(**changes: str) -> dict[str, str]:
    """Ours without what would change a stack's mind."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TOLLWAY_", "MAKE")) or "ENGINE" in k}
    return kept | changes


def tollway(
    *arguments: str, within_s: float = PATIENCE_S, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; output and errors together, whole lines."""
    return subprocess.run(
        [*TOLLWAY, *arguments],
        cwd=ROOT,
        env=clean_environment(COLUMNS="400", **environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=within_s,
        check=False,
    )


def processes_about(folder: Path) -> dict[int, str]:
    """Every live process whose command line, folder or environment names `folder`, but for our own line."""
    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = {}
    for process in psutil.process_iter():
        if process.pid in ours:
            continue
        try:
            said = [*process.cmdline(), process.cwd(), *process.environ().values()]
            if process.status() != psutil.STATUS_ZOMBIE and any(str(folder) in text for text in said):
                found[process.pid] = " ".join(process.cmdline())[:150]
        except (psutil.Error, OSError):
            continue
    return found


def assert_all_gone(folder: Path, within_s: float = END_S) -> None:
    deadline = time.monotonic() + within_s
    while left := processes_about(folder):
        assert time.monotonic() < deadline, f"still there after {within_s} s: {left}"
        time.sleep(0.1)


class Up:
    """One `tollway up --without-node` in `folder`."""

    def __init__(self, folder: Path, *, through: Sequence[str] = (), **environment: str) -> None:
        self.folder = folder
        self.output = folder.with_name(f"{folder.name}.{time.monotonic_ns()}.out")
        argv = [*TOLLWAY, "up", "--without-node", "--model", "tiny", "--port-base", "0"]
        with self.output.open("wb") as sink:
            self.process = subprocess.Popen(
                [*through, *argv, "--data-dir", str(folder)],
                cwd=ROOT,
                env=clean_environment(COLUMNS="400", **environment),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),  # a killed test run leaves no stack either
            )

    def wait_until_it_says(self, words: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while words not in (said := self.output.read_text()):
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{said}"
            assert time.monotonic() < deadline, f"does not say {words!r}:\n{said}"
            time.sleep(0.05)

    def wait_until_up(self) -> dict[str, Any]:
        """Give what stack.json says."""
        self.wait_until_it_says(IS_UP)
        facts: dict[str, Any] = json.loads((self.folder / "stack.json").read_text())
        return facts

    def send(self, signal_number: int) -> int:
        """Signal it and give its exit code."""
        self.process.send_signal(signal_number)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert_all_gone(self.folder)


class Buyer:
    """A buyer of a running stack, over HTTP, with a wallet on its chains."""

    def __init__(self, facts: dict[str, Any], *, seed: bytes) -> None:
        headers = {"Authorization": f"Bearer {facts['keys']['buyer']}"}
        self.http = httpx.Client(base_url=facts["api"], headers=headers, timeout=20)
        self.wallet = DevelopmentWallet({Chain(c): url for c, url in facts["rpc"].items()}, seed=seed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    @property
    def available_nano(self) -> int:
        return int(self.get("/api/balance")["available_nano"])

    async def deposit(self, chain: Chain, usdc: str) -> str:
        """Pay to the buyer's own deposit address; gives the transaction."""
        to = eventually(lambda: self.deposit_addresses()[chain])
        await self.wallet.fund(chain, parse_usdc(usdc))
        return await self.wallet.pay(chain, to, parse_usdc(usdc))

    def deposit_addresses(self) -> dict[Chain, str]:
        return {Chain(e["chain"]): e["address"] for e in self.get("/api/deposit-addresses")["data"]}

    def credited(self) -> dict[str, int]:
        """Credited micro-USDC by transaction."""
        rows = self.get("/api/deposits")["data"]
        return {row["tx"]: row["amount_micro"] for row in rows if row["is_credited"]}


def eventually(ask: Callable[[], Any], within_s: float = 60) -> Any:
    """Ask until the answer is a truth."""
    deadline = time.monotonic() + within_s
    while not (answer := ask()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.2)
    return answer
