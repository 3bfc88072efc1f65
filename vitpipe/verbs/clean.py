"""`vitpipe clean`: list what runs have left behind, and remove it when told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitpipe.verbs.show import print_rows

_UNIT = 1e6


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="clean")(clean)


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def clean(
    folder: Annotated[Path, typer.Argument(help="where to look, or one listed folder itself")] = Path(
        "artifacts"
    ),
    remove: Annotated[bool, typer.Option("--remove", help="remove what is listed as not needed")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only list, also with --remove")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """List states and outboxes that were moved aside or are not needed any more; remove them when told.

    What is needed (unfinished training, points that MLflow has not got) goes only when it is named itself.
    """
    from vitpipe.contracts.errors import InputError
    from vitpipe.stages.leftovers import clear, leftovers

    if not folder.is_dir():
        raise InputError("There is no such folder", where=folder, fix="name the folder of your runs")
    items = leftovers(folder)
    gone = clear(items, folder) if remove and not dry_run else []
    rows = [
        {
            "folder": _shown(item.path),
            "megabytes": round(item.size_bytes / _UNIT, 1),
            "why": item.reason,
            "needed": "yes" if item.is_needed else "no",
            **({"removed": "yes" if item in gone else "no"} if remove else {}),
        }
        for item in items
    ]
    print_rows(rows, as_json, f"{len(items)} left behind below {folder}")
    if not remove and not as_json and any(not item.is_needed for item in items):
        print("`vitpipe clean --remove` removes what is not needed")
