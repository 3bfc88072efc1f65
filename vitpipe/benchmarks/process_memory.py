"""The peak memory of this process, as the kernel counts it."""

from __future__ import annotations

import re
from pathlib import Path


def peak_resident_mb() -> float:
    """Largest resident size since the program was started, in MB (10^6 bytes).

    From the kernel's `VmHWM`: `getrusage` would count what the starting process had before it, too.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found, "Linux has had this line since 2006"
    return int(found.group(1)) * 1024 / 1e6
