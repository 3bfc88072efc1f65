"""The process that fills an outbox: who it is, and whether it still lives."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

# On another machine nobody can look a process up: what did not change for so long belongs to a dead one.
SILENT_SECONDS = 180.0


class Producer(BaseModel):
    """A process, told apart from every other one that had its number before or has it elsewhere.

    Attributes:
        host: name of the machine, or of the pod.
        kernel: boot of the kernel and the namespace of process numbers; empty where there is no /proc.
        pid: process number there.
        started: when the process started, in the kernel's ticks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    kernel: str
    pid: int
    started: str

    @classmethod
    def of_this_process(cls) -> Producer:
        """Who we are."""
        pid = os.getpid()
        return cls(host=socket.gethostname(), kernel=_kernel(), pid=pid, started=_started(pid) or "")

    def may_live(self, last_change: float) -> bool:
        """Whether the process lives, as far as can be known from here.

        Args:
            last_change: when something in its outbox changed last (seconds since the epoch).
        """
        if (self.host, self.kernel) != (socket.gethostname(), _kernel()):
            return changed_lately(last_change)
        return _started(self.pid) == self.started


def changed_lately(last_change: float) -> bool:
    """Whether so little time has passed since a change that a process may stand behind it."""
    return time.time() - last_change < SILENT_SECONDS


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Start of a process in ticks since boot, empty where that is unknown; None when it has died."""
    try:
        # The name of the program, in parentheses, may hold spaces and parentheses.
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _without_proc(pid)
    except (ProcessLookupError, PermissionError):
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie works no more


def _without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
