"""Rows on the terminal: a table for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_WIDTH_OF_A_PIPE = 160


def print_rows(
    rows: Sequence[Mapping[str, Any]],
    as_json: bool,
    title: str = "",
    *,
    right: Collection[str] = (),
    unbroken: Collection[str] = (),
    shows_header: bool = True,
) -> None:
    """Print rows with the columns of the first; a value of None is an empty cell.

    Args:
        right: columns of numbers, set to the right.
        unbroken: columns whose cells are not folded.
    """
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", header_style="bold", show_header=shows_header)
    for name in rows[0] if rows else ():
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name in unbroken)
    for row in rows:
        # Text: names of files may hold brackets, which rich takes for markup.
        table.add_row(*(Text("" if value is None else str(value)) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE).print(table)
