"""Processes that share one training: torchrun starts them, this module lets them agree.

One process alone never initialises anything, so a laptop run has no moving parts.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitpipe.config.resolve import Accelerator
from vitpipe.data.batches import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `num_ranks`; rank 0 is the one that writes and speaks."""

    rank: int = 0
    num_ranks: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on the rank that writes."""
        return self.rank == 0

    @property
    def accelerator(self) -> Accelerator:
        """What `train_plan` wants to know about the device."""
        if self.device.type == "cpu":
            return Accelerator()
        return Accelerator("cuda", torch.cuda.is_bf16_supported(including_emulation=False))

    def here(self, batch: Batch) -> Batch:
        """The batch on this rank's device."""
        return batch._replace(
            images_BCHW=batch.images_BCHW.to(self.device, non_blocking=True),
            labels_B=batch.labels_B.to(self.device, non_blocking=True),
        )

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over all ranks; the module itself when alone."""
        if self.num_ranks == 1:
            return module
        devices = None if self.device.type == "cpu" else [self.device]
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)

    def sharing(self, wrapped: nn.Module, share: bool) -> AbstractContextManager[None]:
        """Context for forward and backward of one micro-batch: exchange gradients only if `share`."""
        if isinstance(wrapped, DistributedDataParallel) and not share:
            return wrapped.no_sync()
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks; every rank gets the result, on the values' own device."""
        if self.num_ranks == 1:
            return values
        shared = values.to(self.device, copy=True)
        dist.all_reduce(shared)
        return shared.to(values.device)

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Sum each of some numbers over all ranks, in float64."""
        return list(self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist())

    def from_main(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.num_ranks == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


@contextmanager
def joined(rank: int, num_ranks: int, device: str) -> Iterator[Ranks]:
    """Join the other ranks for the time of the context: NCCL on GPUs, gloo on CPUs.

    The meeting point comes from torchrun's environment. Does nothing for one rank, and leaves a group
    that somebody else has opened alone.
    """
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if num_ranks == 1 or dist.is_initialized():
        yield Ranks(rank, num_ranks, place)
        return
    on_gpu = place.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=place if on_gpu else None)
    try:
        yield Ranks(rank, num_ranks, place)
    except BaseException as error:
        _let_go_of_wrappers(error)
        raise
    finally:
        gc.collect()
        dist.destroy_process_group()


def _let_go_of_wrappers(error: BaseException) -> None:
    """Empty the frames that an error keeps alive, and with them DDP modules.

    A DDP module that outlives the process group takes it down while it holds the interpreter's lock, for
    which a gloo thread may be waiting: now and then a rank would hang at its exit for ever.
    """
    traceback.clear_frames(error.__traceback__)
