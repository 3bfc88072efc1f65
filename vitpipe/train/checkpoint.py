"""Training states on disk: complete or absent, checked when read, the last two kept, never mixed up.

A state ends with the SHA-256 of all before it, so that flipped bits, which torch.load takes as they are, are
found out before anything is made of them. torch.load reads such a file as any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from vitpipe.contracts.errors import CheckpointError, disk_errors
from vitpipe.contracts.files import written_aside

_KEPT = 2
_TRAILER = b"vitpipe-sha256:"
_DIGEST_BYTES = 64  # as hexadecimal digits
_BLOCK = 1 << 20


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
        self._damaged: set[int] = set()
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def path_of(self, step: int) -> Path:
        """Where the state after `step` steps is."""
        return self.folder / f"{self._prefix}{step:09d}.pt"

    def steps(self) -> list[int]:
        """Steps of all our states, oldest first."""
        files = self.folder.glob(f"{self._prefix}*.pt")
        return sorted(int(file.stem.removeprefix(self._prefix)) for file in files)

    def save(self, content: dict[str, Any], step: int) -> None:
        """Write a state beside its place, force it to disk, rename it, then drop all but the last two.

        Raises:
            StorageError: when the disk refuses it; the states that were there are untouched.
        """
        # One name for all steps: a kill leaves at most one partial file, and the next save overwrites it.
        with (
            written_aside(self.path_of(step), self.folder / "saving.partial") as partial,
            partial.open("wb") as handle,
        ):
            hashed = _Hashed(handle)
            torch.save({**content, "identity": self.identity}, cast(IO[bytes], hashed))
            handle.write(_TRAILER + hashed.digest())
        self._damaged.discard(step)
        sound = [known for known in self.steps() if known not in self._damaged]
        for old in self.steps():
            if old < sound[-_KEPT:][0]:
                self.path_of(old).unlink(missing_ok=True)

    def newest(self) -> dict[str, Any] | None:
        """The newest state that is sound; damaged ones are named and passed over.

        Raises:
            CheckpointError: when a state may not be read: to begin an older one would lose steps for nothing.
        """
        self._report_strangers()
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except PermissionError as error:
                raise _forbidden(error, self.path_of(step)) from error
            except CheckpointError as error:
                self.say(f"{error} Falling back to an older state")
                self._damaged.add(step)
        return None

    def read(self, step: int) -> dict[str, Any]:
        """The state after `step` steps, on the CPU.

        Raises:
            CheckpointError: when the file is missing, damaged or of another run.
            PermissionError: when it may not be read.
        """
        path = self.path_of(step)
        try:
            _check(path)
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            identity = content.get("identity")
        except PermissionError:
            raise
        except Exception as error:  # whatever torch makes of bytes that are no state
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"The training state cannot be read ({reason[:120]})",
                where=path,
                fix="with several nodes, put the state folder where all of them see it; a damaged one is of "
                "no use any more",
            ) from error
        if identity != self.identity:
            raise CheckpointError(
                "The training state belongs to another run", where=path, fix="give this run another --state"
            )
        return content

    @property
    def _prefix(self) -> str:
        return f"state-{self.identity[:12]}-"

    def _report_strangers(self) -> None:
        names = [file.name for file in self.folder.glob("state-*.pt")]
        strangers = [name for name in names if not name.startswith(self._prefix)]
        if strangers:
            self.say(
                f"{len(strangers)} training state(s) of another recipe, other data or other weights in "
                f"{self.folder} are not resumed: {', '.join(sorted(strangers))}"
            )


class _Hashed:
    """A file for `torch.save` that keeps the checksum of what goes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        """Hand it on. torch writes its archive from front to back."""
        self._hash.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        """Hand it on."""
        self._file.flush()

    def digest(self) -> bytes:
        """The checksum as hexadecimal digits."""
        return self._hash.hexdigest().encode()


def _check(path: Path) -> None:
    """Compare a file with the checksum at its end.

    Raises:
        ValueError: it has none, or another.
    """
    num_bytes = path.stat().st_size - len(_TRAILER) - _DIGEST_BYTES
    with path.open("rb") as handle:
        found = hashlib.sha256()
        while num_bytes > 0 and (block := handle.read(min(num_bytes, _BLOCK))):
            num_bytes -= len(block)
            found.update(block)
        if handle.read() != _TRAILER + found.hexdigest().encode():
            raise ValueError("its checksum is not that of its content")


def _forbidden(error: PermissionError, path: Path) -> CheckpointError:
    return CheckpointError(
        f"The training state may not be read ({error.strerror})",
        where=path,
        fix="give this user the right to read it, or start with another --state",
    )
