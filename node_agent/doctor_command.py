"""`tollway-node doctor`."""

import asyncio
from typing import Final

import msgspec
import typer
from rich.text import Text

from node_agent.doctor import State, examine, is_healthy
from node_agent.status_view import read_current
from node_agent.terminal import HOME, DataDir, Json, out, plain_errors, print_json

_STYLE: Final[dict[State, str]] = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def add_to(app: typer.Typer) -> None:
    """Put this command into `app`."""
    app.command()(doctor)


def doctor(data_dir: DataDir = HOME, as_json: Json = False) -> None:
    """Check engine, clock, network, GPU, tokenizer, disk and settings, and say what to do.

    Exit status 1 if something keeps this machine from serving.
    """
    with plain_errors():
        findings = asyncio.run(examine(data_dir, read_current(data_dir)))
    if as_json:
        print_json({"is_healthy": is_healthy(findings), "findings": msgspec.to_builtins(findings)})
    else:
        for finding in findings:
            line = Text(f"{finding.state:8}", style=_STYLE[finding.state])
            line.append(f"{finding.check}: {finding.detail}", style="default")
            out.print(line)
            if finding.advice:
                out.print(Text(f"         → {finding.advice}"))
    if not is_healthy(findings):
        raise typer.Exit(1)
