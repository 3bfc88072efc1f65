"""The machine as this process may use it: processor, cores and memory, with the limits of its container."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# Where a container sees its own control group, in version 2 (one folder) and in version 1 (one per resource).
_GROUP = Path("/sys/fs/cgroup")


def hardware() -> dict[str, str | int | float]:
    """Processor, and the cores and the memory in GiB that this process may use."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0))
    # Not the node's: a pod with 4 GiB that names 680 GiB in its card explains nothing.
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "num_cores": min(cores, cpu_limit(_GROUP) or cores),
        "memory_gib": round(min(machine, memory_limit(_GROUP) or machine) / 2**30, 1),
    }


def memory_limit(group: Path) -> int | None:
    """Bytes that a control group may use, `None` without a limit."""
    # Version 1 writes a number near 2**63 for "no limit"; `hardware` takes the machine's memory then.
    return _number(group / "memory.max", 0) or _number(group / "memory/memory.limit_in_bytes", 0)


def cpu_limit(group: Path) -> int | float | None:
    """Cores that a control group may use, such as 1.5, `None` without a limit."""
    quota, period = _number(group / "cpu.max", 0), _number(group / "cpu.max", 1)
    if quota is None:
        quota, period = (
            _number(group / "cpu/cpu.cfs_quota_us", 0),
            _number(group / "cpu/cpu.cfs_period_us", 0),
        )
    if quota is None or not period or quota < 0:  # -1: no limit, in version 1
        return None
    cores = round(quota / period, 2)
    return int(cores) if cores == int(cores) else cores


def _number(file: Path, word: int) -> int | None:
    """A whole number of a file, `None` where there is none (`max`, or no such file)."""
    try:
        return int(file.read_text(encoding="ascii").split()[word])
    except (OSError, ValueError, IndexError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
