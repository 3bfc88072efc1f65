"""Every error that a user can meet: one paragraph that says what is wrong, where, and how to fix it.

The command line prints the paragraph and exits with `exit_code`: 1 when the work failed, 2 when the
input was wrong. Anything that is not a `VitpipeError` is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vitpipe.contracts.address import hidden

# Numbers of refused writes, each with its fix.
_REFUSED = {
    errno.ENOSPC: "free some space or choose another --out folder",
    errno.EDQUOT: "free some of your quota or choose another --out folder",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f unlimited`)",
    errno.EIO: "check the disk (`dmesg`), or choose another --out folder",
    errno.EROFS: "choose a folder on a file system that is not mounted read-only",
    errno.EACCES: "give this user the right to write there or choose another --out folder",
}
# A value in a message may be a whole file that somebody pasted; its beginning tells which one it is.
_SHOWN_CHARACTERS = 80
_QUOTED = re.compile(rf"(?<!\w)(['\"])((?:(?!\1).){{{_SHOWN_CHARACTERS + 40},}})\1(?!\w)", re.DOTALL)
_PATH = re.compile(r"/[^\n]{1,4095}")
_MAX_PATH = 4096  # Linux has none that is longer
_NAMED = 5  # names in one message; a set of a million images can have a thousand damaged ones


class VitpipeError(Exception):
    """Base of all errors shown to a user.

    Args:
        what: what is wrong, one sentence without a full stop at the end.
        where: the file, key or stage it was found in.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | Path = "", fix: str = "") -> None:
        # Reasons come from libraries, which quote addresses and values as they were given them.
        self.what = with_short_values(hidden(_without_addresses(what)))
        place = str(where)
        # A path stays whole, to be found; one that no system takes is a mistake.
        self.where = hidden(place) if len(place) <= _MAX_PATH else shortened(place)
        self.fix = hidden(fix)
        parts = [self.what.rstrip(".") + "."]
        if self.where:
            parts.append(f"Where: {self.where.rstrip('.')}.")
        if self.fix:
            parts.append(f"Fix: {self.fix.rstrip('.')}.")
        super().__init__(" ".join(parts))


def some(names: Sequence[object], shown: int = _NAMED) -> str:
    """The first few names of many, for a message."""
    more = len(names) - shown
    return ", ".join(str(name) for name in names[:shown]) + (f" and {more:,} more" if more > 0 else "")


def shortened(value: object) -> str:
    """A value that somebody gave, as one short line without credentials.

    What does not print is written as in Python; of a long value the beginning is shown.
    """
    # Two characters per shown one are enough for what `hidden` takes out of an address.
    text = hidden(str(value))
    line = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: 2 * _SHOWN_CHARACTERS]
    )
    is_whole = len(line) <= _SHOWN_CHARACTERS and len(text) <= 2 * _SHOWN_CHARACTERS
    return line if is_whole else f"{line[:_SHOWN_CHARACTERS]}..."


def with_short_values(text: str) -> str:
    """A message in which every long value in quotes is `shortened`; a path stays whole, to be found."""
    return _QUOTED.sub(
        lambda found: found[0] if _PATH.fullmatch(found[2]) else f"{found[1]}{shortened(found[2])}{found[1]}",
        text,
    )


def reason_of(error: BaseException, limit: int = 120) -> str:
    """A library's error as a part of a message: one line, the same in every run."""
    return _without_addresses(" ".join(str(error).split()))[:limit] or type(error).__name__


def _without_addresses(text: str) -> str:
    # Pillow, torch and others quote objects, as in `<_io.BytesIO object at 0x7fb17adb2970>`.
    return re.sub(r" (?:object )?at 0x[0-9a-fA-F]+", "", text)


class InputError(VitpipeError):
    """What was given is wrong; nothing was started."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe, profile, override or params file cannot be used."""


class DatasetError(InputError):
    """A dataset folder is missing, has another layout, or does not hold what it says."""


class CheckpointError(InputError):
    """A weights or training-state file cannot be read or does not fit the model."""


class ArtifactError(InputError):
    """A stage's input or output folder is missing, incomplete or of another stage."""


class RunError(VitpipeError):
    """The work was started and failed."""


class StoppedError(RunError):
    """The process was asked to stop; exit code 128 + the signal, as shells have it.

    Args:
        by: number of the signal, SIGTERM or, after Ctrl-C, SIGINT.
    """

    def __init__(self, what: str, *, where: str | Path = "", fix: str = "", by: int = signal.SIGTERM) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = 128 + by


class DivergenceError(RunError):
    """The loss is no longer finite; the offending batch has been saved."""


class StorageError(RunError):
    """The disk refused a write, or a remote storage did not answer or refused."""


class EngineError(RunError):
    """An engine (DVC, Docker, Kubeflow) did not do what it was asked."""


@contextmanager
def disk_errors(where: str | Path) -> Iterator[None]:
    """Turn a refused write into a `StorageError`.

    Raises:
        StorageError: when the disk is full, read-only or over quota, or the user may not write there.
    """
    try:
        yield
    except VitpipeError:
        raise
    except Exception as error:
        refused = _refused_write(error)
        if refused is None:
            raise
        raise _storage_error(refused, where) from error


def _refused_write(error: Exception) -> Exception | None:
    """The error of the disk behind an error, if there is one."""
    link: BaseException | None = error
    while link is not None:
        # Other numbers (a missing file, for example) are not about refused writes.
        if isinstance(link, OSError) and link.errno in _REFUSED:
            return link
        # torch.save closes its archive on a full disk and raises that failure instead of the first one,
        # which is left as the context.
        link = link.__cause__ or link.__context__
    # safetensors quotes the system's number in its own class.
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    if quoted and int(quoted[1]) in _REFUSED:
        return OSError(int(quoted[1]), os.strerror(int(quoted[1])))
    # torch's C++ writers raise their own classes, without a number.
    return error if "No space left" in str(error) or "file write failed" in str(error) else None


def _storage_error(error: Exception, where: str | Path) -> StorageError:
    is_system = isinstance(error, OSError)
    reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
    fix = _REFUSED.get(error.errno or 0, "") if isinstance(error, OSError) else _REFUSED[errno.ENOSPC]
    return StorageError(
        f"The disk refused a write ({reason})",
        where=(error.filename if is_system and error.errno == errno.EACCES else "") or where,  # type: ignore[attr-defined]
        fix=f"{fix}, then run the same command again; finished stages and saved training states are kept",
    )
