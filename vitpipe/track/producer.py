"""The process that writes an outbox: its identity, and whether it is alive."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

# Processes of another machine or pod cannot be looked up. Its heartbeat is renewed every 30 s (uploader.py)
# and while the stage logs; after six missed heartbeats the process counts as dead.
STALE_SECONDS = 180.0


class Producer(BaseModel):
    """A process, distinguished from any other one with the same process ID, earlier or on another machine.

    Attributes:
        host: name of the machine or pod.
        kernel: boot ID of the kernel and the PID namespace; empty where there is no /proc.
        pid: process ID in that namespace.
        started: start of the process in clock ticks since boot; empty where there is no /proc.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    kernel: str
    pid: int
    started: str

    @classmethod
    def of_this_process(cls) -> Producer:
        """The identity of the calling process."""
        pid = os.getpid()
        return cls(host=socket.gethostname(), kernel=_kernel(), pid=pid, started=_start_ticks(pid) or "")

    def may_be_alive(self, last_change: float) -> bool:
        """Whether the process is alive, as far as this process can tell.

        Args:
            last_change: latest modification time of its outbox (seconds since the epoch).
        """
        # The same host name does not suffice: containers on one machine have PID namespaces of their own,
        # where the same PID is another process, and after a reboot PIDs start anew.
        if (self.host, self.kernel) != (socket.gethostname(), _kernel()):
            return changed_recently(last_change)
        # A PID is reused after its process has ended; the start time tells the two apart.
        return _start_ticks(self.pid) == self.started


def changed_recently(last_change: float) -> bool:
    """Whether `last_change` (seconds since the epoch) is recent enough for a live process."""
    return time.time() - last_change < STALE_SECONDS


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_ticks(pid: int) -> str | None:
    """Start of a process in clock ticks since boot; empty where that is unknown, None when it is dead."""
    try:
        # proc(5): the second field of /proc/PID/stat, the program's name in parentheses, may itself hold
        # spaces and parentheses. Behind the last ")" follow the state (field 3, index 0) and the start time
        # (field 22, index 19).
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _without_proc(pid)
    except (ProcessLookupError, PermissionError):
        return None
    # A zombie (Z) or dead process (X) still has an entry, but no longer runs.
    return None if fields[0] in "ZX" else fields[19]


def _without_proc(pid: int) -> str | None:
    """As `_start_ticks` on systems without /proc, such as macOS."""
    try:
        os.kill(pid, 0)  # signal 0 only checks whether the process exists
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it exists and belongs to another user
    return ""
