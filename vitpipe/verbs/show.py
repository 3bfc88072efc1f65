"""How verbs show things: rows as a table for the terminal or as JSON for programs, progress as lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitpipe.contracts.errors import VitpipeError
from vitpipe.contracts.shell import with_typed_commands

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# rich takes 80 columns when stdout is not a terminal, which would make narrow tables in files and CI logs.
_PIPE_WIDTH = 160
_UNLIMITED = 10_000


def print_rows(
    rows: Sequence[Mapping[str, Any]],
    as_json: bool,
    title: str = "",
    *,
    right: Collection[str] = (),
    unbroken: Collection[str] = (),
    shows_header: bool = True,
) -> None:
    """Print rows with the columns of the first row; None is an empty cell. Nothing is ever cut.

    Rows whose words do not fit side by side are printed one below the other, a line per column.

    Args:
        as_json: print JSON; the other arguments have no effect then.
        right: columns to align right, whose cells are not wrapped.
        unbroken: other columns whose cells are not wrapped.
    """
    if as_json:
        print(json.dumps(rows, indent=2, default=str))  # str: paths
        return
    if not rows:
        print(title, end="\n" if title else "")  # rich prints an empty line in its place
        return
    # Here, because --json needs no rich.
    from rich.cells import cell_len
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    # Text, not str: names may contain brackets, which rich interprets as markup.
    shown_title = Text(title, style="table.title") if title else None
    table = Table(title=shown_title, title_justify="left", header_style="bold", show_header=shows_header)
    texts = [["" if value is None else str(value) for value in row.values()] for row in rows]
    for place, name in enumerate(rows[0]):
        is_whole = name in right or name in unbroken
        widths = (cell_len(line) for cells in texts for line in cells[place].splitlines())
        table.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=is_whole,
            min_width=max(widths, default=1) if is_whole else None,
            overflow="fold",  # rich's own choice cuts a long word and writes an ellipsis
        )
    for cells in texts:
        table.add_row(*map(Text, cells))
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    # The least width that breaks no word; measured without a limit, to which rich would reduce it.
    unlimited = console.options.update(max_width=_UNLIMITED)
    if Measurement.get(console, unlimited, table).minimum > console.width:
        _print_below(console, title, list(rows[0]), texts)
    else:
        console.print(table)


def _print_below(console: Console, title: str, names: list[str], texts: list[list[str]]) -> None:
    """Every row as lines of column and value; the first column is the heading of its row."""
    from rich.text import Text

    if title:
        console.print(Text(title, style="table.title"))
    for cells in texts:
        console.print(Text(cells[0], style="bold"), overflow="fold")
        console.print(_lines(names[1:], cells[1:]))


def _lines(names: list[str], cells: list[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 0, 0, 2))
    grid.add_column(no_wrap=True, min_width=max(map(len, names), default=1))
    grid.add_column(overflow="fold")
    for name, cell in zip(names, cells, strict=True):
        if cell:
            grid.add_row(Text(name), Text(cell))
    return grid


def print_progress(line: str) -> None:
    """Print a line to stderr: stdout belongs to the result."""
    print(line, file=sys.stderr, flush=True)


def warn_of(check: Callable[[Path], None], path: Path) -> None:
    """Print on stderr what a check refuses, and go on."""
    try:
        check(path)
    except VitpipeError as error:
        print(f"warning: {with_typed_commands(str(error))}", file=sys.stderr)
