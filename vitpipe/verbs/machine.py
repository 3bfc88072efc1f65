"""Check this machine: disk, shared memory, memory, CPU cores, and library versions against the lock."""

from __future__ import annotations

import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from vitpipe.contracts.units import format_bytes
from vitpipe.prepare.findings import Finding

_GIB = 2**30
_LIBRARIES = ("torch", "torchvision", "timm")
# OpenMMLab's libraries: only the stages detect and segment need them, and the `train` image does not have
# them.
_OPTIONAL_LIBRARIES = ("onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation")
# Loader processes pass batches through shared memory. Docker's default is 64 MiB; one batch of 64 images of
# 224 x 224 pixels in float32 has 37 MiB.
_MIN_SHARED_BYTES, _MIN_DISK_BYTES, _MIN_MEMORY_BYTES = 1 * _GIB, 10 * _GIB, 4 * _GIB


def examine_machine(folder: Path) -> tuple[list[dict[str, Any]], list[Finding]]:
    """One row (`what`, `value`) per fact, and the findings that need a fix.

    Args:
        folder: where runs will write.
    """
    disk = shutil.disk_usage(folder).free
    # The memory of the node, which a container's limit may be below.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shared_memory = Path("/dev/shm")
    shared = shutil.disk_usage(shared_memory).total if shared_memory.is_dir() else 0
    rows: list[dict[str, Any]] = [
        {"what": "free disk", "value": format_bytes(disk)},
        {"what": "shared memory", "value": format_bytes(shared, binary=True)},
        {"what": "memory", "value": format_bytes(memory, binary=True)},
        # Cores that this process may use: a container or taskset may allow fewer than the machine has.
        {"what": "cores", "value": len(os.sched_getaffinity(0))},
    ]
    findings = []
    if disk < _MIN_DISK_BYTES:
        what = f"Only {format_bytes(disk)} of disk space are free"
        fix = "free some space, or choose another --out folder"
        findings.append(Finding("warning", what, str(folder), fix))
    if shared < _MIN_SHARED_BYTES:
        what = f"There are only {format_bytes(shared, binary=True)} of shared memory"
        fix = "start the container with --shm-size=2g, or set data.workers to 0"
        findings.append(Finding("warning", what, str(shared_memory), fix))
    if memory < _MIN_MEMORY_BYTES:
        what = f"There are only {format_bytes(memory, binary=True)} of memory"
        findings.append(Finding("warning", what, fix="use a smaller batch, and set data.workers to 0"))
    _compare_libraries(rows, findings)
    return rows, findings


def locked_versions() -> dict[str, str]:
    """Package -> version in the checkout's lock for this Python; empty where there is no lock."""
    # There is none where vitpipe is installed as a wheel.
    lock = Path(__file__).parents[2] / "requirements.lock"
    if not lock.is_file():
        return {}
    # `name==version ; marker \` and hashes on the following lines. A package is listed twice where Pythons
    # need different versions; its marker tells which one holds here.
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
        # 2.13.0+cpu is a build of 2.13.0: local version labels (PEP 440) are ignored.
        if name in locked and installed.partition("+")[0] != locked[name].partition("+")[0]:
            what = f"{name} has version {installed}" if installed else f"{name} is not installed"
            what += f", requirements.lock has {locked[name]}"
            fix = "install from requirements.lock: results and golden values are those of its versions"
            findings.append(Finding("warning" if installed else "error", what, fix=fix))
