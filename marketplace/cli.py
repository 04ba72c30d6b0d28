"""`tollway`: the marketplace's command line.

Commands that work on a book read TOLLWAY_ variables; without them they use the stack in `--data-dir`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import typer
from rich.markup import escape

from chain.addresses import parse_payout_address
from chain.errors import ChainError
from chain.networks import Chain
from chain.units import parse_usdc
from marketplace.cli_deposits import deposits_app
from marketplace.cli_nats import nats_config
from marketplace.gateway.receipts_commands import receipts_app
from marketplace.ledger.money import dollars
from marketplace.platform.errors import PlatformError, SetupFault
from marketplace.platform.logging import configure_logging
from marketplace.platform.settings import Settings, load_settings
from marketplace.routing.commands import route_app
from marketplace.terminal import err, out, print_table

app = typer.Typer(
    help="A marketplace for LLM inference that settles on chain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
batch_app = typer.Typer(help="Settlement batches: plan, show, export, approve.", no_args_is_help=True)
models_app = typer.Typer(help="The catalogue of models.", no_args_is_help=True)
ledger_app = typer.Typer(help="Look into the book.", no_args_is_help=True)
keystore_app = typer.Typer(help="A signer's keys.", no_args_is_help=True)
for name, group in (
    ("deposits", deposits_app), ("route", route_app), ("receipts", receipts_app),
    ("batch", batch_app), ("models", models_app), ("ledger", ledger_app), ("keystore", keystore_app),
):  # fmt: skip
    app.add_typer(group, name=name)
app.command("nats-config")(nats_config)


DEFAULT_STACK: Final = Path("var/stack")
DataDir = Annotated[Path, typer.Option("--data-dir", help="The stack's data folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
ChainArgument = Annotated[Chain, typer.Option("--chain", help="ethereum, base or solana.")]


_STACK_URLS: Final[set[str]] = set()
"""Database URLs read from a stack's folder: `make up` starts these servers, and not those of others."""


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What we raise on purpose ends in one sentence and exit code 1, not in a stack trace."""
    try:
        yield
    except (PlatformError, ChainError, ValueError) as e:
        err.print(f"[red]tollway:[/] {escape(str(e))}")
        raise typer.Exit(1) from e
    except OSError as e:
        err.print(f"[red]tollway:[/] {escape(_missing(e))}")
        raise typer.Exit(1) from e
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as e:
        said = _shut_out(e)
        if said is None:
            raise
        err.print(f"[red]tollway:[/] {escape(said)}")
        raise typer.Exit(1) from e


def _missing(error: OSError) -> str:
    # Of a database's socket that is gone asyncpg names no file.
    if error.filename is None and isinstance(error, FileNotFoundError | ConnectionRefusedError):
        if os.environ.get("TOLLWAY_DATABASE_URL") in _STACK_URLS:
            return "the database does not answer: the stack does not run; start it with `make up`"
        return "the database of TOLLWAY_DATABASE_URL does not answer"
    if isinstance(error, TimeoutError):  # it has no words of its own, or those of the system about an address
        is_database = any("asyncpg" in frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__))
        return f"{'the database' if is_database else 'something that was asked'} does not answer in time"
    return f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)


def _driver_error(error: Exception) -> BaseException | None:
    """What asyncpg raised, if SQLAlchemy's error is of that."""
    if "sqlalchemy" not in sys.modules:  # half of a command's start-up time, needed by some
        return None
    from sqlalchemy.exc import DBAPIError

    return error.orig.__cause__ if isinstance(error, DBAPIError) and error.orig is not None else None


def _shut_out(error: Exception) -> str | None:
    """Why the database of TOLLWAY_DATABASE_URL lets nobody work in it; None: another error."""
    cause = _driver_error(error)
    if cause is None:
        return None
    import asyncpg

    from marketplace.platform.database import APPLICATION_ROLE

    match cause:
        case asyncpg.InvalidAuthorizationSpecificationError():  # SQLSTATE class 28
            return f"the database refuses the login of TOLLWAY_DATABASE_URL: {cause.args[0]}"
        case asyncpg.InvalidCatalogNameError():
            return f"there is no such database: {cause.args[0]}"
        case asyncpg.InvalidParameterValueError() if f'"{APPLICATION_ROLE}"' in cause.args[0]:
            # On a new server the role is missed before any table is.
            return f"the database has no tables yet ({cause.args[0]}): run `tollway migrate`"
    return None


def _refused_value(error: Exception) -> str | None:
    """What the database says of a value it never takes (SQLSTATE classes 22, 23), or of a table it has not.

    None: another error.
    """
    cause = _driver_error(error)
    if cause is None:
        return None
    from asyncpg import DataError, IntegrityConstraintViolationError, InterfaceError, UndefinedTableError

    match cause:
        case UndefinedTableError():
            return f"the database has no tables yet, or old ones ({cause.args[0]}): run `tollway migrate`"
        case IntegrityConstraintViolationError(constraint_name=str(name)):
            return f"a value breaks the book's rule {name}: give another"
        case IntegrityConstraintViolationError() | DataError():
            return f"the book takes no such value: {cause.args[0]}"
        case InterfaceError() if isinstance(cause, ValueError):  # the driver's word, such as: out of range
            return f"the book takes no such value: {str(cause.args[0]).rpartition('(')[2].rstrip(')')}"
    return None


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    with _plain_errors():
        try:
            return asyncio.run(work)
        except Exception as e:  # here and not for processes: of those it is a fault, to be traced
            said = _shut_out(e) or _refused_value(e)
            if said is None:
                raise
            raise ValueError(said) from e


def _settings(data_dir: Path) -> Settings:
    """Settings from the environment, else of the stack in `data_dir`."""
    from marketplace.stack.folder import StackFolder

    if "TOLLWAY_DATABASE_URL" not in os.environ:
        for name, value in StackFolder(data_dir).read_environment().items():
            os.environ.setdefault(f"TOLLWAY_{name.upper()}", value)
        _STACK_URLS.add(os.environ.get("TOLLWAY_DATABASE_URL", ""))
    return load_settings()


# ---- processes


@app.command()
def serve(
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="So many processes on one socket; SIGHUP replaces them in turn."),
    ] = None,
    listen_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run a gateway: the OpenAI-compatible API and the account API."""
    import uvloop

    configure_logging("serve")
    with _plain_errors():
        settings = load_settings()
        if workers is None:
            from marketplace.app import serve as serve_gateway
            from marketplace.platform.garbage import collect_rarely

            collect_rarely()
            uvloop.run(serve_gateway(settings, listen_fd=listen_fd, ready_fd=ready_fd))
            return
        from marketplace.gateway.workers import run_workers

        argv = (sys.executable, "-m", "marketplace", "serve")
        asyncio.run(run_workers(argv, host=settings.api_host, port=settings.api_port, count=workers))


@app.command()
def watch(
    chains: Annotated[list[Chain] | None, typer.Argument(help="Which; all if none is named.")] = None,
    start: Annotated[
        int | None, typer.Option("--from", min=0, help="Height to start at, at a chain's very first start.")
    ] = None,
    early_account: Annotated[
        str | None, typer.Option(help="Lend a buyer so many USDC against deposits not yet final.")
    ] = None,
    early_total: Annotated[str, typer.Option(help="And everybody together, at most so many.")] = "0",
) -> None:
    """Run chain watchers: credit what is final."""
    from marketplace.deposits.early import EarlyCredit
    from marketplace.processes import run_watchers

    configure_logging("watch")
    with _plain_errors():
        early = None
        if early_account is not None:
            early = EarlyCredit(parse_usdc(early_account), parse_usdc(early_total))
        asyncio.run(run_watchers(load_settings(), chains or tuple(Chain), start_height=start, early=early))


@app.command()
def settle(
    chains: Annotated[list[Chain] | None, typer.Argument(help="Which; all if none is named.")] = None,
) -> None:
    """Run the settler: batches, broadcasts, sweeps, the Solana address pool."""
    from marketplace.processes import run_settler

    configure_logging("settle")
    with _plain_errors():
        asyncio.run(run_settler(load_settings(), chains or tuple(Chain)))


@app.command()
def work() -> None:
    """Run background work: deliver notices, sign receipts, add up usage."""
    from marketplace.processes import run_worker

    configure_logging("work")
    with _plain_errors():
        asyncio.run(run_worker(load_settings()))


@app.command()
def migrate(data_dir: DataDir = DEFAULT_STACK) -> None:
    """Bring the database's schema to its newest revision."""
    from marketplace.platform import database

    with _plain_errors():
        database.migrate(_settings(data_dir).database_url.get_secret_value())


# ---- the stack on one machine


def _say(text: str) -> None:
    out.print(f"  [dim]·[/] {escape(text)}")


ModelOption = Annotated[str, typer.Option(help="smollm2 (real, small) or tiny (random, for tests).")]


@app.command()
def up(
    data_dir: DataDir = DEFAULT_STACK,
    model: ModelOption = "smollm2",
    port_base: Annotated[int, typer.Option(help="First of five loopback ports; 0 chooses free ones.")] = 8700,
    without_node: Annotated[bool, typer.Option(help="Start no operator's node and no engine.")] = False,
) -> None:
    """Start everything on this machine and keep it running; Ctrl-C or `tollway down` ends it."""
    from marketplace.stack.commands import run_up

    _run(run_up(data_dir, _demo_model(model), _ports(port_base), _say, out, has_node=not without_node))


@app.command()
def down(data_dir: DataDir = DEFAULT_STACK) -> None:
    """End the stack that runs in the data folder."""
    from marketplace.stack.folder import StackFolder

    with _plain_errors():
        ended = StackFolder(data_dir).end_owner()
    out.print("The stack has ended; its data stays." if ended else "No stack runs here.")


@app.command()
def demo(
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Made anew at every run.")] = Path("var/demo"),
    model: ModelOption = "smollm2",
) -> None:
    """Tell the whole story on real parts: deposit, chat, earn, settle, prove."""
    from marketplace.stack.demo import run_demo

    if not _run(run_demo(data_dir, _demo_model(model), out)):
        raise typer.Exit(1)


def _demo_model(name: str) -> Any:
    from marketplace.stack.stack import MODELS

    if name not in MODELS:
        err.print(f"[red]tollway:[/] no model {escape(repr(name))}; choose one of {', '.join(MODELS)}")
        raise typer.Exit(2)
    return MODELS[name]


def _ports(base: int) -> Any:
    from marketplace.stack.stack import Ports

    if base and not 1024 <= base <= 65_000:
        err.print("[red]tollway:[/] --port-base is 0 or 1024..65000")
        raise typer.Exit(2)
    return Ports.any() if base == 0 else Ports(*range(base, base + 5))


@app.command()
def faucet(
    chain: ChainArgument,
    to: Annotated[str, typer.Option(help="Wallet address.")],
    usdc: Annotated[str, typer.Option(help="Decimal USDC.")] = "100",
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Development chains: mint USDC to a wallet and give it gas."""
    from marketplace.stack.commands import run_faucet

    with _plain_errors():
        amount, wallet = parse_usdc(usdc), parse_payout_address(chain, to)
        if amount.n == 0:
            raise ValueError("0 USDC cannot be minted: give more")
    out.print(_run(run_faucet(data_dir, chain, wallet, amount)))


# ---- the book


@app.command()
def prove(data_dir: DataDir = DEFAULT_STACK, as_json: Json = False) -> None:
    """Check every ledger invariant, and escrow against the chains; exit code 1 if one is broken."""
    from marketplace.ledger.chains import Progress
    from marketplace.proof import Proof, prove_all

    def show(proof: Proof) -> None:
        if not as_json:
            mark = "[green]holds[/]" if proof.ok else "[bold red]BROKEN[/]"
            out.print(f"{mark}  {escape(proof.name)}  [dim]{escape(proof.detail)}[/]")

    with err.status("reading the book") as status:

        def progress(seen: Progress) -> None:
            status.update(f"lane {seen.lane}: {seen.done:,} of {seen.total:,} charges re-hashed")

        proofs = _run(prove_all(_settings_or_exit(data_dir), show, progress))
    if as_json:
        print(json.dumps([{"name": p.name, "ok": p.ok, "detail": p.detail} for p in proofs]))
    if not all(proof.ok for proof in proofs):
        raise typer.Exit(1)


def _settings_or_exit(data_dir: Path) -> Settings:
    with _plain_errors():
        return _settings(data_dir)


@ledger_app.command("show")
def ledger_show(
    account: Annotated[str, typer.Argument(help="Such as escrow:base, buyer:<person id>, loss.")],
    lines: Annotated[int, typer.Option(min=1, max=1000, help="How many movements, newest first.")] = 20,
    before: Annotated[UUID | None, typer.Option(help="Movements older than this id.")] = None,
    data_dir: DataDir = DEFAULT_STACK,
    as_json: Json = False,
) -> None:
    """Show one account: its balance, and what moved it."""
    from marketplace.proof import account_statement, statement_as_json

    page = _run(account_statement(_settings_or_exit(data_dir), account, lines_max=lines, before=before))
    found = statement_as_json(page)
    if as_json:
        print(json.dumps(found))
        return
    for key in ("account", "posted", "held", "available"):
        out.print(f"{key:>10}  {found[key]}")
    rows = [
        (
            f"{line.made_at:%Y-%m-%d %H:%M:%S}", line.kind, dollars(line.amount), dollars(line.balance),
            str(line.other or line.model), line.ref or str(line.id),
        )
        for line in page.lines
    ]  # fmt: skip
    print_table(("when", "what", "amount", "left", "with", "reference"), rows, box=None)
    if page.next_before is not None:
        out.print(f"older: tollway ledger show {escape(account)} --before {page.next_before}", soft_wrap=True)


@models_app.command("add")
def models_add(
    name: Annotated[str, typer.Argument(help="What buyers ask for.")],
    path: Annotated[
        Path, typer.Option(help="A Hugging Face model folder (tokenizer and template are read).")
    ],
    tier: Annotated[str, typer.Option(help="small, medium, large or premium (explicit, R8).")],
    context: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, help="Tokens; the model's own if not given.")
    ] = None,
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Put a model on offer, or change its entry."""
    from marketplace.catalog.models import CatalogError, Tier, add_model, read_model_folder
    from marketplace.platform import database

    async def add() -> None:
        files, own_context = read_model_folder(path)
        engine = database.connect(_settings(data_dir).database_url.get_secret_value(), pool_size=1)
        try:
            async with database.transaction(engine) as connection:
                await add_model(
                    connection, name=name, tier=Tier(tier), context=context or own_context, files=files
                )
        finally:
            await engine.dispose()

    try:
        _run(add())
    except CatalogError as e:
        err.print(f"[red]tollway:[/] {escape(str(e))}")
        raise typer.Exit(1) from e
    out.print(f"{escape(name)} is on offer.")


# ---- settlement


@models_app.command("alias")
def models_alias(
    alias: Annotated[str, typer.Argument(help="What buyers may ask for.")],
    models: Annotated[list[str] | None, typer.Argument(help="Tried in this order; none: forget it.")] = None,
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Let a name stand for models, the first that can serve just now."""
    from marketplace.catalog.aliases import drop_alias, set_alias
    from marketplace.catalog.models import CatalogError
    from marketplace.platform.database import transaction

    async def change(engine: Any, *_: Any) -> bool:
        async with transaction(engine) as connection:
            if not models:
                return await drop_alias(connection, alias)
            try:
                await set_alias(connection, alias, models)
            except CatalogError as e:
                raise SetupFault(str(e)) from e
            return True

    if not _with_book(data_dir, change):
        err.print(f"[red]tollway:[/] no alias is named {escape(alias)}")
        raise typer.Exit(1)


def _with_book(data_dir: Path, work: Callable[..., Coroutine[Any, Any, Any]]) -> Any:
    """Run `work(engine, chains, clock)` on the book."""
    from marketplace.platform import database
    from marketplace.platform.clock import SystemClock
    from marketplace.platform.settings import load_chains
    from marketplace.settlement.errors import SettlementError

    async def inside() -> Any:
        settings = _settings(data_dir)
        engine = database.connect(settings.database_url.get_secret_value(), pool_size=2)
        try:
            return await work(engine, load_chains(settings.chains_file), SystemClock())
        finally:
            await engine.dispose()

    try:
        return _run(inside())
    except SettlementError as e:
        err.print(f"[red]tollway:[/] {escape(str(e))}")
        raise typer.Exit(1) from e


@batch_app.command("plan")
def batch_plan(
    chain: ChainArgument,
    actor: Annotated[str, typer.Option("--as", help="Who asks; kept with the batch.")],
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Ask the settler to freeze a chain's requested withdrawals into a batch; prints the batch's id."""
    from marketplace.settlement import commands

    asked = _with_book(data_dir, lambda engine, _, clock: commands.plan(engine, clock, chain, asked_by=actor))
    if asked.batch_id is None:
        err.print(f"[yellow]tollway:[/] no batch: {escape(asked.outcome or 'the settler has not answered')}")
        raise typer.Exit(1)
    print(asked.batch_id)


@batch_app.command("show")
def batch_show(
    batch: Annotated[
        str | None, typer.Argument(help="A batch's id; without it, the newest are listed.")
    ] = None,
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Show a batch: members, approvals, transactions."""
    from marketplace.settlement import commands

    if batch is None:
        rows = [
            (str(row.id), row.chain.value, row.status.value, str(row.count), str(row.total))
            for row in _with_book(data_dir, lambda engine, *_: commands.listing(engine))
        ]
        print_table(("batch", "chain", "status", "payouts", "USDC"), rows)
        return
    identity = _uuid(batch)
    found, members, approvals, sent = _with_book(data_dir, lambda engine, *_: commands.show(engine, identity))
    out.print(
        f"batch {found.id} on {found.chain.value}: [bold]{found.status.value}[/], fence {found.fence}",
        soft_wrap=True,
    )
    payouts = [(str(member.payout_id), member.address, str(member.amount)) for member in members]
    print_table(("payout", "to", "USDC"), payouts)
    out.print(f"approved by: {', '.join(approvals) or 'nobody yet'}", soft_wrap=True)
    if found.trouble:
        out.print(f"waits: {escape(found.trouble)}", soft_wrap=True)
    for broadcast in sent:
        out.print(f"transaction: {broadcast.tx}", soft_wrap=True)


@batch_app.command("export")
def batch_export(
    batch: Annotated[str, typer.Argument(help="A batch's id.")],
    file: Annotated[Path, typer.Option("--out", help="Where to write the export that signers sign.")],
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Write the file that signers take to their own machines."""
    from marketplace.settlement import commands

    identity = _uuid(batch)
    with _plain_errors():
        file.write_bytes(_with_book(data_dir, lambda engine, *_: commands.export(engine, identity)))
    print(file)


@batch_app.command("witness")
def batch_witness(
    export: Annotated[Path, typer.Argument(help="The file written by `tollway batch export`.")],
    chains_file: Annotated[Path, typer.Option(help="Your own copy of the chains file, with your providers.")],
) -> None:
    """Ask your own providers what a Solana batch's lookup table holds; `tollway sign --witness` reads it."""
    from chain.errors import ChainError
    from marketplace.settlement import commands
    from marketplace.settlement.errors import SettlementError

    try:
        with _plain_errors():
            print(asyncio.run(commands.witness(export, chains_file=chains_file)))
    except (SettlementError, ChainError) as e:
        err.print(f"[red]tollway:[/] {escape(str(e))}")
        raise typer.Exit(1) from e


@batch_app.command("approve")
def batch_approve(
    approval: Annotated[Path, typer.Argument(help="What `tollway sign` wrote.")],
    actor: Annotated[str, typer.Option("--as", help="Who brings it; not the planner.")],
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Store a signer's approval; at the threshold the settler goes on."""
    from marketplace.settlement import commands

    with _plain_errors():
        document = approval.read_bytes()
    batch, status = _with_book(
        data_dir,
        lambda engine, chains, clock: commands.approve(engine, chains, clock, document, pushed_by=actor),
    )
    out.print(f"batch {batch}: {status.value}")


@batch_app.command("status")
def batch_status(data_dir: DataDir = DEFAULT_STACK, as_json: Json = False) -> None:
    """Per chain: the batch under way, halts, the escrow's cover; exit code 1 if S3 is broken."""
    from marketplace.settlement import commands
    from marketplace.settlement.earnings import Reserve

    reserve = Reserve.of(_settings_or_exit(data_dir))
    found = _with_book(data_dir, lambda engine, _, clock: commands.status(engine, clock, reserve))
    if as_json:
        print(json.dumps(found))
    else:
        for row in found["chains"]:
            out.print("  ".join(f"[dim]{key}[/] {escape(str(value))}" for key, value in row.items()))
        for line in (*found["broken"], *found["warnings"]):
            out.print(f"[yellow]{escape(line)}[/]")
    if found["broken"]:
        raise typer.Exit(1)


@batch_app.command("expire")
def batch_expire(
    chain: ChainArgument,
    actor: Annotated[str, typer.Option("--as", help="Who looked on chain and decides.")],
    reason: Annotated[str, typer.Option(help="Why; kept for ever.")],
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """End a batch never signed here whose fence something else spent; on the settler's machine."""
    from marketplace.settlement import commands

    settler_dir = _settings_or_exit(data_dir).settler_dir
    _with_book(
        data_dir,
        lambda engine, chains, clock: commands.expire_unsigned(
            engine, chains, clock, chain, settler_dir=settler_dir, actor=actor, reason=reason
        ),
    )


@batch_app.command("sanctions")
def batch_sanctions(
    file: Annotated[Path | None, typer.Argument(help="One address a line; # starts a comment.")] = None,
    none: Annotated[bool, typer.Option("--none", help="Screen nobody any more; takes no file.")] = False,
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Put a list in force: never added or paid, and their deposits wait; replaces the list before."""
    from marketplace import screening

    if none == (file is not None):
        err.print("[red]tollway:[/] give either a file or --none")
        raise typer.Exit(1)
    if file is None:
        _with_book(data_dir, lambda engine, _, clock: screening.empty(engine, clock))
        out.print("Nobody is screened.")
        return
    found = _with_book(data_dir, lambda engine, _, clock: screening.refresh(engine, clock, file))
    out.print(f"{len(found.addresses)} addresses are screened.")
    if found.of_other_chains:
        out.print(
            f"{found.of_other_chains} lines name addresses of other chains; none can be paid from here."
        )


@batch_app.command("rules")
def batch_rules(
    large_above: Annotated[str, typer.Option(help="USDC above which a batch is large.")],
    large_approvals: Annotated[int, typer.Option(min=1, max=11, help="Signers a large batch needs.")],
    daily_max: Annotated[str, typer.Option(help="USDC that may be planned in 24 hours, all chains.")],
    actor: Annotated[str, typer.Option("--as", help="Who decides.")],
    reason: Annotated[str, typer.Option(help="Why; kept for ever.")],
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Change who must agree to how much."""
    from marketplace.settlement import commands
    from marketplace.settlement.payout_rules import PayoutRules

    with _plain_errors():
        rules = PayoutRules(parse_usdc(large_above), large_approvals, parse_usdc(daily_max))
    _with_book(
        data_dir,
        lambda engine, _, clock: commands.change_rules(engine, clock, rules, actor=actor, reason=reason),
    )


@batch_app.command("rebalance")
def batch_rebalance(
    amount: Annotated[str, typer.Argument(help="USDC that arrived, all of it.")],
    source: Annotated[str, typer.Option("--from", help="The chain whose escrow it left, or `card`.")],
    target: Annotated[Chain, typer.Option("--to", help="The chain whose escrow it arrived in.")],
    arrived: Annotated[str, typer.Option(help="The deposit's key, as `deposits cases` prints it.")],
    ref: Annotated[str, typer.Option(help="The movement's own name: the transaction that left.")],
    actor: Annotated[str, typer.Option("--as", help="Who decides.")],
    reason: Annotated[str, typer.Option(help="Why; kept for ever.")],
    fee: Annotated[str, typer.Option(help="USDC that a bridge kept: it left too, and did not arrive.")] = "0",
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Book USDC that people moved between escrows, or bought with card money, once it has arrived."""
    from marketplace.settlement import commands

    with _plain_errors():
        moved, kept = parse_usdc(amount), parse_usdc(fee)
        origin: Chain | Literal["card"] = "card" if source == "card" else Chain(source)
    _with_book(
        data_dir,
        lambda engine, _, clock: commands.rebalance(
            engine,
            clock,
            origin,
            target,
            moved,
            arrived=arrived,
            fee=kept,
            ref=ref,
            actor=actor,
            reason=reason,
        ),
    )


@batch_app.command("tier")
def batch_tier(
    tier: Annotated[str, typer.Argument(help="`none`, `identity`, or a tier of your own.")],
    actor: Annotated[str, typer.Option("--as", help="Who decides.")],
    reason: Annotated[str, typer.Option(help="Why; kept for ever.")],
    withdrawal_max: Annotated[str | None, typer.Option(help="USDC at once; without it, no limit.")] = None,
    total_max: Annotated[str | None, typer.Option(help="USDC in all; without it, no limit.")] = None,
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Change how much a KYC tier lets out."""
    from marketplace.settlement import commands

    with _plain_errors():
        at_once = None if withdrawal_max is None else parse_usdc(withdrawal_max)
        total = None if total_max is None else parse_usdc(total_max)
    _with_book(
        data_dir,
        lambda engine, _, clock: commands.change_tier(
            engine, clock, tier, withdrawal_max=at_once, total_max=total, actor=actor, reason=reason
        ),
    )


@batch_app.command("halt")
def batch_halt(
    rail: Annotated[str, typer.Argument(help="A chain, or `payouts` for all.")],
    actor: Annotated[str, typer.Option("--as", help="Who decides.")],
    reason: Annotated[str, typer.Option(help="Why; kept for ever.")],
    lift: Annotated[bool, typer.Option("--lift", help="Let payouts run again.")] = False,
    data_dir: DataDir = DEFAULT_STACK,
) -> None:
    """Stop payouts, or let them run again; a fact with actor and reason."""
    from marketplace.settlement import commands

    act = commands.lift if lift else commands.halt
    _with_book(data_dir, lambda engine, _, clock: act(engine, clock, rail, actor=actor, reason=reason))


@app.command()
def sign(
    export: Annotated[Path, typer.Argument(help="The file written by `tollway batch export`.")],
    keystore: Annotated[Path, typer.Option(help="Your encrypted key for this chain.")],
    chains_file: Annotated[Path, typer.Option(help="Your own copy of the chains file: what you pin.")],
    limit: Annotated[str | None, typer.Option(help="Refuse batches above so many USDC.")] = None,
    witness: Annotated[
        Path | None, typer.Option(help="What `tollway batch witness` wrote, for a batch on a lookup table.")
    ] = None,
    approval: Annotated[Path | None, typer.Option("--out", help="Where to write the approval.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Sign a batch on your own machine, offline: everything is rebuilt from its rows and compared."""
    from marketplace.settlement import commands
    from marketplace.settlement.errors import SettlementError

    def confirm(review: Any) -> bool:
        err.print(
            f"batch {review.batch} on {review.chain.value}, planned by {escape(review.planned_by)}: "
            f"{review.total} USDC from {review.escrow}, fence {review.fence}, digest {review.digest}"
        )
        rows = [
            (to, str(amount), "NEW" if to in review.new_recipients else "")
            for to, amount in review.recipients
        ]
        print_table(("to", "USDC", "new"), rows, console=err)
        return yes or typer.confirm("Sign this?", err=True)

    try:
        with _plain_errors():
            _, written = commands.sign(
                export,
                keystore,
                chains_file=chains_file,
                limit=None if limit is None else parse_usdc(limit),
                witness_file=witness,
                confirm=confirm,
                approval_file=approval,
            )
    except SettlementError as e:
        err.print(f"[red]tollway:[/] {escape(str(e))}")
        raise typer.Exit(1) from e
    print(written)


@keystore_app.command("create")
def keystore_create(
    chain: ChainArgument,
    file: Annotated[Path, typer.Option("--out", help="A new file; never overwritten.")],
) -> None:
    """Make a signer's key; prints its address."""
    from marketplace.settlement import commands

    with _plain_errors():
        out.print(commands.create_keystore(chain, file, commands.read_passphrase(file)))


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        err.print(f"[red]tollway:[/] {escape(repr(text))} is not a batch id")
        raise typer.Exit(2) from None


def main() -> None:
    """Entry point of the `tollway` command."""
    try:
        app()
    except SetupFault as e:
        err.print(f"[red]tollway:[/] {escape(str(e))}")
        sys.exit(1)
