"""What every command of `tollway-node` shares: its options, its two ways to print, its errors."""

import contextlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from node_agent.account import AccountError
from node_agent.chain_check import ChainUnreachableError
from node_agent.config import ConfigError
from node_agent.engine_recipe import RecipeError
from node_agent.enroll import EnrollError
from node_agent.identity import IdentityError
from node_agent.machine_service import ServiceError
from node_agent.prices import PriceError

HOME: Final = Path.home() / ".tollway-node"

DataDir = Annotated[
    Path,
    typer.Option("--data-dir", envvar="TOLLWAY_NODE_DIR", help="Where key, settings and journal are kept."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def version() -> str:
    """The installed version; "0" in a bare source tree."""
    try:
        return importlib.metadata.version("tollway")
    except importlib.metadata.PackageNotFoundError:
        return "0"


out: Final = Console()
err: Final = Console(stderr=True)
TABLE_WIDTH_MAX: Final = 10_000


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table that cuts no word: half an id or address names nothing, and is copied all the same.

    A line wider than the terminal is wrapped by the terminal, which still copies its words whole; a text of
    many words is folded at half the terminal's width. In a pipe each row is one line.
    """
    table = Table()
    for cells in zip(columns, *rows, strict=True):
        longest_word = max(map(len, " ".join(cells).split()))
        folded_at = max(longest_word, out.width // 2) if out.is_terminal else None
        table.add_column(cells[0], max_width=folded_at, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # no markup: what others wrote stays as it is
    wide = out.options.update(max_width=TABLE_WIDTH_MAX)
    table.width = Measurement.get(out, wide, table).maximum
    out.print(table, crop=False)


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on one line."""
    sys.stdout.write(msgspec.json.encode(content).decode() + "\n")


class JsonLines(logging.Formatter):
    """Log records as one JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {"time": record.created, "level": record.levelname, "logger": record.name}
        told["message"] = record.getMessage()
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(told).decode()


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what can go wrong for an operator into one sentence and exit status 1."""
    try:
        yield
    except (
        *(ConfigError, IdentityError, EnrollError, PriceError),
        *(AccountError, ChainUnreachableError, RecipeError, ServiceError),
    ) as error:
        end(str(error))
    except OSError as error:
        end(f"{error.filename or 'the data folder'}: {error.strerror or error}")


def end(sentence: str) -> NoReturn:
    """Say why on standard error; exit status 1."""
    err.print(sentence, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)
