"""The peak memory of this process, as counted by the kernel."""

from __future__ import annotations

import re
from pathlib import Path


def peak_resident_mb() -> float:
    """Largest resident size of this process since its start, in MB (10^6 bytes). Linux only."""
    # VmHWM starts at 0 with the new program. getrusage's ru_maxrss survives exec, so it would include the
    # memory of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found, "/proc/self/status has no line VmHWM"
    return int(found.group(1)) * 1024 / 1e6  # the kernel's kB are KiB
