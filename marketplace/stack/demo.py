"""`tollway demo`: the main job, told as it happens, on real parts.

Two buyers turn USDC on three chains into balance, chat through the official OpenAI client, one runs out
and is refused; an operator earns at his own price and is paid 80 % from the multisig on Base and on
Solana; then every invariant of the book is proved and escrow compared with the chains.  Each step checks
what it claims; the first that does not hold ends the demo with exit code 1.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import httpx
import openai
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chain.errors import ChainError
from chain.networks import Chain
from chain.units import Micro, parse_usdc
from marketplace.ledger.money import Nano, cost, dollars, parse_dollars, split
from marketplace.platform import database
from marketplace.platform.errors import PlatformError, SetupFault
from marketplace.platform.processes import end_with_make
from marketplace.platform.settings import Environment, Settings
from marketplace.proof import ledger_sum_nano, prove_all, reconciled
from marketplace.stack.development_chains import DevelopmentWallet
from marketplace.stack.folder import StackFolder
from marketplace.stack.stack import ROOT, DemoModel, Ports, Stack, cancel_on_signals

PRICE_IN, PRICE_OUT = "20000", "100000"
"""Dollars per million tokens: steep, so that a payout's $10.00 minimum is reached honestly in minutes."""
DEPOSITS: Final = {Chain.ETHEREUM: "40", Chain.BASE: "45", Chain.SOLANA: "35"}
BEN_DEPOSIT: Final = "6"
WANTED_EARNINGS: Final = parse_dollars("21")
LENT_NANO_MAX: Final = 1_000_000_000
"""What a buyer's last answer may lack (R12), unless TOLLWAY_OVERDRAFT_NANO says otherwise."""
REQUESTS_MAX: Final = 24
ANSWER_TOKENS: Final = 48
FINALITY_PATIENCE_S: Final = 90
SETTLEMENT_PATIENCE_S: Final = 120
QUESTIONS: Final = (
    "What is the capital of France?",
    "Write three sentences about the sea.",
    "Explain what a toll road is to a child.",
    "List the planets of the solar system.",
    "Tell a short story about a lighthouse.",
)


class DemoFailed(Exception):
    """A step did not do what it promises."""


def check(fact: object, otherwise: str) -> None:
    """Go on only if `fact` holds."""
    if not fact:
        raise DemoFailed(otherwise)


@dataclass
class Buyer:
    """A person with a wallet and an API key."""

    name: str
    wallet: DevelopmentWallet
    http: httpx.AsyncClient
    key: str

    async def get(self, path: str) -> Any:
        answer = await self.http.get(path)
        check(answer.status_code == 200, f"GET {path} answered {answer.status_code}: {answer.text}")
        return answer.json()

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> Any:
        answer = await self.http.post(path, json=body, headers=headers)
        check(answer.status_code < 300, f"POST {path} answered {answer.status_code}: {answer.text}")
        return answer.json()

    async def available(self) -> Nano:
        return Nano((await self.get("/api/balance"))["available_nano"])


@dataclass
class Demo:
    """One run of the story."""

    stack: Stack
    out: Console
    report: dict[str, Any] = field(
        default_factory=lambda: {
            "deposits": [], "requests": [], "refused_402": False, "payouts": [], "escrow": [],
            "ledger_sum_nano": None, "seconds": {},
        }
    )  # fmt: skip
    _clients: list[httpx.AsyncClient] = field(default_factory=list)

    # ---- telling

    def title(self, text: str) -> None:
        self.out.print(f"\n[bold cyan]{escape(text)}[/]")

    def tell(self, text: str) -> None:
        self.out.print(f"  {escape(text)}", soft_wrap=True)

    async def timed(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        began = time.monotonic()
        await work()
        self.report["seconds"][name] = round(time.monotonic() - began, 1)

    # ---- the story

    async def play(self) -> None:
        await self.timed("start", self.start)
        await self.timed("sign_up_and_deposit", self.sign_up_and_deposit)
        await self.timed("engine", self.wait_for_engine)
        await self.timed("chat", self.chat)
        await self.timed("run_out", self.run_out)
        await self.timed("settle", self.settle)
        await self.timed("prove", self.prove)

    async def start(self) -> None:
        self.title(
            "1. Real parts: PostgreSQL 18, NATS, two anvils with Circle's USDC and Safe, the Solana VM, vLLM"
        )
        await self.stack.start()
        facts = self.stack.facts()
        for chain, escrow in facts["escrow"].items():
            self.tell(f"escrow on {chain}: {escrow} (2-of-3 multisig)")
        self.tell("development settings: reserve 0 s, cooling 0 s (24 h and 48 h in production)")

    async def sign_up_and_deposit(self) -> None:
        self.title("2. Two buyers sign in with their wallets and deposit USDC on three chains")
        self.ann = await self.sign_up("Ann", Chain.ETHEREUM)
        self.ben = await self.sign_up("Ben", Chain.SOLANA)
        addresses = await self._addresses(self.ann)
        waiting = [
            await self._pay(self.ann, chain, addresses[chain], DEPOSITS[chain])
            for chain in (Chain.ETHEREUM, Chain.BASE)
        ]
        intent = await self.ann.post(
            "/api/deposit-intents", {"chain": "solana", "amount": f"{DEPOSITS[Chain.SOLANA]}.00"}
        )
        await self.ann.wallet.fund(Chain.SOLANA, parse_usdc(DEPOSITS[Chain.SOLANA]))
        tx = await self.ann.wallet.pay_link(intent["url"])
        self.tell(f"Ann pays a Solana Pay link of {DEPOSITS[Chain.SOLANA]} USDC straight to the escrow: {tx}")
        waiting.append((self.ann, Chain.SOLANA, tx, parse_usdc(DEPOSITS[Chain.SOLANA])))
        ben_address = (await self._addresses(self.ben))[Chain.SOLANA]
        waiting.append(await self._pay(self.ben, Chain.SOLANA, ben_address, BEN_DEPOSIT))
        for buyer, chain, tx, amount in waiting:
            await self._wait_for_credit(buyer, chain, tx, amount)
        self.tell(
            f"Ann can spend ${dollars(await self.ann.available())}, "
            f"Ben ${dollars(await self.ben.available())}"
        )

    async def sign_up(self, name: str, chain: Chain) -> Buyer:
        """Sign in with a wallet (first time: sign up) and make an API key."""
        wallet = DevelopmentWallet(self.stack.rpc)
        address = await wallet.address(chain)
        http = httpx.AsyncClient(base_url=self.stack.api, timeout=60)
        self._clients.append(http)
        buyer = Buyer(name, wallet, http, "")
        challenge = await buyer.post("/api/auth/wallet/challenge", {"chain": chain.value, "address": address})
        signature = (
            wallet.sign_in_message(challenge["message"])
            if chain.is_evm
            else await wallet.sign_in_message_on_solana(challenge["message"])
        )
        session = await buyer.post(
            "/api/auth/wallet/verify", {"message": challenge["message"], "signature": signature}
        )
        http.headers["Authorization"] = f"Bearer {session['token']}"
        made = await buyer.post("/api/keys", {"name": "demo", "scopes": ["inference"]})
        buyer.key = made["key"]
        self.tell(f"{name} signs in with {address} and makes the key {made['key'][:18]}…")
        return buyer

    async def _addresses(self, buyer: Buyer) -> dict[Chain, str]:
        """Deposit addresses by chain; a Solana one may take seconds to be ready."""
        deadline = time.monotonic() + FINALITY_PATIENCE_S
        while True:
            listed = (await buyer.get("/api/deposit-addresses"))["data"]
            if all(entry["address"] for entry in listed):
                return {Chain(entry["chain"]): entry["address"] for entry in listed}
            check(time.monotonic() < deadline, "the Solana pool has no address ready")
            await asyncio.sleep(0.5)

    async def _pay(self, buyer: Buyer, chain: Chain, to: str, usdc: str) -> tuple[Buyer, Chain, str, Micro]:
        amount = parse_usdc(usdc)
        await buyer.wallet.fund(chain, amount)
        tx = await buyer.wallet.pay(chain, to, amount)
        self.tell(f"{buyer.name} sends {usdc} USDC on {chain.value} to {to}: {tx}")
        return buyer, chain, tx, amount

    async def _wait_for_credit(self, buyer: Buyer, chain: Chain, tx: str, amount: Micro) -> None:
        deadline = time.monotonic() + FINALITY_PATIENCE_S
        while time.monotonic() < deadline:
            for row in (await buyer.get("/api/deposits"))["data"]:
                if row["tx"] == tx and row["is_credited"]:
                    check(
                        row["amount_micro"] == amount.n and row["credited_nano"] == amount.n * 1000,
                        f"{tx} was credited as {row}",
                    )
                    self.report["deposits"].append(
                        {
                            "chain": chain.value,
                            "tx": tx,
                            "amount_micro": amount.n,
                            "credited_nano": row["credited_nano"],
                        }
                    )
                    self.tell(f"final and credited on {chain.value}: ${dollars(Nano(row['credited_nano']))}")
                    return
            await asyncio.sleep(0.4)
        raise DemoFailed(f"the deposit {tx} on {chain.value} was not credited in {FINALITY_PATIENCE_S} s")

    async def wait_for_engine(self) -> None:
        self.title("3. The operator's node: vLLM behind NATS, dialling out, at its own price")
        await self.stack.wait_for_node()
        offers = (await self.ann.get(f"/v1/models/{self.stack.model.name}"))["offers"]
        check(len(offers) == 1, f"one node should offer the model, not {len(offers)}")
        check(
            offers[0]["price_out"] == dollars(parse_dollars(PRICE_OUT)),
            f"the node's price is {offers[0]['price_out']}",
        )
        self.tell(
            f"node {offers[0]['node']} offers {self.stack.model.name} at ${PRICE_IN} / ${PRICE_OUT} per 1M "
            "tokens (steep, so that minutes are enough to earn a payout)"
        )

    async def chat(self) -> None:
        self.title("4. Ann chats with the official OpenAI client, whole answers and streams")
        before, spent, earned = await self.ann.available(), Nano(0), Nano(0)
        async with openai.AsyncOpenAI(
            base_url=f"{self.stack.api}/v1", api_key=self.ann.key, max_retries=0, timeout=120
        ) as client:
            for number in range(REQUESTS_MAX):
                if earned >= WANTED_EARNINGS and number >= 4:
                    break
                is_stream = number % 2 == 1
                usage, text = await self._ask(
                    client, QUESTIONS[number % len(QUESTIONS)], ANSWER_TOKENS, is_stream=is_stream
                )
                row = self._note(usage, is_stream=is_stream)
                spent, earned = spent + Nano(row["cost_nano"]), earned + Nano(row["operator_nano"])
                kind = "stream" if is_stream else "answer"
                self.tell(
                    f"{kind}: {usage.prompt_tokens} + {usage.completion_tokens} tokens, "
                    f"${dollars(Nano(row['cost_nano']))}: {' '.join(text.split())[:60]!r}"
                )
        check(earned >= WANTED_EARNINGS, f"only ${dollars(earned)} were earned in {REQUESTS_MAX} requests")
        await self._check_usage()
        await self._wait_for_balance(self.ann, before - spent)
        self.tell(f"Ann spent ${dollars(spent)} exactly; the operator's 80 % are ${dollars(earned)}")

    async def _ask(
        self, client: openai.AsyncOpenAI, question: str, max_tokens: int, *, is_stream: bool
    ) -> tuple[Any, str]:
        messages: list[Any] = [{"role": "user", "content": question}]
        if not is_stream:
            answer = await client.chat.completions.create(
                model=self.stack.model.name, messages=messages, max_tokens=max_tokens, temperature=0.7
            )
            return answer.usage, answer.choices[0].message.content or ""
        text, usage = [], None
        stream = await client.chat.completions.create(
            model=self.stack.model.name,
            messages=messages,
            max_tokens=max_tokens,
            temperature=0.7,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            text += [choice.delta.content or "" for choice in chunk.choices]
        check(usage is not None, "a stream ended without its usage")
        return usage, "".join(text)

    def _note(self, usage: Any, *, is_stream: bool) -> dict[str, Any]:
        """Check a bill against the price list, to the nano-dollar, and put it in the report."""
        expected = cost(
            tokens_in=usage.prompt_tokens,
            tokens_out=usage.completion_tokens,
            price_in=parse_dollars(PRICE_IN).n,
            price_out=parse_dollars(PRICE_OUT).n,
        )
        check(usage.cost_nano == expected.n, f"billed {usage.cost_nano}, the price list says {expected.n}")
        operator, platform = split(expected)
        row = {
            "id": usage.receipt_id,
            "stream": is_stream,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cost_nano": expected.n,
            "operator_nano": operator.n,
            "platform_nano": platform.n,
        }
        self.report["requests"].append(row)
        return row

    async def _check_usage(self) -> None:
        """What GET /api/usage says is what was billed."""
        listed = {row["id"]: row for row in (await self.ann.get("/api/usage?limit=1000"))["data"]}
        for row in self.report["requests"]:
            found = listed.get(row["id"])
            check(found is not None, f"request {row['id']} has no usage row")
            assert found is not None
            for name in ("prompt_tokens", "completion_tokens", "cost_nano", "operator_nano", "platform_nano"):
                check(found[name] == row[name], f"{name} of {row['id']}: {found[name]} is not {row[name]}")

    async def _wait_for_balance(self, buyer: Buyer, expected: Nano) -> None:
        """Leased slices come back when they are idle; then the balance is exact."""
        deadline = time.monotonic() + FINALITY_PATIENCE_S
        while (found := await buyer.available()) != expected:
            check(
                time.monotonic() < deadline, f"{buyer.name} has ${dollars(found)}, not ${dollars(expected)}"
            )
            await asyncio.sleep(0.5)

    async def run_out(self) -> None:
        self.title("5. Ben runs out of money")
        async with openai.AsyncOpenAI(
            base_url=f"{self.stack.api}/v1", api_key=self.ben.key, max_retries=0, timeout=120
        ) as client:
            for number in range(REQUESTS_MAX):
                try:
                    usage, _ = await self._ask(
                        client, QUESTIONS[number % len(QUESTIONS)], 400, is_stream=False
                    )
                except openai.APIStatusError as e:
                    check(e.status_code == 402, f"expected 402, got {e.status_code}: {e.message}")
                    self.report["refused_402"] = True
                    self.tell(f"402: {e.message}")
                    break
                self._note(usage, is_stream=False)
                self.tell(f"answer: {usage.completion_tokens} tokens, ${usage.cost}")
        check(self.report["refused_402"], "Ben was never refused")
        left = await self.ben.available()
        check(left.n >= -LENT_NANO_MAX, f"Ben's balance fell to ${dollars(left)}")
        self.tell(f"Ben is left with ${dollars(left)}: his last answer was let go on for up to $1.00 more")

    async def settle(self) -> None:
        self.title("6. The operator withdraws on Base and on Solana; two of three signers sign, offline")
        facts = self.stack.facts()
        http = httpx.AsyncClient(
            base_url=self.stack.api,
            timeout=60,
            headers={"Authorization": f"Bearer {facts['keys']['operator']}"},
        )
        self._clients.append(http)
        operator = Buyer("operator", DevelopmentWallet(self.stack.rpc), http, "")
        earnings = await operator.get("/api/earnings")
        half = Decimal(int(earnings["matured_nano"]) // 2_000) / 1_000_000
        self.tell(f"earnings ready to withdraw: ${earnings['matured']}")
        withdrawals = []
        for chain, amount in ((Chain.BASE, f"{half:.6f}"), (Chain.SOLANA, "all")):
            to = await operator.wallet.address(chain)
            await operator.post("/api/payout-addresses", {"chain": chain.value, "address": to})
            made = await operator.post(
                "/api/withdrawals",
                {"chain": chain.value, "address": to, "amount": amount},
                **{"Idempotency-Key": f"demo-{chain.value}"},
            )
            self.tell(f"withdrawal of {made['amount']} USDC to {to} on {chain.value}")
            withdrawals.append((chain, to, made))
        await asyncio.gather(*(self._settle_on(operator, *withdrawal) for withdrawal in withdrawals))

    async def _settle_on(self, operator: Buyer, chain: Chain, to: str, withdrawal: dict[str, Any]) -> None:
        batch = (await self._tollway("batch", "plan", "--chain", chain.value, "--as", "paula")).strip()
        export = self.stack.folder.root / f"{chain.value}.export.json"
        await self._tollway("batch", "export", batch, "--out", str(export))
        for signer in ("alice", "bob") if chain.is_evm else ("bob", "carol"):
            keystore = self.stack.folder.signers / signer / ("evm.json" if chain.is_evm else "solana.json")
            approval = self.stack.folder.signers / signer / f"{batch}.approval.json"
            await self._tollway(
                "sign", str(export), "--keystore", str(keystore), "--chains-file",
                str(self.stack.folder.chains_file), "--limit", "1000", "--out", str(approval), "--yes",
                with_book=False,
            )  # fmt: skip
            said = await self._tollway("batch", "approve", str(approval), "--as", signer)
            self.tell(f"{signer} rebuilds and signs the batch for {chain.value} offline: {said.strip()}")
        deadline = time.monotonic() + SETTLEMENT_PATIENCE_S
        while True:
            found = await operator.get(f"/api/withdrawals/{withdrawal['id']}")
            if found["status"] == "paid":
                break
            check(found["status"] in {"requested", "planned"}, f"the withdrawal is {found}")
            check(time.monotonic() < deadline, f"the batch {batch} is not final; see the log of `settle`")
            await asyncio.sleep(0.5)
        received = await operator.wallet.usdc(chain)
        check(received.n == withdrawal["amount_micro"], f"{to} holds {received}, not {withdrawal['amount']}")
        self.report["payouts"].append(
            {"chain": chain.value, "tx": found["tx"], "to": to, "amount_micro": received.n}
        )
        self.tell(f"paid on {chain.value} and final: {received} USDC in {found['tx']}")

    async def _tollway(self, *arguments: str, with_book: bool = True) -> str:
        """Run the real command line, as a person would."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TOLLWAY_")}
        environment["TOLLWAY_SIGNER_PASSPHRASE"] = self.stack.folder.secret("signer-passphrase")
        place = ["--data-dir", str(self.stack.folder.root)] if with_book else []
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "marketplace", *arguments, *place,
            cwd=ROOT, env=environment, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        check(process.returncode == 0, f"tollway {' '.join(arguments[:2])}: {(err or out).decode().strip()}")
        return out.decode()

    async def prove(self) -> None:
        self.title("7. Proof: every invariant of the book, and escrow on chain equals the books")
        settings = Settings(environment=Environment.DEVELOPMENT, **_typed(self.stack.environment))
        proofs = await prove_all(settings, lambda _: None)
        broken = [proof for proof in proofs if not proof.ok]
        check(not broken, "; ".join(f"{proof.name}: {proof.detail}" for proof in broken))
        self.tell(f"{len(proofs)} checks hold")
        engine = database.connect(self.stack.database_url, pool_size=5)
        try:
            for result in await reconciled(engine, settings):
                check(result.is_equal, f"{result.account}: {result}")
                if result.account.startswith("escrow:"):
                    self.report["escrow"].append(
                        {
                            "chain": result.chain,
                            "onchain_micro": result.onchain_micro,
                            "books_micro": result.books_micro,
                        }
                    )
            self.report["ledger_sum_nano"] = await ledger_sum_nano(engine)
        finally:
            await engine.dispose()
        check(self.report["ledger_sum_nano"] == 0, "the book does not sum to zero")

    def show_result(self) -> None:
        table = Table(title="\nWhat happened", show_lines=False)
        for column in ("what", "where", "amount", "transaction / request"):
            table.add_column(column, overflow="fold")
        for deposit in self.report["deposits"]:
            table.add_row(
                "deposit", deposit["chain"], f"${dollars(Nano(deposit['credited_nano']))}", deposit["tx"]
            )
        spent = Nano(sum(row["cost_nano"] for row in self.report["requests"]))
        operator = Nano(sum(row["operator_nano"] for row in self.report["requests"]))
        count = len(self.report["requests"])
        table.add_row("chats", self.stack.model.name, f"${dollars(spent)}", f"{count} requests")
        table.add_row("of it 80 %", "operator", f"${dollars(operator)}", "")
        for payout in self.report["payouts"]:
            table.add_row("payout", payout["chain"], f"{Micro(payout['amount_micro'])} USDC", payout["tx"])
        for escrow in self.report["escrow"]:
            table.add_row(
                "escrow = books", escrow["chain"], f"{Micro(escrow['onchain_micro'])} USDC",
                f"{Micro(escrow['books_micro'])} in the books",
            )  # fmt: skip
        self.out.print(table)

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()


def _typed(environment: dict[str, str]) -> dict[str, Any]:
    return {name: value for name, value in environment.items() if name != "environment"}


async def run_demo(data_dir: Path, model: DemoModel, out: Console) -> bool:
    """Play the story in a fresh data folder; True if every step held.  Writes `report.json` there."""
    began = time.monotonic()
    folder = StackFolder(data_dir)
    _require_ours(folder)
    folder.make()
    end_with_make()
    interruption = cancel_on_signals()
    async with folder.owned():
        folder.forget()
        folder.make()
        stack = Stack(
            folder, Ports.any(), model, lambda text: out.print(f"  [dim]· {escape(text)}[/]"),
            prices=(PRICE_IN, PRICE_OUT), is_fresh=True,
        )  # fmt: skip
        demo = Demo(stack, out)
        failure: BaseException | None = None
        try:
            await demo.play()
        except (DemoFailed, PlatformError, ChainError, openai.OpenAIError, httpx.HTTPError, OSError) as e:
            failure = e
        except asyncio.CancelledError:
            if not interruption.is_set():
                raise
            failure = DemoFailed("interrupted")
        finally:
            await demo.close()
            await stack.stop()
    demo.report["seconds"] |= {f"stack: {name}": value for name, value in stack.seconds.items()}
    demo.report["seconds"]["total"] = round(time.monotonic() - began, 1)
    report = folder.root / "report.json"
    report.write_text(json.dumps(demo.report, indent=2))
    if failure is not None:
        out.print(f"\n[bold red]The demo failed:[/] {escape(str(failure))}")
        out.print(f"Logs: {folder.logs}")
        return False
    demo.show_result()
    total = demo.report["seconds"]["total"]
    out.print(f"[bold green]Every step held[/] in {total} s. Report: {report}")
    return True


def _require_ours(folder: StackFolder) -> None:
    """Never empty a folder that holds something else than a demo or a stack; SetupFault."""
    root = folder.root
    if root.is_dir() and any(root.iterdir()) and not (root / "stack.lock").exists():
        raise SetupFault(f"{root} holds something else than a demo; choose another --data-dir")
