"""`tollway-node status`: what the running agent does, once or live."""

import asyncio
import os
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from node_agent import config as settings
from node_agent.account import Account, AccountError, Report, Standing, load_key
from node_agent.config import ConfigError
from node_agent.prices import NANO_PER_DOLLAR, format_price
from node_agent.service import LocalStatus, read_local_status
from node_agent.terminal import HOME, DataDir, Json, out, print_json

STALE_MS: Final = 20_000
LOOK_EVERY_SECONDS: Final = 1.0
NEWS_EVERY_SECONDS: Final = 30.0
NEWS_SECONDS_MAX: Final = 8.0
LOSSES_SHOWN: Final = 5
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

    With an API key (tollway-node login) also why requests went to others, and your standing.
    Exit status 1 if no agent runs.
    """
    found = read_current(data_dir)
    if found is not None and not as_json and (live or (live is None and _is_person_watching())):
        _keep_showing(data_dir)
        return
    news = read_news(data_dir)
    if as_json:
        told = {"is_running": found is not None, "status": found, "account": news}
        print_json({name: msgspec.to_builtins(value) for name, value in told.items()})
    else:
        out.print(picture(found, news))
    if found is None:
        raise typer.Exit(1)


def _is_person_watching() -> bool:
    return out.is_terminal and sys.stdin.isatty()


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


# -- what the marketplace says of us ------------------------------------------------------------------


class News(msgspec.Struct, frozen=True):
    """The marketplace's view of this node; None where it told nothing, `trouble` says why."""

    report: Report | None = None
    standing: Standing | None = None
    trouble: str = ""


def read_news(folder: Path) -> News | None:
    """Ask the marketplace, None without an API key; a marketplace that does not answer is no error here."""
    try:
        api, key = settings.load_config(folder).api, load_key(folder)
    except (AccountError, ConfigError, OSError):
        return None
    try:
        return asyncio.run(_ask(api, key))
    except (AccountError, TimeoutError) as error:
        return News(trouble=str(error) or "the marketplace does not answer")


async def _ask(api: str, key: str) -> News:
    async with asyncio.timeout(NEWS_SECONDS_MAX), Account(api, key) as account:
        report, standing = await asyncio.gather(account.report(), account.standing())
    return News(report, standing)


def _keep_showing(folder: Path) -> None:
    """Show until Ctrl-C; the marketplace is asked beside it, so that a slow one never stops the picture."""
    latest: list[News | None] = [None]

    def keep_asking() -> None:
        while True:
            latest[0] = read_news(folder)
            time.sleep(NEWS_EVERY_SECONDS)

    threading.Thread(target=keep_asking, daemon=True).start()
    try:
        with Live(console=out, refresh_per_second=4, screen=False) as live:
            while True:
                live.update(picture(read_current(folder), latest[0]))
                time.sleep(LOOK_EVERY_SECONDS)
    except KeyboardInterrupt:
        return


# -- the picture --------------------------------------------------------------------------------------


def picture(found: LocalStatus | None, news: News | None) -> RenderableType:
    """The status as a person reads it."""
    parts: list[RenderableType] = []
    if found is None:
        parts.append(Text(NOTHING_RUNS))
    else:
        parts += [_head(found), _models(found)]
        for engine in found.engines:
            restarts = f", {engine.restarts} restarts" if engine.restarts else ""
            trouble = f": {engine.last_error}" if engine.last_error else ""
            parts.append(Text(f"engine {engine.name}: {engine.state}{restarts}{trouble}"))
    if news is None:
        parts.append(Text("For why requests went to others: tollway-node login", style="dim"))
    else:
        parts += _news(news, found.node_id if found else "")
    return Group(*parts)


def _news(news: News, node_id: str) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if news.trouble:
        parts.append(Text(news.trouble, style="yellow"))
    if news.standing is not None and news.standing.standing != "good":
        style = "bold red" if news.standing.standing == "held" else "yellow"
        parts.append(Text(f"standing: {news.standing.standing}: {news.standing.reason}", style=style))
        parts += [Text(f"  {finding.severity}: {finding.message}") for finding in news.standing.findings]
        if news.standing.standing == "held" and news.standing.dispute is None:
            parts.append(Text('  If this is wrong: tollway-node dispute "WHY"'))
    for node in news.report.nodes if news.report is not None else ():
        if node_id and node.node_id != node_id:
            continue
        for model in node.models:
            parts.append(
                Text(
                    f"{model.model}: asked first in {model.chosen} of {model.considered} decisions looked at"
                )
            )
            parts += [
                Text(f"  lost {loss.share_permille / 10:.0f} %: {loss.message}")
                for loss in model.lost[:LOSSES_SHOWN]
            ]
    return parts


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
    cents = found.earned_today_nano * 100 // NANO_PER_DOLLAR
    text.append(
        f"\n{found.tokens_per_second:.0f} tokens/s, about ${cents // 100}.{cents % 100:02d} earned today"
    )
    return text


def _models(found: LocalStatus) -> Table:
    table = Table("model", "state", "running", "waiting", "cache", "capacity", "$ in / 1M", "$ out / 1M")
    for model in found.models:
        table.add_row(
            Text(model.name),
            "ready" if model.is_ready else "not ready",
            str(model.running),
            str(model.waiting),
            f"{model.kv_used_permille / 10:.0f} %",
            str(model.capacity),
            format_price(model.price_in),
            format_price(model.price_out),
        )
    return table
