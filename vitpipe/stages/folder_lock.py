"""One writer at a time for an output and a state folder, on one machine or on several.

`flock` decides between the processes of one machine. On mounted buckets, and on network file systems that do
not forward locks, it has no effect, so the lock file also names its owner, who rewrites it every 30 seconds:
a file that is older than three minutes belongs to a process that has died.
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
from vitpipe.contracts.files import read_keys
from vitpipe.stages.pipeline_run import own_pod

# Six missed refreshes in a row mean that the owner is dead, not slow. A second starter waits for half of
# that: long enough for a predecessor that is just finishing.
REFRESH_SECONDS, STALE_SECONDS, WAIT_SECONDS = 30.0, 180.0, 90.0
# Between two looks at the lock; and, without flock, between writing one's name and reading it back.
_POLL_SECONDS, _SETTLE_SECONDS = 0.5, 1.0


def lock_of(folder: Path) -> Path:
    """The lock file of a folder, beside it."""
    return folder.with_name(f".{folder.name.lstrip('.')}.lock")


@contextmanager
def locked_folders(
    *folders: Path, wait_seconds: float = WAIT_SECONDS, say: Callable[[str], None] = print
) -> Iterator[None]:
    """Hold the locks of these folders while the block runs.

    Raises:
        ArtifactError: another process holds one of them for `wait_seconds`; the message names it.
        StorageError: when the lock file cannot be written.
    """
    until = time.monotonic() + wait_seconds
    with ExitStack() as held:
        for folder in sorted(folders):  # in one order everywhere: two starters cannot block each other
            held.enter_context(_owned(folder, until, say))
        yield


def holder_of(folder: Path) -> str:
    """The process that writes a folder at this moment, as text; empty when there is none."""
    path = lock_of(folder)
    if not path.exists():
        return ""
    owner = read_keys(path)
    return _named(owner) if _is_locked(path) or (owner and _is_at_work(owner, has_locks=True)) else ""


@contextmanager
def _owned(folder: Path, until: float, say: Callable[[str], None]) -> Iterator[None]:
    path, first_seen = lock_of(folder), None
    with disk_errors(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        while (descriptor := _try(path)) is None:
            owner = read_keys(path)
            if first_seen is None:
                first_seen = owner
                say(f"Waiting for {_named(owner)}, which writes {folder}")
            # Unlocked, not stale yet, and not refreshed since we began to wait: its owner was most likely
            # killed on another machine, as pre-empted pods are. Waiting until it is stale saves the restart.
            is_silent = owner == first_seen and not _is_locked(path)
            if time.monotonic() > until and not is_silent:
                raise ArtifactError(
                    f"Another process writes this folder: {_named(owner)}",
                    where=folder,
                    fix="wait for it, stop it, or choose another --out and --state; a lock whose owner has "
                    f"died is taken over after {STALE_SECONDS / 60:.0f} minutes",
                )
            time.sleep(_POLL_SECONDS)
    stop = threading.Event()
    keeper = threading.Thread(target=_keep_fresh, args=(path, stop), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        # Still locked: who has opened the file meanwhile finds another inode at its path and tries again.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _try(path: Path) -> int | None:
    """Take the lock: its file descriptor, or None while another process holds it."""
    _refuse_foreign_lock(path)
    # O_NOFOLLOW: a link of this name would have its target overwritten.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        has_locks = _flock(descriptor)
        # The previous owner may have removed the file after we opened it and before we locked it.
        is_there = os.fstat(descriptor).st_ino == path.stat().st_ino
    except OSError:
        os.close(descriptor)
        return None
    owner = read_keys(path)
    if not is_there or (owner and _is_at_work(owner, has_locks)):
        os.close(descriptor)
        return None
    mine = _write_owner(path)
    if not has_locks:
        # Two starters may both have written: after a moment the later one's name stands in the file.
        time.sleep(_SETTLE_SECONDS)
        if read_keys(path) != mine:
            os.close(descriptor)
            return None
    return descriptor


def _refuse_foreign_lock(path: Path) -> None:
    """Raise ArtifactError when the lock's path is taken by something else than a lock."""
    if not path.is_symlink() and not path.exists():
        return
    try:
        is_lock = path.is_file() and not path.is_symlink() and _is_lock_text(path.read_text("utf-8"))
    except FileNotFoundError:
        return  # its owner has just finished
    except (OSError, UnicodeDecodeError):
        is_lock = False
    if not is_lock:
        raise ArtifactError(
            "The path of the lock file is taken by something else; nothing was touched",
            where=path,
            fix="move it away, or choose another --out and --state",
        )


def _is_lock_text(text: str) -> bool:
    """Whether a file's content is a lock: an owner, perhaps cut off by a kill, or nothing on a full disk."""
    start = '{"host"'
    return text.startswith(start) or start.startswith(text.strip())


def _flock(descriptor: int) -> bool:
    """Lock without waiting; False on file systems without locks.

    Raises:
        BlockingIOError: another process holds it.
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
        "pod": own_pod(),
        "time": time.time(),
    }
    # In place: a renamed file would be another inode than the locked one.
    with path.open("r+", encoding="utf-8") as handle:
        handle.write(json.dumps(owner) + "\n")
        handle.truncate()
    return owner


def _keep_fresh(path: Path, stop: threading.Event) -> None:
    while not stop.wait(REFRESH_SECONDS):
        try:
            _write_owner(path)
        except OSError:
            continue  # a full disk; flock still holds


def _is_at_work(owner: dict[str, Any], has_locks: bool) -> bool:
    """Whether the owner named in a file that is not locked here may still be running elsewhere."""
    try:
        age = time.time() - float(owner["time"])
        # Pods have process numbers of their own: only those of this very pod can be looked up here. Its ranks
        # start again after one has died.
        is_here = owner["host"] == socket.gethostname() and owner.get("pod", "") == own_pod()
        if is_here and (has_locks or not Path(f"/proc/{int(owner['pid'])}").exists()):
            return False
        return age < STALE_SECONDS
    except (KeyError, TypeError, ValueError):
        return False


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "an unnamed process"
    pod = f", pod {owner['pod']}" if owner.get("pod") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{pod}"
