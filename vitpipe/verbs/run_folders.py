"""Which finished runs a verb is about; where there are none yet, the error says how to get one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitpipe.contracts.errors import ArtifactError, InputError
from vitpipe.contracts.files import read_keys

if TYPE_CHECKING:
    from vitpipe.contracts.address import Address

LOCAL_RUNS = Path("artifacts/local")  # where `vitpipe local` keeps its runs
LOCAL_RUN = "local-run.json"  # in the folder of such a run: what it was started with
_MAKE_ONE = "run `make demo` or `dvc repro` in the folder of the project first"


def check_runs_folder(folder: Path, default: Path = Path("artifacts")) -> None:
    """Check that the folder that holds runs is there.

    Args:
        default: what the verb takes when no folder is given.

    Raises:
        InputError: when it is missing or no folder.
    """
    check_run_place(folder)
    if folder.is_dir():
        return
    if folder == default:
        fix = f"{_MAKE_ONE}, or give the folder of your runs"
        raise InputError(f"There are no runs here: no folder '{folder}'", where=Path.cwd(), fix=fix)
    raise InputError("The folder does not exist", where=folder, fix="give the folder of your runs")


def check_run_place(run: Path) -> None:
    """Check that nothing but folders stands where a run's folders are or will be made.

    Raises:
        InputError: when a part of the path is a file, or a link that leads nowhere.
    """
    for place in (*reversed(run.parents), run):
        if place.is_dir() or not (place.exists() or place.is_symlink()):
            continue
        what = "is a file" if place.exists() else f"is a link to {place.readlink()}, which does not exist"
        fix = "move it away" if place.exists() else "make the folder that it leads to, or remove the link"
        raise InputError(
            f"'{place}' {what}; the folders of runs are made there", where=place.absolute(), fix=fix
        )


def chosen_runs(runs: Sequence[Path] | None, params: Path) -> list[Path]:
    """The folders of runs that were given, else the one of the params file.

    Raises:
        InputError: when one is given twice.
        ArtifactError: when none is given and there is no params file, or its recipe has not run yet.
        RecipeError: as `load_params`.
    """
    from vitpipe.config.params_file import load_params
    from vitpipe.config.read import run_folder

    if runs:
        for run in runs:
            if [other.resolve() for other in runs].count(run.resolve()) > 1:
                raise InputError("A run is given twice", where=run, fix="give every run once")
        return list(runs)
    fix = f"{_MAKE_ONE}, or give the folder of a run"
    if (local := newest_local_run()) is not None:
        fix += f", for example the newest one of `vitpipe local`: {local}"
    if not params.exists():
        what = f"There is no finished run here: no '{params}' names one"
        raise ArtifactError(what, where=Path.cwd(), fix=fix)
    chosen = load_params(params)
    folder = run_folder(chosen.recipe, chosen.profile)
    check_run_place(folder)
    # `vitpipe compile --dvc` makes empty folders.
    if not any(folder.glob("*/card.json")):
        what = f"{chosen.recipe} has not run yet at profile {chosen.profile}"
        raise ArtifactError(what, where=folder, fix=fix)
    return [folder]


def newest_local_run(root: Path = LOCAL_RUNS) -> Path | None:
    """The run of `vitpipe local` that was started last and has finished a stage; None without one."""
    from vitpipe.contracts.artifact import CARD

    files = [file for file in root.glob(f"*/{LOCAL_RUN}") if any(file.parent.glob(f"*/{CARD}"))]
    return max(files, key=lambda file: file.stat().st_mtime).parent if files else None


def store_of_run(run: Path) -> Address:
    """The MLflow store of a run, without credentials: its own, where it was made by `vitpipe local`."""
    from vitpipe.contracts.address import Address
    from vitpipe.track.server import store_address

    named = read_keys(run / LOCAL_RUN).get("store")
    return Address(named) if isinstance(named, str) and named else store_address(Path.cwd())
