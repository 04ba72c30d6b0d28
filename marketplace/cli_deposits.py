"""`tollway deposits`: what came in, what a person decides about it, and Solana's sweeps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final
from uuid import UUID

import typer
from rich.markup import escape

from chain.networks import Chain
from marketplace.platform.clock import Clock
from marketplace.platform.settings import ChainsConfig, load_chains
from marketplace.terminal import err, out, print_table

if TYPE_CHECKING:  # what the commands work with is imported by those who need it: starting must be quick
    from sqlalchemy.ext.asyncio import AsyncEngine

deposits_app = typer.Typer(help="Deposits: explain, decide, halt, sweep Solana.", no_args_is_help=True)
sweep_app = typer.Typer(help="Solana sweeps: show, export, sign, approve, cancel.", no_args_is_help=True)
deposits_app.add_typer(sweep_app, name="sweep")

DataDir = Annotated[Path, typer.Option("--data-dir", help="The stack's data folder.")]
ChainOption = Annotated[Chain, typer.Option("--chain", help="ethereum, base or solana.")]
Actor = Annotated[str, typer.Option("--as", help="Who decides; kept for ever.")]
Reason = Annotated[str, typer.Option(help="Why; kept for ever.")]
Key = Annotated[str, typer.Argument(help="The deposit's key, as `explain` and `cases` print it.")]
DEFAULT_STACK: Final = Path("var/stack")


def _book(data_dir: Path, work: Any) -> Any:
    from marketplace.cli import _with_book
    from marketplace.deposits.errors import DepositError

    try:
        return _with_book(data_dir, work)
    except DepositError as e:
        err.print(f"[red]tollway:[/] {escape(str(e))}")
        raise typer.Exit(1) from e


@deposits_app.command("explain")
def explain(
    tx: Annotated[str, typer.Argument(help="Transaction hash or signature.")],
    chain: ChainOption,
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Say what the system thinks of a transaction, and why."""
    from marketplace.cli import _settings_or_exit
    from marketplace.deposits.explain import explain_transaction
    from marketplace.platform.database import transaction

    if not _is_transaction(chain, tx):
        err.print(f"[red]tollway:[/] {escape(repr(tx[:100]))} is not a transaction hash of {chain}")
        raise typer.Exit(1)
    minimum = _settings_or_exit(data_dir).deposit_micro_min
    key = tx.lower() if chain.is_evm else tx  # as nodes spell a hash

    async def work(engine: AsyncEngine, *_: object) -> Any:
        async with transaction(engine) as conn:
            return await explain_transaction(conn, chain, key, deposit_micro_min=minimum)

    for said in _book(data_dir, work):
        out.print(f"[bold]{said.verdict}[/]  {escape(said.why)}  [dim]{escape(said.key)}[/]")


def _is_transaction(chain: Chain, text: str) -> bool:
    """Whether it is spelt as one: 0x and 32 bytes of hex, on Solana 64 bytes of base58."""
    if chain.is_evm:
        return re.fullmatch(r"0x[0-9a-fA-F]{64}", text) is not None
    from chain.solana.base58 import decode

    try:
        return len(decode(text)) == 64
    except ValueError:
        return False


@deposits_app.command("cases")
def cases(
    kind: Annotated[str | None, typer.Option(help="Only these, such as `chain_halted`.")] = None,
    before: Annotated[UUID | None, typer.Option(help="Only those older than this one.")] = None,
    data_dir: DataDir = DEFAULT_STACK,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line and nothing else.")
    ] = False,
) -> None:
    """List what waits for a person's decision, newest first."""
    from marketplace.deposits import decisions
    from marketplace.platform.database import transaction

    async def work(engine: AsyncEngine, *_: object) -> Any:
        async with transaction(engine) as conn:
            return await decisions.open_cases(conn, kind=kind, before=before, limit=shown + 1)

    shown = decisions.CASES_MAX
    columns, found = ("at", "kind", "chain", "key", "detail"), _book(data_dir, work)
    rows = {
        str(row.id): (row.created_at.isoformat(timespec="seconds"), row.kind, row.chain, row.key, row.detail)
        for row in found[:shown]
    }
    if as_json:
        for case, cells in rows.items():
            print(json.dumps({"id": case, **dict(zip(columns, cells, strict=True))}))
        return
    print_table(columns, list(rows.values()))
    if len(found) > shown:
        out.print(f"There are older ones: --before {found[shown - 1].id}")


@deposits_app.command("attribute")
def attribute(
    key: Key,
    chain: ChainOption,
    person: Annotated[UUID, typer.Option(help="Whose it is: a person's id.")],
    actor: Actor,
    reason: Reason,
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Give a deposit that waits to a person."""
    from marketplace.deposits import decisions
    from marketplace.platform.database import transaction

    async def work(engine: AsyncEngine, _: ChainsConfig, clock: Clock) -> Any:
        async with transaction(engine) as conn:
            return await decisions.attribute_deposit(
                conn, chain, key, person, actor=actor, reason=reason, now=clock.now()
            )

    out.print(f"{_book(data_dir, work)} USDC credited to {person}.")


@deposits_app.command("leave")
def leave(
    key: Key, chain: ChainOption, actor: Actor, reason: Reason, data_dir: DataDir = DEFAULT_STACK
) -> None:
    """Decide that a case stays as it is."""
    from marketplace.deposits import decisions
    from marketplace.platform.database import transaction

    async def work(engine: AsyncEngine, _: ChainsConfig, clock: Clock) -> None:
        async with transaction(engine) as conn:
            await decisions.leave_deposit(conn, chain, key, actor=actor, reason=reason, now=clock.now())

    _book(data_dir, work)


@deposits_app.command("screen")
def screen(
    address: Annotated[str, typer.Argument(help="A sender: EVM address or Solana wallet.")],
    actor: Actor,
    reason: Reason,
    lift: Annotated[bool, typer.Option("--lift", help="Take it off the list.")] = False,
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Set aside what this sender sends, until a person decides."""
    from marketplace.deposits import decisions
    from marketplace.platform.database import transaction

    decide = decisions.unscreen_sender if lift else decisions.screen_sender

    async def work(engine: AsyncEngine, _: ChainsConfig, clock: Clock) -> None:
        async with transaction(engine) as conn:
            await decide(conn, address, actor=actor, reason=reason, now=clock.now())

    _book(data_dir, work)


@deposits_app.command("retire")
def retire(
    person: Annotated[UUID, typer.Argument(help="Whose address: a person's id.")],
    chain: ChainOption,
    actor: Actor,
    reason: Reason,
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Retire a person's address (Ethereum and Base share one): his next request makes a new one.

    What still arrives at the old one waits for a decision.
    """
    from marketplace.deposits.addresses import retire_address
    from marketplace.deposits.directory import family_of
    from marketplace.platform.database import transaction

    async def work(engine: AsyncEngine, _: ChainsConfig, clock: Clock) -> Any:
        async with transaction(engine) as conn:
            return await retire_address(
                conn, person, family_of(chain), actor=actor, reason=reason, now=clock.now()
            )

    retired = _book(data_dir, work)
    if retired is None:
        err.print(f"[red]tollway:[/] {person} has no address on {chain}")
        raise typer.Exit(1)
    out.print(f"retired  {retired}")


@deposits_app.command("halt")
def halt(chain: ChainOption, actor: Actor, reason: Reason, data_dir: DataDir = DEFAULT_STACK) -> None:
    """Stop a chain's credits."""
    from marketplace.deposits import service

    _book(data_dir, lambda engine, _, clock: service.halt(engine, clock, chain, actor=actor, reason=reason))


@deposits_app.command("resume")
def resume(
    chain: ChainOption,
    actor: Actor,
    reason: Reason,
    alarm: Annotated[
        str | None, typer.Option("--acknowledge", help="The alarm that the halt's reason names.")
    ] = None,
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Let a halted chain go on."""
    from marketplace.deposits import service

    async def work(engine: AsyncEngine, _: ChainsConfig, clock: Clock) -> None:
        if alarm is None:
            await service.resume(engine, clock, chain, actor=actor, reason=reason)
        else:
            await service.acknowledge_alarm(engine, clock, chain, alarm, actor=actor, reason=reason)

    _book(data_dir, work)


@deposits_app.command("accept-history")
def accept_history(
    chain: ChainOption,
    from_height: Annotated[
        int, typer.Option("--from", min=0, help="A block below the fork; lower reads more, and is no harm.")
    ],
    actor: Actor,
    reason: Reason,
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """After a chain changed what was final: read it anew, take back what it took back, and go on."""
    from marketplace.cli import _settings_or_exit
    from marketplace.deposits import service

    minimum = _settings_or_exit(data_dir).deposit_micro_min

    async def work(engine: AsyncEngine, chains: ChainsConfig, clock: Clock) -> Any:
        return await service.accept_history(
            engine,
            clock,
            chains,
            chain,
            from_height=from_height,
            deposit_micro_min=minimum,
            actor=actor,
            reason=reason,
        )

    accepted = _book(data_dir, work)
    out.print(
        f"The books of {chain} stand at {accepted.height} and go on; {accepted.kept} movements are kept."
    )
    for key in accepted.taken_back:
        out.print(f"taken back  {key}")
    for person in accepted.frozen:
        out.print(f"below zero, frozen  {person}")


# ---- Solana's sweeps


@sweep_app.command("show")
def sweep_show(data_dir: DataDir = DEFAULT_STACK) -> None:
    """List the newest sweeps; the settler prepares them when they are worth it."""
    from marketplace.deposits import solana_sweeps
    from marketplace.platform.database import transaction

    async def work(engine: AsyncEngine, *_: object) -> Any:
        async with transaction(engine) as conn:
            return await solana_sweeps.newest(conn)

    rows = [
        (
            str(row.id),
            row.status,
            str(len(row.lines)),
            str(row.amount_micro),
            str(row.approvals),
            row.tx or "",
            row.note or "",
        )
        for row in _book(data_dir, work)
    ]
    print_table(("sweep", "status", "accounts", "micro-USDC", "approvals", "transaction", "note"), rows)


@sweep_app.command("export")
def sweep_export(
    file: Annotated[Path, typer.Option("--out", help="Where to write what signers sign.")],
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Write the waiting sweep for its signers."""
    import msgspec

    from marketplace.cli import _plain_errors
    from marketplace.deposits import solana_sweeps
    from marketplace.platform.database import transaction

    async def work(engine: AsyncEngine, *_: object) -> Any:
        async with transaction(engine) as conn:
            return await solana_sweeps.export_sweep(conn)

    export = _book(data_dir, work)
    with _plain_errors():
        file.write_bytes(msgspec.json.encode(export))
    out.print(f"{file}: {len(export.lines)} accounts")


@sweep_app.command("sign")
def sweep_sign(
    export: Annotated[Path, typer.Argument(help="The file written by `export`.")],
    keystore: Annotated[Path, typer.Option(help="Your encrypted Solana key.")],
    chains_file: Annotated[Path, typer.Option(help="Your own copy of the chains file: what you pin.")],
    approval: Annotated[Path, typer.Option("--out", help="Where to write the approval.")],
) -> None:
    """Sign a sweep on your own machine, offline; it can pay nobody but the escrow you pin."""
    import msgspec

    from marketplace.cli import _plain_errors
    from marketplace.deposits import solana_sweeps
    from marketplace.deposits.errors import DepositError
    from marketplace.settlement.commands import read_passphrase

    with _plain_errors():
        try:
            document = solana_sweeps.sign_sweep(
                solana_sweeps.decode_export(export.read_bytes()),
                load_chains(chains_file).solana,
                keystore,
                read_passphrase(keystore),
            )
        except DepositError as e:
            err.print(f"[red]tollway:[/] {escape(str(e))}")
            raise typer.Exit(1) from e
        approval.write_bytes(msgspec.json.encode(document))
    out.print(str(approval))


@sweep_app.command("approve")
def sweep_approve(
    approval: Annotated[Path, typer.Argument(help="What `sign` wrote.")],
    actor: Annotated[str, typer.Option("--as", help="Who brings it.")],
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Store a signer's approval; at the threshold the settler sends the sweep."""
    from marketplace.cli import _plain_errors
    from marketplace.deposits import solana_sweeps
    from marketplace.platform.database import transaction

    with _plain_errors():
        raw = approval.read_bytes()

    async def work(engine: AsyncEngine, chains: ChainsConfig, clock: Clock) -> int:
        document = solana_sweeps.decode_approval(raw)
        async with transaction(engine) as conn:
            return await solana_sweeps.store_approval(
                conn, chains.solana, document, brought_by=actor, clock=clock
            )

    out.print(f"{_book(data_dir, work)} approvals")


@sweep_app.command("cancel")
def sweep_cancel(
    sweep: Annotated[UUID, typer.Argument(help="A sweep that waits for signers.")],
    actor: Actor,
    reason: Reason,
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Give up a sweep nobody has sent."""
    from marketplace.deposits import solana_sweeps
    from marketplace.platform.database import transaction

    async def work(engine: AsyncEngine, _: ChainsConfig, clock: Clock) -> None:
        async with transaction(engine) as conn:
            await solana_sweeps.cancel_sweep(conn, sweep, actor=actor, reason=reason, clock=clock)

    _book(data_dir, work)
