"""What the marketplace's commands print with; `node_agent.terminal` is the node's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.box import HEAVY_HEAD, Box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

out: Final = Console(soft_wrap=True)  # a key, a path is never broken into two lines
err: Final = Console(stderr=True, soft_wrap=True)
TABLE_WIDTH_MAX: Final = 10_000


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    box: Box | None = HEAVY_HEAD,
    console: Console = out,
) -> None:
    """Print a table that cuts no word: half an id or address names nothing, and is copied all the same.

    A line wider than the terminal is wrapped by the terminal, which still copies its words whole; a text of
    many words is folded at half the terminal's width. In a pipe each row is one line.
    """
    table = Table(box=box)
    for cells in zip(columns, *rows, strict=True):
        longest_word = max(map(len, " ".join(cells).split()))
        folded_at = max(longest_word, console.width // 2) if console.is_terminal else None
        table.add_column(cells[0], max_width=folded_at, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # no markup: what strangers wrote stays as it is
    wide = console.options.update(max_width=TABLE_WIDTH_MAX)
    table.width = Measurement.get(console, wide, table).maximum
    console.print(table, crop=False)
