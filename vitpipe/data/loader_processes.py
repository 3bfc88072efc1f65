"""The processes of a DataLoader: how they begin, and what is said when one of them ends.

Left alone, a worker that cannot hand over a batch drops it, and the trainer waits for ever.
"""

from __future__ import annotations

import multiprocessing.queues
import os
import re
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import parent_process
from typing import Any, NoReturn

from vitpipe.contracts.errors import RunError, StorageError
from vitpipe.contracts.processes import die_with_parent

# Exit code of a worker without shared memory for its batch; EX_IOERR of sysexits.h.
_NO_SHARED_MEMORY = 74
_ENDED = (
    r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) "
    r"(?:is killed by signal: (?P<signal>[^.]+)|exited unexpectedly(?: with exit code (?P<code>\d+))?)"
)
_WITHOUT_WORKERS = "data.workers=0 loads in the trainer itself"


def begin_worker(worker: int) -> None:
    """Move a loader process to a process group of its own (`worker_init_fn` of a DataLoader)."""
    # A scheduler or Ctrl-C signals the whole group. The trainer finishes its step and saves; a worker that
    # was killed meanwhile would make DataLoader raise before that.
    os.setpgid(0, 0)
    # A `kill -9` of the trainer's group no longer reaches this process. It would wait for ever, with half a
    # gigabyte of memory, so the kernel ends it with its parent.
    trainer = parent_process()
    if trainer is not None and trainer.pid is not None:
        die_with_parent(trainer.pid)
    # Batches travel through a queue, whose thread prints an error and drops the batch. This hook is how the
    # standard library's own pools learn of it; DataLoader does not use it.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, batch: Any) -> None:
    # torch's words for /dev/shm that is full and for a file beyond a limit.
    if re.search(r"unable to (allocate|resize|open|write|mmap)|No space left|File too large", str(error)):
        os._exit(_NO_SHARED_MEMORY)
    traceback.print_exception(error)
    os._exit(1)


@contextmanager
def loader_errors() -> Iterator[None]:
    """Turn the end of a loader process into a message. DataLoader raises it anywhere, from a signal handler.

    Raises:
        StorageError: a batch found no room in shared memory.
        RunError: a process was killed, most often because memory was short.
    """
    try:
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            _explain(error)
    except RuntimeError as error:
        # The signal handler may raise while the broken connection, which was noticed first, is explained.
        _explain(error)


def _explain(error: Exception) -> NoReturn:
    """Raise the error in words if it is about a loader process, else as it is."""
    # torch has no class of its own for this. Where the process ends while a batch is fetched from it, the
    # connection breaks first.
    # The cause, where there is one, says how it ended.
    said = re.search(_ENDED, str(error.__cause__)) or re.search(_ENDED, str(error))
    if said is None and not _is_handing_over(error):
        raise error
    # The run is over. torch's handler would raise again for every other worker that ends now, up to the exit
    # of the interpreter. Only the main thread may change it, and only there does it raise.
    with suppress(ValueError):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    by, code = (said["signal"], said["code"]) if said else ("", "")
    if code == str(_NO_SHARED_MEMORY) or by == "Bus error":
        raise StorageError(
            "A loader process found no shared memory for a batch",
            where="/dev/shm",
            fix="enlarge it (docker run --shm-size=8g; in Kubernetes a volume of medium Memory), raise a "
            f"limit on the size of files (`ulimit -f`), or take smaller batches; {_WITHOUT_WORKERS}",
        ) from error
    how = f"was killed by a signal ({by})" if by else "ended"
    raise RunError(
        f"A loader process {how} before its work was done",
        where="data.workers",
        fix="if memory was short (`dmesg` names killed processes), take fewer workers or smaller "
        "batches; the same command goes on from the saved state; " + _WITHOUT_WORKERS,
    ) from error


def _is_handing_over(error: BaseException) -> bool:
    """Whether an error comes from the part of torch that fetches a tensor from another process."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename.endswith("torch/multiprocessing/reductions.py") for frame in frames)
