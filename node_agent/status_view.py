"""`tollway-node status`: what the running agent does, once or live."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from node_agent.prices import format_price
from node_agent.service import LocalStatus, read_local_status
from node_agent.terminal import HOME, DataDir, Json, out, print_json

STALE_MS: Final = 20_000
LOOK_EVERY_SECONDS: Final = 1.0
NOTHING_RUNS: Final = "No agent runs here. Start it: tollway-node run"


def add_to(app: typer.Typer) -> None:
    """Put this command into `app`."""
    app.command()(status)


def status(
    data_dir: DataDir = HOME,
    live: Annotated[
        bool | None, typer.Option("--live/--once", help="Keep showing; the default in a terminal.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what the running agent does: health, models, requests, tokens a second, earned today.

    Exit status 1 if none runs.
    """
    found = read_current(data_dir)
    if as_json:
        print_json({"is_running": found is not None, "status": msgspec.to_builtins(found)})
    elif found is None:
        out.print(NOTHING_RUNS)
    elif live or (live is None and out.is_terminal and sys.stdin.isatty()):
        _keep_showing(data_dir)
        return
    else:
        out.print(picture(found))
    if found is None:
        raise typer.Exit(1)


def read_current(folder: Path) -> LocalStatus | None:
    """What the agent of this folder says, None if none runs."""
    found = read_local_status(folder)
    return found if found is not None and _is_current(found) else None


def _is_current(found: LocalStatus) -> bool:
    if time.time_ns() // 1_000_000 - found.time_ms > STALE_MS:
        return False
    if sys.platform == "win32":
        return True  # os.kill(pid, 0) would end it there
    try:
        os.kill(found.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _keep_showing(folder: Path) -> None:
    """Show until Ctrl-C."""
    try:
        with Live(console=out, refresh_per_second=4, screen=False) as live:
            while True:
                found = read_current(folder)
                live.update(Text(NOTHING_RUNS) if found is None else picture(found))
                time.sleep(LOOK_EVERY_SECONDS)
    except KeyboardInterrupt:
        return


# -- the picture --------------------------------------------------------------------------------------


def picture(found: LocalStatus) -> RenderableType:
    """The status as a person reads it."""
    parts: list[RenderableType] = [_head(found), _models(found)]
    for engine in found.engines:
        restarts = f", {engine.restarts} restarts" if engine.restarts else ""
        trouble = f": {engine.last_error}" if engine.last_error else ""
        parts.append(Text(f"engine {engine.name}: {engine.state}{restarts}{trouble}"))
    return Group(*parts)


def _head(found: LocalStatus) -> Text:
    text = Text()
    text.append(f"node {found.node_id}", style="bold")
    text.append(", ")
    text.append(*(("connected", "green") if found.is_connected else ("not connected", "red")))
    text.append(f"{', draining' if found.is_draining else ''}, {found.running} running")
    text.append(
        f"\nsince start: {found.served} served, {found.failed} failed, "
        f"{found.prompt_tokens} tokens in, {found.completion_tokens} out"
    )
    return text


def _models(found: LocalStatus) -> Table:
    table = Table("model", "state", "running", "waiting", "cache", "capacity", "$ in / 1M", "$ out / 1M")
    for model in found.models:
        table.add_row(
            model.name,
            "ready" if model.is_ready else "not ready",
            str(model.running),
            str(model.waiting),
            f"{model.kv_used_permille / 10:.0f} %",
            str(model.capacity),
            format_price(model.price_in),
            format_price(model.price_out),
        )
    return table
