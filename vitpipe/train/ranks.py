"""Distributed data parallel training: this process among those that torchrun started.

With one process nothing is initialised, and every exchange is the identity.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vitpipe.config.resolve import Accelerator

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `num_ranks`; only rank 0 writes files and logs."""

    rank: int = 0
    num_ranks: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    @property
    def accelerator(self) -> Accelerator:
        """The properties of the device from which `train_plan` chooses the precision."""
        if self.device.type == "cpu":
            return Accelerator()
        # By default torch reports bf16 on GPUs that only emulate it, too.
        return Accelerator("cuda", torch.cuda.is_bf16_supported(including_emulation=False))

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module in DDP, which averages gradients over all ranks; the module itself for one rank."""
        if self.num_ranks == 1:
            return module
        devices = None if self.device.type == "cpu" else [self.device]
        # Gradients are views of the communication buckets: saves a copy of all gradients in memory.
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)

    def gradient_sync(self, wrapped: nn.Module, sync: bool) -> AbstractContextManager[None]:
        """Context for forward and backward of one micro-batch: all-reduce the gradients only if `sync`."""
        if isinstance(wrapped, DistributedDataParallel) and not sync:
            return wrapped.no_sync()
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks; every rank gets the result, on the device of `values`."""
        if self.num_ranks == 1:
            return values
        # NCCL reduces GPU tensors only. A copy, because all_reduce works in place.
        shared = values.to(self.device, copy=True)
        dist.all_reduce(shared)
        return shared.to(values.device)

    def gather(self, values: Tensor) -> Tensor:
        """The tensors of all ranks, equal in shape, in their order: (num_ranks, ...) on every rank."""
        if self.num_ranks == 1:
            return values.unsqueeze(0)
        shared = values.to(self.device).contiguous()
        found = [torch.empty_like(shared) for _ in range(self.num_ranks)]
        dist.all_gather(found, shared)
        return torch.stack(found).to(values.device)

    def gather_rows(self, rows: list[T]) -> list[T]:
        """Rows of any type that can be pickled, of all ranks in their order, on every rank."""
        if self.num_ranks == 1:
            return rows
        shares: list[list[T]] = [[] for _ in range(self.num_ranks)]
        # Ranks have different numbers of rows: they are gathered as pickled objects, not as tensors.
        dist.all_gather_object(shares, rows)
        return list(chain.from_iterable(shares))

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Element-wise sum of numbers over all ranks, in float64."""
        return list(self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist())

    def share_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors of every rank, on its device, by rank 0's."""
        for tensor in tensors if self.num_ranks > 1 else ():
            dist.broadcast(tensor, src=0)

    def from_main(self, value: T) -> T:
        """Rank 0's value, of any type that can be pickled, on every rank."""
        if self.num_ranks == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


@contextmanager
def joined(rank: int, num_ranks: int, device: str) -> Iterator[Ranks]:
    """The process group of all ranks for the time of the context: NCCL on GPUs, gloo on CPUs.

    The address of the rendezvous comes from torchrun's environment (MASTER_ADDR, MASTER_PORT). Does nothing
    for one rank. A group that exists already is used and not destroyed.

    Args:
        rank: of this process.
        num_ranks: of the run.
        device: `cpu`, `cuda:0`, ...
    """
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if num_ranks == 1 or dist.is_initialized():
        yield Ranks(rank, num_ranks, place)
        return
    on_gpu = place.type == "cuda"
    # With `device_id` NCCL connects now; else it would guess the device at the first exchange.
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=place if on_gpu else None)
    try:
        yield Ranks(rank, num_ranks, place)
    except BaseException as error:
        # The error's traceback keeps local variables alive, and with them DDP modules.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # DDP modules must be freed before the group. The last reference to the group would otherwise be
        # dropped by a DDP module while it holds the interpreter's lock, for which a gloo thread may be
        # waiting: now and then a rank hung at its exit for ever. They are in reference cycles, hence gc.
        gc.collect()
        dist.destroy_process_group()
