"""One process per GPU: restart a training stage under torchrun when the machine has several.

The engines call one command, `vitpipe run STAGE`; how many processes share it is a fact of the node.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vitpipe.config.recipe import Recipe
from vitpipe.config.resolve import num_threads
from vitpipe.contracts.graph import BY_NAME
from vitpipe.contracts.processes import die_with_parent
from vitpipe.models.registry import find_model


def num_ranks_wanted(stage: str, asked: int | None) -> int:
    """Processes that should share a stage: as asked, else one per visible GPU for stages that use GPUs."""
    if asked is not None:
        return asked
    known = BY_NAME.get(stage)
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


def choose_threads(recipe: Recipe) -> None:
    """Set torch's threads by `resolve.num_threads`, unless the user has; before torch is imported."""
    chosen = num_threads(find_model(recipe.model.name).classifier_params)
    if chosen is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(chosen))


def under_torchrun() -> bool:
    """True in a process that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def die_with_torchrun() -> None:
    """End this rank when the torchrun that started it dies; after a `kill -9` it would wait for ever."""
    if under_torchrun():
        die_with_parent(os.getppid())


def restart_under_torchrun(num_ranks: int) -> None:
    """Replace this process by torchrun with `num_ranks` copies of the same command. Does not return.

    torchrun forwards SIGTERM to its children, so a stage saves its state as it would alone.
    """
    # --standalone: a rendezvous on a free port of this machine, so that two stages can share a node.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_ranks}", "-m", "vitpipe", *sys.argv[1:]]
    # exec, not a child: the engine's signals and the exit code belong to torchrun then.
    os.execv(sys.executable, command)
