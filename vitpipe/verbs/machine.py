"""Check this machine: disk, memory, cores, GPU, git, MLflow, Docker, versions against the lock."""

from __future__ import annotations

import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from vitpipe.config.read import ARTIFACTS
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import CARD
from vitpipe.contracts.units import format_bytes
from vitpipe.prepare.findings import Finding
from vitpipe.verbs.machine_probes import Answer, ask_all, examine_docker, examine_git, examine_gpus
from vitpipe.verbs.mlflow_probe import examine_mlflow

_GIB = 2**30
_LIBRARIES = ("torch", "torchvision", "timm")
# OpenMMLab's libraries: only the stages detect and segment need them, and the `train` image does not have
# them.
_OPTIONAL_LIBRARIES = ("onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation")
# Loader processes pass batches through shared memory. Docker's default is 64 MiB; one batch of 64 images of
# 224 x 224 pixels in float32 has 37 MiB.
_MIN_SHARED_BYTES, _MIN_DISK_BYTES, _MIN_MEMORY_BYTES = 1 * _GIB, 10 * _GIB, 4 * _GIB


def examine_machine(
    folder: Path, recipe: Recipe | None = None, run: Path = ARTIFACTS
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """One row (`what`, `value`) per fact, and the findings that need a fix. Takes `PROBE_SECONDS` at most.

    Args:
        folder: where runs are started.
        recipe: whose prepared data need room on the disk.
        run: where its stages lie, below `folder`.
    """
    answers = ask_all(
        {
            "free disk": lambda: _examine_disk(folder, recipe, folder / run),
            "shared memory": _examine_shared_memory,
            "memory": _examine_memory,
            # Cores that this process may use: a container or taskset may allow fewer than the machine has.
            "cores": lambda: (str(len(os.sched_getaffinity(0))), []),
            "GPU": examine_gpus,
            "git": examine_git,
            "MLflow": lambda: examine_mlflow(folder),
            "Docker": examine_docker,
        }
    )
    rows: list[dict[str, Any]] = [{"what": name, "value": value} for name, (value, _) in answers.items()]
    findings = [finding for _, found in answers.values() for finding in found]
    _compare_libraries(rows, findings)
    return rows, findings


def _examine_disk(folder: Path, recipe: Recipe | None, run: Path) -> Answer:
    """Free space where outputs go, beside what the recipe's prepared data take."""
    # `artifacts` may be a link to another disk.
    outputs = folder / ARTIFACTS
    place = outputs if outputs.is_dir() else folder
    free = shutil.disk_usage(place).free
    value, needed = f"{format_bytes(free)} in {place}", 0
    # At its peak, while `prepare` runs; what it has prepared is on the disk already.
    if recipe is not None and not (run / "prepare" / CARD).is_file():
        from vitpipe.prepare.packing_cost import packing_cost

        needed = sum(cost.disk_bytes for cost in packing_cost(recipe.data))
    if needed and recipe is not None:
        value += f"; the data of {recipe.name} ({recipe.profile}) need {format_bytes(needed)}"
    fix = "free some space, or make `artifacts` a link to a folder on a larger disk"
    if needed > free:
        what = f"The prepared data need {format_bytes(needed)}, of which {format_bytes(free)} are free"
        return value, [
            Finding("error", what, str(place), f"{fix}; `vitpipe plan` shows the need of each set")
        ]
    if free < _MIN_DISK_BYTES:
        what = f"Only {format_bytes(free)} of disk space are free"
        return value, [Finding("warning", what, str(place), fix)]
    return value, []


def _examine_shared_memory() -> Answer:
    folder = Path("/dev/shm")
    size = shutil.disk_usage(folder).total if folder.is_dir() else 0
    value = format_bytes(size, binary=True)
    if size >= _MIN_SHARED_BYTES:
        return value, []
    what = f"There are only {value} of shared memory"
    fix = "start the container with --shm-size=2g, or set data.workers to 0"
    return value, [Finding("warning", what, str(folder), fix)]


def _examine_memory() -> Answer:
    # The memory of the node, which a container's limit may be below.
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    value = format_bytes(size, binary=True)
    if size >= _MIN_MEMORY_BYTES:
        return value, []
    fix = "use a smaller batch, and set data.workers to 0"
    return value, [Finding("warning", f"There are only {value} of memory", fix=fix)]


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
