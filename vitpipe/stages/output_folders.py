"""Where a stage may write: checked before any work, so that nothing of the user's is ever replaced.

A stage owns two folders, its output and its training state, and puts others beside them for a moment. Each
has to be absent, empty or marked as ours, and neither may touch what the stage reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import is_marked, read_card, refuse_foreign, refuse_strangers
from vitpipe.contracts.errors import ArtifactError


@dataclass(frozen=True)
class OutputFolders:
    """A stage's own folders, symbolic links followed."""

    out: Path
    state: Path


def check_output_folders(
    stage: str, recipe: Recipe, inputs: Mapping[str, Path], out: Path, state: Path | None
) -> OutputFolders:
    """Decide where a stage writes and see that it may.

    Args:
        out: as given; a symbolic link is followed, so the result lies on the disk that it points to.
        state: as given; beside the output if not.

    Raises:
        ArtifactError: before anything is made, when a folder is or holds somebody else's, overlaps what the
            stage reads, or cannot appear by a rename.
    """
    real_out = out.resolve()
    places = OutputFolders(
        real_out, state.resolve() if state else real_out.with_name(f".{real_out.name}.state")
    )
    for option, place in (("--out", places.out), ("--state", places.state)):
        _check_place(option, place)
        _check_overlap(option, place, recipe, inputs)
    if _touch(places.out, places.state):
        raise _refused("--state", places.state, "is, holds or lies inside the output folder")
    refuse_foreign(places.out)
    refuse_strangers(places.out)
    _check_stage(stage, places.out)
    return places


def _check_place(option: str, place: Path) -> None:
    """The folder's name and kind: something that can be renamed into place."""
    if place == place.parent:
        raise _refused(option, place, "is the root of the file system")
    if place.exists() and not place.is_dir():
        raise _refused(option, place, "is a file")
    if place.is_dir() and os.path.ismount(place):
        raise _refused(
            option, place, "is a mount point, which nothing can be renamed to; name a folder in it"
        )
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir():
        raise _refused(option, place, f"cannot be made: {above} is a file")
    for name, special in (("the current folder", Path.cwd()), ("the home folder", _home())):
        if special is not None and special.is_relative_to(place):
            raise _refused(option, place, f"is {name}, or holds it")


def _check_overlap(option: str, place: Path, recipe: Recipe, inputs: Mapping[str, Path]) -> None:
    for what, other in _read_places(recipe, inputs):
        if _touch(place, other):
            raise _refused(option, place, f"is, holds or lies inside {what} ({other})")
    root = recipe.data.root
    if root is not None and root.resolve().is_relative_to(place):
        raise _refused(option, place, f"is data.root, or holds it ({root})")


def _read_places(recipe: Recipe, inputs: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Everything that a stage of this recipe may read, with what to call it."""
    yield from ((f"the input '{name}'", folder.resolve()) for name, folder in inputs.items())
    data = recipe.data
    if data.root is not None:
        for name in data.sets:
            given = data.root / name
            yield f"the dataset '{name}'", given.resolve()
    if data.volume is not None:
        yield "data.store", data.volume.resolve()
    if data.pinned is not None and Path(data.pinned.repo.secret).is_dir():
        repo = Path(data.pinned.repo.secret)
        yield "the pinned folder of data.pinned.repo", (repo / data.pinned.path).resolve()
    for section in recipe.stages:
        weights = getattr(getattr(recipe, section, None), "weights", None)
        if weights is not None:
            yield f"the starting weights of {section}", Path(weights).resolve()


def _check_stage(stage: str, out: Path) -> None:
    """A finished output of another stage is not replaced: the name was mistaken."""
    if not is_marked(out):
        return
    try:
        made_by = read_card(out).stage
    except (OSError, ValueError):  # damaged: to run its stage again is the way to fix it
        return
    if made_by != stage:
        raise _refused("--out", out, f"is the finished output of stage '{made_by}'")


def _touch(a: Path, b: Path) -> bool:
    return a.is_relative_to(b) or b.is_relative_to(a)


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except RuntimeError:  # a user without an entry, as in many containers
        return None


def _refused(option: str, place: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"{option} {why}; nothing was touched",
        where=place,
        fix="choose a folder of its own, for example artifacts/RECIPE/PROFILE/STAGE",
    )
