"""What a pod of a pipeline has: volumes, shared memory, GPUs, and the code that its package promises."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import VitpipeError, reason_of
from vitpipe.contracts.units import counted, format_bytes
from vitpipe.prepare.findings import Finding
from vitpipe.stages.executor import refuse_other_code
from vitpipe.verbs.machine_probes import Answer

_PROBE_BYTES = 2**20
_SHM = Path("/dev/shm")
# A volume of 8 GiB has a little less: the kernel rounds to pages.
_SHM_SHARE = 0.98


def examine_writable(folder: Path) -> Answer:
    """Write, sync, rename and remove a file, as saved states are."""
    probe = folder / f".vitpipe-probe-{uuid.uuid4().hex[:8]}"
    try:
        with probe.open("wb") as handle:
            handle.write(b"\0" * _PROBE_BYTES)
            handle.flush()
            os.fsync(handle.fileno())
        probe = probe.replace(probe.with_suffix(".renamed"))
        size = os.statvfs(folder)
    except OSError as error:
        fix = "mount the claim there with ReadWriteMany, writable by the pod's user (`user` of the placement)"
        return "not writable", [
            _error(f"The volume cannot be written ({reason_of(error)})", str(folder), fix)
        ]
    finally:
        with suppress(OSError):
            probe.unlink()
    return f"writable, {format_bytes(size.f_bavail * size.f_frsize, binary=True)} free", []


def examine_readable(folder: Path) -> Answer:
    """List a volume that holds something."""
    try:
        number = len(list(folder.iterdir()))
    except OSError as error:
        fix = "mount the claim there, readable by the pod's user (`user` of the placement)"
        return "not readable", [_error(f"The volume cannot be read ({reason_of(error)})", str(folder), fix)]
    if number == 0:
        return "empty", [_error("The volume is empty", str(folder), "mount the claim that holds the sets")]
    return counted(number, "entry", "entries"), []


def examine_shm(gib: float) -> Answer:
    """The size of /dev/shm, through which loader processes hand over their batches."""
    try:
        size = os.statvfs(_SHM)
    except OSError as error:
        return "none", [_error(f"There is no /dev/shm ({reason_of(error)})", str(_SHM), "mount one")]
    held = size.f_blocks * size.f_frsize
    said = format_bytes(held, binary=True)
    if held < gib * 2**30 * _SHM_SHARE:
        what = f"/dev/shm holds {said}, not {gib:g} GiB: loader processes would die of a bus error"
        return said, [_error(what, str(_SHM), "keep the memory-backed volume of the package")]
    return said, []


def examine_torch_gpus(number: int) -> Answer:
    """Compute on each GPU; the driver may be too old for this torch."""
    import torch

    built = torch.version.cuda or "no CUDA"
    try:
        found = torch.cuda.device_count()
        names = [torch.cuda.get_device_name(i) for i in range(found)]
        for i in range(found):
            ones = torch.ones(64, 64, device=f"cuda:{i}")
            if float((ones @ ones).sum()) != 64.0**3:
                raise RuntimeError(f"GPU {i} computes wrong sums")
    except (RuntimeError, AssertionError) as error:
        what = f"The GPUs cannot be used ({reason_of(error)}); torch is built for {built}"
        return "not usable", [_error(what, "nvidia-smi", "install a driver that has this CUDA version")]
    if found < number:
        what = f"torch sees {counted(found, 'GPU')}, not {number}; it is built for {built}"
        fix = "check the driver on the node, and gpu_resource and pools of the placement"
        return counted(found, "GPU"), [_error(what, "nvidia-smi", fix)]
    return f"{', '.join(names)}, CUDA {built}", []


def examine_code(recipe: Recipe, promised: Mapping[str, str]) -> Answer:
    """Compare this image's code with the digests that the package was compiled with.

    Args:
        promised: stage -> digest of its code, of the stages that run in this image.
    """
    return f"{counted(len(promised), 'stage')} compared", list(_other_code(recipe, promised))


def _other_code(recipe: Recipe, promised: Mapping[str, str]) -> Iterator[Finding]:
    for stage, digest in promised.items():
        try:
            refuse_other_code(recipe, stage, digest)
        except VitpipeError as error:
            yield Finding.of(error)


def _error(what: str, where: str, fix: str) -> Finding:
    return Finding("error", what, where, fix)
