"""One writer at a time for an output and a state folder, on one machine or on many.

A lock of the operating system decides between processes of one machine. On a mounted bucket, or where a
network file system does not hand locks on, it means nothing, so the lock file also names its owner and is
written anew every 30 seconds: what is older than three minutes belongs to a process that has died.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vitpipe.contracts.errors import ArtifactError, disk_errors

REFRESH_SECONDS, STALE_SECONDS, WAIT_SECONDS = 30.0, 180.0, 90.0
_LOOK_SECONDS, _SETTLE_SECONDS = 0.5, 1.0


def lock_of(folder: Path) -> Path:
    """The lock file of a folder, beside it."""
    return folder.with_name(f".{folder.name.lstrip('.')}.lock")


@contextmanager
def locked_folders(
    *folders: Path, wait_seconds: float = WAIT_SECONDS, say: Callable[[str], None] = print
) -> Iterator[None]:
    """Be the only process that writes these folders.

    Raises:
        ArtifactError: when another process has one of them for `wait_seconds`; it names the holder.
        StorageError: when the lock file cannot be written.
    """
    until = time.monotonic() + wait_seconds
    with ExitStack() as held:
        for folder in sorted(folders):
            held.enter_context(_owned(folder, until, say))
        yield


def holder_of(folder: Path) -> str:
    """Who writes a folder at this moment, for a message; empty when nobody does."""
    path = lock_of(folder)
    if not path.exists():
        return ""
    owner = _owner_in(path)
    return _named(owner) if _is_locked(path) or (owner and _is_at_work(owner, has_locks=True)) else ""


@contextmanager
def _owned(folder: Path, until: float, say: Callable[[str], None]) -> Iterator[None]:
    path, first_seen = lock_of(folder), None
    with disk_errors(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        while (descriptor := _try(path)) is None:
            owner = _owner_in(path)
            if first_seen is None:
                first_seen = owner
                say(f"{folder} is being written by {_named(owner)}; waiting for it")
            # A lock that is free but not stale yet, and not refreshed since we look: its owner has most
            # likely been killed on another machine, as pre-empted pods are. It is worth waiting until that is
            # certain.
            is_silent = owner == first_seen and not _is_locked(path)
            if time.monotonic() > until and not is_silent:
                raise ArtifactError(
                    f"Another process writes this folder: {_named(owner)}",
                    where=folder,
                    fix="wait for it, stop it, or choose another --out and --state; a lock whose owner has "
                    f"died is taken over after {STALE_SECONDS / 60:.0f} minutes",
                )
            time.sleep(_LOOK_SECONDS)
    stop = threading.Event()
    keeper = threading.Thread(target=_keep_fresh, args=(path, stop), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        path.unlink(missing_ok=True)  # still locked: whoever opened it meanwhile sees that it has gone
        os.close(descriptor)


def _try(path: Path) -> int | None:
    """Take the lock; its descriptor, or None while somebody else has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        has_locks = _flock(descriptor)
        # The owner before may have removed the file between our opening and our locking it.
        is_there = os.fstat(descriptor).st_ino == path.stat().st_ino
    except OSError:
        os.close(descriptor)
        return None
    owner = _owner_in(path)
    if not is_there or (owner and _is_at_work(owner, has_locks)):
        os.close(descriptor)
        return None
    mine = _write_owner(path)
    if not has_locks:
        time.sleep(_SETTLE_SECONDS)  # two that started together both wrote: the last one has it
        if _owner_in(path) != mine:
            os.close(descriptor)
            return None
    return descriptor


def _flock(descriptor: int) -> bool:
    """Lock without waiting; False where the file system has no locks.

    Raises:
        BlockingIOError: somebody else has it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r+") as handle:
            _flock(handle.fileno())
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _write_owner(path: Path) -> dict[str, Any]:
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pod": os.environ.get("POD_NAME") or os.environ.get("KFP_POD_NAME", ""),
        "time": time.time(),
    }
    # In place: a renamed file would not be the one that is locked.
    with path.open("r+", encoding="utf-8") as handle:
        handle.write(json.dumps(owner) + "\n")
        handle.truncate()
    return owner


def _keep_fresh(path: Path, stop: threading.Event) -> None:
    while not stop.wait(REFRESH_SECONDS):
        try:
            _write_owner(path)
        except OSError:
            continue  # a full disk: the lock itself still holds


def _owner_in(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_at_work(owner: dict[str, Any], has_locks: bool) -> bool:
    """Whether the owner that an unlocked file names is at work where locks do not reach."""
    try:
        age = time.time() - float(owner["time"])
        is_here = owner["host"] == socket.gethostname() and not owner.get("pod")
        if is_here and (has_locks or not Path(f"/proc/{int(owner['pid'])}").exists()):
            return False
        return age < STALE_SECONDS
    except (KeyError, TypeError, ValueError):
        return False


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "a process that has not said who it is"
    pod = f", pod {owner['pod']}" if owner.get("pod") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{pod}"
