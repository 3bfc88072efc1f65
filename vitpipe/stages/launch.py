"""One process per GPU: restart a training stage under torchrun when the machine has several.

The engines call one command, `vitpipe run STAGE`; how many processes share it is a fact of the node.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from vitpipe.config.recipe import Recipe
from vitpipe.config.resolve import num_threads
from vitpipe.contracts.graph import all_stages
from vitpipe.contracts.processes import TIED_VARIABLE, die_with_ancestor, die_with_parent


def num_ranks_wanted(stage: str, asked: int | None) -> int:
    """Processes that should share a stage: as asked, else one per visible GPU for stages that use GPUs."""
    if asked is not None:
        return asked
    known = all_stages().get(stage)
    # The device file first: without a GPU nobody should pay for importing torch.
    if known is None or known.resources.gpus < 2 or not Path("/dev/nvidia0").exists():
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def share_the_cores() -> None:
    """Let waiting threads sleep instead of spin; must come before torch is imported.

    On cores that something else uses too, spinning at every small operator's barrier made a training step
    forty times slower; on idle cores sleeping costs next to nothing.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next step instead of returning it.

    glibc gives large blocks back to the system, which clears every page when it is asked for again: up to
    60,000 page faults, 2 to 5 % of a step of iTPN-B on a CPU. The peak stays the same. Does nothing with
    another C library.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # Blocks below 1 GiB come from the heap, whose end is never given back (glibc's malloc.h).
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 2**30)
    mallopt(m_trim_threshold, 2**31 - 1)


def choose_threads(recipe: Recipe) -> None:
    """Set torch's threads by `resolve.num_threads`, unless the user has; before torch is imported."""
    chosen = num_threads(recipe.model.entry.classifier_params)
    if chosen is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(chosen))


def under_torchrun() -> bool:
    """True in a process that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_starter() -> None:
    """End this process when torchrun dies that started it, or the DVC of `vitpipe repro`.

    After a `kill -9` of torchrun a rank would wait for ever; a stage that outlived `vitpipe repro` would hold
    its folders against the next one.
    """
    # Removed: a child of the stage, a loader process for example, is tied to the stage itself.
    if starter := os.environ.pop(TIED_VARIABLE, ""):
        die_with_ancestor(int(starter))
    if under_torchrun():
        die_with_parent(os.getppid())


def restart_under_torchrun(num_ranks: int) -> None:
    """Replace this process by torchrun with `num_ranks` copies of the same command. Does not return.

    torchrun forwards SIGTERM to its children, so a stage saves its state as it would alone.
    """
    # --standalone: a rendezvous on a free port of this machine, so that two stages can share a node.
    command = [sys.executable, "-m", "vitpipe.stages.ranks_launcher", "--standalone"]
    command += [f"--nproc-per-node={num_ranks}", "-m", "vitpipe", *sys.argv[1:]]
    # exec, not a child: the engine's signals and the exit code belong to torchrun then.
    os.execv(sys.executable, command)
