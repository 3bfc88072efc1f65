"""A masked pre-training step by one process or by two under DistributedDataParallel.

Child processes import this module, so what they need is here and not in a test.
"""

from __future__ import annotations

import multiprocessing
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from vitpipe.models.masking import patchify
from vitpipe.models.revcolv2.columns import RevColV2Shape
from vitpipe.models.revcolv2.revcolv2 import RevColV2, RevColV2Pretrainer

SHAPE = RevColV2Shape("test", width=24, num_heads=2, depth=1)
NUM_IMAGES = 4


def _gradients(model: nn.Module, images: torch.Tensor, noise: torch.Tensor, micro_batch: int) -> None:
    """Gradients of the mean loss, in micro-batches; only the last one is reduced over ranks."""
    starts = range(0, len(images), micro_batch)
    for start in starts:
        chosen = slice(start, start + micro_batch)
        quiet = model.no_sync() if start != starts[-1] and hasattr(model, "no_sync") else nullcontext()
        with quiet:
            prediction = model(images[chosen], noise[chosen])
            error = (prediction.pred_BND - patchify(images[chosen])).square().mean(-1)
            loss = (error * prediction.mask_BN).sum() / prediction.mask_BN.sum()
            (loss / len(starts)).backward()


def gradients_of(memory_mode: str, rank: int = 0, num_ranks: int = 1, micro_batch: int = 2) -> dict:
    """Gradients by name after one step, the same step whatever the number of ranks; float64."""
    torch.manual_seed(0)
    backbone = RevColV2(SHAPE, image_size=48, memory_mode=memory_mode)
    network = RevColV2Pretrainer(backbone, mask_ratio=0.6).double()
    images, noise = torch.randn(NUM_IMAGES, 3, 48, 48).double(), torch.rand(NUM_IMAGES, 9)
    share = NUM_IMAGES // num_ranks
    own = slice(rank * share, (rank + 1) * share)
    model = nn.parallel.DistributedDataParallel(network) if num_ranks > 1 else network
    _gradients(model, images[own], noise[own], micro_batch)
    return {name: p.grad for name, p in network.named_parameters() if p.requires_grad}


def _child(folder: Path, rank: int, memory_mode: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    torch.save(gradients_of(memory_mode, rank, 2, micro_batch=1), folder / f"gradients{rank}.pt")
    torch.distributed.destroy_process_group()


def gradients_of_two(folder: Path, memory_mode: str) -> list[dict]:
    """The same step by two processes, each in two micro-batches."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_child, args=(folder, rank, memory_mode)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"gradients{rank}.pt", weights_only=True) for rank in range(2)]
