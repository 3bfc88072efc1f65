"""Which finished runs a verb is about; where there are none yet, the error says how to get one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitpipe.contracts.errors import ArtifactError, InputError

_MAKE_ONE = "run `make demo` or `dvc repro` in the folder of the project first"


def check_runs_folder(folder: Path, default: Path = Path("artifacts")) -> None:
    """Check that the folder that holds runs is there.

    Args:
        default: what the verb takes when no folder is given.

    Raises:
        InputError: when it is missing or no folder.
    """
    if folder.is_dir():
        return
    if folder.exists() or folder.is_symlink():
        what = (
            "A link leads nowhere" if not folder.exists() else "This is a file, not the folder of your runs"
        )
        raise InputError(what, where=folder, fix="move it away, or give the folder of your runs")
    if folder == default:
        fix = f"{_MAKE_ONE}, or give the folder of your runs"
        raise InputError(f"There are no runs here: no folder '{folder}'", where=Path.cwd(), fix=fix)
    raise InputError("The folder does not exist", where=folder, fix="give the folder of your runs")


def chosen_runs(runs: Sequence[Path] | None, params: Path) -> list[Path]:
    """The folders of runs that were given, else the one of the params file.

    Raises:
        ArtifactError: when none is given and there is no params file, or its recipe has not run yet.
        RecipeError: as `load_params`.
    """
    from vitpipe.config.params_file import load_params
    from vitpipe.config.read import run_folder

    if runs:
        return list(runs)
    fix = f"{_MAKE_ONE}, or give the folder of a run"
    if not params.exists():
        what = f"There is no finished run here: no '{params}' names one"
        raise ArtifactError(what, where=Path.cwd(), fix=fix)
    chosen = load_params(params)
    folder = run_folder(chosen.recipe, chosen.profile)
    # `vitpipe compile --dvc` makes empty folders.
    if not any(folder.glob("*/card.json")):
        what = f"{chosen.recipe} has not run yet at profile {chosen.profile}"
        raise ArtifactError(what, where=folder, fix=fix)
    return [folder]
