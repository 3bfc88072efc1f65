"""One process per GPU: restart a training stage under torchrun when the machine, or the job, has several.

The engines call one command, `vitpipe run STAGE`; how many processes share it is a fact of the node. On a
node of a Kubeflow TrainJob it stands in the variables that Trainer's torch plugin sets there:

    PET_NNODES, PET_NPROC_PER_NODE     nodes of the job, processes on each
    PET_NODE_RANK                      this node among them
    PET_MASTER_ADDR, PET_MASTER_PORT   where node 0 is found
    PET_MAX_RESTARTS                   torchrun's own: how often all ranks start again after one has died

A rank that dies (a kill, a lost GPU, a lost peer) does not end the run: torchrun starts all ranks of all
nodes again, and they resume from the saved state. A rank that has said what is wrong is not started again.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from vitpipe.config.recipe import Recipe
from vitpipe.config.resolve import num_threads
from vitpipe.contracts.graph import all_stages
from vitpipe.contracts.processes import TIED_VARIABLE, die_with_ancestor, die_with_parent

# How often the ranks start again unless PET_MAX_RESTARTS says otherwise. A lasting cause is met four times.
DEFAULT_RESTARTS = 3
NUM_NODES, RANKS_PER_NODE, NODE_RANK = "PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK"
MASTER_ADDRESS, MASTER_PORT, MAX_RESTARTS = "PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_MAX_RESTARTS"
# In the file that a rank leaves for torchrun.
SAID = "vitpipe_has_said_it"
# Nodes of one job start minutes apart: an autoscaler makes them, then each pulls the image.
_JOIN_SECONDS, _STORE_SECONDS = 1800, 900


def num_ranks_wanted(stage: str, asked: int | None) -> int:
    """Processes that should share a stage, on all nodes of its job.

    As asked; else as the TrainJob says that this process belongs to; else one per visible GPU for stages that
    use GPUs.
    """
    if asked is not None:
        return asked
    if in_train_job():
        per_node = os.environ.get(RANKS_PER_NODE, "1")
        # `auto` and the like are torchrun's to resolve, where there is a second rank or not.
        return int(os.environ[NUM_NODES]) * (int(per_node) if per_node.isdigit() else 2)
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


def in_train_job() -> bool:
    """True on a node of a Kubeflow TrainJob, unless torchrun has started this process already."""
    return os.environ.get(NUM_NODES, "").isdigit() and not under_torchrun()


def restart_under_torchrun(num_ranks: int, asked: int | None = None) -> None:
    """Replace this process by torchrun with copies of the same command. Does not return.

    torchrun forwards SIGTERM to its children, so a stage saves its state as it would alone.

    Args:
        num_ranks: as `num_ranks_wanted`.
        asked: the number that the command line asks for, on this machine whatever job it belongs to.
    """
    command = [sys.executable, "-m", "vitpipe.stages.ranks_launcher"]
    if in_train_job() and asked is None:
        command += node_options(os.environ)
        for name in (NODE_RANK, MASTER_ADDRESS, MASTER_PORT):
            os.environ.pop(name, None)  # torchrun would warn that its rendezvous does not use them
    else:
        # --standalone: a rendezvous on a free port of this machine, so that two stages can share a node.
        command += ["--standalone", "--nnodes=1", f"--nproc-per-node={num_ranks}"]
    # A store of their own for the ranks of every start. In the one that torchrun keeps they find the
    # addresses of those that have died, and connect to nobody (seen with gloo).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if MAX_RESTARTS not in os.environ:
        command.append(f"--max-restarts={DEFAULT_RESTARTS}")
    # exec, not a child: the engine's signals and the exit code belong to torchrun then.
    os.execv(sys.executable, [*command, "-m", "vitpipe", *sys.argv[1:]])


def node_options(variables: Mapping[str, str]) -> list[str]:
    """torchrun's options on a node of a TrainJob; it reads the numbers of nodes and processes by itself.

    Not its static rendezvous, which the variables are meant for: there the other nodes do not learn that one
    has started its ranks again, and wait for the dead ones.

    Args:
        variables: those of the module's docstring.
    """
    is_first = variables.get(NODE_RANK, "0") == "0"
    address = variables.get(MASTER_ADDRESS, "127.0.0.1")
    # Ranks go to nodes in the order of their addresses. Node 0's is the first, `JOB-node-0-0` on a cluster,
    # so rank 0, which writes and says everything, is on the node whose log the launcher shows.
    own = address if is_first else socket.gethostname()
    return [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={address}:{variables.get(MASTER_PORT, '29500')}",
        "--rdzv-id=vitpipe",
        f"--rdzv-conf=is_host={int(is_first)},join_timeout={_JOIN_SECONDS},read_timeout={_STORE_SECONDS}",
        f"--local-addr={own}",
    ]


def tell_torchrun(error: Exception) -> None:
    """Say that this rank has ended for a reason that starting again does not change.

    torchrun passes every rank the name of such a file; `ranks_launcher` looks for it.
    """
    if under_torchrun() and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        # A disk that is full does not hide the error itself.
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": str(error), SAID: True}), encoding="utf-8")
