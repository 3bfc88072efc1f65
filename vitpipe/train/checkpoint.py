"""Training states on disk: written atomically, verified by checksum when read, the last two kept.

A state file is what torch.save writes, followed by the SHA-256 of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from vitpipe.contracts.errors import CheckpointError, disk_errors
from vitpipe.contracts.files import written_aside

# Two: the one before the newest is needed when the newest turns out to be damaged.
_KEPT = 2
# Behind torch's zip archive, whose directory torch.load finds from the end within 64 kB, so the file stays
# readable without this module.
_TRAILER = b"vitpipe-sha256:"
_DIGEST_BYTES = 64  # hexadecimal digits
_BLOCK = 1 << 20


class StateFolder:
    """Saved states of one run.

    Args:
        folder: on a disk that outlives the process; created if missing.
        identity: digest of everything that determines the weights (recipe, data, starting weights).
        say: receives one-line messages for the user.
    """

    def __init__(self, folder: Path, identity: str, say: Callable[[str], None]) -> None:
        self.folder, self.identity, self.say = folder, identity, say
        # Known from reading; they do not count as one of the two states that are kept.
        self._damaged: set[int] = set()
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def path_of(self, step: int) -> Path:
        """File of the state after `step` optimiser steps."""
        return self.folder / f"{self._prefix}{step:09d}.pt"

    def steps(self) -> list[int]:
        """Steps of all states of this run, ascending."""
        files = self.folder.glob(f"{self._prefix}*.pt")
        return sorted(int(file.stem.removeprefix(self._prefix)) for file in files)

    def save(self, content: dict[str, Any], step: int) -> None:
        """Write a state under a temporary name, sync, rename; then delete all but the last two.

        Args:
            content: tensors and plain values only.
            step: optimiser steps done.

        Raises:
            StorageError: when the disk refuses the write; older states are untouched.
        """
        # One temporary name for all steps: a kill leaves at most one partial file, which the next save
        # overwrites.
        with (
            written_aside(self.path_of(step), self.folder / "saving.partial") as partial,
            partial.open("wb") as handle,
        ):
            hashed = _HashingWriter(handle)
            torch.save({**content, "identity": self.identity}, cast(IO[bytes], hashed))
            handle.write(_TRAILER + hashed.digest())
        self._damaged.discard(step)
        # Deleted only after the new state is on the disk. A damaged state is not counted: it would take the
        # place of an intact one.
        sound = [known for known in self.steps() if known not in self._damaged]
        for old in self.steps():
            if old < sound[-_KEPT:][0]:
                self.path_of(old).unlink(missing_ok=True)

    def newest(self) -> dict[str, Any] | None:
        """The newest intact state, or `None`; damaged ones are reported and skipped.

        Raises:
            CheckpointError: when a state cannot be read for lack of permission.
        """
        self._report_other_runs()
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.read(step)
            # Not skipped: the state is probably intact, and an older one would lose steps for nothing.
            except PermissionError as error:
                raise _permission_denied(error, self.path_of(step)) from error
            except CheckpointError as error:
                # Without its advice: nothing has to be done.
                then = (
                    "There is no older state: training starts from the beginning"
                    if step == steps[0]
                    else "An older state is tried"
                )
                self.say(f"{error.what}. Where: {error.where}. {then}.")
                self._damaged.add(step)
        return None

    def read(self, step: int) -> dict[str, Any]:
        """The state after `step` steps, on the CPU.

        Raises:
            CheckpointError: when the file is missing, damaged or of another run.
            PermissionError: when this user has no read permission.
        """
        path = self.path_of(step)
        try:
            # First: torch.load accepts three quarters of the files with flipped bits, and the run then
            # diverges or ends in other weights.
            _check(path)
            # weights_only: a pickle could run code. CPU: tensors would otherwise return to the GPU that
            # they were saved from, rank 0's, on every rank.
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            identity = content.get("identity")
        except PermissionError:
            raise
        # torch.load raises many types for bytes that are no state: EOFError, UnpicklingError, KeyError, ...
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            # A rank asks for the step that rank 0 has found: on another node the folder may be another one.
            is_missing = isinstance(error, FileNotFoundError)
            raise CheckpointError(
                f"The training state cannot be read ({reason[:120]})",
                where=path,
                fix="with several nodes, put the state folder on storage that all of them see"
                if is_missing
                else "remove this file, then run the stage again: it resumes from the state before it",
            ) from error
        # The name holds 12 digits of the identity only.
        if identity != self.identity:
            raise CheckpointError(
                "The training state belongs to another run", where=path, fix="give this run another --state"
            )
        return content

    @property
    def _prefix(self) -> str:
        # States of another recipe or other data have other names and may share the folder.
        return f"state-{self.identity[:12]}-"

    def _report_other_runs(self) -> None:
        names = [file.name for file in self.folder.glob("state-*.pt")]
        others = [name for name in names if not name.startswith(self._prefix)]
        if others:
            self.say(
                f"{len(others)} training state(s) of another recipe, other data or other weights in "
                f"{self.folder} are not resumed: {', '.join(sorted(others))}"
            )


class _HashingWriter:
    """A file for `torch.save` that computes the SHA-256 of what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        """Write and hash. Needs no seek: torch writes its archive sequentially."""
        self._hash.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def digest(self) -> bytes:
        """The SHA-256 as hexadecimal digits."""
        return self._hash.hexdigest().encode()


def _check(path: Path) -> None:
    """Verify the checksum at the end of a file.

    Raises:
        ValueError: when it is missing or differs.
    """
    # In blocks, so that a state is not held in memory twice.
    num_bytes = path.stat().st_size - len(_TRAILER) - _DIGEST_BYTES
    with path.open("rb") as handle:
        found = hashlib.sha256()
        while num_bytes > 0 and (block := handle.read(min(num_bytes, _BLOCK))):
            num_bytes -= len(block)
            found.update(block)
        if handle.read() != _TRAILER + found.hexdigest().encode():
            raise ValueError("its checksum does not match its content")


def _permission_denied(error: PermissionError, path: Path) -> CheckpointError:
    return CheckpointError(
        f"The training state cannot be opened ({error.strerror})",
        where=path,
        fix="give this user read permission, or start with another --state",
    )
