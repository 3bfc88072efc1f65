"""Rows on the terminal: a table for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from typing import Any


def print_rows(rows: list[dict[str, Any]], as_json: bool, title: str = "") -> None:
    """Print rows with the columns of the first; a value of None is an empty cell."""
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", header_style="bold")
    for name in rows[0] if rows else ():
        table.add_column(name)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
