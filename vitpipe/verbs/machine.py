"""Is this machine fit for a run? Disk, shared memory, cores, memory, and libraries as the lock has them."""

from __future__ import annotations

import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from vitpipe.prepare.findings import Finding

_GIB = 2**30
_LIBRARIES = ("torch", "torchvision", "timm")
# OpenMMLab's libraries; only the dense stages need them, and the image of the others leaves them out.
_OPTIONAL_LIBRARIES = ("onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation")
# Loader processes hand batches over in shared memory; Docker's default of 64 MiB holds no batch.
_MIN_SHARED_GIB, _MIN_DISK_GIB, _MIN_MEMORY_GIB = 1, 10, 4


def examine_machine(folder: Path) -> tuple[list[dict[str, Any]], list[Finding]]:
    """One row (`what`, `value`) per fact, and what is to be fixed.

    Args:
        folder: where runs will write.
    """
    disk = shutil.disk_usage(folder).free / _GIB
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    shared_memory = Path("/dev/shm")
    shared = shutil.disk_usage(shared_memory).total / _GIB if shared_memory.is_dir() else 0.0
    rows: list[dict[str, Any]] = [
        {"what": "free disk", "value": f"{disk:.1f} GiB"},
        {"what": "shared memory", "value": f"{shared:.2f} GiB"},
        {"what": "memory", "value": f"{memory:.1f} GiB"},
        {"what": "cores", "value": len(os.sched_getaffinity(0))},
    ]
    findings = []
    if disk < _MIN_DISK_GIB:
        what = f"{disk:.1f} GiB of disk are free"
        findings.append(Finding("warning", what, str(folder), "free some, or choose another --out folder"))
    if shared < _MIN_SHARED_GIB:
        what = f"There are {shared:.2f} GiB of shared memory"
        fix = "start the container with --shm-size=2g, or set data.workers to 0"
        findings.append(Finding("warning", what, str(shared_memory), fix))
    if memory < _MIN_MEMORY_GIB:
        fix = "use a smaller batch and data.workers 0"
        findings.append(Finding("warning", f"There are {memory:.1f} GiB of memory", fix=fix))
    _compare_libraries(rows, findings)
    return rows, findings


def locked_versions() -> dict[str, str]:
    """Package -> version that the checkout's lock has for this Python; empty where there is no lock."""
    lock = Path(__file__).parents[2] / "requirements.lock"
    if not lock.is_file():
        return {}
    lines = re.finditer(r"^[A-Za-z0-9].*?(?= \\)", lock.read_text(encoding="utf-8"), re.MULTILINE)
    pins = (Requirement(line[0]) for line in lines)
    return {
        pin.name.lower(): next(iter(pin.specifier)).version
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def _compare_libraries(rows: list[dict[str, Any]], findings: list[Finding]) -> None:
    locked = locked_versions()
    for name in (*_LIBRARIES, *_OPTIONAL_LIBRARIES):
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = ""
        rows.append({"what": name, "value": installed or "absent"})
        if not installed and name in _OPTIONAL_LIBRARIES:
            continue
        # 2.13.0+cpu is a build of 2.13.0.
        if name in locked and installed.partition("+")[0] != locked[name].partition("+")[0]:
            what = f"{name} is {installed or 'absent'}, the lock has {locked[name]}"
            fix = "install from requirements.lock: results and golden values hold for its versions"
            findings.append(Finding("warning" if installed else "error", what, fix=fix))
