"""Where a stage may write: checked before any work, so that no file of the user's is ever replaced.

A stage owns two folders, its output and its training state, and temporary ones beside them. Each has to be
absent, empty or marked as ours, and neither may overlap with what the stage reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vitpipe.config.own_files import WEIGHTS, own_files
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import TEMPORARY, is_marked, read_card, refuse_added_files, refuse_foreign
from vitpipe.contracts.errors import ArtifactError


@dataclass(frozen=True)
class OutputFolders:
    """A stage's own folders, symbolic links followed."""

    out: Path
    state: Path

    @property
    def previous(self) -> Path | None:
        """The output of an earlier run, of which prepare reuses the shards whose source has not changed."""
        return self.out if self.out.is_dir() else None


def check_output_folders(
    stage: str, recipe: Recipe, inputs: Mapping[str, Path], out: Path, state: Path | None
) -> OutputFolders:
    """Resolve a stage's folders and check that it may write them.

    Args:
        out: as given; a symbolic link is followed, so the result lies on the disk that it points to.
        state: as given; beside the output if not.

    Raises:
        ArtifactError: before anything is written, when a folder holds other files, overlaps with what the
            stage reads, or cannot be renamed into place.
    """
    real_out = check_folder("--out", out)
    # Hidden and beside the output: DVC, which tracks the output, does not see the state.
    beside = real_out.with_name(f".{real_out.name}.state")
    real_state = check_folder("--state", state or beside)
    for option, folder in (("--out", real_out), ("--state", real_state)):
        _check_overlap(option, folder, recipe, inputs)
    if _overlap(real_out, real_state):
        raise _refused("--state", real_state, "is, contains or lies inside the output folder")
    if is_marked(real_state):
        raise _refused("--state", real_state, "is a stage's output")
    # The temporary folders of `artifact.writing`, too: a refusal must come before anything is written.
    for folder in (real_out, *(real_out.with_name(f".{real_out.name}.{end}") for end in TEMPORARY)):
        refuse_foreign(folder)
    refuse_added_files(real_out)
    _check_stage(stage, real_out)
    return OutputFolders(real_out, real_state)


def check_folder(option: str, given: Path) -> Path:
    """Refuse a folder to write into that is no folder of its own.

    Args:
        option: for the message, for example `--out`.
        given: a symbolic link is followed.

    Returns:
        The real path.

    Raises:
        ArtifactError: it is a file, a mount point, the root, or is or contains the current or home folder.
    """
    # Python up to 3.12 raises RuntimeError for a loop of links, later versions return the link itself.
    try:
        folder = given.resolve()
    except RuntimeError:
        folder = given
    if folder.is_symlink():
        raise _refused(option, given, "is a symbolic link that leads to itself")
    if folder == folder.parent:
        raise _refused(option, folder, "is the root of the file system")
    if folder.exists() and not folder.is_dir():
        raise _refused(option, folder, "is a file")
    # A mounted volume itself cannot be the target of a rename, a folder in it can.
    if folder.is_dir() and os.path.ismount(folder):
        raise _refused(
            option, folder, "is a mount point, which nothing can be renamed to; name a folder in it"
        )
    # mkdir would fail with NotADirectoryError after the inputs have been opened and hashed.
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir():
        raise _refused(option, folder, f"cannot be made: {above} is a file")
    for name, special in (("the current folder", Path.cwd()), ("the home folder", _home())):
        if special is not None and special.is_relative_to(folder):
            raise _refused(option, folder, f"is or contains {name}")
    return folder


def check_result_folder(option: str, given: Path) -> Path:
    """`check_folder` for a verb that writes files of its own: never inside a stage's output.

    Raises:
        ArtifactError: as `check_folder`, or it is or lies inside a stage's output.
    """
    folder = check_folder(option, given)
    owner = next((place for place in (folder, *folder.parents) if is_marked(place)), None)
    if owner is not None:
        raise _refused(option, folder, f"is or lies inside the output of a stage ({owner})")
    return folder


def _check_overlap(option: str, place: Path, recipe: Recipe, inputs: Mapping[str, Path]) -> None:
    for what, other in _read_places(recipe, inputs):
        if _overlap(place, other):
            raise _refused(option, place, f"is, contains or lies inside {what} ({other})")
    root = recipe.data.root
    if root is not None and root.resolve().is_relative_to(place):
        raise _refused(option, place, f"is or contains data.root ({root})")


def _read_places(recipe: Recipe, inputs: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Everything that a stage of this recipe may read, with its name for messages."""
    yield from ((f"the input '{name}'", folder.resolve()) for name, folder in inputs.items())
    data = recipe.data
    if data.root is not None:
        # The sets, not data.root itself: results inside data.root/results are a common and harmless choice.
        for name in data.names:
            given = data.root / name
            yield f"the dataset '{name}'", given.resolve()
    if data.volume is not None:
        yield "data.store", data.volume.resolve()
    if data.pinned is not None and Path(data.pinned.repo.secret).is_dir():
        repo = Path(data.pinned.repo.secret)
        yield "the pinned folder of data.pinned.repo", (repo / data.pinned.path).resolve()
    for section in recipe.stages:
        for key, path in own_files(recipe, section).items():
            what = "the starting weights of" if key == WEIGHTS else f"the file {key} of"
            yield f"{what} {section}", path.resolve()


def _check_stage(stage: str, out: Path) -> None:
    """A finished output of another stage is not replaced: its path was given by mistake."""
    if not is_marked(out):
        return
    try:
        made_by = read_card(out).stage
    except (OSError, ValueError):  # a damaged card: running the stage again is the fix
        return
    if made_by != stage:
        raise _refused("--out", out, f"is the finished output of stage '{made_by}'")


def _overlap(a: Path, b: Path) -> bool:
    return a.is_relative_to(b) or b.is_relative_to(a)


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except RuntimeError:  # a user id without an entry in /etc/passwd, as in many containers
        return None


def _refused(option: str, place: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"{option} {why}; nothing was touched",
        where=place,
        fix="choose a folder of its own, for example artifacts/RECIPE/PROFILE/STAGE",
    )
