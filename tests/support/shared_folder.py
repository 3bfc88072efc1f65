"""A folder that takes minutes to make, made once for all test processes."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def shared_folder(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name`, which `make` fills; another test process waits for it and takes the same.

    Whoever uses it must not write into it.
    """
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist gives every worker a folder of its own below that of the whole run.
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / name
    with (base / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".complete").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed half-way
            folder.mkdir()
            make(folder)
            (folder / ".complete").touch()
    return folder
