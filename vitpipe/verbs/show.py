"""How verbs show things: rows as a table for the terminal or as JSON for programs, progress as lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# rich takes 80 columns when stdout is not a terminal, which cuts paths and checksums in files and CI logs.
_PIPE_WIDTH = 160


def print_rows(
    rows: Sequence[Mapping[str, Any]],
    as_json: bool,
    title: str = "",
    *,
    right: Collection[str] = (),
    unbroken: Collection[str] = (),
    shows_header: bool = True,
) -> None:
    """Print rows with the columns of the first row; None is an empty cell.

    Args:
        as_json: print JSON; the other arguments have no effect then.
        right: columns to align right.
        unbroken: columns whose cells are not wrapped.
    """
    if as_json:
        print(json.dumps(rows, indent=2, default=str))  # str: paths
        return
    # Here, because --json needs no rich.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text, not str: names may contain brackets, which rich interprets as markup.
    shown_title = Text(title, style="table.title") if title else None
    table = Table(title=shown_title, title_justify="left", header_style="bold", show_header=shows_header)
    for name in rows[0] if rows else ():
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name in unbroken)
    for row in rows:
        table.add_row(*(Text("" if value is None else str(value)) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)


def print_progress(line: str) -> None:
    """Print a line to stderr: stdout belongs to the result."""
    print(line, file=sys.stderr, flush=True)
