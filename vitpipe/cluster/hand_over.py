"""Artifacts between the launcher's pod and the job's, over a shared claim that both see at the same path.

    SHARED/jobs/NAME/in/INPUT     copies of the task's input artifacts
    SHARED/jobs/NAME/out          the stage's folder, written by rank 0
    SHARED/states                 resumable training states, a folder for each run (`stages/state_folder.py`)

Copies of the inputs are complete when their card is there, which is copied last; a copy that was broken off
goes on with the files that are missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from vitpipe.config.digest import digest_of
from vitpipe.contracts.artifact import CARD, Artifact, open_artifact, read_card, writing
from vitpipe.contracts.errors import VitpipeError, disk_errors
from vitpipe.contracts.files import remove, written_aside

JOBS, STATES, IN, OUT = "jobs", "states", "in", "out"


class HandOver:
    """The folders of one job on the shared claim."""

    def __init__(self, shared: Path, name: str) -> None:
        self.folder = shared / JOBS / name

    @property
    def out(self) -> Path:
        """The stage's folder as the job writes it."""
        return self.folder / OUT

    def input(self, name: str) -> Path:
        """An input's copy."""
        return self.folder / IN / name

    def give(self, inputs: Mapping[str, Artifact]) -> dict[str, Path]:
        """Copy the input artifacts, as far as they are not there yet.

        Returns:
            Input name -> folder on the claim.

        Raises:
            ArtifactError: an input is damaged.
            StorageError: the claim refuses a write.
        """
        return {name: self._copied(artifact, self.input(name)) for name, artifact in inputs.items()}

    def result(self, stage: str) -> Artifact | None:
        """The finished folder of the job, or None where it is missing or damaged."""
        try:
            artifact = open_artifact(self.out, stage)
            artifact.verify()
        except VitpipeError:
            return None
        return artifact

    def take(self, artifact: Artifact, out: Path) -> Artifact:
        """Copy the finished folder to its place in this pod, and verify the copy.

        Raises:
            ArtifactError: the target is not ours, or the copy differs.
            StorageError: the disk refuses a write.
        """
        with writing(out) as folder, disk_errors(out):
            for name in _files(artifact.path):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact.path / name, folder / name)
        taken = open_artifact(out, artifact.card.stage)
        taken.verify()
        return taken

    def clear(self) -> None:
        """Remove the copies; the states stay for the stages behind, which release them."""
        remove(self.folder)

    def _copied(self, artifact: Artifact, target: Path) -> Path:
        if _has_card_of(target, artifact):
            return target
        artifact.verify()
        with disk_errors(target):
            names = [name for name in _files(artifact.path) if name != CARD]
            for name in (*names, CARD):
                source, copy = artifact.path / name, target / name
                # Each appears by a rename, so what is there is whole.
                if name == CARD or not copy.is_file() or copy.stat().st_size != source.stat().st_size:
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    with written_aside(copy) as aside:
                        shutil.copyfile(source, aside)
        return target


def _has_card_of(folder: Path, artifact: Artifact) -> bool:
    try:
        return digest_of(read_card(folder)) == digest_of(artifact.card)
    except (OSError, ValueError):
        return False


def _files(folder: Path) -> Iterator[str]:
    """Relative names of all files below a folder, in a fixed order."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from ((Path(root) / name).relative_to(folder).as_posix() for name in sorted(names))
