"""The verb `clean`: list states and outboxes that are no longer needed, and remove them on demand."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from vitpipe.contracts.shell import with_typed_commands
from vitpipe.contracts.units import counted, format_bytes
from vitpipe.verbs.options import JsonOption
from vitpipe.verbs.run_folders import check_runs_folder
from vitpipe.verbs.show import print_rows


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="clean")(clean)


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def clean(
    folder: Annotated[Path, typer.Argument(help="folder to search, or one of the listed folders")] = Path(
        "artifacts"
    ),
    remove: Annotated[bool, typer.Option("--remove", help="remove the folders listed as not needed")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list only, even with --remove")] = False,
    as_json: JsonOption = False,
) -> None:
    """List states and outboxes that were moved aside or are no longer needed; --remove removes them.

    Folders that are needed (unfinished training, points that MLflow has not received) are removed only if the
    folder itself is given.
    """
    from vitpipe.stages.leftovers import clear, leftovers

    check_runs_folder(folder)
    items = leftovers(folder)
    removed = clear(items, folder) if remove and not dry_run else []
    rows = [
        {
            "folder": _shown(item.path),
            # A number in JSON, which programs read; with a unit in the table.
            **(
                {"megabytes": round(item.size_bytes / 1e6, 1)}
                if as_json
                else {"size": format_bytes(item.size_bytes)}
            ),
            "why": item.reason,
            "needed": "yes" if item.is_needed else "no",
            **({"removed": "yes" if item in removed else "no"} if remove else {}),
        }
        for item in items
    ]
    print_rows(rows, as_json, f"{counted(len(items), 'leftover folder')} below {folder}", right=("size",))
    if not remove and not as_json and any(not item.is_needed for item in items):
        command = shlex.join(
            ["vitpipe", "clean", *([] if folder == Path("artifacts") else [str(folder)]), "--remove"]
        )
        print(with_typed_commands(f"`{command}` removes the folders that are not needed"))
