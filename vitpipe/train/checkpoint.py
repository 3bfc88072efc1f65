"""Training states on disk: complete or absent, the last two kept, never mixed up between runs."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vitpipe.errors import CheckpointError, disk_errors

_KEPT = 2


class StateFolder:
    """Saved states of one run.

    The first 12 digits of the run's identity are part of every file name, so states of another recipe or
    other data lie side by side with ours and are never read.

    Args:
        folder: survives a kill; made if it is not there.
        identity: digest of all that decides the run (recipe, data, starting weights).
        say: takes one line for the person who watches.
    """

    def __init__(self, folder: Path, identity: str, say: Callable[[str], None]) -> None:
        self.folder, self.identity, self.say = folder, identity, say
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def path_of(self, step: int) -> Path:
        """Where the state after `step` steps is."""
        return self.folder / f"state-{self.identity[:12]}-{step:09d}.pt"

    def steps(self) -> list[int]:
        """Steps of all our states, oldest first."""
        files = self.folder.glob(f"state-{self.identity[:12]}-*.pt")
        return sorted(int(file.stem.rpartition("-")[2]) for file in files)

    def save(self, content: dict[str, Any], step: int) -> None:
        """Write a state beside its place, force it to disk, rename it, then drop all but the last two.

        Raises:
            StorageError: when the disk refuses it; the states that were there are untouched.
        """
        partial = self.folder / "saving.partial"
        with disk_errors(self.folder):
            try:
                with partial.open("wb") as handle:
                    torch.save({**content, "identity": self.identity}, handle)
                    handle.flush()
                    os.fsync(handle.fileno())
                partial.replace(self.path_of(step))
            finally:
                partial.unlink(missing_ok=True)
        for old in self.steps()[:-_KEPT]:
            self.path_of(old).unlink(missing_ok=True)

    def newest(self) -> dict[str, Any] | None:
        """The newest state that can be read; damaged ones are reported and passed over."""
        self._report_strangers()
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except CheckpointError as error:
                self.say(f"{error} Falling back to an older state")
        return None

    def read(self, step: int) -> dict[str, Any]:
        """The state after `step` steps, on the CPU.

        Raises:
            CheckpointError: when the file is missing, damaged or of another run.
        """
        path = self.path_of(step)
        try:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"The training state cannot be read ({reason[:120]})",
                where=path,
                mend="with several nodes, put the state folder where all of them see it; "
                "otherwise delete the file",
            ) from error
        if content.get("identity") != self.identity:
            raise CheckpointError(
                "The training state belongs to another run", where=path, mend="delete the file"
            )
        return content

    def _report_strangers(self) -> None:
        ours = f"state-{self.identity[:12]}-"
        strangers = [file.name for file in self.folder.glob("state-*.pt") if not file.name.startswith(ours)]
        if strangers:
            self.say(
                f"{len(strangers)} training state(s) of another recipe, other data or other weights in "
                f"{self.folder} are not resumed: {', '.join(sorted(strangers))}"
            )
