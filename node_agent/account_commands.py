"""`tollway-node login|earnings|withdraw|payouts`: the operator's money, from his terminal."""

import asyncio
import sys
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec
import typer

from node_agent import config as settings
from node_agent.account import (
    ACCOUNT_KEY_FILE,
    Account,
    AccountError,
    BankAccount,
    BankWithdrawal,
    InclusionProof,
    PublicBatch,
    load_key,
    store_key,
)
from node_agent.chain_check import Expected, is_paid_on_chain
from node_agent.inclusion import line_hash, root_of
from node_agent.terminal import HOME, DataDir, Json, err, out, plain_errors, print_json, print_table

NOT_INCLUDED_EXIT: Final = 3

payouts_app = typer.Typer(help="What you were paid, with proof.", invoke_without_command=True)
bank_app = typer.Typer(help="Payouts to your bank, which people of ours see to.", invoke_without_command=True)
addresses_app = typer.Typer(help="Where you may be paid.", invoke_without_command=True)

_Result = TypeVar("_Result")
ApiKeyOption = Annotated[bool, typer.Option("--forget", help="Delete the stored key instead.")]


def add_to(app: typer.Typer) -> None:
    """Put these commands into `app`."""
    for command in (login, earnings, withdraw, standing, dispute):
        app.command()(command)
    app.add_typer(payouts_app, name="payouts")
    app.add_typer(addresses_app, name="addresses")
    app.add_typer(bank_app, name="bank")


def _with_account(folder: Path, work: Callable[[Account], Awaitable[_Result]]) -> _Result:
    """Run `work` with the operator's account; every trouble ends the command with one sentence."""
    with plain_errors():
        api, key = settings.load_config(folder).api, load_key(folder)

        async def run() -> _Result:
            async with Account(api, key) as account:
                return await work(account)

        return asyncio.run(run())
    raise AssertionError("plain_errors ends the command")


# -- the key ------------------------------------------------------------------------------------------


def login(data_dir: DataDir = HOME, forget: ApiKeyOption = False, as_json: Json = False) -> None:
    """Keep an API key of your account here, for earnings, withdraw and payouts (prompt or stdin)."""
    with plain_errors():
        path = data_dir / ACCOUNT_KEY_FILE
        if forget:
            path.unlink(missing_ok=True)
        else:
            is_person = sys.stdin.isatty()
            key = typer.prompt("API key", hide_input=True) if is_person else sys.stdin.readline()
            path = store_key(data_dir, key)
    if as_json:
        print_json({"path": str(path), "is_stored": not forget})
    elif forget:
        out.print("Deleted.")
    else:
        out.print(f"Stored in {path}, readable by you alone.", markup=False)


# -- earnings -----------------------------------------------------------------------------------------


def earnings(
    data_dir: DataDir = HOME,
    lines: Annotated[int, typer.Option(min=0, max=100, help="Show so many movements.")] = 10,
    as_json: Json = False,
) -> None:
    """Show what you earned, what can be withdrawn now, and the latest movements."""

    async def work(account: Account) -> tuple[Any, Any]:
        return await account.earnings(), await account.statement(limit=max(1, lines))

    found, statement = _with_account(data_dir, work)
    if as_json:
        data = msgspec.to_builtins(statement)
        print_json(
            {"earnings": msgspec.to_builtins(found), "statement": data | {"data": data["data"][:lines]}}
        )
        return
    out.print(f"[bold]${found.matured}[/] can be withdrawn now")
    out.print(
        f"${found.maturing} matures within {_duration(found.reserve_s)}, ${found.held} is on its way to you"
    )
    per_day = _dollars(int(statement.forecast_per_day_nano))
    out.print(f"${per_day} a day over the last {statement.forecast_days} days")
    if lines and statement.data:
        rows = [
            (
                line.kind,
                line.amount,
                line.model or "",
                "" if line.tokens is None else str(line.tokens),
                line.tx or "",
            )
            for line in statement.data[:lines]
        ]
        print_table(("what", "$", "model", "tokens", "transaction"), rows)


def _duration(seconds: int) -> str:
    return f"{seconds // 86400} days" if seconds >= 2 * 86400 else f"{seconds // 3600} hours"


def _dollars(nano: int) -> str:
    whole, part = divmod(abs(nano), 10**9)
    digits = f"{part:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nano < 0 else ''}{whole}.{digits}"


# -- standing -----------------------------------------------------------------------------------------


def standing(data_dir: DataDir = HOME, as_json: Json = False) -> None:
    """Show what the marketplace thinks of your nodes, and why."""
    found = _with_account(data_dir, lambda account: account.standing())
    if as_json:
        print_json(msgspec.to_builtins(found))
        return
    out.print(f"{found.standing} {found.reason}".rstrip(), markup=False)
    for finding in found.findings:
        out.print(f"  {finding.severity}: {finding.message}", markup=False)
    if found.dispute is not None:
        out.print(
            f"your dispute is {found.dispute.state}. {found.dispute.answer or ''}".rstrip(), markup=False
        )


def dispute(
    text: Annotated[str, typer.Argument(help="What is wrong with the finding, for a person to read.")],
    data_dir: DataDir = HOME,
    as_json: Json = False,
) -> None:
    """Dispute a standing that holds your earnings; a person decides."""
    made = _with_account(data_dir, lambda account: account.dispute(text))
    if as_json:
        print_json({"dispute": msgspec.to_builtins(made)})
    else:
        out.print(f"Dispute {made.id} is {made.state}; see: tollway-node standing")


# -- withdrawals --------------------------------------------------------------------------------------


def withdraw(
    amount: Annotated[str, typer.Argument(help="USDC such as 25.00, or all.")],
    chain: Annotated[str, typer.Option(help="ethereum, base or solana.")],
    to: Annotated[str, typer.Option("--to", help="An address of your address book.")],
    idempotency_key: Annotated[
        str, typer.Option(help="Your own name for this request; the same one is never paid twice.")
    ] = "",
    data_dir: DataDir = HOME,
    as_json: Json = False,
) -> None:
    """Ask to be paid; the next settlement batch of that chain pays it."""
    key = idempotency_key or f"node-{uuid.uuid4()}"
    made = _asked_once(
        data_dir, key, lambda account: account.withdraw(chain=chain, address=to, amount=amount, key=key)
    )
    if as_json:
        print_json({"withdrawal": msgspec.to_builtins(made), "idempotency_key": key})
    else:
        out.print(
            f"Withdrawal {made.id}: {made.amount} USDC to {made.address} on {made.chain}, {made.status}.",
            markup=False,
            soft_wrap=True,
        )
        out.print(
            f"idempotency key {key}: repeating the request with it pays once", markup=False, soft_wrap=True
        )


def _asked_once(folder: Path, key: str, ask: Callable[[Account], Awaitable[_Result]]) -> _Result:
    """Run `ask`; whoever cannot know whether it arrived is told how to ask again."""

    async def work(account: Account) -> _Result:
        try:
            return await ask(account)
        except AccountError as error:
            if error.code:
                raise
            raise AccountError(
                f"{error}\nUnsure whether the request arrived? Repeat it with --idempotency-key {key}"
            ) from error

    return _with_account(folder, work)


# -- the bank -----------------------------------------------------------------------------------------


@bank_app.callback()
def bank(context: typer.Context, data_dir: DataDir = HOME, as_json: Json = False) -> None:
    """List your bank accounts (add one signed in, on the site or by the API) and withdrawals to them."""
    if context.invoked_subcommand is not None:
        return

    async def work(account: Account) -> tuple[list[BankAccount], list[BankWithdrawal]]:
        return await account.bank_accounts(), await account.bank_withdrawals()

    accounts, made = _with_account(data_dir, work)
    if as_json:
        print_json({"accounts": msgspec.to_builtins(accounts), "withdrawals": msgspec.to_builtins(made)})
        return
    for entry in accounts:
        state = f"retired {entry.retired_at}" if entry.retired_at else f"usable from {entry.usable_at}"
        out.print(f"{entry.iban}  {entry.holder}, {state}; account {entry.id}", markup=False, soft_wrap=True)
    for each in made:
        told = each.reference or each.reason or ""
        out.print(f"${each.amount} {each.status} {told}; withdrawal {each.id}", markup=False, soft_wrap=True)


@bank_app.command("withdraw")
def bank_withdraw(
    amount: Annotated[str, typer.Argument(help="Dollars such as 25.00, or all.")],
    account: Annotated[str, typer.Option(help="A bank account's id; see: tollway-node bank")],
    idempotency_key: Annotated[
        str, typer.Option(help="Your own name for this request; the same one is never paid twice.")
    ] = "",
    data_dir: DataDir = HOME,
    as_json: Json = False,
) -> None:
    """Ask to be paid at your bank; one person approves it, another sends it."""
    key = idempotency_key or f"node-{uuid.uuid4()}"
    made = _asked_once(
        data_dir, key, lambda line: line.bank_withdraw(account_id=account, amount=amount, key=key)
    )
    if as_json:
        print_json({"withdrawal": msgspec.to_builtins(made), "idempotency_key": key})
    else:
        out.print(f"Withdrawal {made.id}: ${made.amount} to your bank, {made.status}.")
        out.print(
            f"idempotency key {key}: repeating the request with it pays once", markup=False, soft_wrap=True
        )


@bank_app.command("cancel")
def bank_cancel(withdrawal_id: str, data_dir: DataDir = HOME, as_json: Json = False) -> None:
    """Cancel a withdrawal that nobody has approved."""
    gone = _with_account(data_dir, lambda account: account.bank_cancel(withdrawal_id))
    if as_json:
        print_json({"withdrawal": msgspec.to_builtins(gone)})
    else:
        out.print(f"{gone.id} is {gone.status}; the money is earnings again.")


# -- the address book ---------------------------------------------------------------------------------


@addresses_app.callback()
def addresses(context: typer.Context, data_dir: DataDir = HOME, as_json: Json = False) -> None:
    """List your payout addresses."""
    if context.invoked_subcommand is not None:
        return
    found = _with_account(data_dir, lambda account: account.addresses())
    if as_json:
        print_json({"addresses": msgspec.to_builtins(found)})
        return
    rows = [(entry.chain, entry.address, entry.usable_at, entry.retired_at or "") for entry in found]
    print_table(("chain", "address", "usable from", "retired"), rows)


@addresses_app.command("add")
def addresses_add(
    chain: Annotated[str, typer.Argument(help="ethereum, base or solana.")],
    address: str,
    data_dir: DataDir = HOME,
    as_json: Json = False,
) -> None:
    """Add an address; it can be used after its cooling time."""
    made = _with_account(data_dir, lambda account: account.add_address(chain, address))
    if as_json:
        print_json({"address": msgspec.to_builtins(made)})
    else:
        out.print(f"{made.address} on {made.chain} can be used from {made.usable_at}.", markup=False)


# -- payouts ------------------------------------------------------------------------------------------


@payouts_app.callback()
def payouts(context: typer.Context, data_dir: DataDir = HOME, as_json: Json = False) -> None:
    """List your withdrawals, newest first, with the transactions that paid them."""
    if context.invoked_subcommand is not None:
        return
    found = _with_account(data_dir, lambda account: account.withdrawals())
    if as_json:
        print_json({"withdrawals": msgspec.to_builtins(found)})
        return
    rows = [
        (made.id, made.chain, made.amount, made.status, made.address, made.tx or made.refusal or "")
        for made in found
    ]
    print_table(("id", "chain", "USDC", "status", "address", "transaction or reason"), rows)


@payouts_app.command("cancel")
def payouts_cancel(withdrawal_id: str, data_dir: DataDir = HOME, as_json: Json = False) -> None:
    """Cancel a withdrawal that is not in a batch yet."""
    gone = _with_account(data_dir, lambda account: account.cancel(withdrawal_id))
    if as_json:
        print_json({"withdrawal": msgspec.to_builtins(gone)})
    else:
        out.print(f"{gone.id} is {gone.status}; the money is earnings again.")


@payouts_app.command("verify")
def payouts_verify(
    withdrawal_id: str,
    rpc: Annotated[
        str,
        typer.Option(help="A JSON-RPC address of the chain, of a provider you trust: also looks on chain."),
    ] = "",
    data_dir: DataDir = HOME,
    as_json: Json = False,
) -> None:
    """Prove on this machine that a payout is in its batch, and with --rpc that the chain paid it.

    Exit status 3 if the proof fails.
    """

    async def work(account: Account) -> dict[str, Any]:
        proof = await account.proof(withdrawal_id)
        batch = await account.public_batch(proof.batch_id)
        is_on_chain = None
        if rpc:
            is_on_chain = await _look_on_chain(account, rpc, proof, batch)
        return {
            "proof": proof,
            "batch": batch,
            "is_included": is_included(proof, batch),
            "is_on_chain": is_on_chain,
        }

    found = _with_account(data_dir, work)
    proof, batch = found["proof"], found["batch"]
    is_good = found["is_included"] and found["is_on_chain"] is not False
    if as_json:
        print_json({name: msgspec.to_builtins(value) for name, value in found.items()})
    elif not found["is_included"]:
        err.print(
            f"NOT PROVEN: {proof.payout_id} is not in the batch whose public root is {batch.merkle_root}",
            markup=False,
            soft_wrap=True,
        )
    else:
        amount = f"{proof.amount_micro // 10**6}.{proof.amount_micro % 10**6:06d}"
        for line in (
            f"Proven: {amount} USDC to {proof.address} is entry {proof.position + 1} of {proof.count}",
            f"of batch {batch.id} on {batch.chain}, root {batch.merkle_root}, {batch.status}",
            _on_chain_sentence(found["is_on_chain"], batch),
        ):
            out.print(line, markup=False, soft_wrap=True)
    if not is_good:
        raise typer.Exit(NOT_INCLUDED_EXIT)


def is_included(proof: InclusionProof, batch: PublicBatch) -> bool:
    """Tell whether the proof leads to the root that is public; the proof's own word for it does not count."""
    leaf = line_hash(payout_id=proof.payout_id, address=proof.address, amount_micro=proof.amount_micro)
    steps = [bytes.fromhex(step) for step in proof.proof]
    root = root_of(leaf, position=proof.position, count=proof.count, proof=steps)
    return (
        root == bytes.fromhex(batch.merkle_root)
        and (proof.batch_id, proof.chain, proof.count) == (batch.id, batch.chain, batch.count)
        and proof.tx == batch.tx
    )


async def _look_on_chain(account: Account, rpc: str, proof: InclusionProof, batch: PublicBatch) -> bool:
    if batch.tx is None:
        return False
    chain = next((entry for entry in await account.public_chains() if entry.chain == proof.chain), None)
    if chain is None:
        raise AccountError(f"the marketplace does not list the chain {proof.chain!r}")
    expected = Expected(
        chain=proof.chain,
        usdc=chain.usdc,
        escrow=chain.escrow,
        address=proof.address,
        amount_micro=proof.amount_micro,
        tx=batch.tx,
    )
    return await is_paid_on_chain(rpc, expected)


def _on_chain_sentence(is_on_chain: bool | None, batch: PublicBatch) -> str:
    if is_on_chain is None:
        return f"transaction: {batch.tx or 'not yet'}   (look on chain yourself: --rpc URL)"
    return (
        f"transaction: {batch.tx or 'none'}, {'paid and final' if is_on_chain else 'NOT FOUND to pay this'}"
    )
