"""`tollway route`: look at decisions after the fact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.table import Table

route_app = typer.Typer(help="Routing decisions.", no_args_is_help=True)
out: Final = Console()


@route_app.callback()
def _group() -> None:
    """Keep `replay` a command of its own while it is the only one."""


@route_app.command("replay")
def replay_command(
    log: Annotated[Path, typer.Argument(help="A log written under TOLLWAY_DECISION_LOG.")],
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="recorded, price, latency, throughput, load, balanced, or weights such as 60/20/20.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Decide a log's requests again under other policies, and compare."""
    from marketplace.routing.replay import parse_policy, read_log, replay

    try:
        outcomes = replay(read_log(log), [parse_policy(text) for text in policies or ["recorded", "price"]])
    except (ValueError, OSError) as e:
        raise typer.BadParameter(str(e)) from e
    if as_json:
        print(msgspec.json.encode(outcomes).decode())
        return
    table = Table(
        "policy", "decisions", "unserved", "as recorded", "mean cost (nano)", "latency ms", "busiest"
    )
    for found in outcomes:
        table.add_row(
            found.policy,
            str(found.decisions),
            str(found.unserved),
            f"{found.agrees_permille / 10:.1f} %",
            str(found.cost_nano_mean),
            "–" if found.latency_ms_mean is None else str(found.latency_ms_mean),
            f"{found.busiest_permille / 10:.1f} %",
        )
    out.print(table)
